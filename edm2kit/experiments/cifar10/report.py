"""What the study publishes: records, figures, sheets, the table of the README, and the networks in the package."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from edm2kit.cli.generation import prepare
from edm2kit.cli.generation_options import parse_request
from edm2kit.cli.presets import BOX
from edm2kit.conditions import ALL_CLASSES
from edm2kit.experiments.cifar10.measure import describe, read_best, setting_from_json
from edm2kit.experiments.cifar10.networks import ema_file, words
from edm2kit.experiments.cifar10.settings import BATCH, METHODS, RUNS, SCORE_SEEDS, SHEET_SEEDS, Setting
from edm2kit.experiments.compare_guidance.sheet import Strip, draw_sheet
from edm2kit.experiments.demo.report import picture
from edm2kit.experiments.documents import checkout, markdown_table
from edm2kit.experiments.pages.figures import Curve, line_chart, standalone
from edm2kit.models.encoders import to_image
from edm2kit.snapshots.file_format import read_header, save_snapshot
from edm2kit.snapshots.loading import open_weights
from edm2kit.torch_utils.files import atomic_write, sha256_of, write_json

FOLDER = Path("experiments", "cifar10")
RECORD_NAME, PICTURE_NAME, SHEET_NAME, WEIGHTS_NAME = "study.json", "first.png", "sheet.png", "weights.svg"
COMMAND = "python scripts/cifar10_study.py"
_COLUMNS = {
    "fd_lite0": "fd_lite0",
    "fd_lite0.fd_infinity": "fd_infinity",
    "fd_lite2": "fd_lite2",
    "fd_lite0.kid": "kid",
    "fd_lite0.precision": "precision",
    "fd_lite0.recall": "recall",
    "fd_lite0.coverage": "coverage",
}
_TITLES = {"real": "held-out photos", **{name: method.title for name, method in METHODS.items()}}
_WEIGHTS = (1.0, 1.5, 2.0, 3.0)  # of the sheet, from top to bottom


def publish(out: Path, box: bool, report: Callable[[str], None]) -> None:
    """Write the record, figures and sheets of the study in `out` to the checkout; with `box`, the networks as well."""
    folder = checkout() / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    best = read_best(out)
    record = study_record(out)
    if box:
        write_box(out, record, report)
    write_json(folder / RECORD_NAME, record)
    figure = weight_figure(record)
    if figure is not None:
        with atomic_write(folder / WEIGHTS_NAME, "w") as file:
            file.write(standalone(figure))
    for name, image in (
        (PICTURE_NAME, _first_picture(out, best, record)),
        (SHEET_NAME, _sheet(out, best)),
    ):
        with atomic_write(folder / name) as file:
            image.save(file, "PNG", optimize=True)
    report(document_parts(record)["scores"])
    report(f"Wrote {folder}; now run: python scripts/write_documents.py")


# the record


def study_record(out: Path) -> dict[str, Any]:
    """Everything that was measured, with what made it: runs, settings tried, best settings, scores."""
    best, runs = read_best(out), {}
    for name in RUNS:
        folder = out / "runs" / name
        if not folder.exists():
            continue
        status = [json.loads(line) for line in (folder / "stats.jsonl").read_text(encoding="utf-8").splitlines()]
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        runs[name] = {"config": {**config, "data": Path(config["data"]).name}, "last_status": status[-1]}
    return {
        "command": COMMAND,
        "runs": runs,
        "trials": _read_list(out / "trials.json"),
        "best": {name: json.loads((out / "best.json").read_text(encoding="utf-8"))[name] for name in best},
        "points": _read_list(out / "scores.json"),
    }


def _read_list(path: Path) -> list[Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def current_points(record: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The points of each row of the table: those of the best settings, with the most images."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for name in _TITLES:
        found = [point for point in record["points"] if point["key"]["method"] == name]
        if name != "real":
            found = [point for point in found if point["key"]["setting"] == record["best"].get(name)]
        if found:
            latest = found[-1]["key"]["files"]
            found = [point for point in found if point["key"]["files"] == latest]
            most = max(point["key"]["num"] for point in found)
            found = [p for p in found if p["key"]["num"] in (most, most // len(SCORE_SEEDS))]
            rows[name] = found
    return rows


def first_parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated part of the README."""
    return {"cifar10": _short_table(current_points(record))}


def document_parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of the study's page."""
    return {"scores": _table(current_points(record)), "settings": _settings(record)}


