"""What the study publishes: records, figures, sheets, the table of the README, and the networks in the package."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from edm2kit.cli.generation import prepare
from edm2kit.cli.generation_options import parse_request
from edm2kit.cli.presets import BOX
from edm2kit.conditions import ALL_CLASSES
from edm2kit.experiments.cifar10.ablation import ABLATION_RECORD, degradation_table, ema_figure
from edm2kit.experiments.cifar10.networks import ROLES, describe, is_searched, search_folder, settings_file, words
from edm2kit.experiments.cifar10.settings import BATCH, INFINITY, METHODS, RUNS, SCORE_SEEDS, SHEET_SEEDS
from edm2kit.experiments.cifar10.training_settings import TRIED_RECORD, settings_table
from edm2kit.experiments.compare_guidance.sheet import Strip, draw_sheet
from edm2kit.experiments.demo.report import picture
from edm2kit.experiments.documents import checkout, markdown_table
from edm2kit.experiments.pages.figures import Curve, line_chart, standalone
from edm2kit.experiments.tune.report import PAGE as SEARCH_PAGE
from edm2kit.experiments.tune.report import RESULT
from edm2kit.models.encoders import to_image
from edm2kit.snapshots.file_format import read_header
from edm2kit.snapshots.loading import open_weights
from edm2kit.torch_utils.files import atomic_write, plain_json, sha256_of, write_json

FOLDER = Path("experiments", "cifar10")
RECORD_NAME, PICTURE_NAME, SHEET_NAME = "study.json", "first.png", "sheet.png"
WEIGHTS_NAME, EMA_NAME = "weights.svg", "ema.svg"
PAGE_NAME = "search.html"  # of the best autoguided method
COMMAND = "python scripts/cifar10_study.py"
_COLUMNS = {
    "fd_lite0": "fd_lite0",
    "fd_lite0.fd_infinity": "fd_infinity",
    "fd_lite2": "fd_lite2",
    "fd_lite2.fd_infinity": "fd_lite2, infinity",
    "fd_lite0.kid": "kid",
    "fd_lite0.precision": "precision",
    "fd_lite0.recall": "recall",
    "fd_lite0.coverage": "coverage",
}
_TITLES = {"real": "held-out photos", **{name: method.title for name, method in METHODS.items()}}
_AUTOGUIDED = ("autoguidance", "autoguidance-interval")
_DEGRADED = (*_AUTOGUIDED, "sims")  # searches that lead away from a worse network
BOX_MB = 10  # of all networks in the package
_WEIGHTS = (1.0, 1.5, 2.0, 3.0)  # of the sheet, from top to bottom


def publish(out: Path, box: bool, report: Callable[[str], None]) -> None:
    """Write record, figures, sheets and search pages of the study in `out` to the checkout; with `box`, the networks.

    Raises ValueError for a method whose search has not ended.
    """
    folder = checkout() / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    record = study_record(out)
    if box:
        write_box(out, record, report)
    write_json(folder / RECORD_NAME, record)
    for name, figure in ((WEIGHTS_NAME, weight_figure(record)), (EMA_NAME, ema_figure(record["ablation"]))):
        if figure is not None:
            with atomic_write(folder / name, "w") as file:
                file.write(standalone(figure))
    for name, image in ((PICTURE_NAME, _first_picture(out, record)), (SHEET_NAME, _sheet(out))):
        with atomic_write(folder / name) as file:
            image.save(file, "PNG", optimize=True)
    page = search_folder(out, best_guided(record)) / SEARCH_PAGE
    with atomic_write(folder / PAGE_NAME) as file:
        file.write(page.read_bytes())
    report(document_parts(record)["scores"])
    report(f"Wrote {folder}; now run: python scripts/write_documents.py")


# the record


def study_record(out: Path) -> dict[str, Any]:
    """Everything that was measured, with what made it: runs, searches, best settings, scores."""
    runs = {}
    for name in RUNS:
        folder = out / "runs" / name
        if not folder.exists():
            continue
        status = [json.loads(line) for line in (folder / "stats.jsonl").read_text(encoding="utf-8").splitlines()]
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        runs[name] = {"config": {**config, "data": Path(config["data"]).name}, "last_status": status[-1]}
    searches, best = {}, {}
    for name in METHODS:
        if is_searched(out, name):
            searches[name] = _search_record(search_folder(out, name))
            best[name] = describe(out, settings_file(out, name))
    scores = out / "scores.json"
    points = json.loads(scores.read_text(encoding="utf-8")) if scores.exists() else []
    record: dict[str, Any] = {"command": COMMAND, "runs": runs, "searches": searches, "best": best, "points": points}
    for name, path in (("tried", out / TRIED_RECORD), ("ablation", out / ABLATION_RECORD)):
        record[name] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return record


def _search_record(folder: Path) -> dict[str, Any]:
    """What a search tried and found, without the paths of the machine."""
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    names = ("metric", "value", "num_images", "unguided", "weight_curve", "images_spent", "seconds", "candidates")
    trials = []
    for trial in result["trials"]:
        way, weight, main, guide, interval = json.loads(trial["key"])
        trials.append(
            {
                "way": way,
                "weight": weight,
                "main": main,
                "guide": None if guide == "None" else guide,
                "interval": plain_json(interval),
                "num_images": trial["num_images"],
                "value": trial["value"],
            }
        )
    made = ("commit", "python", "torch", "numpy", "hardware")
    kept = {name: result[name] for name in (*names, "combinations", "rungs", *made)}
    return {**kept, "trials": trials}


def current_points(record: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The points of each row: those of the best settings and the largest reference, with the most images.

    Those of many images, of which only a few metrics were measured, are left out.
    """
    points = [point for point in record["points"] if "detectors" not in point["key"]]
    references = [point["key"].get("reference", 0) for point in points]
    points = [one for one, images in zip(points, references, strict=True) if images == max(references)]
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for name in _TITLES:
        setting = record["best"].get(name)
        found = [p for p in points if p["key"]["method"] == name and p["key"]["setting"] == setting]
        if found:
            most = max(point["key"]["num"] for point in found)
            rows[name] = [p for p in found if p["key"]["num"] in (most, most // len(SCORE_SEEDS))]
    return rows


def first_parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated part of the README."""
    return {"cifar10": _short_table(record)}


def document_parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of the study's page."""
    return {
        "scores": _table(current_points(record)),
        "large": large_table(record),
        "settings": _settings(record),
        "guides": guide_table(record),
        "training": settings_table(record.get("tried", [])),
        "degradations": degradation_table(record.get("ablation", [])),
    }


def _short_table(record: Mapping[str, Any]) -> str:
    rows = current_points(record)
    if "none" not in rows:
        return "The scores of these networks are not measured yet."
    lines, count = [], rows["none"][-1]["key"]["num"]
    for name in ("real", "none", "cfg", best_guided(record)):
        if name not in rows:
            continue
        together = rows[name][-1]
        num, title = together["key"]["num"], _TITLES[name]
        if num != count:  # there are only so many held-out photos
            title = f"{num:,} {title}"
        values = [_with_interval(together, metric) for metric in ("fd_lite0", *INFINITY)]
        lines.append([title, *values, f"{together['results']['fd_lite0.coverage']:.2f}"])
    columns = [f"{count:,} images each", "fd_lite0", "extrapolated", "fd_lite2, extrapolated", "coverage"]
    return markdown_table(columns, lines, "lrrrr")


def _table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = []
    for name, points in rows.items():
        for point in sorted(points, key=lambda one: one["key"]["images"] != "all"):
            title = _TITLES[name] if point["key"]["images"] == "all" else ""
            images = f"{point['key']['num']:,}" if point["key"]["images"] == "all" else point["key"]["images"]
            lines.append([title, images, *(_with_interval(point, metric) for metric in _COLUMNS)])
    return markdown_table(["method", "images", *_COLUMNS.values()], lines, "ll" + "r" * len(_COLUMNS))


def large_table(record: Mapping[str, Any]) -> str:
    """The scores of many images, as published FIDs have them, beside what they fall to from no guidance."""
    found = {}
    for point in record["points"]:
        key = point["key"]
        if "detectors" in key and key["images"] == "all" and key["setting"] == record["best"].get(key["method"]):
            found[key["method"]] = point
    if "none" not in found:
        return "Not measured yet."
    lines = []
    for name in (name for name in METHODS if name in found):
        values = []
        for metric in ("fd_lite0", "fd_lite0.fd_infinity", "fd_lite0.kid"):
            change = found[name]["results"][metric] / found["none"]["results"][metric] - 1
            values += [_with_interval(found[name], metric), "" if name == "none" else f"{change:+.1%}"]
        lines.append([METHODS[name].title, f"{found[name]['key']['num']:,}", *values])
    head = ["method", "images", "fd_lite0", "", "fd_infinity", "", "kid", ""]
    return markdown_table(head, lines, "lrrrrrrr")


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
    for name, search in record["searches"].items():
        value = f"{search['value']:.1f} ({_metric_of(search)} of {search['num_images']:,})"
        lines.append([METHODS[name].title, setting_text(record["best"][name]), value, f"{search['candidates']:,}"])
    return markdown_table(["method", "best settings", "in the search", "candidates"], lines, "llrr")


def _metric_of(search: Mapping[str, Any]) -> str:
    """The metric that a search made small, without its detector's name."""
    return search["metric"].rpartition(".")[2]


def setting_text(options: Mapping[str, Any]) -> str:
    """The best settings of a method in one line."""
    text = f"EMA {options['net']['ema_std']:.3g}"
    if "guidance" not in options:
        return text
    if "gnet" in options:
        guide = options["gnet"]
        text += f", guide {guide['run']} at {guide['nimg'] // 1024}Ki, EMA {guide['ema_std']:.3g}"
    text += f", w {options['guidance']:g}"
    if "interval" in options:
        text += ", sigma in ({}, {}]".format(*options["interval"].split(","))
    return f"{text}, with {options['guidance-also']}" if "guidance-also" in options else text


def guide_table(record: Mapping[str, Any]) -> str:
    """Which guide: the best value that the searches saw with each guide at each training time.

    Only searches by the same metric and number of images are compared.
    """
    searches = [record["searches"][name] for name in _DEGRADED if name in record["searches"]]
    if not searches:
        return "Not searched yet."
    few, metric = searches[0]["rungs"][0], searches[0]["metric"]
    best: dict[str, list[float]] = {}
    for search in searches:
        if (search["rungs"][0], search["metric"]) != (few, metric):
            continue
        for trial in search["trials"]:
            if trial["guide"] is not None and trial["num_images"] == few and trial["value"] is not None:
                best.setdefault(trial["guide"].rpartition(", EMA")[0], []).append(trial["value"])
    lines = [[guide, f"{min(values):.1f}", str(len(values))] for guide, values in sorted(best.items(), key=_by_best)]
    return markdown_table(["guide", f"best {_metric_of(searches[0])} of {few:,} images", "candidates"], lines, "lrr")


def _by_best(item: tuple[str, list[float]]) -> float:
    return min(item[1])


# pictures


def weight_figure(record: Mapping[str, Any]) -> str | None:
    """The metric of the searches against the guidance weight, all else at its best value, as SVG; None without any.

    Only methods that were searched by the same metric and number of images as the first one are in it.
    """
    curves, shown = [], ""
    for name, search in record["searches"].items():
        points, metric = search["weight_curve"]["points"], f"{_metric_of(search)} of {search['rungs'][0]:,} images"
        if points and metric == (shown or metric):
            shown = metric
            weights, values = [point["weight"] for point in points], [point["value"] for point in points]
            curves.append(Curve(METHODS[name].title, weights, values))
    if not curves:
        return None
    alone = []
    if "none" in record["searches"]:
        few = record["searches"]["none"]["rungs"][0]
        values = [one["value"] for one in record["searches"]["none"]["trials"] if one["num_images"] == few]
        alone = [(min(values), METHODS["none"].title)]
    return line_chart(curves, "guidance weight", shown, references=alone)


def _images(settings: Path, count: int, **others: float) -> list[Image.Image]:
    request = parse_request([*words(settings, **others), "--balanced"])
    assert request.classes == ALL_CLASSES
    generation = prepare(request, torch.device("cpu"))
    seeds = range(SHEET_SEEDS.start, SHEET_SEEDS.start + count)
    return [to_image(image.numpy()) for batch in generation.batches(seeds, BATCH) for image in batch.images]


def _first_picture(out: Path, record: Mapping[str, Any]) -> Image.Image:
    """The same seeds alone and autoguided, side by side."""
    rows, names = current_points(record), ("none", best_guided(record))
    titles = []
    for name in names:
        value = f": fd_lite0 {rows[name][-1]['results']['fd_lite0']:.1f}" if name in rows else ""
        titles.append(f"{METHODS[name].title}{value}")
    left, right = (_images(settings_file(out, name), len(SHEET_SEEDS)) for name in names)
    return picture(left, right, (titles[0], titles[1]), columns=5, zoom=3).quantize(255, dither=Image.Dither.NONE)


def best_guided(record: Mapping[str, Any]) -> str:
    """The autoguided method with the lower value, among searches by one metric. Raises ValueError without any."""
    names = [name for name in _AUTOGUIDED if name in record["searches"]]
    if not names:
        raise ValueError("autoguidance was not searched yet; run the step tune")
    metric = record["searches"][names[0]]["metric"]
    names = [name for name in names if record["searches"][name]["metric"] == metric]
    return min(names, key=lambda name: record["searches"][name]["value"])


def _sheet(out: Path) -> Image.Image:
    lines = []
    for name in ("cfg", "autoguidance"):
        if is_searched(out, name):
            for weight in _WEIGHTS:
                images = _images(settings_file(out, name), 14, guidance=weight)
                lines.append((METHODS[name].title, [Strip(f"weight {weight:g}", images)]))
    return draw_sheet(lines)


# the networks in the package


def write_box(out: Path, record: Mapping[str, Any], report: Callable[[str], None]) -> None:
    """Put the networks of the best settings into the package instead of older ones, with presets and cards."""
    BOX.mkdir(exist_ok=True)
    files: dict[str, str] = {}  # hash -> name
    presets = {"cifar10": "none", "cifar10-autoguidance": best_guided(record)}
    for preset, name in {**presets, "cifar10-cfg": "cfg"}.items():
        source = settings_file(out, name)
        options = dict(yaml.safe_load(source.read_text(encoding="utf-8"))["options"])
        if name == "cfg" and not _has_room(files, source.parent / options["net"]):
            options["net"] = _net_of(out, "none")
        for role in ROLES:
            if role in options:
                options[role] = _boxed(source.parent / options[role], role, files)
        del options["precision"]  # that of the user's device
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


def _has_room(files: Mapping[str, str], path: Path) -> bool:
    """Whether the networks of the package stay below BOX_MB with one more."""
    known = sum((BOX / name).stat().st_size for name in files.values())
    return sha256_of(path) in files or known + path.stat().st_size <= BOX_MB * 10**6


def _net_of(out: Path, name: str) -> str:
    return yaml.safe_load(settings_file(out, name).read_text(encoding="utf-8"))["options"]["net"]


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
    """Copy a network into the package, once; its file name, such as cifar10-main, with a number from the second on."""
    content = sha256_of(path)
    if content not in files:
        stem = "cifar10-main" if role == "net" else "cifar10-guide"
        number = sum(name.startswith(stem) for name in files.values()) + 1
        files[content] = f"{stem}{number if number > 1 else ''}.safetensors"
        with atomic_write(BOX / files[content]) as file:
            file.write(path.read_bytes())
    return files[content]
