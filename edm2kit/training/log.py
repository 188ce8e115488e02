"""Progress of a training run: running statistics, status lines, stats.jsonl and TensorBoard."""

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


class RunningStats:
    """Mean and count of named quantities since the last `collect`.

    `add` does not wait for the device. Sums are float64, on the CPU if the device does not support it.
    """

    def __init__(self, device: torch.device):
        self._device = torch.device("cpu") if device.type == "mps" else device
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, values: torch.Tensor | float, where: torch.Tensor | None = None) -> None:
        """Add all of `values`, or those at which the boolean tensor `where` (same shape) is true."""
        values = torch.as_tensor(values).detach().to(self._device, torch.float64)
        mask = torch.ones_like(values) if where is None else where.to(self._device, torch.float64)
        moments = torch.stack([mask.sum(), torch.where(mask > 0, values, 0).sum()])
        self._sums[name] = self._sums[name] + moments if name in self._sums else moments

    def collect(self) -> dict[str, tuple[float, int]]:
        """(mean, count) over all ranks by name, in the order first added; then start over.

        Every rank must have added the same names. The mean of no values is NaN.
        """
        if not self._sums:
            return {}
        names = list(self._sums)
        totals = dist.all_reduce_sum_(torch.stack(list(self._sums.values()))).tolist()
        self._sums = {}
        return {name: (s / c if c else float("nan"), int(c)) for name, (c, s) in zip(names, totals, strict=True)}


class RunLog:
    """Writes status lines to the terminal, `stats.jsonl` to the run folder and, if asked for, TensorBoard events.

    Raises ValueError if TensorBoard is asked for but not installed.
    """

    def __init__(self, run_dir: Path, duration_nimg: int, device: torch.device, tensorboard: bool = False):
        self.run_dir, self.duration_nimg, self.device = run_dir, duration_nimg, device
        self._make_writer: Any = None
        self._writer: Any = None
        self._last = (0, 0.0)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
            self._make_writer = SummaryWriter

    def begin(self, nimg: int, elapsed_sec: float) -> None:
        """Report where the run starts; drop statistics later than that, so that the file reads like a single run's."""
        self._last = (nimg, elapsed_sec)
        dist.on_rank0(drop_later_lines, self.run_dir / STATS_NAME, nimg)
        dist.print0(f"Resuming at {nimg} images" if nimg else "Starting at image 0")

    def status(self, nimg: int, elapsed_sec: float, stats: dict[str, tuple[float, int]]) -> None:
        """Record the means since the last status."""
        images, seconds = nimg - self._last[0], elapsed_sec - self._last[1]
        self._last = (nimg, elapsed_sec)
        record: dict[str, Any] = {"nimg": nimg, "elapsed_sec": round(elapsed_sec, 3)}
        record["images_per_sec"] = round(images / max(seconds, 1e-9), 3)
        record.update({name: mean for name, (mean, count) in stats.items() if count})
        # this one is a total since the last status, not a mean over steps
        mean, count = stats["nonfinite_gradients"]
        record["nonfinite_gradients"] = round(mean * count)
        record.update(memory_gb(self.device))
        dist.on_rank0(self._write, record)
        dist.print0(self._line(record))

    def _write(self, record: dict[str, Any]) -> None:
        with open(self.run_dir / STATS_NAME, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._make_writer is None:
            return
        if self._writer is None:
            self._writer = self._make_writer(str(self.run_dir / "tensorboard"), purge_step=record["nimg"])
        for name, value in record.items():
            if name != "nimg":
                self._writer.add_scalar(name, value, global_step=record["nimg"])
        self._writer.flush()

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
            f"{timedelta(seconds=round(record['elapsed_sec']))} elapsed, {left} left",
        ]
        if record["nonfinite_gradients"]:
            parts.append(f"{record['nonfinite_gradients']} non-finite gradients set to 0")
        return "  ".join(parts)

    def stopped(self, nimg: int) -> None:
        """Report that the run was asked to stop and can be resumed."""
        dist.print0(f"Stopped at {nimg} images; state saved. Run the same command to resume.")

    def finished(self, nimg: int) -> None:
        """Report that the run is complete."""
        dist.print0(f"Finished at {nimg} images; results are in {self.run_dir}")


def memory_gb(device: torch.device) -> dict[str, float]:
    """Peak memory of this process in GB (1e9 bytes): host memory and, on a CUDA device, GPU memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"cpu_peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)}
    if device.type == "cuda":
        peaks["gpu_peak_gb"] = round(torch.cuda.max_memory_reserved(device) / 1e9, 3)
    return peaks


def drop_later_lines(path: Path, nimg: int) -> None:
    """Remove the lines of a statistics file that are later than `nimg` images, or damaged."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["nimg"] <= nimg:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue  # the last process was killed while it wrote this line
    with atomic_write(path, "w") as file:
        file.writelines(kept)
