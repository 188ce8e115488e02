"""The networks of the study: its training runs, and any EMA length and training time of them as a file."""

from pathlib import Path

from edm2kit.ema.rebuild import plan_outputs, write_outputs
from edm2kit.experiments.cifar10.settings import PRECISION, Setting
from edm2kit.snapshots.loading import open_weights


def snapshots(run: Path) -> list[Path]:
    """The snapshots of a run, sorted; raises ValueError if there are none."""
    found = sorted(path for path in run.glob("network-snapshot-*.safetensors"))
    if not found:
        raise ValueError(f"{run} has no snapshots yet; run the step train, or wait for the first one")
    return found


def latest_nimg(run: Path) -> int:
    """The training images of the newest snapshot."""
    return open_weights(snapshots(run)[-1]).header.nimg


def ema_file(out: Path, run: str, nimg: int | None, std: float) -> Path:
    """The snapshot of `run` after `nimg` images (None: the newest) with an EMA of length `std`; rebuilt if missing."""
    folder = out / "runs" / run
    nimg = latest_nimg(folder) if nimg is None else nimg
    path = out / "ema" / f"{run}-{nimg:08d}-{std:.3f}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        inputs = [open_weights(file) for file in snapshots(folder)]
        inputs = [weights for weights in inputs if weights.header.nimg <= nimg]
        outputs = plan_outputs(inputs, [std], [nimg], dtype="float16")
        write_outputs(inputs, outputs, [path])
    return path


def words(out: Path, setting: Setting) -> list[str]:
    """The options of generate.py for a setting."""
    found = ["--net", str(ema_file(out, "main", setting.nimg, setting.ema)), "--precision", PRECISION, *setting.sampler]
    if setting.guide is None:
        return found
    if setting.guide == "uncond":
        found += ["--guidance-method", "cfg"]
    else:
        assert setting.guide_ema is not None
        found += ["--gnet", str(ema_file(out, setting.guide, setting.guide_nimg, setting.guide_ema))]
    found += ["--guidance", f"{setting.weight:g}"]
    low, high = setting.interval
    if (low, high) != (0.0, float("inf")):
        found += ["--interval", f"{low:g},{high:g}"]
    return found
