"""One or several training runs as an HTML page: findings, losses, speed, samples over time, scores and settings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edm2kit.experiments.pages import figures, page
from edm2kit.experiments.runs.doctor import examine
from edm2kit.experiments.runs.expected_loss import DataMoments, filter_loss, filter_loss_between
from edm2kit.experiments.runs.folder import RunFolder
from edm2kit.metrics.card import read_card
from edm2kit.training.config import config_to_dict, option_of

_POINTS = 80  # of a curve; more status lines are averaged
_MAX_SHEETS = 24  # in the slider
_CURVE_LEVELS = 60
_Z = 2.0  # range of noise levels on the figure, in P_std

MEANING = (
    "EDM2's loss at noise level sigma is weight / exp(u) x squared error + u. The weight, (sigma\u00b2 + "
    "sigma_data\u00b2) / (sigma sigma_data)\u00b2, makes noise levels comparable: a network that knows nothing of "
    "the image, and only scales its input, has a weighted error of about 1 at every level. u is a number "
    "that the network learns for each noise level, the logarithm of its own weighted error; dividing by "
    "exp(u) gives every level the same weight in the gradients.",
    "With u fitted, the loss is 1 + ln(weighted error). Loss 1 means that nothing is learned, loss 0 a "
    "weighted error of 0.37, loss -1 one of 0.14. So a negative loss is a good sign and not a fault, and "
    "0 is not its lower end. A step of -0.1 is a tenth less error, wherever it happens.",
    "Losses compare between runs on the same data with the same P_mean, P_std and sigma_data. They do not "
    "say how good images look: most of the loss comes from detail, and a run can improve for the eye "
    "while its loss stands still. For that there are scores (calculate_metrics.py).",
)


@dataclass(frozen=True)
class Reported:
    """A run with what is known of its data; `why_no_data` says why nothing is, if `moments` is None."""

    name: str
    run: RunFolder
    moments: DataMoments | None
    why_no_data: str = ""


def write_report(path: Path, reported: Sequence[Reported], about: str) -> None:
    """Write the page of one run, or of several for comparison. Raises OSError if it cannot be written."""
    single = len(reported) == 1
    title = f"Training run {reported[0].name}" if single else f"{len(reported)} training runs compared"
    blocks = [_summary(reported)]
    blocks += _findings(reported)
    blocks += [page.heading("Loss"), *_over_time(reported, "loss", "loss", "Mean over all noise levels.")]
    blocks += _by_sigma(reported)
    if single:
        blocks += _bins_over_time(reported[0])
    blocks += _heldout(reported)
    blocks += [page.heading("What the loss means"), *(page.paragraph(text) for text in MEANING)]
    blocks += [page.heading("Samples over training time"), _sheets(reported)]
    blocks.append(page.heading("Training"))
    blocks += _over_time(reported, "lr", "learning rate", "The learning rate: ramp-up, then decay.")
    blocks += _over_time(reported, "gradient_norm", "gradient norm", "The norm of the gradients.", log_y=True)
    blocks += _over_time(reported, "images_per_sec", "images per second", "Speed, with the time for snapshots.")
    blocks += _scores(reported)
    blocks += _settings(reported)
    page.write_page(path, title, blocks, about)


def _summary(reported: Sequence[Reported]) -> str:
    head = ["run", "images so far", "of", "epochs", "loss", "images/s", "EMA", "snapshots"]
    rows = []
    for one in reported:
        run, identity = one.run, one.run.record.get("data_identity", {})
        num_images = identity.get("num_images")
        loss, speed = (run.series(name)[1] for name in ("loss", "images_per_sec"))
        rows.append(
            [
                one.name,
                f"{run.nimg:,}",
                f"{run.config.duration_nimg:,}",
                f"{run.nimg / num_images:,.1f}" if isinstance(num_images, int) and num_images else "unknown",
                f"{loss[-_recent(loss) :].mean():.3f}" if len(loss) else "none",
                f"{np.median(speed):,.1f}" if len(speed) else "none",
                ", ".join(f"{std:g}" for std in run.config.ema_stds),
                f"{len(run.headers)}",
            ]
        )
    return page.table(head, rows, "lrrrrrlr")


def _recent(values: np.ndarray) -> int:
    """How many of the last status lines make a mean."""
    return max(1, min(len(values), max(5, len(values) // 10)))


def _findings(reported: Sequence[Reported]) -> list[str]:
    blocks = [page.heading("Findings")]
    for one in reported:
        checks = examine(one.run, one.moments, one.why_no_data)
        found = [finding for check in checks for finding in check.findings]
        name = "" if len(reported) == 1 else f"{one.name}: "
        if found:
            rows = [[finding.what, finding.evidence, finding.advice] for finding in found]
            blocks += [page.paragraph(f"{name}{len(found)} found.")] if name else []
            blocks.append(page.table(["what", "evidence", "what to do"], rows))
        else:
            looked = [check.name for check in checks if not check.not_looked]
            blocks.append(page.paragraph(f"{name}Nothing wrong found. Looked at: {', '.join(looked)}."))
        skipped = [f"{check.name} ({check.not_looked})" for check in checks if check.not_looked]
        if skipped:
            blocks.append(page.paragraph(f"{name}Not looked at: {'; '.join(skipped)}."))
    return blocks


def _unit(reported: Sequence[Reported]) -> tuple[float, str]:
    most = max((one.run.nimg for one in reported), default=0)
    return (1e6, "training images (millions)") if most >= 1_000_000 else (1e3, "training images (thousands)")


def thinned(x: np.ndarray, y: np.ndarray, points: int = _POINTS) -> tuple[list[float], list[float]]:
    """A curve of at most `points` means of neighbouring values, without those that are not finite."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if not len(y):
        return [], []
    parts = min(points, len(y))
    return [float(p.mean()) for p in np.array_split(x, parts)], [float(p.mean()) for p in np.array_split(y, parts)]


