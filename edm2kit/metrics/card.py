"""The score card: everything that decides a score, as JSON and Markdown, and what differs between two cards."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edm2kit.metrics.detectors.registry import Detector
from edm2kit.metrics.scoring import Measurement
from edm2kit.torch_utils.dist import one_line
from edm2kit.torch_utils.files import short

_TABLED = ("results", "intervals", "cautions", "by_class")  # shown in the first tables of a card

_LARGEST_INT = 1 << 62  # others need not be floats
Runs = Mapping[str, Mapping[str, float]]  # run -> metric -> value


def summary(runs: Runs) -> dict[str, dict[str, Any]]:
    """Minimum, mean and all values by metric; papers report the minimum of three runs."""
    result = {}
    for metric in next(iter(runs.values())):
        values = {run: by_metric[metric] for run, by_metric in runs.items()}
        result[metric] = {"min": min(values.values()), "mean": sum(values.values()) / len(values), "values": values}
    return result


def table(runs: Runs) -> str:
    """One line per run and one column per metric, followed by minimum and mean if there are several runs."""
    rows = {run: list(by_metric.values()) for run, by_metric in runs.items()}
    columns = summary(runs)
    if len(runs) > 1:
        rows["min"] = [column["min"] for column in columns.values()]
        rows["mean"] = [column["mean"] for column in columns.values()]
    name_width = max(map(len, rows))
    lines = [" " * name_width, *(name.ljust(name_width) for name in rows)]
    for metric, values in zip(columns, zip(*rows.values(), strict=True), strict=True):
        cells = [metric, *(f"{value:.6g}" for value in values)]
        width = max(map(len, cells))
        lines = [f"{line}  {cell.rjust(width)}" for line, cell in zip(lines, cells, strict=True)]
    return "\n".join(lines)


def run_line(measured: Measurement) -> str:
    """All values of a run with their intervals, such as "fid 3.2 [3.1, 3.3], fid.recall 0.61"."""
    cells = []
    for metric, value in measured.values.items():
        cell = f"{metric} {value:.6g}"
        if metric in measured.intervals:
            low, high = measured.intervals[metric]
            cell += f" [{low:.6g}, {high:.6g}]"
        cells.append(cell)
    return ", ".join(cells)


def cautions(detectors: Sequence[Detector]) -> str:
    """Which values are not what they may seem, such as "fd_lite0: not FID; compares only with itself"."""
    by_caution: dict[str, list[str]] = {}
    for detector in detectors:
        if detector.caution:
            by_caution.setdefault(detector.caution, []).append(detector.name)
    return "\n".join(f"{', '.join(names)}: {caution}" for caution, names in by_caution.items())


def intervals(measured: Mapping[str, Measurement]) -> dict[str, dict[str, list[float]]]:
    """The 95% intervals by metric and run, [low, high] each."""
    found: dict[str, dict[str, list[float]]] = {}
    for run, one in measured.items():
        for metric, (low, high) in one.intervals.items():
            found.setdefault(metric, {})[run] = [low, high]
    return found


def by_class(measured: Mapping[str, Measurement], names: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Run -> class (its number and name) -> numbers of images, and the distances by detector."""
    found: dict[str, dict[str, Any]] = {}
    for run, one in measured.items():
        for detector, classes in one.by_class.items():
            for number, of_class in classes.items():
                title = f"{number} {names[number]}" if names else str(number)
                counts = {"num_images": of_class.num_images, "num_real": of_class.num_real, "distances": {}}
                entry = found.setdefault(run, {}).setdefault(title, counts)
                entry["distances"][detector] = of_class.distance
    return found


def label_balance(measured: Mapping[str, Measurement]) -> dict[str, dict[str, int]]:
    """The entry "labels": how many classes the images have, and how many images the rarest and the most frequent ones.

    Of several runs, the least and the largest numbers. Empty if classes are unknown.
    """
    counts = [one.class_counts for one in measured.values() if one.class_counts]
    if not counts:
        return {}
    fewest, most = (end(end(one.values()) for one in counts) for end in (min, max))
    return {"labels": {"classes": max(map(len, counts)), "fewest_images": fewest, "most_images": most}}


