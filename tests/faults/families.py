"""The command families: their smallest real jobs, and what their results hold.

Everything that a job writes is called out*, everything else is input.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tests.faults.processes import Job, Server
from tests.support import fakes, runs, tiny, tuning

NETWORK = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 8}
TRAINING = {
    "network": NETWORK,
    "ref_lr": 0.01,
    "ref_batches": 10,
    "rampup_nimg": 16,
    "duration_nimg": 64,
    "batch_size": 8,
    "status_every_nimg": 16,
    "snapshot_every_nimg": 1000,
    "checkpoint_every_nimg": 16,
    "keep_checkpoints": 2,
}
# of a JSON record: what differs from run to run
_VOLATILE = {
    "command", "started", "elapsed_sec", "runs", "seconds", "images_per_sec", "cpu_peak_gb", "batch", "processes",
    "pace_sec_per_image", "commit", "hardware", "sha256", "data_files",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A way to run a command of a family."""

    name: str
    job: Job
    readers: bool = False  # whether it starts processes that read


@dataclass(frozen=True)
class Family:
    """Jobs that write results of one kind.

    `prepare(folder, server)` makes their inputs.
    `unchecked` are suffixes of result files without a checksum, in which damage can go unnoticed. `lasting` are those
    of results that are not made again if someone deletes them. If `is_shared`, several processes divide the work, so
    that its results depend on their order.
    """

    name: str
    commands: tuple[str, ...]
    prepare: Callable[[Path, Server], None]
    variants: tuple[Variant, ...]
    unchecked: tuple[str, ...] = ()
    lasting: tuple[str, ...] = ()
    is_shared: bool = False


def _job(command: str, text: str, ranks: int = 1, agent: bool = False) -> Job:
    return Job(command, tuple(text.split()), ranks, agent)


def _for_training(folder: Path, server: Server) -> None:
    tiny.make_dataset(folder / "data", 24, size=8)
    for name, workers in (("plain", 0), ("readers", 1)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**TRAINING, "workers": workers}))


def _for_generating(folder: Path, server: Server) -> None:
    architecture = {**NETWORK, "img_resolution": 8, "img_channels": 3, "label_dim": 4}
    fakes.tiny_snapshot(folder / "net.safetensors", **architecture)


def _for_data_sets(folder: Path, server: Server) -> None:
    tiny.make_dataset(folder / "data", 24, size=16)
    fakes.tiny_vae(folder / "vae")


def _for_metrics(folder: Path, server: Server) -> None:
    tiny.make_dataset(folder / "data", 24, size=8)
    tiny.make_dataset(folder / "images", 20, size=8)
    make_reference(folder, server)


def make_reference(folder: Path, server: Server) -> None:
    """Reference statistics of folder/data in folder/ref.npz, by the command itself."""
    words = "ref --data data --dest ref.npz --metrics fd_random --device cpu"
    (ending,) = server.run(folder, [_job("metrics", words)])
    assert ending.succeeded, ending.text


def _for_rebuilding(folder: Path, server: Server) -> None:
    snapshots = runs.walk(tracked=()).snapshots
    runs.write(folder / "run", snapshots[::2])


def _for_tuning(folder: Path, server: Server) -> None:
    tuning.make_run(folder / "main", seed=0, times=(1000, 2000))
    tuning.make_run(folder / "guide", seed=1, times=(1000,))
    tiny.make_dataset(folder / "data", 16, size=8)
    make_reference(folder, server)