def _over_time(reported: Sequence[Reported], key: str, title: str, caption: str, log_y: bool = False) -> list[str]:
    unit, x_title = _unit(reported)
    curves = []
    for one in reported:
        x, y = one.run.series(key)
        if log_y:
            x, y = x[y > 0], y[y > 0]
        xs, ys = thinned(x / unit, y)
        if xs:
            curves.append(figures.Curve(one.name, xs, ys, dots=len(xs) < 3))
    if not curves:
        return [page.paragraph(f"The log has no {title}.")]
    return [page.figure(figures.line_chart(curves, x_title, title, log_y=log_y), caption)]


def _level(low: float, high: float, P_mean: float, P_std: float) -> float:
    """The noise level in the middle of a range, in the distribution that training draws from."""
    z_low = (math.log(low) - P_mean) / P_std if low > 0 else -_Z
    z_high = (math.log(high) - P_mean) / P_std if math.isfinite(high) else _Z
    return math.exp(P_mean + P_std * (z_low + z_high) / 2)


def _by_sigma(reported: Sequence[Reported]) -> list[str]:
    curves = []
    for one in reported:
        config, xs, ys = one.run.config, [], []
        for key, low, high in one.run.noise_bins():
            _, values = one.run.series(key)
            values = values[-_recent(values) :] if len(values) else values
            if len(values) and np.isfinite(values).all():
                xs.append(_level(low, high, config.P_mean, config.P_std))
                ys.append(float(values.mean()))
        if xs:
            curves.append(figures.Curve(one.name, xs, ys))
    if not curves:
        return [page.paragraph("The log has no losses by noise level.")]
    known: dict[str, Reported] = {}
    for one in reported:
        known.setdefault(one.run.config.data, one)
    for one in known.values():
        if one.moments is None:
            continue
        config = one.run.config
        levels = np.exp(config.P_mean + config.P_std * np.linspace(-_Z, _Z, _CURVE_LEVELS))
        losses = [filter_loss(one.moments, float(level), config.sigma_data) for level in levels]
        name = "filter" if len(known) == 1 else f"filter, data of {one.name}"
        curves.append(figures.Curve(name, [float(level) for level in levels], losses, dots=False))
    chart = figures.line_chart(curves, "noise level sigma", "loss", log_x=True, references=[(1.0, "nothing learned")])
    caption = (
        "The mean loss of the last status lines within each range of noise levels. The filter is the best one that is "
        "linear and the same everywhere, from the power spectrum of the data: a trained network should be below it."
    )
    return [page.figure(chart, caption), *_table_by_sigma(reported)]


def _table_by_sigma(reported: Sequence[Reported]) -> list[str]:
    blocks = []
    for one in reported:
        config, rows = one.run.config, []
        for key, low, high in one.run.noise_bins():
            _, values = one.run.series(key)
            expected = "unknown"
            if one.moments is not None:
                mean = filter_loss_between(one.moments, low, high, config.P_mean, config.P_std, config.sigma_data)
                expected = f"{mean:.3f}"
            now = f"{values[-_recent(values) :].mean():.3f}" if len(values) else "none"
            span = f"{low:.3g} to {high:.3g}" if math.isfinite(high) else f"from {low:.3g}"
            rows.append([span, now, expected])
        if len(reported) > 1:
            blocks.append(page.paragraph(one.name))
        blocks.append(page.table(["sigma", "loss now", "filter"], rows, "lrr"))
    return blocks


def _bins_over_time(one: Reported) -> list[str]:
    unit, x_title = _unit([one])
    curves = []
    for key, low, high in one.run.noise_bins():
        x, y = one.run.series(key)
        xs, ys = thinned(x / unit, y)
        if xs:
            span = f"sigma {low:.3g} to {high:.3g}" if math.isfinite(high) else f"sigma from {low:.3g}"
            curves.append(figures.Curve(span, xs, ys, dots=False))
    if not curves:
        return []
    chart = figures.line_chart(curves, x_title, "loss")
    return [page.figure(chart, "The loss within each range of noise levels over training.")]