def markdown(record: Mapping[str, Any]) -> str:
    """The card of a record as Markdown: a table of values, then everything that decides them."""
    lines = ["# Score card", "", "| metric | value | 95 % interval | remark |", "|---|---|---|---|"]
    for metric, entry in record["results"].items():
        detector = metric.partition("@")[0].partition(".")[0]
        caution = record.get("cautions", {}).get(detector, "")
        for run, value in entry["values"].items():
            ends = record.get("intervals", {}).get(metric, {}).get(run, ())
            low_high = " to ".join(f"{end:.6g}" for end in ends)
            name = metric if len(entry["values"]) == 1 else f"{metric} ({run})"
            lines.append(f"| {name} | {value:.6g} | {low_high} | {caution} |")
    for run, classes in record.get("by_class", {}).items():
        detectors = list(dict.fromkeys(name for one in classes.values() for name in one["distances"]))
        lines += ["", f"Distances by class ({run})", "", f"| class | images | real | {' | '.join(detectors)} |"]
        lines.append("|---" * (3 + len(detectors)) + "|")
        for title, one in classes.items():
            values = " | ".join(f"{value:.6g}" for value in one["distances"].values())
            lines.append(f"| {_cell(title)} | {one['num_images']} | {one['num_real']} | {values} |")
    lines += ["", "| what | |", "|---|---|"]
    for name, value in _flat({key: value for key, value in record.items() if key not in _TABLED}):
        lines.append(f"| {_cell(name)} | {_cell(value)} |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    """A value within a table of Markdown: names of classes and files may hold anything."""
    return one_line(str(value)).replace("|", "/")


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything inside nested dictionaries."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


@dataclass(frozen=True)
class Effect:
    """Which way a setting usually moves a distance, and who says so. `prefixes` are dotted names in a record."""

    prefixes: tuple[str, ...]
    text: str
    source: str


_IGNORED = (*_TABLED, "command", "started", "elapsed_sec", "batch", "processes", "commit")

# the first that fits a difference explains it
EFFECTS: tuple[Effect, ...] = (
    Effect(
        ("num_images",),
        "fewer images give a larger Frechet distance (its bias falls as 1 / n), lower recall and coverage",
        "Chong and Forsyth 2020, arXiv 1911.07023",
    ),
    Effect(
        ("seeds",),
        "other seeds move FID by about 1 %; papers of the EDM line report the minimum of three runs, which is lower",
        "Karras et al. 2022, arXiv 2206.00364",
    ),
    Effect(
        ("reference.source", "reference.sha256", "reference.path", "reference.num_images"),
        "another reference (training or validation set, other crop or resize) moves FID by several tenths or more, "
        "either way; compare only with equal hashes",
        "Parmar et al. 2022, arXiv 2104.11222",
    ),
    Effect(
        ("detectors",),
        "another detector or another resize in it gives another scale: such values cannot be compared at all",
        "Parmar et al. 2022, arXiv 2104.11222; Stein et al. 2023, arXiv 2306.04675",
    ),
    Effect(
        ("settings.classes", "settings.labels_sha256", "labels"),
        "equal numbers of each class give a lower FID than random labels (by about 0.1 to 0.2 on ImageNet)",
        "the evaluation of RAE, arXiv 2510.11690, compares both",
    ),
    Effect(
        ("settings.guidance",),
        "more guidance first lowers FID, then raises it; it raises precision and Inception Score and lowers recall",
        "Karras et al. 2024, arXiv 2406.02507; Kynkaanniemi et al. 2024, arXiv 2404.07724",
    ),
    Effect(
        ("settings.sampler", "evaluations"),
        "fewer steps or a lower order usually raise FID; churn helps some networks and harms others",
        "Karras et al. 2022, arXiv 2206.00364",
    ),
    Effect(
        ("settings.net", "settings.gnet", "settings.uncond"),
        "other weights; the EMA length alone moves FID by a factor, and guidance shifts its optimum",
        "Karras et al. 2023, arXiv 2312.02696",
    ),
    Effect(
        ("settings.vae_sha256",),
        "another decoder moves rFID, which FID contains: a fine-tuned decoder usually lowers FID",
        "Rombach et al. 2021, arXiv 2112.10752",
    ),
    Effect(
        ("settings.precision",),
        "float16 or bfloat16 inside the network moves FID by less than other seeds do",
        "Karras et al. 2023, arXiv 2312.02696",
    ),
    Effect(
        ("settings.device", "hardware", "torch", "numpy", "python"),
        "other kernels round differently, and other kinds of device draw other noise: like other seeds at most",
        "measured by this project, docs/metrics.md",
    ),
    Effect(("images", "real", "heldout"), "other images: scores of other things", ""),
)


def read_card(path: Path) -> dict[str, Any]:
    """A record that `--record` wrote. Raises ValueError if the file is something else, naming what is wrong in it."""
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("results"), dict):
        raise ValueError(f"{path} is not a score card; write one with --record")
    for name, is_fitting, expected in _TABLES:
        entries = record.get(name, {})
        for key, value in entries.items() if isinstance(entries, dict) else [("", entries)]:
            if not (isinstance(entries, dict) and is_fitting(value)):
                raise ValueError(f"{path}: {f'{name}.{key}'.rstrip('.')} must be {expected}; got {short(value)}")
    return record


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < _LARGEST_INT
    return isinstance(value, float)


def _has_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_result(entry: Any) -> bool:
    if not isinstance(entry, dict) or not entry.get("values") or not _has_numbers(entry["values"]):
        return False
    return _is_number(entry.get("min")) and _is_number(entry.get("mean"))


def _has_pairs(value: Any) -> bool:
    def is_pair(ends: Any) -> bool:
        return isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends))

    return isinstance(value, dict) and all(map(is_pair, value.values()))


def _is_by_class(value: Any) -> bool:
    def is_class(one: Any) -> bool:
        return isinstance(one, dict) and _has_numbers(one.get("distances")) and {"num_images", "num_real"} <= one.keys()

    return isinstance(value, dict) and all(map(is_class, value.values()))


# what the tables of a card hold by metric, detector or run
_TABLES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("results", _is_result, "numbers min, mean and values by run"),
    ("intervals", _has_pairs, "two numbers by run"),
    ("cautions", lambda value: isinstance(value, str), "text"),
    ("by_class", _is_by_class, "distances and numbers of images by class"),
)


def explain(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What differs between two records that `--record` wrote, one line each, and which way it usually moves the score.

    Lines without a known effect say so. An empty list means that nothing that decides a score differs.
    """
    ours, theirs = (
        dict(_flat({key: value for key, value in record.items() if key not in _IGNORED})) for record in (first, second)
    )
    by_effect: dict[Effect | None, list[str]] = {}
    for name in dict.fromkeys([*ours, *theirs]):
        one, other = ours.get(name, "absent"), theirs.get(name, "absent")
        if one != other:
            by_effect.setdefault(_effect_of(name), []).append(f"{name}: {_short(one)} -> {_short(other)}")
    lines = []
    for effect in [*EFFECTS, None]:
        if effect not in by_effect:
            continue
        lines += by_effect[effect]
        if effect is None:
            lines.append("    no usual effect known")
        else:
            lines.append(f"    {effect.text}{f' [{effect.source}]' if effect.source else ''}")
    return lines


def scores_side_by_side(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """A line for each metric of both records: the least of each, and whether their intervals overlap."""
    lines = []
    for metric, ours in first["results"].items():
        theirs = second["results"].get(metric)
        if theirs is None:
            continue
        line = f"{metric}: {ours['min']:.6g} and {theirs['min']:.6g}"
        ends = [_interval_of_least(record, metric) for record in (first, second)]
        if None not in ends:
            (low, high), (other_low, other_high) = (end for end in ends if end is not None)
            line += "; intervals apart" if high < other_low or other_high < low else "; intervals overlap"
        lines.append(line)
    return lines


def _interval_of_least(record: Mapping[str, Any], metric: str) -> tuple[float, float] | None:
    values = record["results"][metric]["values"]
    ends = record.get("intervals", {}).get(metric, {}).get(min(values, key=values.get))
    return None if ends is None else (ends[0], ends[1])


def _effect_of(name: str) -> Effect | None:
    for effect in EFFECTS:
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in effect.prefixes):
            return effect
    return None


def _short(value: Any, most: int = 60) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
