"""Damaged records of runs, scores and searches for `benchmarks.fuzz`."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import Image

from benchmarks.fuzz_inputs import Parser, in_file, text_of, values_and_text
from edm2kit.data.dataset import open_source
from edm2kit.data.image_files import encode_png
from edm2kit.experiments.compare_guidance.measure import best_weight, read_record
from edm2kit.experiments.documents import read_object
from edm2kit.experiments.paper_tables.report import lines_of
from edm2kit.experiments.paper_tables.run import describe
from edm2kit.experiments.paper_tables.tables import Table, load_table
from edm2kit.experiments.runs.doctor import examine, report_lines
from edm2kit.experiments.runs.folder import open_run
from edm2kit.experiments.runs.report import Reported, write_report
from edm2kit.experiments.toy.evaluation import load_record
from edm2kit.experiments.toy.measures import MEASURES
from edm2kit.experiments.tune.study import check_settings
from edm2kit.guidance.records import settings_differences
from edm2kit.metrics.card import explain, markdown, read_card, scores_side_by_side
from edm2kit.models.compilation import read_record as read_compilations
from edm2kit.torch_utils.download import resume_point
from edm2kit.training.config import TrainConfig
from edm2kit.training.log import drop_later_lines
from edm2kit.training.micro_batches import recorded_size
from edm2kit.training.run import Run, check_run_dir, resolve

# training runs

_LINE = {"nimg": 1000, "elapsed_sec": 1.5, "loss": 0.7, "lr": 0.01, "gradient_norm": 0.3, "images_per_sec": 20.5}
_MEASURED = {
    "nimg": 1000, "images": 8, "heldout": {"loss": 0.7, "loss_0": 0.7}, "training": {"loss": 0.6, "loss_0": 0.6},
    "gap_error": {"loss": 0.1, "loss_0": 0.1},
}  # fmt: skip
_RUN = {
    "run_id": "0123", "data_identity": {"num_images": 64, "sha256": "0", "holdout": {"num_images": 8, "sha256": "1"}},
    "label_names": ["cat", "dog"], "world_size": 1, "micro_batches": [4, 4],
}  # fmt: skip


def _lines(line: Mapping[str, Any]) -> bytes:
    return b"".join(text_of({**line, "nimg": nimg}) + b"\n" for nimg in (1, 2, 3))


def _in_run(name: str) -> Callable[[bytes, Path], object]:
    """Reads a run folder with the input as the file `name`: what doctor and report show of it."""

    def parse(data: bytes, folder: Path) -> object:
        place = folder / "run"
        place.mkdir(exist_ok=True)
        (place / "config.yaml").write_text("data: x\n")
        for other, content in {"stats.jsonl": _lines(_LINE), "heldout.jsonl": _lines(_MEASURED)}.items():
            (place / other).write_bytes(content)
        (place / "run.json").write_bytes(text_of(_RUN))
        (place / name).write_bytes(data)
        run = open_run(place)
        write_report(folder / "report.html", [Reported("run", run, None, "none")], "about")
        return report_lines(examine(run, None, "none"))

    return parse


def _resumed_run() -> Parser:
    """The record of a run that is to be resumed."""
    runs: dict[str, Run] = {}

    def seeds(folder: Path) -> list[Any]:
        (folder / "data").mkdir()
        (folder / "data" / "0.png").write_bytes(encode_png(Image.new("RGB", (4, 4), (1, 2, 3))))
        network = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
        config = TrainConfig(data=str(folder / "data"), cond=False, batch_size=2, network=network)
        (folder / "resumed").mkdir()
        run = runs["run"] = resolve(config, open_source(config.data), folder / "resumed")
        run.write_records({})
        (folder / "resumed" / "config.yaml").write_text("data: x\n")  # the complete one takes milliseconds each time
        record = json.loads((folder / "resumed" / "run.json").read_text())
        return [record, text_of(record)]

    def parse(data: bytes, folder: Path) -> object:
        (folder / "resumed" / "run.json").write_bytes(data)
        return recorded_size(check_run_dir(runs["run"]), 1)

    return Parser(seeds, parse)


# scores


def _card() -> dict[str, Any]:
    values = {"min": 3.2, "mean": 3.2, "values": {"selection 0": 3.2}}
    return {
        "command": "calculate_metrics.py", "results": {"fid": values},
        "intervals": {"fid": {"selection 0": [3.1, 3.3]}},
        "by_class": {"selection 0": {"0 cat": {"num_images": 5, "num_real": 5, "distances": {"fid": 3.0}}}},
        "detectors": {"fid": "0123"}, "reference": {"path": "a.npz", "sha256": "0", "num_images": 9, "source": {}},
        "num_images": 9, "seeds": [0], "settings": {"guidance": {"method": "none"}},
    }  # fmt: skip


def _read_cards(path: Path) -> object:
    card = read_card(path)
    return markdown(card), explain(card, _card()), scores_side_by_side(card, _card())


_ASKED = {"row": "auto", "options": "--guidance-method pag", "files": {}, "num_images": 100}
_POINTS = {
    "asked": _ASKED,
    "points": [{"weight": weight, "first_seed": 0, "results": {"fid": 3.2}} for weight in (1.5, 2)],
}


def _read_points(path: Path) -> object:
    return best_weight("auto", read_record(path, _ASKED), [1.5, 2], [0], "fid")


@functools.cache
def _table() -> Table:
    """A table of one cell."""
    table = load_table("autoguidance-1")
    row = next(row for row in table.rows if row.cells)
    return dataclasses.replace(table, rows=(dataclasses.replace(row, cells=row.cells[:1]),))


def _cells(folder: Path) -> list[Any]:
    made = {"processes": 1, "hardware": "CPU", "commit": "0123456789abcdef"}
    found = {"value": 2.5, "first_seed": 0, "num_images": 100, "made_by": [made]}
    [cell] = _table().cells()
    record = {"asked": describe(_table(), cell, 100), "settings": {"device": "cpu"}, "runs": {"0": found}}
    return [record, text_of(record)]


def _read_cell(data: bytes, folder: Path) -> object:
    [cell] = _table().cells()
    (folder / f"{cell.name}.json").write_bytes(data)
    return lines_of(_table(), folder)


# generated images, searches, downloads

_SETTINGS = {
    "net": {"path": "a"}, "gnet": None,
    "guidance": {"method": "none", "also": [["pag", 3]], "options": {"pag_blocks": "auto"}},
}  # fmt: skip


def _read_settings(path: Path) -> object:
    return settings_differences(read_object(path), _SETTINGS)


def _read_note(path: Path) -> object:
    return resume_point("https://x/y", path.with_suffix(""))


def _read_compilations(path: Path) -> object:
    with mock.patch.dict(os.environ, {"DNNLIB_CACHE_DIR": str(path.parent)}):
        return read_compilations()


_TOY = {
    "training_seeds": [0], "num_samples": 9,
    "rows": [{"method": "main", "weight": 1, "seed": 0, **dict.fromkeys(MEASURES, 0.1)}],
}  # fmt: skip
_SEARCH = {"networks": {"main": "a"}, "ways": ["auto", "cfg"], "metric": "fid", "images": [100, 1000]}
PARSERS: Mapping[str, Parser] = {
    "statistics": Parser(
        lambda folder: [_lines(_LINE)], in_file("stats.jsonl", lambda path: drop_later_lines(path, 2))
    ),
    "run statistics": Parser(lambda folder: [_lines(_LINE)], _in_run("stats.jsonl")),
    "held-out losses": Parser(lambda folder: [_lines(_MEASURED)], _in_run("heldout.jsonl")),
    "run record": Parser(values_and_text(_RUN), _in_run("run.json")),
    "sample sheet": Parser(
        lambda folder: [encode_png(Image.new("RGB", (4, 4), (1, 2, 3)))], _in_run("samples-0000001.png")
    ),
    "resumed run": _resumed_run(),
    "card": Parser(values_and_text(_card()), in_file("a.json", _read_cards)),
    "comparison points": Parser(values_and_text(_POINTS), in_file("a.json", _read_points)),
    "table cell": Parser(_cells, _read_cell),
    "toy record": Parser(values_and_text(_TOY), in_file("evaluation.json", lambda path: load_record(path.parent))),
    "generation settings": Parser(values_and_text(_SETTINGS), in_file("settings.json", _read_settings)),
    "search settings": Parser(
        values_and_text(_SEARCH), in_file("settings.json", lambda path: check_settings(path, _SEARCH))
    ),
    "download note": Parser(
        values_and_text({"url": "https://x/y", "version": '"0123"'}), in_file("y.partial.json", _read_note)
    ),
    "compile times": Parser(
        values_and_text({"CPU, torch 2.13": {"seconds": 30.5, "gain": 1.2}}),
        in_file("compile-times.json", _read_compilations),
    ),
}
