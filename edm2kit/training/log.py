"""What a run says of itself while it goes: status lines, JSON statistics, TensorBoard."""

import json
import resource
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from edm2kit.torch_utils import dist
from edm2kit.torch_utils.files import atomic_write

STATS_NAME = "stats.jsonl"


class RunLog:
    """Writes status lines to the terminal, `stats.jsonl` to the run folder and, if asked, TensorBoard events.

    A resumed run drops the lines later than its checkpoint first, so that the file reads like one run's.
    """

    def __init__(self, run_dir: Path, duration_nimg: int, device: torch.device, tensorboard: bool = False):
        self.run_dir, self.duration_nimg, self.device = run_dir, duration_nimg, device
        self._writer_class = _tensorboard_writer_class() if tensorboard else None
        self._events: Any = None
        self._last = (0, 0.0)

    def begin(self, nimg: int, elapsed_sec: float) -> None:
        """Say where the run starts."""
        self._last = (nimg, elapsed_sec)
        dist.on_rank0(_drop_later_lines, self.run_dir / STATS_NAME, nimg)
        dist.print0(f"Resuming at {nimg} images" if nimg else "Starting at image 0")

    def status(self, nimg: int, elapsed_sec: float, stats: dict[str, tuple[float, int]]) -> None:
        """Record the means since the last status."""
        images, seconds = nimg - self._last[0], elapsed_sec - self._last[1]
        self._last = (nimg, elapsed_sec)
        record: dict[str, Any] = {"nimg": nimg, "elapsed_sec": round(elapsed_sec, 3)}
        record["images_per_sec"] = round(images / max(seconds, 1e-9), 3)
        record.update({name: mean for name, (mean, count) in stats.items() if count})
        # the count of a whole period is wanted here, not its mean over steps
        mean, count = stats["nonfinite_gradients"]
        record["nonfinite_gradients"] = round(mean * count)
        record.update(memory_gb(self.device))
        dist.on_rank0(_append_line, self.run_dir / STATS_NAME, json.dumps(record))
        dist.print0(self._line(record))
        if self._writer_class is not None:
            dist.on_rank0(self._write_events, record)

    def _write_events(self, record: dict[str, Any]) -> None:
        if self._events is None:
            self._events = self._writer_class(str(self.run_dir / "tensorboard"), purge_step=record["nimg"])
        for name, value in record.items():
            if name != "nimg":
                self._events.add_scalar(name, value, global_step=record["nimg"])
        self._events.flush()

    def _line(self, record: dict[str, Any]) -> str:
        nimg, rate = record["nimg"], record["images_per_sec"]
        left = timedelta(seconds=round((self.duration_nimg - nimg) / max(rate, 1e-9)))
        parts = [
            f"{nimg:,} images ({min(nimg / self.duration_nimg, 1):.1%})",
            f"loss {record['loss']:.4f}",
            f"lr {record['lr']:.5f}",
            f"grad {record['gradient_norm']:.3f}",
            f"{rate:.1f} img/s",
            f"mem {record.get('gpu_peak_gb', record['cpu_peak_gb']):.2f} GB",
            f"{timedelta(seconds=round(record['elapsed_sec']))} gone, {left} left",
        ]
        if record["nonfinite_gradients"]:
            parts.append(f"{record['nonfinite_gradients']} non-finite gradients set to 0")
        return "  ".join(parts)

    def stopped(self, nimg: int) -> None:
        """Say that the run was asked to stop and can be taken up again."""
        dist.print0(f"Stopped as asked at {nimg} images, all saved; the same command goes on from here")

    def finished(self, nimg: int) -> None:
        """Say that the run is complete."""
        dist.print0(f"Finished: {nimg} images, results in {self.run_dir}")


def memory_gb(device: torch.device) -> dict[str, float]:
    """Peak memory of this process in GB (1e9 bytes): resident, and on the GPU where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"cpu_peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)}
    if device.type == "cuda":
        peaks["gpu_peak_gb"] = round(torch.cuda.max_memory_reserved(device) / 1e9, 3)
    return peaks


def _append_line(path: Path, line: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def _drop_later_lines(path: Path, nimg: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["nimg"] <= nimg:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue  # a line cut short by the end of the last process
    with atomic_write(path, "w") as file:
        file.writelines(kept)


def _tensorboard_writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter
