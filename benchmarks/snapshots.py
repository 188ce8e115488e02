"""Writing and reading snapshots of edm2-img512-xxs: time, and peak memory of writing."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch

from benchmarks import harness, plain_io
from benchmarks.harness import Comparison, Work
from edm2kit.cli import click_types as cli
from edm2kit.models import Precond, full_architecture
from edm2kit.snapshots.file_format import Header, save_snapshot
from edm2kit.snapshots.loading import load_snapshot
from edm2kit.training.config import config_from_dict, preset_path, read_yaml


@click.command(cls=cli.Command)
@harness.runs_option()
@harness.only_option(["save", "save_to_disk", "load"])
@click.option("--preset", default="edm2-img512-xxs", show_default=True, help="Preset with the architecture")
@harness.out_option
@click.option("--worker", nargs=2, hidden=True, help="Measure memory in this process: WAY PRESET")
def main(runs: int, only: tuple[str, ...], preset: str, out: Path, worker: tuple[str, str] | None) -> None:
    """Compare snapshots with torch.save of a copied network; writes snapshot_*.json."""
    if worker:
        print(json.dumps(added_memory(*worker)))
        return
    with tempfile.TemporaryDirectory() as name:
        for job in jobs(Path(name), preset):
            if not only or job.name.removeprefix("snapshot_") in only:
                harness.save(harness.measure(job, runs), out)


def jobs(folder: Path, preset: str) -> list[Comparison]:
    """Saving to the operating system's cache, saving to disk, and loading as float32."""
    net, arguments = make_network(preset), architecture(preset)
    header = Header(arguments, {"kind": "rgb"}, 1 << 23, 0.05)
    save(net, header, folder / "ours")
    plain_io.save_network(folder / "plain", net)
    ours = partial(save, net, header, folder / "saved" / "ours")
    plain = partial(plain_io.save_network, folder / "saved" / "plain", net)
    work = partial(Work, os.path.getsize(folder / "ours"), "bytes")
    memory = {way: memory_of(way, preset) for way in ("plain", "tensor by tensor")}
    remove = partial(empty, folder / "saved")
    notes = {"parameters": sum(p.numel() for p in net.parameters())}
    load = {
        "plain": partial(plain_io.load_network, folder / "plain", **arguments),
        "load_snapshot": lambda: load_snapshot(folder / "ours").net,
    }
    return [
        Comparison(
            "snapshot_save",
            {"plain": plain, "tensor by tensor": partial(not_flushed, ours)},
            work=work("memory_copy"),
            goals={"tensor by tensor": 2},
            notes={**notes, "added_memory_bytes": memory, "flushed": False},
            prepare=remove,
        ),
        Comparison(
            "snapshot_save_to_disk",
            {"plain": partial(flushed, plain, folder / "saved" / "plain"), "tensor by tensor": ours},
            work=work(None),
            notes={**notes, "flushed": True},
            prepare=remove,
        ),
        Comparison(
            "snapshot_load",
            load,
            work=work("file_read"),
            goals={"load_snapshot": 4},
            errors={"load_snapshot": difference(load["load_snapshot"](), load["plain"]())},
            error_kind="of the weights, relative norm",
            notes=notes,
        ),
    ]


def architecture(preset: str) -> dict[str, Any]:
    """Precond's arguments for a preset."""
    config = config_from_dict(read_yaml(preset_path(preset)), preset)
    size, channels = (64, 3) if "img64" in preset else (64, 4)
    return full_architecture(size, channels, 1000, config.sigma_data, config.network)


def make_network(preset: str) -> Precond:
    torch.manual_seed(0)
    return Precond(**architecture(preset)).requires_grad_(False)


def save(net: Precond, header: Header, path: Path) -> None:
    """Save as training does."""
    save_snapshot(path, net.state_dict(), header)


def empty(folder: Path) -> None:
    """Remove and recreate the folder: file systems may flush a file at once if it replaces another."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def not_flushed(run: Callable[[], None]) -> None:
    """Run without flushing to disk: the plain way does not flush either."""
    with mock.patch("os.fsync"):
        run()


def flushed(run: Callable[[], None], path: Path) -> None:
    """Run, and flush the file to disk, as snapshots always are."""
    run()
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def difference(net: Precond, plain: Precond) -> float:
    state, other = net.state_dict(), plain.state_dict()
    return harness.relative_error(*(torch.cat([part[name].flatten() for name in other]) for part in (state, other)))


def memory_of(way: str, preset: str) -> int:
    """Bytes that saving adds to the peak memory of a separate process."""
    command = [sys.executable, "-m", "benchmarks.snapshots", "--worker", way, preset]
    return json.loads(
        subprocess.run(command, check=True, cwd=harness.ROOT, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def added_memory(way: str, preset: str) -> int:
    """Bytes that saving adds to this process, which already holds the network and has saved a tiny one."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "network"
        tiny = Precond(8, 3, 0, model_channels=8, channel_mult=[1], attn_resolutions=[], channels_per_head=8)
        for net in (tiny, make_network(preset)):
            before = harness.peak_rss()
            if way == "plain":
                plain_io.save_network(path, net)
            else:
                save(net, Header(architecture(preset), {"kind": "rgb"}, 1 << 23, 0.05), path)
    return harness.peak_rss() - before


if __name__ == "__main__":
    main()