_TRAIN = "--outdir out --data data --samples 0 --device cpu --timeout 20s --config"
_GENERATE = "--net net.safetensors --seeds 0-8 --batch 3 --steps 2 --device cpu"
_TUNE = (
    "search --main main --guide guide --ref ref.npz --metric fd_random --budget 40img --num 8 --halvings 1 "
    "--outdir out --device cpu -- --steps 2 --balanced"
)
FAMILIES = {
    "train": Family(
        "train",
        ("train",),
        _for_training,
        (
            Variant("one process", _job("train", f"{_TRAIN} plain.yaml --samples 1")),
            Variant("with readers", _job("train", f"{_TRAIN} readers.yaml"), readers=True),
            Variant("two ranks", _job("train", f"{_TRAIN} plain.yaml", 2)),
            Variant("two ranks, sharded", _job("train", f"{_TRAIN} plain.yaml --shard true", 2)),
            Variant("two ranks under an agent", _job("train", f"{_TRAIN} readers.yaml", 2, agent=True), readers=True),
        ),
        unchecked=(".jsonl",),
        lasting=(".safetensors", ".png", ".jsonl"),
    ),
    "generate": Family(
        "generate",
        ("generate",),
        _for_generating,
        (
            Variant("folder", _job("generate", f"{_GENERATE} --outdir out")),
            Variant("folder and sheet", _job("generate", f"{_GENERATE} --outdir out --subdirs --grid out.png")),
            Variant("one file", _job("generate", f"{_GENERATE} --npz out.npz")),
            Variant("two ranks", _job("generate", f"{_GENERATE} --outdir out --timeout 20s", 2)),
        ),
    ),
    "dataset": Family(
        "dataset",
        ("dataset", "latents"),
        _for_data_sets,
        (
            Variant("convert to a zip", _job("dataset", "convert --source data --dest out.zip --workers 1")),
            Variant("convert to a folder", _job("dataset", "convert --source data --dest out --workers 1")),
            Variant(
                "convert with readers",
                _job("dataset", "convert --source data --dest out.zip --workers 2 --timeout 20s"),
                readers=True,
            ),
            Variant(
                "encode",
                _job("latents", "encode --source data --dest out.zip --vae vae --device cpu --batch 4 --workers 1"),
            ),
        ),
    ),
    "metrics": Family(
        "metrics",
        ("metrics",),
        _for_metrics,
        (
            Variant("ref", _job("metrics", "ref --data data --dest out.npz --metrics fd_random --device cpu")),
            Variant(
                "calc",
                _job(
                    "metrics",
                    "calc --images images --ref ref.npz --num 16 --real data --bootstrap 4 --record out.json "
                    "--device cpu",
                ),
            ),
            Variant(
                "calc on two ranks",
                _job(
                    "metrics",
                    "calc --images images --ref ref.npz --num-images 20 --record out.json --bootstrap 0 --device cpu "
                    "--timeout 20s",
                    2,
                ),
            ),
        ),
    ),
    "reconstruct": Family(
        "reconstruct",
        ("reconstruct",),
        _for_rebuilding,
        (
            Variant(
                "one process", _job("reconstruct", "--indir run --outdir out --outstd 0.06,0.08,0.1 --skip --batch 2")
            ),
            Variant(
                "two ranks",
                _job("reconstruct", "--indir run --outdir out --outstd 0.06,0.08,0.1 --skip --timeout 20s", 2),
            ),
        ),
    ),
    "tune": Family(
        "tune",
        ("tune", "metrics"),
        _for_tuning,
        (Variant("search", _job("tune", _TUNE)),),
        unchecked=(".db", ".svg", ".html", ".md", ".yaml", ".json"),
        lasting=(".npz",),  # features, which a search needs only to continue
        is_shared=True,
    ),
}


def results(folder: Path) -> dict[str, str]:
    """A digest of every result in a folder of a trial by its name, without what differs from run to run."""
    found = {}
    for path in written(folder):
        if not is_furniture(path):
            found[path.relative_to(folder).as_posix()] = digest(path)
    checkpoints = [name for name in found if name.endswith(".pt")]
    for name in checkpoints[:-1]:  # how many are kept depends on where a run was stopped
        del found[name]
    return found


def written(folder: Path) -> list[Path]:
    """The files in a folder of a trial that are no inputs."""
    found = sorted(folder.rglob("*"))
    return [path for path in found if path.is_file() and path.relative_to(folder).parts[0].startswith("out")]


def is_furniture(path: Path) -> bool:
    """Whether a file is no result: locks that may stay, and what was set aside as damaged."""
    return path.name.startswith(".") or path.suffix == ".damaged" or path.parent.name == "workers"


def leftovers(folder: Path) -> list[str]:
    """Temporary files in a folder of a trial, of which none should remain."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    return [name for name in names if name.endswith((".tmp", ".partial", ".parts")) or name.endswith("-journal")]


def digest(path: Path) -> str:
    """A digest of what a file says."""
    data = path.read_bytes()
    match path.suffix:
        case ".pt":
            content = _describe(torch.load(io.BytesIO(data), weights_only=True))
        case ".jsonl":
            content = sorted({json.loads(line)["nimg"] for line in data.decode().splitlines()})[-1:]
        case ".json":
            content = _steady(json.loads(data))
        case ".npz":
            with np.load(io.BytesIO(data)) as file:
                content = {name: hashlib.sha256(file[name].tobytes()).hexdigest() for name in sorted(file)}
        case ".html" | ".svg" | ".db" | ".md":
            return "exists"
        case _:
            return hashlib.sha256(data).hexdigest()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _describe(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, Mapping):
        return {str(key): _describe(one) for key, one in value.items() if key != "elapsed_sec"}
    if isinstance(value, list | tuple):
        return [_describe(one) for one in value]
    return repr(value)


def _steady(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "trials" in value and "confirmation" in value:
            return _of_search(value)
        return {key: _steady(one) for key, one in value.items() if key not in _VOLATILE}
    if isinstance(value, list):
        return [_steady(one) for one in value]
    return value


def _of_search(record: Mapping[str, Any]) -> Any:
    """What a search found, in whatever order."""
    trials = {json.dumps([one["key"], one["num_images"], one["value"]], sort_keys=True) for one in record["trials"]}
    points = [[one["way"], one["first_seed"], one["value"]] for one in record["confirmation"]["points"]]
    return [record["best"], record["value"], sorted(trials), sorted(points)]
