"""Checks of what training logs: gradients, the loss over time, speed and memory."""

import statistics

import numpy as np

from edm2kit.experiments.runs.findings import Check, Finding
from edm2kit.experiments.runs.folder import RunFolder

FEW_LINES = 8  # status lines, below which trends are noise
_SPIKE, _SPIKES = 10.0, 3  # times the median of the neighbours, and how often
_GROWTH = 5.0  # of gradient norms, from the second quarter of the log to the last
_OFTEN = 0.1  # share of the later status lines with non-finite gradients; single ones are usual with fp16
_RISE = 0.1  # of the loss: a tenth more error
_STILL_FALLING = 0.05  # of the loss, over the last quarter of a finished run
_SLOW = 0.5  # of the best quarter's images/s
_LEAK, _LEAK_GB = 1.5, 1.0


def check_log(run: RunFolder) -> Check:
    """Whether there is a log, and whether it is complete."""
    name, findings = "log", []
    if not run.stats:
        return Check(name, not_looked="stats.jsonl is missing or empty: nothing about losses, gradients and speed")
    if run.damaged_lines:
        findings.append(
            Finding(
                "Lines of the log cannot be read.",
                f"{run.damaged_lines} damaged lines in stats.jsonl or heldout.jsonl",
                "Check the disk. Resuming the run removes them; the statistics of those times are lost",
            )
        )
    seen = f"{len(run.stats)} status lines up to {run.nimg:,} of {run.config.duration_nimg:,} images"
    return Check(name, seen, findings)


