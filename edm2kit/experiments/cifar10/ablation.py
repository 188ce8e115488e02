"""What makes a good guide: distances over guides and weights, and over both EMA lengths, as the paper shows them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from edm2kit.experiments.cifar10.measure import reference_file
from edm2kit.experiments.cifar10.settings import BATCH, GUIDED_SAMPLER, GUIDES, TUNED_ON
from edm2kit.experiments.documents import markdown_table
from edm2kit.experiments.pages.figures import heat_map
from edm2kit.experiments.tune.sweep import sweep
from edm2kit.snapshots.loading import open_weights
from edm2kit.torch_utils.files import provenance, write_json

ABLATION_RECORD = "ablation.json"  # in the folder of the study
# kind of degradation, name of GUIDES, training images (the latest snapshot before them)
DEGRADATIONS = (
    ("less training", "early", 65_536),
    ("less training", "early", 98_304),
    ("less training", "early", 180_224),
    ("less training", "early", 360_448),
    ("less training and less capacity", "small", 20_480),
    ("less training and less capacity", "small", 45_056),
    ("less capacity and half the training", "small", 393_216),
    ("less capacity", "small", 753_664),
)
WEIGHTS = (1.5, 2.0, 2.5, 3.0)
EMA_MAIN, EMA_GUIDE = (0.04, 0.05, 0.07, 0.1), (0.05, 0.07, 0.1, 0.14)
USUAL = {"ema_main": 0.05, "ema_guide": 0.07}  # those of the best pair of the search
GRID_GUIDE, GRID_WEIGHT = ("early", 180_224), 2.5


def ablate(out: Path, num: int, device: str, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """The rows of both ablations, `num` images each; kept in OUT/ablation.json, and features in OUT/ablation.

    A row is measured once; each is a combination of guide, its training images, both EMA lengths, and weight. Raises
    ValueError before it generates any if a guide has no snapshot at a time of DEGRADATIONS.
    """
    for run, age in dict.fromkeys((GUIDES[guide], age) for _, guide, age in DEGRADATIONS):
        times = {open_weights(path).header.nimg for path in (out / "runs" / run).glob("network-snapshot-*.safetensors")}
        if age not in times:
            raise ValueError(
                f"{out / 'runs' / run} has no snapshot at {age:,} images; its latest is at {max(times, default=0):,}. "
                f"Train it further: python scripts/cifar10_study.py train --only {run} --nimg {age}"
            )
    path = out / ABLATION_RECORD
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for setting in combinations():
        if any(row["setting"] == setting and row["num"] == num for row in rows):
            continue
        table = sweep(
            out / "runs" / "main",
            reference_file(out),
            [setting["weight"]],
            guides={setting["guide"]: out / "runs" / GUIDES[setting["guide"]]},
            ages=[setting["age"]],
            ema_main=[setting["ema_main"]],
            ema_guide=[setting["ema_guide"]],
            metrics=[TUNED_ON],
            options=" ".join(GUIDED_SAMPLER),
            num=num,
            batch=BATCH,
            device=device,
            cache=out / "ablation",
        )
        (row,) = table.rows
        made = provenance(device)
        rows.append({"setting": setting, "num": num, "metric": TUNED_ON, "value": row[TUNED_ON], **made})
        write_json(path, rows)
        report(f"{setting}: {row[TUNED_ON]}")
    return rows


def combinations() -> Iterator[dict[str, Any]]:
    """The settings of both ablations, each once."""
    seen = []
    for (_, guide, age), weight in product(DEGRADATIONS, WEIGHTS):
        seen.append({"guide": guide, "age": age, **USUAL, "weight": weight})
    guide, age = GRID_GUIDE
    for main, other in product(EMA_MAIN, EMA_GUIDE):
        setting = {"guide": guide, "age": age, "ema_main": main, "ema_guide": other, "weight": GRID_WEIGHT}
        if setting not in seen:
            seen.append(setting)
    yield from seen


def degradation_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The distance for every guide and weight; the best of each guide is bold."""
    if not rows:
        return "Not measured yet."
    lines = []
    for kind, guide, age in DEGRADATIONS:
        found = [_value(rows, {"guide": guide, "age": age, **USUAL, "weight": weight}) for weight in WEIGHTS]
        known = [value for value in found if value is not None]
        shown = ["" if value is None else f"{value:.1f}" for value in found]
        best = shown[found.index(min(known))] if known else ""
        cells = [f"**{text}**" if text and text == best else text for text in shown]
        lines.append([kind, guide, f"{age:,}", *cells])
    head = ["degradation", "guide", "training images", *(f"w = {weight:g}" for weight in WEIGHTS)]
    return markdown_table(head, lines, "llr" + "r" * len(WEIGHTS))


def ema_figure(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The distance over both EMA lengths as a heat map; None if none is known."""
    guide, age = GRID_GUIDE
    values = [
        [
            _value(rows, {"guide": guide, "age": age, "ema_main": main, "ema_guide": other, "weight": GRID_WEIGHT})
            for other in EMA_GUIDE
        ]
        for main in EMA_MAIN
    ]
    if all(value is None for line in values for value in line):
        return None
    names = [[f"{length:g}" for length in lengths] for lengths in (EMA_MAIN, EMA_GUIDE)]
    return heat_map(names[0], names[1], values, "EMA of the main network", "EMA of the guide")


def _value(rows: Sequence[Mapping[str, Any]], setting: Mapping[str, Any]) -> float | None:
    found = [row for row in rows if row["setting"] == setting]
    return max(found, key=lambda row: row["num"])["value"] if found else None
