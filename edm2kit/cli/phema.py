"""Rebuild EMAs of any length from the snapshots of a training run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from edm2kit.cli import click_types as cli
from edm2kit.ema.rebuild import Output, count_values, plan_outputs, write_outputs
from edm2kit.snapshots.file_format import Header, read_header, snapshot_name
from edm2kit.snapshots.loading import open_sources
from edm2kit.snapshots.weights import Weights
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.dist import progress_bar
from edm2kit.torch_utils.precision import PRECISIONS

_POOR_FIT = 0.1  # from about here on, the rebuilt profile's width is off by more than a twentieth
_COARSE = 0.05


@dataclass(frozen=True)
class Job:
    """What is to be made from what; `todo` are the outputs that are not there yet."""

    inputs: list[Weights]
    outputs: list[Output]
    paths: list[Path]
    todo: list[int]


@click.command(cls=cli.Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--indir",
    metavar="DIR|PATH|URL",
    required=True,
    multiple=True,
    help="Folder with a run's snapshots, or a snapshot; may be repeated",
)
@click.option("--inprefix", metavar="TEXT", default="", help="Use only files whose names start so")
@click.option("--instd", metavar="LIST", type=cli.FloatSeries(), help="Use only snapshots of these EMA lengths")
@click.option("--outdir", metavar="DIR", required=True, type=click.Path(path_type=Path), help="Folder for the results")
@click.option("--outprefix", metavar="TEXT", default="phema", show_default=True, help="How their file names start")
@click.option(
    "--outstd", metavar="LIST", type=cli.FloatSeries(), required=True, help="EMA lengths to make: 0.05,0.10,...,0.25"
)
@click.option("--outkimg", metavar="LIST", type=cli.IntRanges(), help="Times, in thousands of images  [the latest]")
@click.option("--outnimg", metavar="NIMG", type=cli.Size(), multiple=True, help="Times, exactly; may be repeated")
@click.option("--skip", is_flag=True, help="Keep outputs that are there, whole, and made from the same snapshots")
@click.option("--batch", metavar="N", type=click.IntRange(1), default=128, show_default=True, help="Outputs per pass")
@click.option(
    "--dtype", type=click.Choice(list(PRECISIONS)), default="fp16", show_default=True, help="Stored precision"
)
@click.option("-n", "--dry-run", is_flag=True, help="Print how well each length can be rebuilt, and stop")
def main(
    indir: Sequence[str],
    inprefix: str,
    instd: Sequence[float] | None,
    outdir: Path,
    outprefix: str,
    outstd: Sequence[float],
    outkimg: Sequence[int] | None,
    outnimg: Sequence[int],
    skip: bool,
    batch: int,
    dtype: str,
    dry_run: bool,
) -> None:
    """Make snapshots with EMA lengths that training did not store, as if it had (Karras et al. 2023, Section 3.2).

    One pass over the input files serves all outputs. The table says, before anything is read, how well each can be
    made: the EMA length it really has ("width"); how far its profile is from the wanted one ("fit error"); and the
    error its weights inherit from the inputs' precision ("rounding"). Under torchrun, processes share the outputs.

    \b
    python reconstruct_phema.py --indir runs/main --outdir ema --outstd 0.05,0.10,...,0.25
    python reconstruct_phema.py --indir runs/guide --outdir ema --outstd 0.125 --outkimg 134217
    """
    with cli.interrupt_on_sigterm(), dist.session("cpu"):
        job = dist.on_rank0(
            _prepare, *(indir, inprefix, instd, outdir, outprefix, outstd, outkimg, outnimg, skip, dtype)
        )
        _report(job)
        if not dry_run:
            _write(job, batch)
            dist.print0(f"Wrote {len(job.todo)} snapshots to {outdir}")


def _prepare(
    indir: Sequence[str],
    inprefix: str,
    instd: Sequence[float] | None,
    outdir: Path,
    outprefix: str,
    outstd: Sequence[float],
    outkimg: Sequence[int] | None,
    outnimg: Sequence[int],
    skip: bool,
    dtype: str,
) -> Job:
    inputs = open_sources(indir, inprefix, instd)
    times = [*(_time_of(kimg, inputs) for kimg in outkimg or ()), *outnimg]
    outputs = plan_outputs(
        inputs,
        list(dict.fromkeys(outstd)),
        list(dict.fromkeys(times)) or None,
        str(PRECISIONS[dtype]).removeprefix("torch."),
    )
    paths = [outdir / snapshot_name(output.header.nimg, output.header.ema_std, outprefix) for output in outputs]
    if shared := next((path for path in paths if paths.count(path) > 1), None):
        raise ValueError(
            f"two outputs would be called {shared.name}; make their times one by one, with --outprefix each"
        )
    _protect({weights.path.resolve() for weights in inputs if weights.path}, outputs, paths)
    todo = [i for i, path in enumerate(paths) if not (skip and _is_made(path, outputs[i]))]
    return Job(inputs, outputs, paths, todo)


def _time_of(kimg: int, inputs: Sequence[Weights]) -> int:
    """The exact number of images that file names and --outkimg round down to `kimg` thousands."""
    times = sorted({weights.header.nimg for weights in inputs})
    found = [nimg for nimg in times if nimg // 1000 == kimg]
    if not found:
        near = sorted({nimg // 1000 for nimg in times}, key=lambda there: abs(there - kimg))[:4]
        raise ValueError(f"no snapshot at --outkimg {kimg}; the nearest are at {', '.join(map(str, sorted(near)))}")
    if len(found) > 1:
        raise ValueError(f"--outkimg {kimg} may mean {' or '.join(map(str, found))} images; say which with --outnimg")
    return found[0]


def _protect(inputs: set[Path], outputs: Sequence[Output], paths: Sequence[Path]) -> None:
    """Raise ValueError where an output would replace anything but an earlier one of its kind."""
    for output, path in zip(outputs, paths, strict=True):
        if path.resolve() in inputs:
            raise ValueError(f"{path} is one of the inputs; choose another --outprefix or --outdir")
        there = _header_of(path)
        wanted = (output.header.run_id, output.header.nimg, output.header.ema_std)
        if there and (there.recipe is None or (there.run_id, there.nimg, there.ema_std) != wanted):
            raise ValueError(f"{path} holds another network; choose another --outprefix or --outdir")


def _header_of(path: Path) -> Header | None:
    """The header of a snapshot that is there and whole."""
    try:
        return read_header(path)
    except ValueError:
        return None


def _is_made(path: Path, output: Output) -> bool:
    there, wanted = _header_of(path), output.header
    if there is None or there.recipe is None or wanted.recipe is None:
        return False
    return there.dtype == wanted.dtype and there.recipe.get("inputs") == wanted.recipe["inputs"]


def _report(job: Job) -> None:
    nimg = sorted({weights.header.nimg for weights in job.inputs})
    stds = sorted({weights.header.ema_std for weights in job.inputs})
    run = job.inputs[0].header.run_id
    dist.print0(
        f"{len(job.inputs)} snapshots{f' of run {run}' * bool(run)}: EMA {', '.join(f'{std:g}' for std in stds)} at "
        f"{len(nimg)} times from {nimg[0]} to {nimg[-1]} images"
    )
    for std in stds:
        there = {weights.header.nimg for weights in job.inputs if weights.header.ema_std == std}
        if missing := [time for time in nimg if time not in there]:
            dist.warn0(f"EMA {std:g} has no snapshot at {len(missing)} of these times (the first is {missing[0]})")
    dist.print0(f"{'images':>12} {'std':>7} {'width':>7} {'fit error':>10} {'rounding':>9}  file")
    for i, (output, path) in enumerate(zip(job.outputs, job.paths, strict=True)):
        fit, header = output.fit, output.header
        width = "none" if fit.width is None else f"{fit.width:.4f}"
        dist.print0(
            f"{header.nimg:>12} {header.ema_std:>7.4g} {width:>7} {fit.error:>10.3%} {fit.rounding:>9.3%}  {path.name}"
            + ("" if i in job.todo else "  (there already)")
        )
    _warn(job.outputs)


def _warn(outputs: Sequence[Output]) -> None:
    def lengths(chosen: Sequence[Output]) -> str:
        return ", ".join(f"{std:g}" for std in sorted({output.header.ema_std for output in chosen}))

    if poor := [output for output in outputs if output.fit.error > _POOR_FIT]:
        dist.warn0(
            f"fit error above {_POOR_FIT:.0%} for {lengths(poor)}: these are other averages than their names say. The "
            "snapshots are too few, or too far apart, for such lengths"
        )
    if coarse := [output for output in outputs if output.fit.rounding > _COARSE]:
        dist.warn0(
            f"rounding above {_COARSE:.0%} for {lengths(coarse)}: the stored precision of the inputs is magnified that "
            "much; fewer snapshots (--instd, --inprefix) or a greater length magnify less"
        )


def _write(job: Job, batch: int) -> None:
    share = job.todo[dist.rank() :: dist.world_size()]
    groups = [share[first : first + batch] for first in range(0, len(share), batch)]
    error = None
    total = len(groups) * count_values(job.outputs[0])
    with progress_bar(total, "w", hidden=not share, scaled=True) as bar:
        try:
            for group in groups:
                chosen, paths = [job.outputs[i] for i in group], [job.paths[i] for i in group]
                write_outputs(job.inputs, chosen, paths, on_progress=bar.update)
        except (ValueError, OSError) as caught:
            error = caught
    dist.raise_together(error)


if __name__ == "__main__":
    main()