def check_nonfinite_gradients(run: RunFolder) -> Check:
    """NaN and infinite gradients, which training sets to 0."""
    name = "non-finite gradients"
    _, counts = run.series("nonfinite_gradients")
    if not len(counts):
        return Check(name, not_looked="the log has no nonfinite_gradients")
    with_any = counts > 0
    later = with_any[len(with_any) // 2 :]
    seen = f"none in {len(counts)} status lines"
    if with_any.any():
        seen = f"{counts.sum():,.0f} set to 0, in {with_any.sum()} of {len(counts)} status lines"
    if later.mean() <= _OFTEN and not (len(counts) < FEW_LINES and later.all()):
        return Check(name, seen)
    if run.config.precision == "fp16":
        advice = f"Overflow in fp16: lower --ls (it is {run.config.loss_scaling:g}), or use --precision bf16 or fp32"
    else:
        advice = (
            "Check the data (`python scripts/dataset_tool.py check --source ...`) for images that are not finite, then "
            "use a lower --lr"
        ).replace("...", run.config.data)
    evidence = f"{later.mean():.0%} of the later status lines have some, {counts[with_any].mean():,.0f} on average"
    return Check(name, seen, [Finding("Gradients are often not finite and are set to 0.", evidence, advice)])


def check_gradient_norms(run: RunFolder) -> Check:
    """Spikes, growth and vanishing of the norm of the gradients, after the ramp-up."""
    name = "gradient norms"
    x, norms = after_rampup(run, "gradient_norm")
    if len(norms) < FEW_LINES:
        return Check(name, not_looked=too_few(run, "gradient_norm", len(norms)))
    findings = []
    quarter = max(len(norms) // 4, 1)
    typical = np.array([statistics.median(norms[max(0, k - 4) : k + 5]) for k in range(len(norms))])
    spikes = norms > _SPIKE * np.maximum(typical, 1e-30)
    if (norms[-quarter:] == 0).any():
        findings.append(
            Finding(
                "Gradients are zero: the network no longer learns.",
                f"{(norms == 0).sum()} of {len(norms)} status lines with norm 0",
                "With --precision fp16, raise --ls; otherwise look for non-finite gradients above, which become zeros",
            )
        )
    elif spikes.sum() >= _SPIKES:
        worst = int(np.argmax(norms / np.maximum(typical, 1e-30)))
        findings.append(
            Finding(
                "Gradient norms have spikes.",
                f"{spikes.sum()} status lines above {_SPIKE:g} times their neighbours; the largest, "
                f"{norms[worst]:,.0f} instead of about {typical[worst]:,.0f}, at {x[worst]:,.0f} images",
                f"Use a lower --lr (it is {run.config.ref_lr:g}) or a larger --batch, and check the data for broken "
                "images",
            )
        )
    early, late = (float(np.median(part)) for part in (norms[quarter : 2 * quarter], norms[-quarter:]))
    if early > 0 and late > _GROWTH * early:
        findings.append(
            Finding(
                "Gradient norms grow.",
                f"median {_norm(early)} in the second quarter of the log, {_norm(late)} in the last",
                f"The run is becoming unstable: start again with a lower --lr (it is {run.config.ref_lr:g}) or an "
                "earlier decay (--decay)",
            )
        )
    return Check(name, f"median {_norm(float(np.median(norms)))}, largest {_norm(float(norms.max()))}", findings)


def _norm(value: float) -> str:
    """The norm of gradients, with three digits or as a whole number; never as 2.15e+03."""
    return f"{value:,.0f}" if 100 <= value < 1e9 else f"{value:.3g}"


def check_loss(run: RunFolder) -> Check:
    """Whether the loss is finite, has not risen, and has had the time to fall."""
    name = "loss over time"
    x, losses = run.series("loss")
    if len(losses) and not np.isfinite(losses).all():
        where = x[~np.isfinite(losses)][0]
        finding = Finding(
            "The loss is not finite: the run has diverged.",
            f"first at {where:,.0f} images, {(~np.isfinite(losses)).sum()} status lines in all",
            "Start again with a lower --lr, or --precision fp32, after checking the data "
            f"(`python scripts/dataset_tool.py check --source {run.config.data}`)",
        )
        return Check(name, f"not finite from {where:,.0f} images on", [finding])
    x, losses = after_rampup(run, "loss")
    if len(losses) < FEW_LINES:
        return Check(name, not_looked=too_few(run, "loss", len(losses)))
    parts = np.array_split(losses, min(10, len(losses) // 2))
    means = np.array([part.mean() for part in parts])
    error = float(parts[-1].std(ddof=1)) / len(parts[-1]) ** 0.5
    last, lowest = float(means[-1]), int(np.argmin(means))
    seen = f"{losses[0]:.3f} after the ramp-up, {last:.3f} now"
    if last - means[lowest] > max(_RISE, 4 * error):
        finding = Finding(
            "The loss has risen.",
            f"{last:.3f} now, {means[lowest]:.3f} around {np.array_split(x, len(parts))[lowest].mean():,.0f} images",
            f"Go back to snapshots of that time, and start again with a lower --lr (it is {run.config.ref_lr:g})",
        )
        return Check(name, seen, [finding])
    quarter = max(len(losses) // 4, 2)
    fell = float(losses[-quarter : -quarter // 2].mean() - losses[-quarter // 2 :].mean())
    if run.nimg >= run.config.duration_nimg and fell > _STILL_FALLING:
        finding = Finding(
            "The run ended while the loss was falling.",
            f"it fell by {fell:.3f} within the last quarter of the log",
            f"Train longer: the same command with --duration {2 * run.config.duration_nimg} resumes the run",
        )
        return Check(name, seen, [finding])
    return Check(name, seen)


def check_speed(run: RunFolder) -> Check:
    """Whether training has become slower."""
    name = "images per second"
    _, rates = run.series("images_per_sec")
    if len(rates) < FEW_LINES:
        return Check(name, not_looked=too_few(run, "images_per_sec", len(rates)))
    medians = [float(np.median(part)) for part in np.array_split(rates, 4)]
    seen = f"median {np.median(rates):,.1f}, by quarter of the log {', '.join(f'{one:,.1f}' for one in medians)}"
    if medians[-1] >= _SLOW * max(medians):
        return Check(name, seen)
    finding = Finding(
        "Training has become slower.",
        f"{medians[-1]:,.1f} images/s in the last quarter of the log, {max(medians):,.1f} in the best",
        "Look for other programs on the machine, a hot GPU and a slow disk; more --workers help if reading is slow",
    )
    return Check(name, seen, [finding])


def check_memory(run: RunFolder) -> Check:
    """Whether the memory of the process grows."""
    name = "memory"
    _, peaks = run.series("cpu_peak_gb")
    if len(peaks) < FEW_LINES:
        return Check(name, not_looked=too_few(run, "cpu_peak_gb", len(peaks)))
    early, late = float(peaks[len(peaks) // 4]), float(peaks[-1])
    seen = f"{late:.2f} GB at most, {early:.2f} GB after a quarter of the log"
    if late <= max(_LEAK * early, early + _LEAK_GB):
        return Check(name, seen)
    finding = Finding(
        "The memory of the training process grows.",
        f"{early:.2f} GB after a quarter of the log, {late:.2f} GB now",
        "Resume the run before the memory is full (it continues bit for bit), and report it with the version of torch",
    )
    return Check(name, seen, [finding])


def after_rampup(run: RunFolder, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A logged quantity after the ramp-up of the learning rate, if the run is beyond it."""
    x, y = run.series(name)
    after = x > run.config.rampup_nimg
    return (x[after], y[after]) if after.sum() >= FEW_LINES else (x, y)


def too_few(run: RunFolder, name: str, count: int) -> str:
    if run.stats and not any(key.startswith(name.rstrip(".")) for line in run.stats for key in line):
        return f"the log has no {name}"
    return f"{count} status lines with {name} are too few; {FEW_LINES} are needed"
