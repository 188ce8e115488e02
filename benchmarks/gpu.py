"""All measurements that need a GPU, in one command with a time limit, which can be resumed."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import harness
from benchmarks.gpu_items import gpu_setting, items, toy_setting
from edm2kit.cli import click_types as cli
from edm2kit.torch_utils.files import atomic_write, provenance


@click.command(cls=cli.Command)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=harness.RECORDS / "gpu.json",
    show_default="benchmarks/records/gpu.json",
    help="Record to write",
)
@click.option("--minutes", default=24.0, help="Time limit for all items together")
@click.option("--only", multiple=True, metavar="ITEM", help="Only this item; may be repeated")
@click.option("--again", is_flag=True, help="Repeat items that the record already has")
@click.option("--toy", is_flag=True, help="Use tiny networks on the CPU, to test the script")
@click.option("--item", hidden=True, help="Measure this item in this process")
def main(out: Path, minutes: float, only: tuple[str, ...], again: bool, toy: bool, item: str | None) -> None:
    """Measure training, evaluation, guided sampling and memory on the GPU of this machine; writes gpu.json.

    Each item runs in a separate process with a time limit. If one fails or takes too long, its results so far are kept
    and the others still run. The record is written after each item. Run the same command again for items without a
    complete result.
    """
    if not toy and not torch.cuda.is_available():
        raise ValueError(
            "this benchmark needs an NVIDIA GPU, and PyTorch finds none. Check nvidia-smi and torch.version.cuda, or "
            "test the script on the CPU with --toy"
        )
    listed = items(toy_setting() if toy else gpu_setting())
    if item:
        measure(listed[item][1], out)
        return
    for name in only:
        if name not in listed:
            raise ValueError(f"unknown item {name!r}; available: {', '.join(listed)}")
    record = read(out, toy)
    until = time.monotonic() + minutes * 60
    for name in only or listed:
        if not again and record["items"].get(name, {}).get("complete"):
            click.echo(f"{name}: complete, skipped")
            continue
        limit_sec = min(listed[name][0], until - time.monotonic())
        record["items"][name] = run_item(name, out, limit_sec, toy)
        save(record, out)
    complete = [found for found in record["items"].values() if found.get("complete")]
    click.echo(f"{len(complete)} of {len(listed)} items are complete, in {out}")


def read(out: Path, toy: bool) -> dict[str, Any]:
    """The record so far, or a new one."""
    fresh = {
        "job": "gpu",
        "kind": "gpu",
        "toy": toy,
        "items": {},
        "command": harness.command(),
        "provenance": provenance("cpu" if toy else "cuda"),
    }
    if not out.exists():
        return fresh
    kept = json.loads(out.read_text(encoding="utf-8"))
    if kept["toy"] != toy or kept["provenance"]["hardware"] != fresh["provenance"]["hardware"]:
        raise ValueError(f"{out} was measured on {kept['provenance']['hardware']}. Move it, or use another --out")
    return kept


def run_item(name: str, out: Path, limit_sec: float, toy: bool) -> dict[str, Any]:
    """Measure one item in a separate process."""
    if limit_sec < 5:
        return {"error": "no time was left; run the same command again"}
    part = out.with_name(f"{out.stem}-{name}.part")
    part.unlink(missing_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-m", "benchmarks.gpu", "--item", name, "--out", str(part), *(["--toy"] if toy else [])]
    click.echo(f"== {name}, at most {limit_sec:.0f} s")
    error = None
    try:
        if code := subprocess.run(line, cwd=harness.ROOT, timeout=limit_sec).returncode:
            error = f"its process ended with exit code {code}"
    except subprocess.TimeoutExpired:
        error = f"it took longer than {limit_sec:.0f} s"
    found = json.loads(part.read_text(encoding="utf-8")) if part.exists() else {}
    part.unlink(missing_ok=True)
    return {**found, "complete": True} if error is None else {**found, "error": error}


def measure(run: Any, part: Path) -> None:
    """Write each stage of an item's result as soon as it is available."""
    for result in run():
        save(result, part)


def save(record: dict[str, Any], path: Path) -> None:
    with atomic_write(path, "w") as file:
        file.write(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
