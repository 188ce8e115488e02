"""Fair timing: contenders take turns in one process, and the median of their ratios counts."""

import contextlib
import ctypes
import json
import platform
import re
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.tables import comparison_table
from edm2kit.torch_utils.files import atomic_write, provenance

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "records"
RUNS, WARMUP = 7, 2

out_option = click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=RECORDS,
    show_default="benchmarks/records",
    help="Folder of the records",
)


def runs_option(default: int = RUNS) -> Callable[[Callable], Callable]:
    """The option --runs."""
    return click.option("--runs", metavar="N", type=click.IntRange(1), default=default, help="Rounds that are counted")


def only_option(names: Iterable[str]) -> Callable[[Callable], Callable]:
    """The option --only, for some of `names`."""
    return click.option("--only", type=click.Choice(list(names)), multiple=True, help="Only this one; may be repeated")


@dataclass(frozen=True)
class Work:
    """How much one run does: `amount` of `unit` ("multiply-adds", "bytes", "images", ...).

    `ceiling` is the machine's limit to compare with, a key of `CEILINGS`, or None.
    """

    amount: float
    unit: str
    ceiling: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Ways to do the same work: the first contender is A, the plain way; the others are faster ways.

    A contender is called without arguments and does all of the work once. If it only does a part, and each part would
    take the same time, `times` is the number of parts. `goals` are ratios to A to reach, `errors` numerical differences
    from A, and `error_kind` says how they were measured; `notes` go into the record. `ceilings` are the limits of
    contenders that compute in another precision than `work.ceiling` says. `prepare` is called before every run and not
    timed.
    """

    name: str
    contenders: Mapping[str, Callable[[], object]]
    work: Work | None = None
    goals: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    error_kind: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)
    times: Mapping[str, int] = field(default_factory=dict)
    ceilings: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[], object] = lambda: None


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    runs: int = RUNS,
    warmup: int = WARMUP,
    synchronize: Callable[[], object] = lambda: None,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each run of each contender, A B C A B C ...; the first `warmup` rounds are not counted.

    `prepare` is called before every run and not timed.

    From here on the process keeps memory that it frees. On some virtual machines a fresh page takes ten times as long
    as on a real one, so the result would depend on the machine more than on the contenders.
    """
    keep_memory()
    seconds: dict[str, list[float]] = {label: [] for label in contenders}
    for round_number in range(-warmup, runs):
        for label, run in contenders.items():
            prepare()
            synchronize()
            began = time.perf_counter()
            run()
            synchronize()
            elapsed = time.perf_counter() - began
            if round_number >= 0:
                seconds[label].append(elapsed)
    return seconds


def keep_memory() -> None:
    """Make this process keep memory that it frees."""
    # glibc: do not map blocks below 32 MB (its maximum) one by one, and never shrink the heap
    with contextlib.suppress(OSError, AttributeError):
        for option, value in ((-3, 1 << 25), (-1, (1 << 31) - 1), (-2, 1 << 28)):
            ctypes.CDLL(None).mallopt(option, value)


