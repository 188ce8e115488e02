"""Honest timing: the contenders of a job take turns in one process, and the median of their ratios counts."""

import contextlib
import ctypes
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import comparison_table
from edm2kit.torch_utils.files import atomic_write
from edm2kit.torch_utils.records import provenance

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "records"
RUNS, WARMUP = 7, 2


@dataclass(frozen=True)
class Work:
    """What one run of a job amounts to: `amount` of `unit` ("multiply-adds", "bytes", "images", ...).

    `ceiling` names the machine's limit that it is held against, a key of `CEILINGS`, where there is one.
    """

    amount: float
    unit: str
    ceiling: str | None = None


@dataclass(frozen=True)
class Job:
    """One comparison: the first contender is A, the plain way; the others are ways to do the same faster.

    A contender is called without arguments and does the whole job once; one that does a part of it, and would take
    as long for every other, counts `times` as long. `goals` are the ratios to A to reach, `errors` the numerical
    differences from A, `error_kind` says how they were measured; `notes` go into the record. `prepare` is called
    before every run, outside its time.
    """

    name: str
    contenders: Mapping[str, Callable[[], object]]
    work: Work | None = None
    goals: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    error_kind: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)
    times: Mapping[str, int] = field(default_factory=dict)
    prepare: Callable[[], object] = lambda: None


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    runs: int = RUNS,
    warmup: int = WARMUP,
    synchronize: Callable[[], object] = lambda: None,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each run of each contender, A B C A B C ...; the first `warmup` rounds are not counted.

    `prepare` is called before every run, outside its time.

    From here on the process keeps the memory that it frees. A virtual machine takes ten times as long as a real one to
    hand out a page, which would tell more of the machine than of the contenders.
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
    """Let this process keep the memory that it frees."""
    # glibc: blocks below 32 MB (more it does not allow) are not mapped one by one, and the heap never shrinks
    with contextlib.suppress(OSError, AttributeError):
        for option, value in ((-3, 1 << 25), (-1, (1 << 31) - 1), (-2, 1 << 28)):
            ctypes.CDLL(None).mallopt(option, value)


def measure(job: Job, runs: int = RUNS, warmup: int = WARMUP, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Time a job and describe it as a JSON record; prints its table."""
    cuda = torch.device(device).type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    seconds = interleave(job.contenders, runs, warmup, synchronize, job.prepare)
    return describe(job, seconds, warmup, device)


def describe(
    job: Job, seconds: Mapping[str, list[float]], warmup: int = WARMUP, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The record of a job whose contenders, as `interleave` tells, took `seconds`; prints its table."""
    record = {
        "job": job.name,
        "runs": len(next(iter(seconds.values()))),
        "warmup": warmup,
        "contenders": _rows(job, seconds, device),
        "error_kind": job.error_kind,
        "work": None if job.work is None else vars(job.work),
        "times": dict(job.times),
        "notes": dict(job.notes),
        "command": command(),
        "provenance": provenance(device),
    }
    print(comparison_table([record]), flush=True)
    return record


def _rows(job: Job, seconds: Mapping[str, list[float]], device: torch.device | str) -> dict[str, Any]:
    seconds = {label: [job.times.get(label, 1) * s for s in found] for label, found in seconds.items()}
    plain = next(iter(seconds.values()))
    rows = {}
    for label, times in seconds.items():
        ratios = [a / b for a, b in zip(plain, times, strict=True)]  # round by round: the machine's pace may drift
        row: dict[str, Any] = {
            "median_sec": statistics.median(times),
            "min_sec": min(times),
            "max_sec": max(times),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "goal": job.goals.get(label),
            "error": job.errors.get(label),
        }
        if job.work is not None:
            row["per_sec"] = job.work.amount / row["median_sec"]
            if job.work.ceiling is not None:
                row["share_of_ceiling"] = row["per_sec"] / ceiling(job.work.ceiling, device)
        rows[label] = row
    return rows


def command() -> str:
    """The command line of this process as a person would type it, e.g. "python -m benchmarks.ema --only 8"."""
    module = sys.modules["__main__"].__spec__
    if module is None:
        return shlex.join(["python", *sys.argv])
    return shlex.join(["python", "-m", module.name, *sys.argv[1:]])


def save(record: Mapping[str, Any], folder: Path = RECORDS) -> None:
    """Write a record under its job's name."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / f"{record['job']}.json", "w") as file:
        file.write(json.dumps(record, indent=1) + "\n")


def load(folder: Path = RECORDS) -> list[dict[str, Any]]:
    """All records, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm, in float64."""
    value, exact = value.double().flatten(), exact.double().flatten()
    return float((value - exact).norm() / exact.norm())


def ceiling(name: str, device: torch.device | str = "cpu") -> float:
    """What the machine can do at best, measured once in a process: multiply-adds or bytes a second."""
    key = (name, str(device))
    if key not in _measured:
        run, amount = CEILINGS[name](torch.device(device))
        cuda = torch.device(device).type == "cuda"
        times = interleave({name: run}, 7, 2, torch.cuda.synchronize if cuda else lambda: None)[name]
        _measured[key] = amount / min(times)
    return _measured[key]


_measured: dict[tuple[str, str], float] = {}


def _matmul(dtype: torch.dtype, size: int, device: torch.device) -> tuple[Callable[[], object], float]:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, size**3


def _copy(device: torch.device) -> tuple[Callable[[], object], float]:
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), source.numel() * 4


def _read(device: torch.device) -> tuple[Callable[[], object], float]:
    size = 1 << 28
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (lives as long as the measurement)
    file.write(bytes(size))
    buffer = bytearray(size)

    def run() -> None:
        file.seek(0)
        file.readinto(buffer)

    return run, size


# name -> device -> (what to run, how much one run does); a matmul's amount counts multiply-adds
CEILINGS: dict[str, Callable[[torch.device], tuple[Callable[[], object], float]]] = {
    "matmul_fp32": lambda device: _matmul(torch.float32, 2048 if device.type == "cpu" else 8192, device),
    "matmul_fp64": lambda device: _matmul(torch.float64, 2048, device),
    "matmul_bf16": lambda device: _matmul(torch.bfloat16, 2048 if device.type == "cpu" else 8192, device),
    "matmul_fp16": lambda device: _matmul(torch.float16, 2048 if device.type == "cpu" else 8192, device),
    "memory_copy": _copy,
    "file_read": _read,
}
