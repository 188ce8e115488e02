"""Everything that needs a GPU, measured in one go, within a time limit, taken up again where it stopped."""

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
from edm2kit.torch_utils.files import atomic_write
from edm2kit.torch_utils.records import provenance


@click.command(cls=cli.Command)
@click.option("--out", type=click.Path(path_type=Path), default=harness.RECORDS / "gpu.json", help="The one JSON.")
@click.option("--minutes", default=24.0, show_default=True, help="What all items together may take.")
@click.option("--only", multiple=True, metavar="ITEM", help="Just this item (may be given several times).")
@click.option("--again", is_flag=True, help="Measure also what the file already holds.")
@click.option("--toy", is_flag=True, help="Tiny networks on the CPU, to see that it runs; says nothing of speed.")
@click.option("--item", hidden=True, help="Be the process that measures this item, into --out.")
def main(out: Path, minutes: float, only: tuple[str, ...], again: bool, toy: bool, item: str | None) -> None:
    """Measure training, evaluation, guided sampling and memory on this machine's GPU, into one JSON.

    Each item runs in a process of its own with its own time limit: one that fails or takes too long costs the others
    nothing, and what it had found by then stays. The file is written after each item; the same command again goes on
    with those that have no complete result.
    """
    if not toy and not torch.cuda.is_available():
        raise ValueError(
            "this measures an NVIDIA GPU, and PyTorch sees none here; see nvidia-smi and torch.version.cuda, or "
            "try the script itself on the CPU with --toy"
        )
    listed = items(toy_setting() if toy else gpu_setting())
    if item:
        measure(listed[item][1], out)
        return
    for name in only:
        if name not in listed:
            raise ValueError(f"there is no item {name!r}; there is: {', '.join(listed)}")
    record = read(out, toy)
    until = time.monotonic() + minutes * 60
    for name in only or listed:
        if not again and record["items"].get(name, {}).get("complete"):
            click.echo(f"{name}: already there")
            continue
        limit_sec = min(listed[name][0], until - time.monotonic())
        record["items"][name] = run_item(name, out, limit_sec, toy)
        save(record, out)
    click.echo(f"{sum(bool(i.get('complete')) for i in record['items'].values())} of {len(listed)} items, in {out}")


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
        raise ValueError(f"{out} is of {kept['provenance']['hardware']}; move it away, or give another --out")
    return kept


def run_item(name: str, out: Path, limit_sec: float, toy: bool) -> dict[str, Any]:
    """Measure one item in a process of its own."""
    if limit_sec < 5:
        return {"error": "no time was left for it; run the same command again"}
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
    """Write each stage of an item's result as soon as it is there."""
    for result in run():
        save(result, part)


def save(record: dict[str, Any], path: Path) -> None:
    with atomic_write(path, "w") as file:
        file.write(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
