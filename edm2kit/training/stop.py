"""What a run leaves that ends early: an exit code, and snapshots of its network, which it replaces when it goes on."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edm2kit.snapshots.file_format import read_header, read_tensors, snapshot_name
from edm2kit.torch_utils import dist
from edm2kit.training.checkpoint import list_checkpoints

if TYPE_CHECKING:
    from edm2kit.training.loop import Trainer


def stopped_exit_code(can_resume: bool = True) -> int:
    """The exit code of a run that stopped early: 75 (EX_TEMPFAIL) if it can be resumed, else 1; 0 under torchrun.

    To torchrun, any other code than 0 is a failure: it would print a report of it, and restart the run if it may.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return 0
    return 75 if can_resume else 1


def leave_network(trainer: "Trainer", run_dir: Path) -> None:
    """Write snapshots of all EMAs of a run that stops between two snapshots of its schedule, and say where they are.

    Those of former stops are removed. If writing fails, warn: the state to resume from is saved already.
    """
    paths = []
    try:
        for number, std in enumerate(trainer.ema.stds):
            path = run_dir / snapshot_name(trainer.nimg, std)
            if dist.on_rank0(_nimg_of, path) not in (None, trainer.nimg, *trainer.stops):
                # a snapshot of the schedule, less than a thousand images ago, has this name
                path = run_dir / snapshot_name(trainer.nimg, std, exact=True)
            trainer.save_snapshot(path, number)
            paths.append(path)
        dist.on_rank0(remove_snapshots, run_dir, [n for n in trainer.stops if n != trainer.nimg], trainer.ema.stds)
    except (ValueError, OSError) as error:
        dist.warn0(f"no snapshots of the network at {trainer.nimg} images: {error}")
    else:
        dist.print0(f"The network at {trainer.nimg} images: {' and '.join(map(str, paths))}")


def leave_last_good_network(trainer: "Trainer", run_dir: Path) -> None:
    """After a run diverged: write snapshots of its last good checkpoint, unless it has those or has no checkpoint."""
    if not trainer.config.snapshot_every_nimg:
        return
    try:
        if not dist.on_rank0(list_checkpoints, run_dir):
            return
        trainer.resume(run_dir)
        if dist.on_rank0(_nimg_of, run_dir / snapshot_name(trainer.nimg, trainer.ema.stds[-1])) != trainer.nimg:
            leave_network(trainer, run_dir)
    except (ValueError, OSError) as error:
        dist.warn0(f"no snapshots of the network of the last good checkpoint: {error}")


def write_missing_snapshots(trainer: "Trainer", run_dir: Path) -> None:
    """Write the last snapshots of a run that is complete, if they were removed or damaged since."""
    names = [snapshot_name(trainer.nimg, std) for std in trainer.ema.stds]
    if not all(dist.on_rank0(lambda: [_is_intact(run_dir / name) for name in names])):
        dist.warn0(f"{run_dir} lacks the snapshots at {trainer.nimg} images, or they are damaged; writing them again")
        trainer.save_snapshots(run_dir)


def remove_snapshots(run_dir: Path, times_nimg: Sequence[int], stds: Sequence[float]) -> None:
    """Remove the snapshots that a run left when it stopped at these numbers of images."""
    for nimg, std, exact in itertools.product(times_nimg, stds, (False, True)):
        path = run_dir / snapshot_name(nimg, std, exact=exact)
        if _nimg_of(path) == nimg:  # else the name has passed to a later snapshot
            path.unlink(missing_ok=True)


def _nimg_of(snapshot: Path) -> int | None:
    """The training images of a snapshot; None if there is none, or it is damaged."""
    try:
        return read_header(snapshot).nimg
    except ValueError:
        return None


def _is_intact(snapshot: Path) -> bool:
    """Whether there is a snapshot, and its weights match their checksums if it has any."""
    try:
        read_header(snapshot)
        for _ in read_tensors(snapshot):
            pass
    except ValueError:
        return False
    return True
