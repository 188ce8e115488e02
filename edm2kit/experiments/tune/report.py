"""What a search leaves: the best settings as a preset, their confirmation on fresh seeds, figures and a page."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from edm2kit.cli.presets import write_preset_file
from edm2kit.data.image_files import contact_sheet
from edm2kit.experiments.documents import read_object
from edm2kit.experiments.pages import figures, page
from edm2kit.experiments.tune.objective import Objective, direction
from edm2kit.experiments.tune.sources import Version
from edm2kit.experiments.tune.space import UNGUIDED, Candidate, Space
from edm2kit.metrics.scoring import REPLICATES
from edm2kit.models.encoders import to_image
from edm2kit.torch_utils.dist import progress_bar
from edm2kit.torch_utils.files import check_type, provenance, write_json

PRESET, RESULT, PAGE, _CONFIRMATION = "preset.yaml", "result.json", "index.html", "confirmation.json"
RANGES = 3  # of fresh seeds, as in the papers
CURVE_WEIGHTS = 7
_SHEET_IMAGES = 16
Trials = Sequence[Mapping[str, Any]]  # as from SharedStudy.results


@dataclass(frozen=True)
class Finish:
    """Everything the end of a search needs; `words` are the options of generate.py that all candidates share."""

    objective: Objective
    space: Space
    trials: Trials
    rungs: tuple[int, ...]
    baseline: Candidate
    words: Sequence[str]
    confirm: int
    outdir: Path
    command: str

    @property
    def num_images_after(self) -> int:
        """Images of the confirmation, the weight curve and the sheets."""
        return images_after(self.confirm, self.rungs)

    def run(self) -> dict[str, Any]:
        """Confirm the best candidate, write the preset, the record, the figures and the page; returns the record."""
        best = self.best()
        total = 2 * RANGES * self.confirm + (CURVE_WEIGHTS + 1) * self.rungs[0]
        with progress_bar(total, what="confirmation") as bar:
            counted = replace(self, objective=replace(self.objective, on_images=bar.update))
            confirmation = counted._confirm(best)
            curve = counted._curve(best)
        self._write_preset(best, confirmation)
        result = {
            "command": self.command,
            "metric": self.objective.metric,
            "best": str(best),
            "value": self._reading(best, self.rungs[-1]),
            "num_images": self._largest(best),
            "unguided": self._reading(self.baseline, self.rungs[-1]),
            "confirmation": confirmation,
            "weight_curve": {"num_images": self.rungs[0], "points": curve},
            "images_spent": sum(trial["cost"] for trial in self.trials),
            "seconds": round(sum(trial["seconds"] for trial in self.trials), 1),
            "candidates": len({trial["key"] for trial in self.trials}),
            "combinations": self.space.count,
            "rungs": list(self.rungs),
            "trials": list(self.trials),
            **provenance(self.objective.scorer.device),
        }
        write_json(self.outdir / RESULT, result)
        charts = self._figures(best, curve)
        for name, (svg, _) in charts.items():
            (self.outdir / f"{name}.svg").write_text(figures.standalone(svg), encoding="utf-8")
        self._write_page(best, result, charts)
        return result

    def best(self) -> Candidate:
        """The best at the largest number of images that any was measured with."""
        finite = [trial for trial in self.trials if trial["value"] is not None and math.isfinite(trial["value"])]
        most = max(trial["num_images"] for trial in finite)
        values = min((one for one in finite if one["num_images"] == most), key=lambda one: one["value"])["values"]
        return self.space.candidate(values)

    def _largest(self, candidate: Candidate) -> int:
        return max(trial["num_images"] for trial in self.trials if trial["key"] == candidate.key)

    def _reading(self, candidate: Candidate, num_images: int) -> float | None:
        """The value of the metric as it is read, where small or large may be good."""
        for trial in self.trials:
            if (trial["key"], trial["num_images"]) == (candidate.key, num_images):
                return direction(self.objective.metric) * trial["value"]
        return None

    def _confirm(self, best: Candidate) -> dict[str, Any]:
        """Both ways on three ranges of fresh seeds, with 95% intervals; what was measured before is kept."""
        path = self.outdir / _CONFIRMATION
        known = _confirmed(path)
        if known.get("best") != best.key or known.get("num_images") != self.confirm:
            known = {"best": best.key, "num_images": self.confirm, "points": []}
        done = {(point["way"], point["first_seed"]) for point in known["points"]}
        for first in range(0, RANGES * self.confirm, self.confirm):
            for way, candidate in (("unguided", self.baseline), ("best", best)):
                if (way, first) in done:
                    continue
                if way == "best" and best == self.baseline:
                    known["points"].append({**known["points"][-1], "way": way})
                    continue
                seeds = range(first, first + self.confirm)
                measured = self.objective.measure_seeds(candidate, seeds, REPLICATES)
                known["points"].append(
                    {
                        "way": way,
                        "first_seed": first,
                        "value": self.objective.reading(measured),
                        "interval": measured.intervals.get(self.objective.name_in(measured)),
                        "values": dict(measured.values),
                    }
                )
                write_json(path, known)
        means = {}
        for way in ("unguided", "best"):
            values = [point["value"] for point in known["points"] if point["way"] == way]
            means[way] = sum(values) / len(values)
        return {**known, "means": means, "change": means["best"] / means["unguided"] - 1 if means["unguided"] else None}

    def _curve(self, best: Candidate) -> list[dict[str, float]]:
        """The metric against the weight, all else as in the best candidate, at the smallest number of images."""
        if best.method == UNGUIDED:
            return []
        points = []
        for weight in self._curve_weights(best):
            try:
                measured = self.objective.measure(replace(best, weight=weight), self.rungs[0])
            except ValueError:
                continue  # a weight too large for this network: the images are not finite
            points.append({"weight": weight, "value": self.objective.reading(measured)})
        return points

    def _curve_weights(self, best: Candidate) -> list[float]:
        steps = self.space.weight_steps(best.method)
        spread = [steps[round(k * (len(steps) - 1) / (CURVE_WEIGHTS - 1))] for k in range(CURVE_WEIGHTS)]
        return sorted({*spread, best.weight})

    def _write_preset(self, best: Candidate, confirmation: Mapping[str, Any]) -> None:
        options: dict[str, Any] = {"net": self._file(best.main, "main")}
        if best.method != UNGUIDED:
            way = self.space.ways[best.method]
            if best.guide is not None:
                options["gnet"] = self._file(best.guide, "guide")
            options |= {"guidance-method": way.method, "guidance": best.weight}
            if best.interval is not None:
                options["interval"] = "{:g},{:g}".format(*best.interval)
        own = self.space.ways[best.method].own if best.method != UNGUIDED else ()
        words = [*own, *self.words]
        about = {
            "about": f"Found by: {self.command}",
            "metric": self.objective.metric,
            "value": confirmation["means"]["best"],
            "num_images": f"{RANGES} x {self.confirm}",
        }
        write_preset_file(self.outdir / PRESET, {**options, **options_of(words)}, about)

    def _file(self, version: Version, role: str) -> str:
        """A snapshot file of this version: the one that exists, or a rebuilt one in the folder of the search."""
        source = self.space.main if role == "main" else self.objective.cache.sources[version.source]
        for weights in source.weights:
            if (weights.header.nimg, weights.header.ema_std) == (version.nimg, version.ema_std):
                return source.path if "://" in source.path else os.path.abspath(weights.path or source.path)
        path = self.outdir / f"{role}.safetensors"
        source.write(version, path)
        return path.name

    # ---- figures and the page

    def _figures(self, best: Candidate, curve: Sequence[Mapping[str, float]]) -> dict[str, tuple[str, str]]:
        """SVG and caption by name."""
        metric, few = self.objective.metric, self.rungs[0]
        found = {}
        if curve:
            lines = [
                figures.Curve("best settings, other weights", [p["weight"] for p in curve], [p["value"] for p in curve])
            ]
            scattered = self._at(few, lambda candidate: candidate.method == best.method)
            if scattered:
                others = figures.Curve(
                    "all candidates", [c.weight for c, _ in scattered], [value for _, value in scattered], joined=False
                )
                lines.append(others)
            unguided = self._reading(self.baseline, few)
            references = [] if unguided is None else [(unguided, "unguided")]
            found["weight"] = (
                figures.line_chart(lines, "guidance weight", metric, references=references),
                f"{metric} against the weight, {few:,} images each (compare only within this figure: a distance "
                "from so few images is too large).",
            )
        heat = self._heat(best)
        if heat is not None:
            found["ema"] = heat
        found["progress"] = (
            figures.line_chart(self._progress(), "images spent", f"best {metric} so far"),
            "The best value so far at each number of images per candidate. Values at different numbers cannot be "
            "compared with each other.",
        )
        return found

    def _at(self, num_images: int, wanted: Any) -> list[tuple[Candidate, float]]:
        found = []
        for trial in self.trials:
            candidate = self.space.candidate(trial["values"])
            is_wanted = trial["num_images"] == num_images and math.isfinite(trial["value"]) and wanted(candidate)
            if is_wanted:
                found.append((candidate, direction(self.objective.metric) * trial["value"]))
        return found

    def _heat(self, best: Candidate) -> tuple[str, str] | None:
        """The best value that the search saw with each pair of EMA lengths."""
        if best.guide is None:
            return None
        source = best.guide.source
        seen = self._at(self.rungs[0], lambda one: one.guide is not None and one.guide.source == source)
        pick = min if direction(self.objective.metric) > 0 else max
        cells: dict[tuple[float, float], float] = {}
        for candidate, value in seen:
            assert candidate.guide is not None
            pair = candidate.main.ema_std or 0.0, candidate.guide.ema_std or 0.0
            cells[pair] = pick(value, cells.get(pair, value))
        mains, guides = sorted({a for a, _ in cells}), sorted({b for _, b in cells})
        if len(mains) * len(guides) < 2:
            return None
        values = [[cells.get((a, b)) for b in guides] for a in mains]
        svg = figures.heat_map(
            [f"{a:.3g}" for a in mains],
            [f"{b:.3g}" for b in guides],
            values,
            "EMA length of the main network",
            "EMA length of the guide",
            direction(self.objective.metric) > 0,
        )
        return svg, (
            f"The best {self.objective.metric} that the search saw with each pair of EMA lengths, over all weights, "
            f"ages and intervals, {self.rungs[0]:,} images each. Empty cells were not tried."
        )

    def _progress(self) -> list[figures.Curve]:
        sign, lines = direction(self.objective.metric), []
        for rung in self.rungs:
            x, y, total, best = [], [], 0, math.inf
            for trial in self.trials:
                total += trial["cost"]
                if trial["num_images"] == rung and math.isfinite(trial["value"]):
                    best = min(best, trial["value"])
                    x.append(float(total))
                    y.append(sign * best)
            if x:
                lines.append(figures.Curve(f"{rung:,} images per candidate", x, y))
        return lines

    def _write_page(self, best: Candidate, result: Mapping[str, Any], charts: Mapping[str, tuple[str, str]]) -> None:
        confirmation, metric = result["confirmation"], self.objective.metric
        rows = []
        for way, title in (("unguided", "unguided"), ("best", "best found")):
            points = [point for point in confirmation["points"] if point["way"] == way]
            each = [with_interval(point) for point in points]
            rows.append([title, f"{confirmation['means'][way]:.4g}", *each])
        blocks = [
            page.paragraph(f"Best settings: {best}."),
            page.command(f"python generate.py --preset {self.outdir / PRESET} --seeds 0-63 --outdir out"),
            page.heading("Confirmation on fresh seeds"),
            page.table(["", f"mean {metric}", *(f"range {k + 1}" for k in range(RANGES))], rows, "lr" + "l" * RANGES),
            page.paragraph(
                f"{self.confirm:,} images per range, of seeds that the search did not use; in brackets 95% intervals "
                "over generated images of this number. The unguided network is at its usual EMA length."
            ),
        ]
        slider = self._slider(best)
        if slider:
            blocks += [page.heading("The same seeds at other weights"), slider]
        blocks.append(page.heading("The search"))
        blocks += [page.figure(svg, caption) for svg, caption in charts.values()]
        blocks.append(self._table_of_best())
        about = (
            f"{result['command']} · {result['images_spent']:,} images for the search, "
            f"{result['candidates']:,} of {result['combinations']:,} combinations · {result['hardware']} · "
            f"commit {result['commit'][:12]}"
        )
        page.write_page(self.outdir / PAGE, f"Search for guidance by {metric}", blocks, about)

    def _table_of_best(self) -> str:
        most = max(trial["num_images"] for trial in self.trials if math.isfinite(trial["value"]))
        ranked = sorted(
            self._at(most, lambda candidate: True), key=lambda pair: direction(self.objective.metric) * pair[1]
        )
        rows = [[f"{value:.4g}", str(candidate)] for candidate, value in ranked[:10]]
        return page.table([f"{self.objective.metric}, {most:,} images", "settings"], rows, "rl")

    def _slider(self, best: Candidate) -> str:
        if best.method == UNGUIDED:
            return ""
        unguided, start = self._sheet(self.baseline), 0
        stops: list[page.SliderStop] = []
        for weight in self._curve_weights(best):
            try:
                sheet = self._sheet(replace(best, weight=weight))
            except ValueError:
                continue
            if weight == best.weight:
                start = len(stops)
            note = "The best weight found." if weight == best.weight else ""
            stops.append(page.SliderStop(f"w = {weight:g}", sheet, note))
        return page.weight_slider([page.SliderGroup(best.method, unguided, stops, start)])

    def _sheet(self, candidate: Candidate) -> Image.Image:
        engine = self.objective.generation(candidate).engine
        pixels = [one for batch in engine.batches(range(_SHEET_IMAGES), self.objective.batch) for one in batch.images]
        return contact_sheet([to_image(one.cpu().numpy()) for one in pixels], columns=math.isqrt(_SHEET_IMAGES))


def images_after(confirm: int, rungs: Sequence[int]) -> int:
    """Images generated after the search: two ways confirmed, the weight curve, and the sheets of the slider."""
    return 2 * RANGES * confirm + (CURVE_WEIGHTS + 1) * rungs[0] + (CURVE_WEIGHTS + 2) * _SHEET_IMAGES


def with_interval(point: Mapping[str, Any]) -> str:
    """A value with its 95% interval."""
    if point["interval"] is None:
        return f"{point['value']:.4g}"
    return "{:.4g} [{:.4g}, {:.4g}]".format(point["value"], *point["interval"])


def options_of(words: Sequence[str]) -> dict[str, Any]:
    """Words of a command line as the options of a preset file: True without a value, a list if it is repeated.

    Raises ValueError for a word that is neither an option nor a value.
    """
    found: list[tuple[str, Any]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found.append((name, value if equals else True))
        elif not found or found[-1][1] is not True:
            raise ValueError(f"{word!r} is not an option; options after -- start with --, such as --steps 16")
        else:
            found[-1] = found[-1][0], word
    options: dict[str, Any] = {}
    for name, value in found:
        before = options.get(name)
        options[name] = value if before is None else [*(before if isinstance(before, list) else [before]), value]
    return options


def _confirmed(path: Path) -> dict[str, Any]:
    """What an earlier confirmation measured; {} if there was none or its record is damaged, as it is measured again."""
    hints: Mapping[str, Any] = {
        "way": str, "first_seed": int, "value": float, "interval": list[float] | None, "values": Mapping[str, Any],
    }  # fmt: skip
    try:
        known = read_object(path)
        check_type(known.get("points"), list[Mapping[str, Any]], "points")
        for point in known["points"]:
            for name, hint in hints.items():
                check_type(point.get(name), hint, name)
    except ValueError:
        return {}
    return known
