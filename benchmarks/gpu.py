"""All measurements that need a GPU, in one command with a time limit, which can be resumed."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import harness
from benchmarks.gpu_items import Item, compile_seconds, gpu_setting, items, toy_setting
from edm2kit.cli import click_types as cli
from edm2kit.torch_utils.files import atomic_write, provenance

WITHOUT_COMPILING = "the ways that compile were left out (--no-compile)"


@click.command(cls=cli.Command)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=harness.RECORDS / "gpu.json",
    show_default="benchmarks/records/gpu.json",
    help="Record to write",
)
@click.option("--minutes", default=9.0, show_default=True, help="Time limit of this call; the next one goes on")
@click.option("--only", multiple=True, metavar="ITEM", help="Only this item; may be repeated")
@click.option("--again", is_flag=True, help="Repeat items that the record already has")
@click.option("--no-compile", is_flag=True, help="Leave out what compiles, which takes most of the time")
@click.option("--toy", is_flag=True, help="Use tiny networks on the CPU, to test the script")
@click.option("--item", hidden=True, help="Measure this item in this process")
def main(
    out: Path, minutes: float, only: tuple[str, ...], again: bool, no_compile: bool, toy: bool, item: str | None
) -> None:
    """Measure training, sampling, detectors, the VAE and memory on the GPU of this machine; writes gpu.json.

    Each item runs in a separate process with a time limit that follows from what compiling takes on this machine. If
    one fails or takes too long, its results so far are kept and the others still run. The record is written after each
    item. An item that may not end in this call waits for the next one: run the same command until all are complete.
    With --no-compile most items take a minute; those with ways that compile are measured again without it.
    """
    if not toy and not torch.cuda.is_available():
        raise ValueError(
            "this benchmark needs an NVIDIA GPU, and PyTorch finds none. Check nvidia-smi and torch.version.cuda, or "
            "test the script on the CPU with --toy"
        )
    setting = toy_setting() if toy else gpu_setting()
    listed = items(dataclasses.replace(setting, compiled=not no_compile))
    if item:
        measure(listed[item].run, out)
        return
    for name in only:
        if name not in listed:
            raise ValueError(f"unknown item {name!r}; available: {', '.join(listed)}")
    record = read(out, toy)
    until = time.monotonic() + minutes * 60
    # items that failed come last, so that they do not take the time of those that were never tried
    for name in sorted(only or listed, key=lambda name: "error" in record["items"].get(name, {})):
        known = record["items"].get(name, {})
        if not again and (known.get("complete") or (no_compile and known.get("error") == WITHOUT_COMPILING)):
            click.echo(f"{name}: {'complete' if 'complete' in known else 'measured without compiling'}, skipped")
            continue
        limit_sec = listed[name].limit_sec(compile_seconds(record["items"]))
        if limit_sec > until - time.monotonic():
            click.echo(f"{name}: may take {limit_sec:.0f} s, more than this call has left")
            continue
        found = run_item(name, out, limit_sec, ["--toy"] * toy + ["--no-compile"] * no_compile)
        if no_compile and items(setting)[name].compiled and found.pop("complete", False):
            found["error"] = WITHOUT_COMPILING
        record["items"][name] = found
        save(record, out)
    click.echo(summary(listed, record["items"], out))


def summary(listed: dict[str, Item], found: dict[str, Any], out: Path) -> str:
    """How many items are complete, and whether another call will measure more."""
    complete = [name for name in listed if found.get(name, {}).get("complete")]
    failed = [name for name in listed if "error" in found.get(name, {})]
    text = f"{len(complete)} of {len(listed)} items are complete, in {out}"
    if len(complete) + len(failed) < len(listed):
        text += ". Run the same command again for the rest"
    elif failed:
        text += f". Without a complete result: {', '.join(failed)}; the same command tries them again"
    return text


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


def run_item(name: str, out: Path, limit_sec: float, options: list[str]) -> dict[str, Any]:
    """Measure one item in a separate process, with `options` of this command."""
    part = out.with_name(f"{out.stem}-{name}.part")
    part.unlink(missing_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-m", "benchmarks.gpu", "--item", name, "--out", str(part), *options]
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
