"""What is wrong with a training run, as far as its folder shows, and what to do about it.

Each check looks at one thing. It returns what it saw, in numbers, and findings; or why it could not look. A check never
guesses: a statistic that is missing is named.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from edm2kit.ema.rebuild import plan_outputs
from edm2kit.experiments.runs.expected_loss import DataMoments, filter_loss_between
from edm2kit.experiments.runs.findings import Check, Finding
from edm2kit.experiments.runs.folder import RunFolder
from edm2kit.experiments.runs.log_checks import (
    after_rampup,
    check_gradient_norms,
    check_log,
    check_loss,
    check_memory,
    check_nonfinite_gradients,
    check_speed,
    too_few,
)
from edm2kit.snapshots.loading import open_weights
from edm2kit.training.learning_rate import learning_rate
from edm2kit.training.log import schedule_warnings

_MARGIN = 0.05  # of the loss, above the expected curve
_GAP = 0.02  # of the loss, between training and held-out images
_LOW_RATE = 0.1  # of the reference rate
_POOR_FIT = 0.1  # of rebuilt EMA profiles, as edm2kit-phema warns
_SIGMA_DATA = 2.0  # factor between sigma_data and the data's standard deviation


def examine(run: RunFolder, moments: DataMoments | None, why_no_data: str = "") -> list[Check]:
    """Every check that needs no network. `moments` are those of the training set; without, `why_no_data` says why."""
    logged: list[Callable[[RunFolder], Check]] = [
        check_nonfinite_gradients, check_gradient_norms, check_loss, check_speed, check_memory,
    ]  # fmt: skip
    checks = [check_log(run)]
    checks += [check(run) for check in logged]
    checks.append(check_noise_levels(run, moments, why_no_data))
    checks.append(check_data(run, moments, why_no_data))
    checks += [check_learning_rate(run), check_schedule(run), check_heldout(run), check_snapshots(run)]
    return checks


def check_noise_levels(run: RunFolder, moments: DataMoments | None, why_no_data: str) -> Check:
    """The loss within each range of noise levels against the filter's: what a network must reach at least."""
    name = "loss by noise level"
    if run.is_distillation:
        return Check(name, not_looked="the run distils a denoiser, whose loss this curve is not made for")
    if moments is None:
        return Check(name, not_looked=f"the expected curve needs the data: {why_no_data}")
    config, above, rows, missing = run.config, [], [], []
    for key, low, high in run.noise_bins():
        _, losses = after_rampup(run, key)
        recent = losses[-max(5, len(losses) // 10) :]
        if len(recent) < 5:
            missing.append(_level(low, high))
            continue
        mean = float(recent.mean())
        error = float(recent.std(ddof=1)) / len(recent) ** 0.5
        expected = filter_loss_between(moments, low, high, config.P_mean, config.P_std, config.sigma_data)
        rows.append(f"{_level(low, high)}: {mean:.3f} \u00b1 {error:.3f}, filter {expected:.3f}")
        if not mean <= expected + _MARGIN + 3 * error:
            above.append((low, high, mean, expected))
    if not rows:
        return Check(name, not_looked=too_few(run, "loss/sigma_...", 0))
    seen = "the loss now, which should be below that of a linear filter that only knows the images' power spectrum"
    if missing:
        seen += f"; too few images to say at {', '.join(missing)}"
    if not above:
        return Check(name, seen, rows=rows)
    if 2 * run.nimg < config.duration_nimg:
        return Check(name, f"{seen}. Not judged before half of the run; look again then", rows=rows)
    worst = max(above, key=lambda one: one[2] - one[3])
    evidence = f"{len(above)} of {len(rows)} ranges; the worst, {_level(worst[0], worst[1])}, has loss {worst[2]:.2f}"
    evidence += f", the filter {worst[3]:.2f}"
    what = "At some noise levels the network is worse than a linear filter."
    if len(above) == len(rows):
        what = "The network is worse than a linear filter at every noise level."
    advice = _advice_on_levels([(low, high) for low, high, _, _ in above], is_everywhere=len(above) == len(rows))
    return Check(name, seen, [Finding(what, evidence, advice)], rows=rows)


def _advice_on_levels(poor: list[tuple[float, float]], is_everywhere: bool) -> str:
    """What to do about the ranges of noise levels, in rising order, in which a network is worse than the filter."""
    if is_everywhere:
        return (
            "It has hardly learned anything. Look at the sample sheets and the data, at the learning rate and the "
            "length of the ramp-up; if all are right, train longer or with more --channels"
        )
    if poor[-1][1] == math.inf and poor[0][0] > 0:
        return (
            "High noise levels are about overall shape and colour: give them more training (a higher --P_mean or "
            "--P_std), or train longer"
        )
    return (
        "Train longer, or with more --channels; if only low noise levels are affected, give them more training (a "
        "lower --P_mean, a larger --P_std)"
    )


def check_data(run: RunFolder, moments: DataMoments | None, why_no_data: str) -> Check:
    """Whether sigma_data fits the data."""
    name = "standard deviation of the data"
    if moments is None:
        return Check(name, not_looked=why_no_data)
    std, assumed = moments.mean_square**0.5, run.config.sigma_data
    seen = f"{std:.3f} over {moments.num_images} images; sigma_data is {assumed:g}"
    if assumed / _SIGMA_DATA <= std <= assumed * _SIGMA_DATA:
        return Check(name, seen)
    finding = Finding(
        "sigma_data does not fit the data.",
        f"the data have {std:.3f}, sigma_data is {assumed:g}",
        "Look whether the images are all dark, all alike or latents of another VAE; if they are right, start again "
        f"with sigma_data: {std:.2g} in the configuration",
    )
    return Check(name, seen, [finding])


def check_learning_rate(run: RunFolder) -> Check:
    """Whether the learning rate is what the configuration says, and has not decayed too early."""
    name, config = "learning rate", run.config
    _, rates = run.series("lr")
    if not len(rates):
        return Check(name, not_looked="the log has no lr")
    seen = f"{rates[-1]:.3g} now, {rates.max():.3g} at most; --lr is {config.ref_lr:g}"
    planned = learning_rate(
        config.duration_nimg, config.batch_size, config.ref_lr, config.ref_batches, config.rampup_nimg
    )
    if planned < _LOW_RATE * config.ref_lr and config.rampup_nimg < config.duration_nimg:
        steps = config.duration_nimg // config.batch_size
        finding = Finding(
            "The learning rate decays too early for a run of this length.",
            f"it ends at {planned:.2g}, {planned / config.ref_lr:.0%} of --lr; the decay begins after "
            f"{config.ref_batches:g} of {steps:,} steps",
            f"Start again with --decay {max(1, steps // 15)}: EDM2's networks end at about a quarter of --lr",
        )
        return Check(name, seen, [finding])
    return Check(name, seen)


def check_schedule(run: RunFolder) -> Check:
    """What a dry run would have warned of: epochs, ramp-up, snapshots."""
    name = "schedule"
    num_images = run.record.get("data_identity", {}).get("num_images")
    if not isinstance(num_images, int) or num_images < 1:
        return Check(name, not_looked="run.json does not say how many images the data set has")
    num_images -= run.record["data_identity"].get("holdout", {}).get("num_images", 0)
    findings = []
    for warning in schedule_warnings(run.config, num_images):
        what, _, advice = warning.partition(" Use ") if " Use " in warning else warning.partition("; use ")
        what = what[0].upper() + what[1:].rstrip(".") + "."
        findings.append(Finding(what, "config.yaml", f"Use {advice}" if advice else "Give --snapshot an interval"))
    epochs = run.nimg / num_images
    return Check(name, f"{epochs:,.1f} epochs of {num_images:,} images so far", findings)


def check_heldout(run: RunFolder) -> Check:
    """The gap between training and held-out images at each noise level, and its course."""
    name = "training and held-out images"
    records = run.heldout
    if not records:
        how = "training measures it with --holdout 0.05; for this run, `python train.py doctor "
        how += f"{run.path} --heldout PATH` does so on images that it did not see"
        return Check(name, not_looked=f"the run has no heldout.jsonl: {how}")
    last, findings, rows, wide = records[-1], [], [], []
    for key, low, high in [("loss", 0.0, float("inf")), *run.noise_bins()]:
        if key not in last["gap_error"]:
            continue
        gap, error = last["heldout"][key] - last["training"][key], last["gap_error"][key]
        rows.append(f"{'all' if key == 'loss' else _level(low, high)}: {gap:+.3f} \u00b1 {error:.3f}")
        if gap > max(_GAP, 3 * error):
            wide.append((key, low, high, gap, error))
    if not rows:
        return Check(name, not_looked="heldout.jsonl has too few images for a standard error")
    seen = f"held-out minus training loss at {last['nimg']:,} images, on {last['images']} images of each"
    if wide:
        key, low, high, gap, error = max(wide, key=lambda one: one[3] / one[4])
        where = "over all noise levels" if key == "loss" else f"at {_level(low, high)}"
        findings.append(
            Finding(
                "The network knows its training images better than others: it overfits.",
                f"held-out loss {gap:.3f} \u00b1 {error:.3f} above the loss on training images {where}",
                "Use more images, --augment 0.12, --dropout 0.13, --flip true if mirror images are right, fewer "
                "--channels, or an earlier snapshot",
            )
        )
    course = [one["heldout"]["loss"] for one in records]
    best = int(np.argmin(course))
    if course[-1] - course[best] > _GAP:
        findings.append(
            Finding(
                "The loss on held-out images rises.",
                f"{course[-1]:.3f} now, {course[best]:.3f} at {records[best]['nimg']:,} images",
                f"Use the snapshots of {records[best]['nimg']:,} images, and train no longer than that",
            )
        )
    return Check(name, seen, findings, rows=rows)


def check_snapshots(run: RunFolder) -> Check:
    """Whether snapshots are complete, of one run, and enough to rebuild other EMA lengths."""
    name, findings = "snapshots", []
    for path, reason in run.damaged.items():
        findings.append(
            Finding(
                "A snapshot cannot be opened.",
                reason,
                f"Delete {path.name}: other snapshots can rebuild an EMA without it",
            )
        )
    own = run.record.get("run_id")
    strangers = [path.name for path, header in run.headers.items() if own is not None and header.run_id != own]
    if strangers:
        findings.append(
            Finding(
                "Snapshots of another run are in this folder.",
                f"{len(strangers)}, such as {strangers[0]}",
                "Move them elsewhere: rebuilding EMAs mixes only snapshots of one run, and refuses these",
            )
        )
    mine = [path for path, header in run.headers.items() if path.name not in strangers]
    times = sorted({run.headers[path].nimg for path in mine})
    lengths = sorted({run.headers[path].ema_std or 0.0 for path in mine})
    if not mine:
        due = run.config.snapshot_every_nimg
        if due and run.nimg >= 2 * due:
            evidence = f"the first was due at {due:,} images, the log is at {run.nimg:,}"
            findings.append(Finding("There are no snapshots.", evidence, "Look whether they were moved or deleted"))
        return Check(name, "none", findings)
    seen = f"{len(mine)} at {len(times)} times up to {times[-1]:,} images, EMA {', '.join(f'{s:g}' for s in lengths)}"
    if len(times) < 2 or strangers:
        return Check(name, f"{seen}; other EMA lengths can be rebuilt once there are two times", findings)
    between = (min(lengths) * max(lengths)) ** 0.5
    [output] = plan_outputs([open_weights(path) for path in mine], [between])
    seen += f"; EMA {between:.3f} can be rebuilt with an error of {output.fit.error:.1%}"
    if output.fit.error > _POOR_FIT:
        findings.append(
            Finding(
                "Other EMA lengths cannot be rebuilt accurately.",
                f"error {output.fit.error:.0%} for EMA {between:.3f}",
                f"Save more snapshots, for example with --snapshot {max(1000, run.config.duration_nimg // 16)}; it may "
                "change when the run is resumed",
            )
        )
    return Check(name, seen, findings)


def _level(low: float, high: float) -> str:
    """A range of noise levels in words."""
    if high == float("inf"):
        return f"sigma from {low:.3g}"
    return f"sigma {low:.3g} to {high:.3g}" if low > 0 else f"sigma below {high:.3g}"


def report_lines(checks: Sequence[Check]) -> list[str]:
    """The checks as text: findings first, then what was looked at, then what was not."""
    findings = [finding for check in checks for finding in check.findings]
    lines = []
    if findings:
        lines.append(f"{len(findings)} finding{'s' if len(findings) > 1 else ''}:")
    else:
        lines.append("Nothing wrong found.")
    for number, finding in enumerate(findings, 1):
        lines += ["", f"{number}. {finding.what}", f"   Evidence: {finding.evidence}.", f"   To do: {finding.advice}."]
    lines += ["", "Looked at:"]
    for check in checks:
        if not check.not_looked:
            lines += [f"  {check.name}: {check.seen}", *(f"    {row}" for row in check.rows)]
    skipped = [check for check in checks if check.not_looked]
    if skipped:
        lines += ["", "Not looked at:"]
        lines += [f"  {check.name}: {check.not_looked}" for check in skipped]
    return lines
