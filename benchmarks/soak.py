"""Two ranks train for as long as you like, while memory, open files and threads of every process are watched.

    python -m benchmarks.soak --length 2h

Everything that happens in a long run happens often in this one: status lines, snapshots, sample images, checkpoints.
"""

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
        samples, titles, code, events = watch(Path(folder), length, every)
    record = {
        "job": "soak",
        "ranks": RANKS,
        "length_sec": round(max(one.seconds for found in samples.values() for one in found), 1),
        "warm_share": WARM_SHARE,
        "goal_mb_per_hour": GOAL_MB_PER_HOUR,
        "exit_code": code,
        "events": events,
        "processes": [summary(titles[pid], found) for pid, found in samples.items() if len(found) >= 8],
        "command": harness.command(),
        "provenance": provenance(),
        "cpu": harness.cpu(),
        "load_average": os.getloadavg()[1],
    }
    for row in record["processes"]:
        click.echo(
            f"{row['process']:24s} {row['median_mb']:8.1f} MB {row['slope_mb_per_hour']:+8.3f} "
            f"+- {row['slope_error_mb_per_hour']:.3f} MB/hour, {row['files']} files, {row['threads']} threads"
        )
    harness.save(record, out)
    if code:
        raise ValueError(f"the run ended with exit code {code}; see its output above")


def watch(
    folder: Path, length_sec: float, every_sec: float
) -> tuple[dict[int, list[Sample]], dict[int, str], int, Any]:
    """Samples and titles of each process of a run by process id; then its exit code, and what happened in it."""
    random = np.random.default_rng(0)
    for k in range(IMAGES):
        path = folder / "data" / f"{k % 4}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    line = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "-m",
        "edm2kit.cli.train", "--outdir", folder / "run", "--config", folder / "config.yaml", "--data", folder / "data",
        "--samples", "4", "--max-time", f"{length_sec:g}s", "--device", "cpu",
    ]  # fmt: skip
    samples: dict[int, list[Sample]] = {}
    titles: dict[int, str] = {}
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
        "images": int(lines[-1].split('"nimg": ')[1].split(",")[0]) if lines else 0,
    }
    return samples, titles, code, events


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


def summary(title: str, samples: Sequence[Sample]) -> Mapping[str, Any]:
    """The growth of a process after its first quarter, with the standard error of the slope."""
    first = samples[0].seconds + WARM_SHARE * (samples[-1].seconds - samples[0].seconds)
    kept = [one for one in samples if one.seconds >= first]
    slope, error = slope_per_hour([one.seconds for one in kept], [one.private_mb for one in kept])
    quarter = max(len(kept) // 4, 1)
    return {
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