def _heldout(reported: Sequence[Reported]) -> list[str]:
    unit, x_title = _unit(reported)
    curves = []
    for one in reported:
        for side, name in (("heldout", "held-out images"), ("training", "training images")):
            points = [
                (line["nimg"] / unit, line[side]["loss"]) for line in one.run.heldout if "loss" in line.get(side, {})
            ]
            if points:
                prefix = "" if len(reported) == 1 else f"{one.name}, "
                x, y = zip(*points, strict=True)
                curves.append(figures.Curve(prefix + name, x, y))
    if not curves:
        return []
    caption = (
        "The longest EMA at each snapshot, without dropout and augmentation, with the same noise on both. A gap that "
        "grows is memorisation."
    )
    return [page.figure(figures.line_chart(curves, x_title, "loss"), caption)]


def _sheets(reported: Sequence[Reported]) -> str:
    groups = []
    for one in reported:
        found = one.run.sheets()
        if len(found) > _MAX_SHEETS:
            found = [found[round(k * (len(found) - 1) / (_MAX_SHEETS - 1))] for k in range(_MAX_SHEETS)]
        stops = []
        for thousands, path in found:
            try:
                with Image.open(path, formats=["PNG"]) as file:
                    stops.append(page.SliderStop(f"{thousands:,} thousand images", file.convert("RGB")))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                stops.append(
                    page.SliderStop(f"{thousands:,} thousand images", Image.new("RGB", (8, 8)), "damaged file")
                )
        if stops:
            groups.append(page.SliderGroup(one.name, None, stops, start=len(stops) - 1))
    if not groups:
        return page.paragraph("No sample sheets. Training writes one with each snapshot, unless it has --samples 0.")
    return page.weight_slider(groups, "Training", "Run")


def _scores(reported: Sequence[Reported]) -> list[str]:
    rows: list[list[str]] = []
    points: dict[tuple[str, str, Any], dict[float, float]] = {}
    for one in reported:
        for path, card in _cards(one.run):
            net = _network_of(card)
            std = net.get("ema_std") if isinstance(net.get("ema_std"), float) else None
            for metric, entry in card["results"].items():
                rows.append([one.name, path.name, metric, f"{entry['mean']:.4g}", "" if std is None else f"{std:.3f}"])
                if std is not None and isinstance(net.get("nimg"), int):
                    points.setdefault((one.name, metric, net.get("nimg")), {}).setdefault(std, entry["mean"])
    if not rows:
        path = reported[0].run.path
        line = f"python calculate_metrics.py gen --net {path} --ref REFERENCE.npz --record {path / 'card.json'}"
        text = "No score cards of this run's networks, neither in its folder nor in the one above it. To make one:"
        return [page.heading("Scores"), page.paragraph(text), page.command(line)]
    blocks = [page.heading("Scores"), page.table(["run", "card", "metric", "value", "EMA"], rows, "lllrr")]
    blocks.append(
        page.paragraph(
            "Score cards (--record) in the run's folder and the one above it whose network belongs to the run. Compare "
            "only values of the same metric, number of images and settings; calculate_metrics.py explain says what "
            "differs."
        )
    )
    for metric in dict.fromkeys(metric for _, metric, _ in points):
        sweeps = {key: sweep for key, sweep in points.items() if key[1] == metric and len(sweep) > 1}
        curves = [
            figures.Curve(f"{name}, {nimg:,} images", sorted(sweep), [sweep[std] for std in sorted(sweep)])
            for (name, _, nimg), sweep in sweeps.items()
        ]
        if curves:
            blocks.append(page.figure(figures.line_chart(curves, "EMA length", metric), f"EMA sweep by {metric}."))
    return blocks


def _network_of(card: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = card.get("settings")
    net = settings.get("net") if isinstance(settings, dict) else None
    return net if isinstance(net, dict) else {}


def _cards(run: RunFolder) -> list[tuple[Path, Mapping[str, Any]]]:
    """The score cards of this run's networks in its folder, and in the folder above."""
    found: list[tuple[Path, Mapping[str, Any]]] = []
    for folder in (run.path, run.path.resolve().parent):
        for path in sorted(folder.glob("*.json")):
            try:
                card = read_card(path)
            except (ValueError, OSError):
                continue  # another kind of file
            if run.record.get("run_id") is not None and _network_of(card).get("run_id") == run.record["run_id"]:
                found.append((path, card))
    return found


def _settings(reported: Sequence[Reported]) -> list[str]:
    values = [config_to_dict(one.run.config) for one in reported]
    rows: list[list[str]] = []
    same: list[list[str]] = []
    for key in values[0]:
        cells = [_text(value[key]) for value in values]
        row = [key, option_of(key) if option_of(key).startswith("--") else "", *cells]
        (same if len(set(cells)) == 1 and len(reported) > 1 else rows).append(row)
    head = ["setting", "option", *(one.name for one in reported)]
    blocks = [page.heading("Settings")]
    if len(reported) == 1:
        return [*blocks, page.table(head, rows)]
    if rows:
        blocks += [page.paragraph("Different:"), page.table(head, rows)]
    return [*blocks, page.paragraph("The same in all:"), page.table(head[:3], [row[:3] for row in same])]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return "" if value is None else str(value)
