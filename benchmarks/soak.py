"""Two ranks train for as long as you like, while memory, open files and threads of every process are watched.

    python -m benchmarks.soak --length 2h

Everything that happens in a long run happens often in this one: status lines, snapshots, sample images, checkpoints.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import yaml
from PIL import Image

from benchmarks import harness
from benchmarks.processes import children_of
from benchmarks.soak_rank import in_use_path
from edm2kit.cli import click_types as cli
from edm2kit.torch_utils.files import provenance

RANKS, IMAGES, SIDE = 2, 64, 16
WARM_SHARE = 0.25  # of the time, in which caches fill; not part of the slopes
GOAL_MB_PER_HOUR = 1.0
CONFIG = {
    "network": {
        "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8], "channels_per_head": 8
    },
    "cond": False,
    "batch_size": 16,
    "workers": 1,
    "rampup_nimg": 1000,
    "duration_nimg": 1 << 40,
    "status_every_nimg": 1600,
    "snapshot_every_nimg": 3200,
    "checkpoint_every_nimg": 1600,
    "keep_checkpoints": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One look at a process: seconds since the start, private memory in MB (1e6 bytes), open files, and threads."""

    seconds: float
    private_mb: float
    files: int
    threads: int


@dataclass(frozen=True)
class InUse:
    """One look at the allocators of a rank: seconds since the start, MB in use by malloc, small blocks of Python."""

    seconds: float
    malloc_mb: float
    python_blocks: int


@dataclass(frozen=True)
class Watched:
    """What was seen of a run: `samples` and `titles` by process id, `in_use` by rank, and the load of the machine."""

    samples: dict[int, list[Sample]]
    titles: dict[int, str]
    in_use: list[list[InUse]]
    loads: list[float]
    exit_code: int
    events: Mapping[str, int]


@click.command(cls=cli.Command)
@click.option(
    "--length",
    metavar="TIME",
    type=cli.Parsed(cli.parse_duration_sec),
    default="2h",
    help="How long to train, such as 2h",
)
@click.option(
    "--every", metavar="TIME", type=cli.Parsed(cli.parse_duration_sec), default="5s", help="Time between two looks"
)
@harness.out_option
def main(length: float, every: float, out: Path) -> None:
    """Train on two ranks, and fit the growth of every process; writes soak.json. Needs Linux (/proc)."""
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        seen = watch(Path(folder), length, every)
    ranks = {f"rank {number}": found for number, found in enumerate(seen.in_use)}
    record = {
        "job": "soak",
        "ranks": RANKS,
        "length_sec": round(max(one.seconds for found in seen.samples.values() for one in found), 1),
        "warm_share": WARM_SHARE,
        "goal_mb_per_hour": GOAL_MB_PER_HOUR,
        "exit_code": seen.exit_code,
        "events": seen.events,
        "processes": [
            summary(seen.titles[pid], found, ranks.get(seen.titles[pid], []))
            for pid, found in seen.samples.items()
            if len(found) >= 8
        ],
        "command": harness.command(),
        "provenance": provenance(),
        "cpu": harness.cpu(),
        "load_average": round(float(np.median(seen.loads)), 2),
        "load_range": [min(seen.loads), max(seen.loads)],
    }
    for row in record["processes"]:
        click.echo(
            f"{row['process']:24s} {row['median_mb']:8.1f} MB {row['slope_mb_per_hour']:+8.3f} "
            f"+- {row['slope_error_mb_per_hour']:.3f} MB/hour, {row['files']} files, {row['threads']} threads"
        )
    harness.save(record, out)
    if seen.exit_code:
        raise ValueError(f"the run ended with exit code {seen.exit_code}; see its output above")