def _short_table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    if "none" not in rows:
        return "The scores of these networks are not measured yet."
    lines, count = [], rows["none"][-1]["key"]["num"]
    for name in ("real", "none", "cfg-interval", "cfg", "autoguidance", "autoguidance-interval"):
        if name in rows and rows[name][-1]["key"]["num"] == count:
            together = rows[name][-1]
            values = [_with_interval(together, metric) for metric in ("fd_lite0", "fd_lite2")]
            lines.append([_TITLES[name], *values, f"{together['results']['fd_lite0.coverage']:.2f}"])
    return markdown_table([f"{count:,} images each", "fd_lite0", "fd_lite2", "coverage"], lines, "lrrr")


def _table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = []
    for name, points in rows.items():
        for point in sorted(points, key=lambda one: one["key"]["images"] != "all"):
            title = _TITLES[name] if point["key"]["images"] == "all" else ""
            images = f"{point['key']['num']:,}" if point["key"]["images"] == "all" else point["key"]["images"]
            lines.append([title, images, *(_with_interval(point, metric) for metric in _COLUMNS)])
    return markdown_table(["method", "images", *_COLUMNS.values()], lines, "ll" + "r" * len(_COLUMNS))


def _with_interval(point: Mapping[str, Any], metric: str) -> str:
    value, bounds = point["results"].get(metric), point["intervals"].get(metric)
    if value is None:
        return ""
    digits = ".1f" if metric.rpartition(".")[2].startswith("fd_") else ".3g"
    if bounds is None or point["key"]["images"] != "all":
        return format(value, digits)
    low, high = bounds
    return f"{value:{digits}} ({low:{digits}} to {high:{digits}})"


def _settings(record: Mapping[str, Any]) -> str:
    lines = []
    for name, values in record["best"].items():
        setting = setting_from_json(values)
        tried = [trial for trial in record["trials"] if trial["key"]["setting"] == values]
        value = f"{tried[-1]['value']:.1f}" if tried else ""
        lines.append([METHODS[name].title, describe(setting), value])
    return markdown_table(["method", "best setting", "fd_lite0 in the search"], lines, "llr")


# pictures


def weight_figure(record: Mapping[str, Any]) -> str | None:
    """fd_lite0 in the search against the guidance weight, all else at its best value, as SVG; None before a search."""
    curves = []
    alone = None
    for name, values in record["best"].items():
        same = {key: value for key, value in values.items() if key != "weight"}
        found = {}
        for trial in record["trials"]:
            setting = trial["key"]["setting"]
            if {key: value for key, value in setting.items() if key != "weight"} == same:
                found[setting["weight"]] = trial["value"]
        if name == "none":
            alone = next(iter(found.values()), None)
        elif len(found) > 1:
            weights = sorted(found)
            curves.append(Curve(METHODS[name].title, weights, [found[weight] for weight in weights]))
    if not curves:
        return None
    references = [] if alone is None else [(alone, METHODS["none"].title)]
    return line_chart(curves, "guidance weight", "fd_lite0", references=references)


def _images(out: Path, setting: Setting, count: int) -> list[Image.Image]:
    options = [*words(out, setting), "--balanced"]
    request = parse_request(options)
    assert request.classes == ALL_CLASSES
    generation = prepare(request, torch.device("cpu"))
    seeds = range(SHEET_SEEDS.start, SHEET_SEEDS.start + count)
    return [to_image(image.numpy()) for batch in generation.batches(seeds, BATCH) for image in batch.images]


def _first_picture(out: Path, best: Mapping[str, Setting], record: Mapping[str, Any]) -> Image.Image:
    """The same seeds alone and autoguided, side by side."""
    rows, names = current_points(record), ("none", best_guided(best, record))
    titles = []
    for name in names:
        value = f": fd_lite0 {rows[name][-1]['results']['fd_lite0']:.1f}" if name in rows else ""
        titles.append(f"{METHODS[name].title}{value}")
    left, right = (_images(out, best[name], len(SHEET_SEEDS)) for name in names)
    return picture(left, right, (titles[0], titles[1]), columns=5, zoom=3).quantize(255, dither=Image.Dither.NONE)


def best_guided(best: Mapping[str, Setting], record: Mapping[str, Any]) -> str:
    """The autoguided method with the lower score in the search."""
    names = [name for name in ("autoguidance", "autoguidance-interval") if name in best]
    values = {}
    for name in names:
        for trial in record["trials"]:
            if trial["key"]["setting"] == record["best"][name]:
                values[name] = trial["value"]
    return min(names, key=lambda name: values.get(name, float("inf")))


def _sheet(out: Path, best: Mapping[str, Setting]) -> Image.Image:
    lines = []
    for name in ("cfg", "autoguidance"):
        if name not in best:
            continue
        for weight in _WEIGHTS:
            images = _images(out, best[name].with_values({"weight": weight}), 14)
            lines.append((METHODS[name].title, [Strip(f"weight {weight:g}", images)]))
    return draw_sheet(lines)


