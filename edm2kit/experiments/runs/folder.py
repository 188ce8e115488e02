"""A run folder as it is read afterwards: configuration, record, statistics, snapshots and sample sheets."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edm2kit.data.dataset import Source, open_source
from edm2kit.data.holdout import split
from edm2kit.snapshots.file_format import Header, read_header
from edm2kit.torch_utils.files import check_type
from edm2kit.training.config import TrainConfig, config_from_dict, read_yaml
from edm2kit.training.log import HELDOUT_NAME, STATS_NAME
from edm2kit.training.loss import noise_bins
from edm2kit.training.run import CONFIG_NAME, RECORD_NAME

_LARGEST_INT = 1 << 62
_SHEET = re.compile(r"samples-(\d+)\.png")


@dataclass(frozen=True)
class RunFolder:
    """What is in a run folder. Nothing in it is written.

    `record` is run.json, empty if it is missing or damaged. `stats` and `heldout` are the lines of the two logs, in
    order of training images; `damaged_lines` of them could not be read. `headers` are those of the training snapshots;
    `damaged` has the reason for each snapshot that cannot be opened.
    """

    path: Path
    config: TrainConfig
    record: Mapping[str, Any]
    stats: Sequence[Mapping[str, Any]]
    heldout: Sequence[Mapping[str, Any]]
    damaged_lines: int
    headers: Mapping[Path, Header]
    damaged: Mapping[Path, str]

    @property
    def nimg(self) -> int:
        """Training images so far, as far as the log says."""
        return int(self.stats[-1]["nimg"]) if self.stats else 0

    @property
    def is_distillation(self) -> bool:
        """Whether the run distils a guided denoiser, so that its loss is another one."""
        return "teacher" in self.record.get("data_identity", {})

    @property
    def label_names(self) -> Sequence[str] | None:
        return self.record.get("label_names")

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Training images and values of a logged quantity, float64 [N] each, where it was logged."""
        found = [(line["nimg"], line[name]) for line in self.stats if isinstance(line.get(name), int | float)]
        x, y = zip(*found, strict=True) if found else ((), ())
        return np.array(x, dtype=np.float64), np.array(y, dtype=np.float64)

    def noise_bins(self) -> list[tuple[str, float, float]]:
        """The ranges of noise levels that the log reports: (name, lowest sigma, end)."""
        return noise_bins(self.config.P_mean, self.config.P_std)

    def sheets(self) -> list[tuple[int, Path]]:
        """The sample sheets, as (thousands of training images, file), in order."""
        found = [(int(m[1]), path) for path in self.path.glob("samples-*.png") if (m := _SHEET.fullmatch(path.name))]
        return sorted(found)


def open_run(path: str | Path) -> RunFolder:
    """Read a run folder. Raises ValueError if it has no configuration that can be read."""
    path = Path(path)
    if not (path / CONFIG_NAME).is_file():
        raise ValueError(f"{path} is not a run folder: it has no {CONFIG_NAME}. Give the --outdir of a training run")
    config = config_from_dict(read_yaml(path / CONFIG_NAME), str(path / CONFIG_NAME))
    stats, damaged = read_log(path / STATS_NAME)
    heldout, more = read_log(path / HELDOUT_NAME)
    complete = [line for line in heldout if _is_measurement(line)]
    more += len(heldout) - len(complete)
    headers, broken = {}, {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            header = read_header(file)
        except ValueError as error:
            broken[file] = str(error)
            continue
        if header.recipe is None and header.ema_std is not None:
            headers[file] = header
    return RunFolder(path, config, _record(path / RECORD_NAME), stats, complete, damaged + more, headers, broken)


def _record(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    try:
        check_type(found, Mapping[str, Any], "the record")
        identity = found.get("data_identity", {})
        check_type(identity, Mapping[str, Any], "data_identity")
        check_type(identity.get("holdout", {}), Mapping[str, Any], "holdout")
        for counts in (identity, identity.get("holdout", {})):
            check_type(counts.get("num_images", 0), int, "num_images")
        held = identity.get("holdout", {}).get("num_images", 0)
        if held and not 0 < held < identity.get("num_images", 0):
            raise ValueError(f"{held} held-out images are not some of all")
        check_type(found.get("label_names"), list[str] | None, "label_names")
        check_type(found.get("run_id"), str | None, "run_id")
    except ValueError:
        return {}
    return found


def _is_measurement(line: Mapping[str, Any]) -> bool:
    """Whether a line is as `HeldoutLoss.measure` makes it: means and errors by range of noise levels."""
    parts: list[Any] = [line.get(name) for name in ("heldout", "training", "gap_error")]
    if not all(isinstance(part, dict) and "loss" in part for part in parts):
        return False
    numbers = [value for part in parts for value in part.values()]
    same = parts[0].keys() >= parts[2].keys() and parts[1].keys() >= parts[2].keys()
    return same and isinstance(line.get("images"), int) and all(isinstance(number, int | float) for number in numbers)


def _check_numbers(values: Any) -> None:
    """Raise ValueError for integers at any depth that are no floats; NaN and infinities may be there."""
    if isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            _check_numbers(value)
    elif isinstance(values, int) and abs(values) >= _LARGEST_INT:
        raise ValueError("a number is too large")


def read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a log that can be read, sorted by training images, and the number of the others."""
    if not path.is_file():
        return [], 0
    found, damaged = [], 0
    for line in path.read_bytes().splitlines():
        try:
            values = json.loads(line)
            values["nimg"] = int(values["nimg"])
            _check_numbers(values)
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            damaged += 1
            continue
        found.append(values)
    return sorted(found, key=lambda values: values["nimg"]), damaged


def training_set(folder: RunFolder, path: str | None = None) -> tuple[Source | None, str]:
    """The images that the run trains on, without held-out ones, or None and the reason.

    `path` is where they are now, if not where the configuration says. Raises ValueError if it holds other images.
    """
    config = folder.config
    try:
        source = open_source(path or config.data, use_labels=config.cond)
        if config.holdout:
            source, _ = split(source, config.holdout)
    except ValueError as error:
        if path is not None:
            raise
        return None, f"the training set cannot be opened ({error}); give --data"
    recorded = folder.record.get("data_identity", {})
    found = source.identity()
    changed = [key for key in recorded if key != "teacher" and recorded[key] != found.get(key)]
    if changed:
        text = f"{source.path} is not the data set that the run was trained on (differs in {', '.join(changed)})"
        if path is not None:
            raise ValueError(text)
        return None, f"{text}; give --data"
    return source, ""
