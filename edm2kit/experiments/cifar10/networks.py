"""The best settings of each method as preset files with their networks, as the search left them, in half precision."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from edm2kit.cli.presets import preset_words, write_preset_file
from edm2kit.experiments.cifar10.settings import RUNS
from edm2kit.experiments.tune.report import PRESET, RESULT
from edm2kit.snapshots.file_format import read_header, save_snapshot, stored_dtype
from edm2kit.snapshots.loading import open_weights
from edm2kit.torch_utils.files import sha256_of

ROLES = ("net", "gnet")


def search_folder(out: Path, method: str) -> Path:
    """Where the search of a method leaves its results; each training time of the main network has its own."""
    run = out / "runs" / "main"
    times = [open_weights(path).header.nimg for path in run.glob("network-snapshot-*.safetensors")]
    if not times:
        raise ValueError(f"{run} has no snapshots yet; run the step train, or wait for the first one")
    return out / "search" / f"{method}-{max(times)}"


def is_searched(out: Path, method: str) -> bool:
    """Whether the search of a method has ended."""
    return (search_folder(out, method) / RESULT).exists()


def settings_file(out: Path, method: str) -> Path:
    """The best settings of a method as a preset file, beside copies of its networks in half precision.

    These copies are what is scored and published. Raises ValueError if the search of the method has not ended.
    """
    found = search_folder(out, method) / PRESET
    if not is_searched(out, method):
        raise ValueError(f"{found.parent} has no result yet; run the step tune for {method}")
    folder = out / "best"
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = yaml.safe_load(found.read_text(encoding="utf-8"))["options"]
    for role in ROLES:
        if role in options:
            source = found.parent / options[role]  # an absolute path stays as it is
            path = folder / f"{sha256_of(source)[:16]}.safetensors"
            if not path.exists():
                save_half(source, path)
            options[role] = path.name
    path = folder / f"{method}.yaml"
    write_preset_file(path, options, {})
    return path


def save_half(source: Path, path: Path) -> None:
    """Copy a snapshot in half precision, without the folder of the machine that trained it."""
    header = read_header(source)
    config = {**header.training_config, "data": Path(header.training_config["data"]).name}
    header = dataclasses.replace(header, training_config=config, dtype="float16")
    tensors = {}
    for name, tensor in load_file(source).items():
        tensors[name] = tensor.to(getattr(torch, stored_dtype(name, tensor.shape, header.dtype)))
    save_snapshot(path, tensors, header)


def words(path: Path, **others: Any) -> list[str]:
    """The options of generate.py for a preset file, with other values of some options."""
    found = preset_words(path)
    for name, value in others.items():
        found += [f"--{name}", f"{value:g}"]
    return found


def describe(out: Path, path: Path) -> dict[str, Any]:
    """A preset file as a record: its options, with run, training images and EMA length in place of each network."""
    options = dict(yaml.safe_load(path.read_text(encoding="utf-8"))["options"])
    for role in ROLES:
        if role in options:
            file = path.parent / options[role]
            header = read_header(file)
            run = _run_of(out, header.run_id)
            options[role] = {"run": run, "nimg": header.nimg, "ema_std": header.ema_std, "sha256": sha256_of(file)}
    return options


def _run_of(out: Path, run_id: str) -> str:
    for run in RUNS:
        some = next((out / "runs" / run).glob("network-snapshot-*.safetensors"), None)
        if some is not None and read_header(some).run_id == run_id:
            return run
    raise ValueError(f"{out / 'runs'} has no run {run_id}, although its network was the best; run the step tune again")