# the networks in the package


def write_box(out: Path, record: Mapping[str, Any], report: Callable[[str], None]) -> None:
    """Put the networks of the best settings into the package instead of older ones, with presets and cards."""
    BOX.mkdir(exist_ok=True)
    files: dict[str, str] = {}
    best = read_best(out)
    presets = {"cifar10": "none", "cifar10-cfg": "cfg", "cifar10-autoguidance": best_guided(best, record)}
    for preset, name in presets.items():
        setting = best[name]
        options: dict[str, Any] = {"net": _boxed(ema_file(out, "main", setting.nimg, setting.ema), "main", files)}
        if setting.guide == "uncond":
            options["guidance-method"] = "cfg"
        elif setting.guide is not None:
            assert setting.guide_ema is not None
            options["gnet"] = _boxed(
                ema_file(out, setting.guide, setting.guide_nimg, setting.guide_ema), "guide", files
            )
        if setting.guide is not None:
            options["guidance"] = setting.weight
        if setting.interval != (0.0, float("inf")):
            options["interval"] = "{:g},{:g}".format(*setting.interval)
        options |= {key.removeprefix("--"): value for key, value in zip(*[iter(setting.sampler)] * 2, strict=True)}
        with atomic_write(BOX / f"{preset}.yaml", "w") as file:
            file.write("# Written by scripts/cifar10_study.py publish --box\n")
            yaml.safe_dump({"options": options}, file, sort_keys=False)
    for path in BOX.glob("cifar10-*.safetensors"):
        if path.name not in files.values():
            path.unlink()
            path.with_suffix(".md").unlink(missing_ok=True)
    for name in files.values():
        with atomic_write((BOX / name).with_suffix(".md"), "w") as file:
            file.write(card(BOX / name, box_scores(presets, record)))
    report(f"Wrote {', '.join(sorted(files.values()))}, their cards and presets to {BOX}")


def box_scores(presets: Mapping[str, str], record: Mapping[str, Any]) -> str:
    """The scores of the presets, as a card says them."""
    rows = current_points(record)
    found = [
        f"`{preset}` {rows[name][-1]['results']['fd_lite0']:.1f}" for preset, name in presets.items() if name in rows
    ]
    if not found:
        return "not scored yet"
    count = rows[presets["cifar10"]][-1]["key"]["num"]
    return f"fd_lite0 of {count:,} images: {', '.join(found)}; more in experiments/cifar10 of the project"


def card(path: Path, scores: str) -> str:
    """The model card of a network in the package."""
    header = read_header(path)
    config, network = header.training_config, header.architecture
    trained = "without labels" if not network["label_dim"] else "with its 10 classes"
    if config.get("label_dropout"):
        trained += f", {config['label_dropout']:.0%} of the images without their label"
    settings = ("batch_size", "ref_lr", "ref_batches", "rampup_nimg", "P_mean", "P_std", "precision", "seed")
    lines = [
        f"# {path.name}",
        "",
        "A small diffusion network for 32x32 pictures, made to show and test guidance offline. It is far from the",
        "quality of large networks, and meant for nothing else.",
        "",
        "| | |",
        "| --- | --- |",
        f"| network | EDM2 U-Net, {_count_weights(path):,} weights, `model_channels` {network['model_channels']}, "
        f"`channel_mult` {list(network['channel_mult'])} |",
        "| data | CIFAR-10 (Krizhevsky 2009), its 50,000 training images recompressed as JPEG: the first 4,500 of each "
        "class |",
        f"| training | {header.nimg:,} images seen, {trained}, on one thread of a CPU |",
        f"| settings | {', '.join(f'`{name}` {config[name]}' for name in settings)} |",
        f"| EMA | relative length {header.ema_std:.3f}, stored as {header.dtype} |",
        f"| scores | {scores} |",
        "| licence | Apache-2.0, as the project |",
    ]
    return "\n".join(lines) + "\n"


def _count_weights(path: Path) -> int:
    weights = open_weights(path)
    return sum(math.prod(tensor.shape) for tensor in weights.tensors.values())


def _boxed(path: Path, role: str, files: dict[str, str]) -> str:
    """Put a snapshot into the package, once; returns its file name, cifar10-ROLE, with a number from the second on."""
    content = sha256_of(path)
    if content not in files:
        number = sum(name.startswith(f"cifar10-{role}") for name in files.values()) + 1
        files[content] = f"cifar10-{role}{number if number > 1 else ''}.safetensors"
        header = read_header(path)
        # without the folder of the machine that trained it
        config = {**header.training_config, "data": Path(header.training_config["data"]).name}
        save_snapshot(BOX / files[content], load_file(path), dataclasses.replace(header, training_config=config))
    return files[content]