def watch(folder: Path, length_sec: float, every_sec: float) -> Watched:
    """Train in `folder`, and look at every process of the run again and again."""
    random = np.random.default_rng(0)
    for k in range(IMAGES):
        path = folder / "data" / f"{k % 4}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    line = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "--no-python",
        sys.executable, "-c", "from benchmarks.soak_rank import main; main()", folder, f"{every_sec:g}",
        "--outdir", folder / "run", "--config", folder / "config.yaml", "--data", folder / "data", "--samples", "4",
        "--max-time", f"{length_sec:g}s", "--device", "cpu",
    ]  # fmt: skip
    samples: dict[int, list[Sample]] = {}
    titles: dict[int, str] = {}
    loads: list[float] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open(folder / "log.txt", "wb") as log:
        job = subprocess.Popen([str(word) for word in line], stdout=log, stderr=log, env=environment, cwd=harness.ROOT)
        try:
            started = time.monotonic()
            while job.poll() is None and time.monotonic() - started < length_sec + 600:
                for pid, title in _family(job.pid, "torchrun"):
                    if found := _look(pid, time.monotonic() - started):
                        samples.setdefault(pid, []).append(found)
                        titles[pid] = title
                loads.append(os.getloadavg()[0])
                time.sleep(every_sec)
        finally:
            if job.poll() is None:
                job.terminate()
            code = job.wait(timeout=120)
    text = (folder / "log.txt").read_text(errors="replace")
    if code:
        click.echo(text[:4000], err=True)
    run = folder / "run"
    lines = (run / "stats.jsonl").read_text().splitlines() if (run / "stats.jsonl").exists() else []
    events = {
        "status_lines": len(lines),
        "snapshots": len(list(run.glob("*.safetensors"))),
        "sample_sheets": len(list(run.glob("samples-*.png"))),
        "images": json.loads(lines[-1])["nimg"] if lines else 0,
    }
    in_use = [_read_in_use(in_use_path(folder, rank), started) for rank in range(RANKS)]
    return Watched(samples, titles, in_use, loads, code, events)


def _read_in_use(path: Path, started: float) -> list[InUse]:
    """What a rank has recorded of itself; nothing if it cannot, without glibc 2.33."""
    looks = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [InUse(look["monotonic_sec"] - started, look["malloc_mb"], look["python_blocks"]) for look in looks]


def _family(pid: int, title: str) -> Iterator[tuple[int, str]]:
    """A process and those below it, with titles such as "rank 0" and "rank 0, reader"."""
    yield pid, title
    for number, child in enumerate(children_of(pid)):
        yield from _family(child, f"rank {number}" if title == "torchrun" else f"{title}, reader")


def _look(pid: int, seconds: float) -> Sample | None:
    place = Path(f"/proc/{pid}")
    try:
        fields = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
        files = len(list((place / "fd").iterdir()))
    except OSError:
        return None
    if "RssAnon" not in fields:  # it is ending
        return None
    # pages of files and shared memory can be dropped, and come and go with the system's cache
    return Sample(seconds, int(fields["RssAnon"].split()[0]) * 1024 / 1e6, files, int(fields["Threads"]))


def summary(title: str, samples: Sequence[Sample], in_use: Sequence[InUse] = ()) -> Mapping[str, Any]:
    """The growth of a process after its first quarter, with the standard error of the slope.

    `in_use` are looks at its allocators, if it has recorded them.
    """
    first = samples[0].seconds + WARM_SHARE * (samples[-1].seconds - samples[0].seconds)
    kept = [one for one in samples if one.seconds >= first]
    slope, error = slope_per_hour([one.seconds for one in kept], [one.private_mb for one in kept])
    quarter = max(len(kept) // 4, 1)
    row = {
        "process": title,
        "samples": len(samples),
        "median_mb": round(float(np.median([one.private_mb for one in kept])), 3),
        "slope_mb_per_hour": round(slope, 4),
        "slope_error_mb_per_hour": round(error, 4),
        "first_and_last_mb": [round(kept[0].private_mb, 3), round(kept[-1].private_mb, 3)],
        "files": sorted({one.files for one in kept[:quarter]} | {one.files for one in kept[-quarter:]}),
        "most_files_first_and_last": [max(one.files for one in part) for part in (kept[:quarter], kept[-quarter:])],
        "threads": sorted({one.threads for one in kept}),
        "course_mb": [round(one.private_mb, 3) for one in samples[:: max(len(samples) // 60, 1)]],
    }
    late = [look for look in in_use if look.seconds >= first]
    if len(late) < 8:
        return row
    seconds = [look.seconds for look in late]
    for name in ("malloc_mb", "python_blocks"):
        slope, error = slope_per_hour(seconds, [getattr(look, name) for look in late])
        row[name] = {
            "median": round(float(np.median([getattr(look, name) for look in late])), 3),
            "slope_per_hour": round(slope, 4),
            "slope_error_per_hour": round(error, 4),
            "course": [round(getattr(look, name), 3) for look in in_use[:: max(len(in_use) // 60, 1)]],
        }
    return row


def slope_per_hour(seconds: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope of `values` per hour, with an error from ten blocks, as samples depend on each other."""
    hours, numbers = np.asarray(seconds) / 3600, np.asarray(values)
    blocks = min(10, len(numbers))
    x = np.array([part.mean() for part in np.array_split(hours, blocks)])
    y = np.array([part.mean() for part in np.array_split(numbers, blocks)])
    spread = ((x - x.mean()) ** 2).sum()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    rest = y - y.mean() - slope * (x - x.mean())
    return slope, float(np.sqrt((rest**2).sum() / max(blocks - 2, 1) / spread))


if __name__ == "__main__":
    main()