def measure(
    comparison: Comparison, runs: int = RUNS, warmup: int = WARMUP, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Time a comparison and return its JSON record; prints its table."""
    cuda = torch.device(device).type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    seconds = interleave(comparison.contenders, runs, warmup, synchronize, comparison.prepare)
    return describe(comparison, seconds, warmup, device)


def describe(
    comparison: Comparison, seconds: Mapping[str, list[float]], warmup: int = WARMUP, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The record of a comparison with the `seconds` that `interleave` returned; prints its table."""
    record = {
        "job": comparison.name,
        "runs": len(next(iter(seconds.values()))),
        "warmup": warmup,
        "contenders": _rows(comparison, seconds, device),
        "error_kind": comparison.error_kind,
        "work": None if comparison.work is None else vars(comparison.work),
        "times": dict(comparison.times),
        "notes": dict(comparison.notes),
        "command": command(),
        "provenance": provenance(device),
        "cpu": cpu(),
    }
    print(comparison_table([record]), flush=True)
    return record


def _rows(comparison: Comparison, seconds: Mapping[str, list[float]], device: torch.device | str) -> dict[str, Any]:
    seconds = {label: [comparison.times.get(label, 1) * s for s in found] for label, found in seconds.items()}
    plain = next(iter(seconds.values()))
    rows = {}
    for label, times in seconds.items():
        ratios = [a / b for a, b in zip(plain, times, strict=True)]  # per round: the machine's pace may drift
        row: dict[str, Any] = {
            "median_sec": statistics.median(times),
            "min_sec": min(times),
            "max_sec": max(times),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "goal": comparison.goals.get(label),
            "error": comparison.errors.get(label),
        }
        if comparison.work is not None:
            row["per_sec"] = comparison.work.amount / row["median_sec"]
            limit = comparison.ceilings.get(label, comparison.work.ceiling)
            if limit is not None:
                row["share_of_ceiling"] = row["per_sec"] / ceiling(limit, device)
        rows[label] = row
    return rows


_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def cpu() -> str:
    """The model of this machine's processor and its instructions that matter here, if the system names them."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = dict(re.findall(r"^(model name|flags|Features)\s*: (.*)$", text, flags=re.MULTILINE))
    flags = f"{found.get('flags', '')} {found.get('Features', '')}".split()
    named = [name for name in _INSTRUCTIONS if name in flags]
    model = found.get("model name") or platform.processor() or platform.machine()
    return f"{model} ({', '.join(named)})" if named else model


def command() -> str:
    """The command line of this process as a person would type it, e.g. "python -m benchmarks.ema --only 8"."""
    module = sys.modules["__main__"].__spec__
    if module is None:
        return shlex.join(["python", *sys.argv])
    return shlex.join(["python", "-m", module.name, *sys.argv[1:]])


def save(record: Mapping[str, Any], folder: Path = RECORDS) -> None:
    """Write a record to FOLDER/JOB.json."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / f"{record['job']}.json", "w") as file:
        file.write(json.dumps(record, indent=1) + "\n")


def load(folder: Path = RECORDS) -> list[dict[str, Any]]:
    """All records, sorted by file name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def peak_rss() -> int:
    """The largest number of bytes that this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include what the parent held when it started this process
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference divided by the norm, in float64."""
    value, exact = value.double().flatten(), exact.double().flatten()
    return float((value - exact).norm() / exact.norm())


def ceiling(name: str, device: torch.device | str = "cpu") -> float:
    """The machine's limit, multiply-adds or bytes per second, measured once per process."""
    key = (name, str(device))
    if key not in _measured:
        cuda = torch.device(device).type == "cuda"
        synchronize = torch.cuda.synchronize if cuda else lambda: None
        rates = []
        for run, amount in CEILINGS[name](torch.device(device)):
            rates.append(amount / min(interleave({name: run}, 7, 2, synchronize)[name]))
        _measured[key] = max(rates)
    return _measured[key]


_measured: dict[tuple[str, str], float] = {}


Measured = list[tuple[Callable[[], object], float]]  # what to run, and multiply-adds or bytes of one run


def _matmul(dtype: torch.dtype, size: int, device: torch.device) -> Measured:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return [(lambda: a @ b, size**3)]


def _multiply_adds(dtype: torch.dtype, device: torch.device) -> Measured:
    if device.type != "cpu":
        return _matmul(dtype, 8192, device)
    # oneDNN's convolutions are faster than MKL's matrix product on some processors
    size, width, side = 8, 256, 32
    x = torch.randn(size, width, side, side).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(width, width, 3, 3).to(dtype, memory_format=torch.channels_last)
    work = size * side**2 * width**2 * 9
    return [*_matmul(dtype, 2048, device), (lambda: torch.nn.functional.conv2d(x, weight, padding=1), work)]


def _copy(device: torch.device) -> Measured:
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    return [(lambda: target.copy_(source), source.numel() * 4)]


def _read(device: torch.device) -> Measured:
    size = 1 << 28
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (lives as long as the measurement)
    file.write(bytes(size))
    buffer = bytearray(size)

    def run() -> None:
        file.seek(0)
        file.readinto(buffer)

    return [(run, size)]


# name -> function from a device to ways to reach the limit, of which the fastest counts
CEILINGS: dict[str, Callable[[torch.device], Measured]] = {
    "matmul_fp32": lambda device: _multiply_adds(torch.float32, device),
    "matmul_fp64": lambda device: _matmul(torch.float64, 2048, device),
    "matmul_bf16": lambda device: _multiply_adds(torch.bfloat16, device),
    "matmul_fp16": lambda device: _multiply_adds(torch.float16, device),
    "memory_copy": _copy,
    "file_read": _read,
}


def added(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The records of two runs of `benchmarks.fuzz` on one parser as one: inputs and times are sums."""
    total = {key: before[key] + found[key] for key in ("inputs", "read", "refused", "failed", "failures")}
    elapsed_sec = round(before["elapsed_sec"] + found["elapsed_sec"], 1)
    slowest_sec = max(before["slowest_sec"], found["slowest_sec"])
    return {**total, "slowest_sec": slowest_sec, "elapsed_sec": elapsed_sec, "seed": found["seed"]}
