"""What a run leaves that ends early: its state, an exit code, and snapshots, which it replaces when it is resumed."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edm2kit.snapshots.file_format import read_header, read_tensors, snapshot_name
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.heartbeat import is_of_group, once
from edm2kit.training.checkpoint import (
    DivergenceError,
    check_finite,
    checkpoint_path,
    checkpoint_state,
    list_checkpoints,
    nonfinite_part,
    prune_checkpoints,
    save_checkpoint,
    save_part,
)

if TYPE_CHECKING:
    from edm2kit.data.batches import GlobalOrder
    from edm2kit.training.loop import Trainer
    from edm2kit.training.run import Run


def stopped_exit_code(can_resume: bool = True) -> int:
    """The exit code of a run that stopped early: 75 (EX_TEMPFAIL) if it can be resumed, else 1; 0 under torchrun.

    To torchrun, any other code than 0 is a failure: it would print a report of it, and restart the run if it may.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return 0
    return 75 if can_resume else 1


def save_after(error: Exception, trainer: "Trainer", run_dir: Path) -> None:
    """Save the state of a run that ends with `error`, if it is sound, and say so; a second error becomes a warning.

    If not all ranks have the error, they cannot meet any more. Without sharding, each holds the complete state, and the
    first to come here writes a checkpoint. With it, each writes its part, which the next start joins.
    """
    if not (trainer.nimg and trainer.config.checkpoint_every_nimg):
        return
    try:
        if dist.world_size() == 1 or dist.is_shared(error):
            if trainer.is_whole:
                check_finite(trainer.net, trainer.optimizer, trainer.ema, trainer.nimg)
                trainer.save_checkpoint(run_dir)
                dist.print0(_saved(trainer.nimg))
        elif run_dir.is_dir() and not checkpoint_path(run_dir, trainer.nimg).exists():
            _save_without_others(error, trainer, run_dir)
    except Exception as second:  # such as that of a GPU that has failed; the first error says more
        dist.warn0(f"no checkpoint could be saved either: {second}", everywhere=True)


def _save_without_others(error: Exception, trainer: "Trainer", run_dir: Path) -> None:
    is_sharded = hasattr(trainer.optimizer, "optim")
    others_failed = isinstance(error, RuntimeError) and is_of_group(error)
    if others_failed and trainer.device.type != "cpu":
        return  # the step is only queued: the device waits for gradients that never come, or has taken up half of them
    if not trainer.is_whole:
        if is_sharded and not others_failed:
            raise ValueError("this rank failed in the middle of a step, and no other one has its part of the state")
        return  # others are between two steps
    if part := nonfinite_part(trainer.net, trainer.optimizer, trainer.ema):
        raise ValueError(f"{part} not finite")
    if is_sharded:
        from edm2kit.training.sharding import ShardedAdam, ShardedEMA, own_state

        assert isinstance(trainer.optimizer, ShardedAdam)
        assert isinstance(trainer.ema, ShardedEMA)
        state = own_state(trainer.net, trainer.optimizer, trainer.ema, trainer.progress())
        missing = save_part(run_dir, state, dist.rank(), dist.world_size())
        if not missing:
            dist.print0(_saved(trainer.nimg), everywhere=True)
        elif dist.rank() == 0:
            ranks = ", ".join(map(str, missing))
            dist.warn0(
                f"saved part of the state at {trainer.nimg} images. Unless those of other ranks follow (so far without "
                f"{ranks}), the same command resumes from the last checkpoint"
            )
        return

    def save() -> None:
        save_checkpoint(run_dir, checkpoint_state(trainer.net, trainer.optimizer, trainer.ema, trainer.progress()))
        prune_checkpoints(run_dir, trainer.config.keep_checkpoints)
        dist.print0(_saved(trainer.nimg), everywhere=True)

    once(f"checkpoint at {trainer.nimg} images", save, dist.timeout_sec())


def _saved(nimg: int) -> str:
    return f"State saved at {nimg} images. Run the same command to resume."


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


def diagnosis(error: DivergenceError, run: "Run", order: "GlobalOrder") -> str:
    """Why a run diverged, as far as its last step shows, and what to do."""
    text = f"{run.run_dir}: the run diverged before {error.nimg} images: {error}."
    if error.images:
        shown = [
            f"{run.dataset.item_name(int(order.indices(position, 1)[0]))} at sigma {sigma:.3g}"
            for position, sigma in error.images[:4]
        ]
        text += f" {len(error.images)} images of the last step have a loss that is not finite: {', '.join(shown)}."
    text += (
        f" Check the data (`python scripts/dataset_tool.py check --source {run.config.data}`), then try a lower --lr, "
        "--precision fp32 or another --ls in a new --outdir."
    )
    kept = list_checkpoints(run.run_dir)
    return f"{text} The last good checkpoint is {kept[-1]}" if kept else f"{text} No checkpoint has been saved yet"


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
