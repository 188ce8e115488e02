"""Post-hoc EMA: 1 to 31 outputs from 48 snapshots of edm2-img512-xxs, time and memory."""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import click
import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks import harness, plain_io
from benchmarks.harness import Comparison, Work
from benchmarks.snapshots import architecture, empty, not_flushed
from edm2kit.cli import click_types as cli
from edm2kit.ema.rebuild import plan_outputs, write_outputs
from edm2kit.models.edm2 import Precond
from edm2kit.snapshots.file_format import Header, save_snapshot, snapshot_name
from edm2kit.snapshots.loading import open_sources

OUTPUTS = (1, 2, 4, 8, 16, 31)
GOALS = {8: 8.0, 31: 11.0}
UNFLUSHED = "one pass, not flushed to disk"  # as the plain way
_TIMES = 24  # snapshots of each of two lengths
_EVERY_NIMG = 1 << 23


@click.command(cls=cli.Command)
@harness.runs_option()
@harness.only_option([str(k) for k in OUTPUTS])
@click.option("--preset", default="edm2-img512-xxs", show_default=True, help="Preset with the architecture")
@harness.out_option
@click.option("--worker", nargs=3, hidden=True, help="Measure memory in this process: WAY FOLDER OUTPUTS")
def main(runs: int, only: tuple[str, ...], preset: str, out: Path, worker: tuple[str, str, str] | None) -> None:
    """Compare rebuilding averages one by one and in one pass; writes posthoc_ema_*.json."""
    if worker:
        print(json.dumps(added_memory(worker[0], Path(worker[1]), int(worker[2]))))
        return
    counts = [int(k) for k in only] or list(OUTPUTS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_snapshots(folder, preset)
        contenders = {"plain": partial(one_by_one, folder, 1)}
        for count in counts:
            contenders[f"{count}"] = partial(one_pass, folder, count)
            contenders[f"{count}, not flushed"] = partial(not_flushed, contenders[f"{count}"])
        seconds = harness.interleave(contenders, runs, 1, prepare=partial(empty_outputs, folder))
        error, plain_bytes = compare(folder), memory_of("plain", folder, 1)
        for count in counts:
            memory = {"plain": plain_bytes, "one pass": memory_of("one pass", folder, count)}
            harness.save(describe(count, seconds, folder, error, memory), out)


def describe(count: int, seconds: dict[str, list[float]], folder: Path, error: float, memory: dict[str, int]) -> dict:
    """The record of `count` outputs. The plain way makes one after another, so only the first is timed."""
    labels = {"plain": "plain", f"{count}": "one pass", f"{count}, not flushed": UNFLUSHED}
    chosen = {labels[label]: found for label, found in seconds.items() if label in labels}
    read = sum(path.stat().st_size for path in folder.glob("network*"))
    written = read // (2 * _TIMES)
    job = Comparison(
        f"posthoc_ema_{count:02d}",
        dict.fromkeys(chosen),
        work=Work(read + count * written, "bytes", "file_read"),
        goals={UNFLUSHED: GOALS[count]} if count in GOALS else {},
        errors={"one pass": error},
        error_kind="of the stored weights, relative norm; both are stored in half precision",
        notes={"outputs": count, "snapshots": 2 * _TIMES, "added_memory_bytes": memory},
        times={"plain": count},
    )
    return harness.describe(job, chosen, 1)


def write_snapshots(folder: Path, preset: str) -> None:
    """Write snapshots of a run: random weights that differ between snapshots."""
    arguments = architecture(preset)
    torch.manual_seed(0)
    state = Precond(**arguments).state_dict()
    for k in range(1, _TIMES + 1):
        for std in (0.05, 0.1):
            header = Header(arguments, {"kind": "rgb"}, k * _EVERY_NIMG, std)
            shifted = {n: v.roll(k) if v.ndim > 1 else v for n, v in state.items()}
            with mock.patch("os.fsync"):
                save_snapshot(folder / snapshot_name(header.nimg, std), shifted, header)


def plan(folder: Path, count: int) -> tuple[list, list]:
    inputs = open_sources([folder], "network")
    return inputs, plan_outputs(inputs, np.linspace(0.02, 0.2, count).tolist())


def one_pass(folder: Path, count: int) -> None:
    """Rebuild `count` averages as reconstruct_phema.py does."""
    inputs, outputs = plan(folder, count)
    write_outputs(inputs, outputs, [folder / "out" / f"{k}.safetensors" for k in range(count)])


def empty_outputs(folder: Path) -> None:
    """Remove the files that either way has written."""
    empty(folder / "out")
    empty(folder / "plain")


def one_by_one(folder: Path, count: int) -> None:
    """Read all files for the first output, then all files for the second, ..."""
    inputs, outputs = plan(folder, count)
    (folder / "plain").mkdir(exist_ok=True)
    for k, output in enumerate(outputs):
        paths = [weights.path for weights in inputs]
        plain_io.posthoc_ema(paths, output.coefficients, folder / "plain" / f"{k}.safetensors")


def compare(folder: Path) -> float:
    """Relative difference of the two ways' files."""
    one_pass(folder, 2)
    one_by_one(folder, 2)
    ours, plain = (load_file(folder / way / "1.safetensors") for way in ("out", "plain"))
    flat = [torch.cat([part[name].flatten().float() for name in plain]) for part in (ours, plain)]
    return harness.relative_error(*flat)


def memory_of(way: str, folder: Path, count: int) -> int:
    """Bytes that the work adds to the peak memory of a separate process."""
    command = [sys.executable, "-m", "benchmarks.ema", "--worker", way, str(folder), str(count)]
    return json.loads(
        subprocess.run(command, check=True, cwd=harness.ROOT, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def added_memory(way: str, folder: Path, count: int) -> int:
    """Bytes that the work adds to the peak memory of this process."""
    plan(folder, count)
    with tempfile.TemporaryDirectory() as name:
        for path in folder.glob("network*"):
            os.symlink(path, Path(name) / path.name)
        before = harness.peak_rss()
        one_pass(Path(name), count) if way == "one pass" else one_by_one(Path(name), count)
    return harness.peak_rss() - before


if __name__ == "__main__":
    main()
