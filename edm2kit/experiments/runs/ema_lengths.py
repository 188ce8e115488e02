"""Which EMA length is best at the end of a run: EMAs are rebuilt in memory and measured on held-out images."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from edm2kit.cli.generation import Request, load_for_sampling, prepare
from edm2kit.data.archive import spread_evenly
from edm2kit.data.dataset import Source
from edm2kit.ema.rebuild import plan_outputs, reconstruct
from edm2kit.experiments.runs.findings import EMA_LENGTH, Check, Finding
from edm2kit.experiments.runs.folder import RunFolder
from edm2kit.experiments.runs.snapshot_losses import BATCH, generated_images
from edm2kit.metrics.scoring import make_scorer
from edm2kit.models.preconditioning import PRECISIONS
from edm2kit.snapshots.loading import Weights, load_weights, open_weights
from edm2kit.training.heldout_loss import HeldoutLoss

LENGTHS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2)
_POOR_FIT = 0.1
_BETTER = 0.005  # of the loss
_BETTER_SCORE = 0.05  # of the score; what seeds alone change is a few percent


def rebuilt(run: RunFolder) -> Iterator[tuple[float, Weights]]:
    """Each of LENGTHS, and those that training tracked, at the latest time; lengths with a poor fit are left out."""
    weights = [open_weights(path) for path in run.headers]
    for std in sorted({*LENGTHS, *run.config.ema_stds}):
        [output] = plan_outputs(weights, [std])
        if output.fit.error <= _POOR_FIT:
            state, header = reconstruct(weights, std)
            yield std, Weights(f"EMA {std:g}", header, state)


def check_by_loss(run: RunFolder, training: Source, heldout: Source | None, device: torch.device, num: int) -> Check:
    """The loss of each length on held-out images, or on training images if there are none."""
    missing = _why_not(run)
    if missing:
        return Check(EMA_LENGTH, not_looked=missing)
    source, what = (training, "training images (there are no held-out ones, which are better for this)")
    if heldout is not None:
        source, what = heldout, "held-out images"
    numbers = spread_evenly(len(source), num)
    losses: dict[float, np.ndarray] = {}
    for std, weights in rebuilt(run):
        snapshot = load_weights(weights, device, PRECISIONS[run.config.precision])
        measure = HeldoutLoss(run.config, snapshot.encoder, training, source, BATCH, device, None, num, True)
        losses[std], _ = measure.losses(snapshot.net, source, numbers)
    best = min(losses, key=lambda std: float(losses[std].mean()))
    rows = []
    for std, values in losses.items():
        worse, error = _difference(values, losses[best])
        beside = "best" if std == best else f"{worse:.4f} \u00b1 {error:.4f} above the best"
        rows.append(f"EMA {std:.3f}: {values.mean():.4f}, {beside}")
    tracked = min((std for std in losses if std in run.config.ema_stds), key=lambda std: float(losses[std].mean()))
    worse, error = _difference(losses[tracked], losses[best])
    seen = f"loss at the latest snapshot on {len(numbers)} {what}"
    if worse <= max(_BETTER, 3 * error):
        return Check(EMA_LENGTH, seen, rows=rows)
    finding = Finding(
        "Another EMA length has a lower loss than those that training stored.",
        f"{best:g} is {worse:.4f} \u00b1 {error:.4f} below {tracked:g}",
        f"Rebuild it: `python reconstruct_phema.py --indir {run.path} --outdir {run.path / 'ema'} --outstd {best:g}`. "
        "For images, compare scores: the best length by a score may be another",
    )
    return Check(EMA_LENGTH, seen, [finding], rows=rows)


def check_by_score(run: RunFolder, reference: Path, device: torch.device, num: int) -> Check:
    """The distance of `num` generated images of each length from a reference, by its first detector."""
    name = f"{EMA_LENGTH} by score"
    missing = _why_not(run)
    if missing:
        return Check(name, not_looked=missing)
    scorer = make_scorer(reference, device)
    metric = scorer.detectors[0].name
    scorer = dataclasses.replace(scorer, detectors=scorer.detectors[:1])
    request = Request(str(next(iter(run.headers))), precision=run.config.precision)
    scores: dict[float, float] = {}
    for std, weights in rebuilt(run):
        snapshot = load_for_sampling(weights, device, run.config.precision)
        engine = prepare(request, device, loaded={"net": snapshot}).engine
        scores[std] = scorer.score(generated_images(engine, num, f"images of EMA {std:g}"))[metric]
    best = min(scores, key=scores.__getitem__)
    rows = [f"EMA {std:.3f}: {score:.2f}{', best' if std == best else ''}" for std, score in scores.items()]
    tracked = min((std for std in scores if std in run.config.ema_stds), key=scores.__getitem__)
    seen = f"{metric} of {num} images each, the same seeds"
    if scores[best] >= (1 - _BETTER_SCORE) * scores[tracked]:
        return Check(name, seen, rows=rows)
    finding = Finding(
        "Another EMA length scores better than those that training stored.",
        f"{metric} {scores[best]:.2f} with {best:g}, {scores[tracked]:.2f} with {tracked:g}",
        f"Rebuild it: `python reconstruct_phema.py --indir {run.path} --outdir {run.path / 'ema'} --outstd {best:g}`",
    )
    return Check(name, seen, [finding], rows=rows)


def _why_not(run: RunFolder) -> str:
    times = {header.nimg for header in run.headers.values()}
    if len(times) < 2:
        return f"snapshots at two times are needed to rebuild EMAs; there are {len(times)}"
    return ""


def _difference(values: np.ndarray, best: np.ndarray) -> tuple[float, float]:
    """The mean difference of losses of the same images with the same noise, and its standard error."""
    difference = values - best
    return float(difference.mean()), float(difference.std(ddof=1)) / len(difference) ** 0.5
