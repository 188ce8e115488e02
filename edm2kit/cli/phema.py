"""Rebuild EMAs of any length from the snapshots of a training run."""

from edm2kit.cli import help_pages

if __name__ == "__main__":
    help_pages.answer("phema")  # before torch is imported

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from edm2kit.cli import click_types as cli
from edm2kit.cli.click_types import check_output, check_writable
from edm2kit.ema.rebuild import Output, count_values, plan_outputs, write_outputs
from edm2kit.models.preconditioning import PRECISIONS
from edm2kit.snapshots.file_format import Header, read_header, snapshot_name
from edm2kit.snapshots.loading import Weights, open_sources
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.dist import progress_bar
from edm2kit.torch_utils.files import remove_partial_files

_POOR_FIT = 0.1  # from about here on, the width of the rebuilt profile is off by more than a twentieth
_COARSE = 0.05


class FloatSeries(click.ParamType):
    """Numbers such as 0.05,0.1 or, with the middle filled in, 0.01,0.02,...,0.25, as a tuple of floats."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if not isinstance(value, str):
            return tuple(value)
        parts = [part.strip() for part in value.split(",")]
        try:
            if "..." in parts:
                return _filled_in(parts)
            return tuple(_number(part) for part in parts)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"{text!r:.60} is not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


def _filled_in(parts: Sequence[str]) -> tuple[float, ...]:
    """The numbers that parts such as ["0.01", "0.02", "...", "0.25"] stand for."""
    *before, dots, last = parts
    if len(before) < 2 or dots != "..." or "..." in before:
        raise ValueError("'...' goes between two numbers that set the step and the last one: 0.01,0.02,...,0.25")
    numbers = [_number(part) for part in before]
    end = _number(last)
    start = numbers[-1]
    step = start - numbers[-2]
    gaps = (end - start) / step if step else 0.0
    count = round(gaps)
    if not 1 <= count <= 10_000 or abs(gaps - count) > 1e-6:
        raise ValueError(f"{last} is not reached from {start} in steps of {step:g}")
    for k in range(1, count):
        # rounding keeps 0.03 from becoming 0.030000000000000002 in file names and records
        numbers.append(round(start + step * k, 10))
    return (*numbers, end)


@dataclass(frozen=True)
class Settings:
    """The options that decide what is rebuilt from what."""

    indir: Sequence[str]
    inprefix: str
    instd: Sequence[float] | None
    outdir: Path
    outprefix: str
    outstd: Sequence[float]
    outkimg: Sequence[int] | None
    outnimg: Sequence[int]
    skip: bool
    dtype: str


@dataclass(frozen=True)
class Plan:
    """Outputs with their inputs and paths; `todo` are the positions of the outputs that do not exist yet."""

    inputs: list[Weights]
    outputs: list[Output]
    paths: list[Path]
    todo: list[int]


@click.command(cls=cli.Command)
@cli.section(
    "Input",
    click.option(
        "--indir",
        metavar="DIR|PATH|URL",
        required=True,
        multiple=True,
        help="Folder with the snapshots of a run, or a single snapshot; repeatable",
    ),
    click.option("--inprefix", metavar="TEXT", default="", help="Only use files with this prefix"),
    click.option("--instd", metavar="LIST", type=FloatSeries(), help="Only use snapshots of these EMA lengths"),
)
@cli.section(
    "Output",
    click.option("--outdir", metavar="DIR", required=True, type=click.Path(path_type=Path), help="Folder to write to"),
    click.option(
        "--outstd",
        metavar="LIST",
        type=FloatSeries(),
        required=True,
        help="EMA lengths to rebuild, such as 0.05,0.10,...,0.25",
    ),
    click.option(
        "--outkimg",
        metavar="LIST",
        type=cli.IntRanges(),
        help="Training times in thousands of images  [default: the latest]",
    ),
    click.option(
        "--outnimg", metavar="NIMG", type=cli.Size(), multiple=True, help="Training time in images, exactly; repeatable"
    ),
    click.option("--outprefix", metavar="TEXT", default="phema", help="Prefix of the file names"),
    click.option(
        "--dtype",
        metavar="NAME",
        type=click.Choice(list(PRECISIONS)),
        default="fp16",
        help="Stored precision: fp32, fp16 or bf16",
    ),
    click.option("--skip", is_flag=True, help="Skip complete outputs that were rebuilt from the same snapshots"),
    click.option("--batch", metavar="N", type=cli.AtLeast(int, 1), default=128, help="Outputs per pass over the input"),
    cli.timeout_option(),
    click.option("-n", "--dry-run", is_flag=True, help="Print how well each length can be rebuilt, then stop"),
)
def main(batch: int, dry_run: bool, **options: Any) -> None:
    """Make snapshots with EMA lengths that training did not store (Karras et al. 2023, Section 3.2).

    One pass over the input files serves all outputs. A table first reports how well each can be rebuilt: the EMA length
    that it really has ("width"), how far its profile is from the requested one ("fit error"), and the error of its
    weights due to the precision of the input ("rounding"). Under torchrun, processes share the outputs.

    \b
    python reconstruct_phema.py --indir runs/main --outdir ema --outstd 0.05,0.10,...,0.25
    python reconstruct_phema.py --indir runs/guide --outdir ema --outstd 0.125 --outkimg 134217
    """
    settings = Settings(**options)
    with cli.interrupt_on_sigterm(), dist.session("cpu"):
        plan = dist.on_rank0(make_plan, settings)
        _report(plan)
        if not dry_run:
            remove_partial_files(settings.outdir)  # of killed processes, also if nothing is left to write
            _write(plan, batch)
            dist.print0(f"Wrote {len(plan.todo)} snapshots to {settings.outdir}")


def make_plan(settings: Settings) -> Plan:
    """Read the headers of the input, and decide what to write where.

    Raises ValueError if the input does not suffice, or if an output would replace another network.
    """
    if Path(settings.outprefix).name != settings.outprefix:
        raise ValueError(
            f"--outprefix {settings.outprefix!r} is not the start of a file name; use --outdir for folders"
        )
    inputs = open_sources(settings.indir, settings.inprefix, settings.instd)
    times = [_nimg_of(kimg, inputs) for kimg in settings.outkimg or ()]
    times += settings.outnimg
    outputs = plan_outputs(
        inputs,
        list(dict.fromkeys(settings.outstd)),
        list(dict.fromkeys(times)) or None,
        str(PRECISIONS[settings.dtype]).removeprefix("torch."),
    )
    paths = []
    for output in outputs:
        name = snapshot_name(output.header.nimg, _std_of(output.header), settings.outprefix)
        paths.append(settings.outdir / name)
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(
                f"two outputs would be called {path.name}; make their times one by one, with --outprefix each"
            )
    _check_overwriting(inputs, outputs, paths)
    check_writable(settings.outdir)
    todo = [i for i, path in enumerate(paths) if not (settings.skip and _is_complete(path, outputs[i]))]
    return Plan(inputs, outputs, paths, todo)


def _std_of(header: Header) -> float:
    """The EMA length of a snapshot that has one, as all inputs and outputs here do."""
    assert header.ema_std is not None
    return header.ema_std


def _nimg_of(kimg: int, inputs: Sequence[Weights]) -> int:
    """The exact number of images that file names and --outkimg round down to `kimg` thousands."""
    found: dict[int, set[int]] = {}
    for weights in inputs:
        nimg = weights.header.nimg
        found.setdefault(nimg // 1000, set()).add(nimg)
    if kimg not in found:
        nearest = sorted(found, key=lambda other: (abs(other - kimg), other))[:4]
        times = ", ".join(str(time) for time in sorted(nearest))
        raise ValueError(f"no snapshot at --outkimg {kimg}; the nearest are at {times}")
    if len(found[kimg]) > 1:
        times = " or ".join(str(nimg) for nimg in sorted(found[kimg]))
        raise ValueError(f"--outkimg {kimg} may mean {times} images; say which with --outnimg")
    return found[kimg].pop()


def _check_overwriting(inputs: Sequence[Weights], outputs: Sequence[Output], paths: Sequence[Path]) -> None:
    """Raise ValueError if an output would replace anything but an earlier version of itself."""
    input_paths = [weights.path.resolve() for weights in inputs if weights.path]
    advice = "choose another --outprefix or --outdir"
    for output, path in zip(outputs, paths, strict=True):
        if path.resolve() in input_paths:
            raise ValueError(f"{path} is one of the inputs; {advice}")
        check_output(path, "safetensors file")
        existing, wanted = _header_of(path), output.header
        if existing is None:
            continue
        same = (existing.run_id, existing.nimg, existing.ema_std) == (wanted.run_id, wanted.nimg, wanted.ema_std)
        if existing.recipe is None or not same:
            raise ValueError(f"{path} holds another network; {advice}")


def _header_of(path: Path) -> Header | None:
    """The header of a complete snapshot; None if there is none."""
    try:
        return read_header(path)
    except ValueError:
        return None


def _is_complete(path: Path, output: Output) -> bool:
    """Whether the file holds this output, rebuilt from the same inputs."""
    existing, wanted = _header_of(path), output.header
    if existing is None or existing.recipe is None or wanted.recipe is None:
        return False
    if existing.dtype == wanted.dtype and _inputs_of(existing, wanted) == wanted.recipe["inputs"]:
        return True
    dist.print0(f"{path.name} is made again: {_reason(existing, wanted)}")
    return False


def _inputs_of(existing: Header, wanted: Header) -> list[dict[str, Any]]:
    """The inputs of an output that exists; checksums, which earlier versions did not record, are those of `wanted`."""
    assert existing.recipe is not None
    assert wanted.recipe is not None
    known = {entry["name"]: entry["checksum"] for entry in wanted.recipe["inputs"]}
    found = [entry for entry in existing.recipe.get("inputs", []) if isinstance(entry, dict)]
    return [{**entry, "checksum": entry.get("checksum", known.get(entry.get("name")))} for entry in found]


def _reason(existing: Header, wanted: Header) -> str:
    """Why an output that exists is not the wanted one."""
    assert existing.recipe is not None
    assert wanted.recipe is not None
    if existing.dtype != wanted.dtype:
        return f"it is stored as {existing.dtype}, not {wanted.dtype}"
    before = {entry.get("name"): entry for entry in _inputs_of(existing, wanted)}
    for entry in wanted.recipe["inputs"]:
        old = before.get(entry["name"])
        if old is None:
            return f"it was made without {entry['name']}"
        if "content" not in old:
            return "its record does not say from which weights it was made"
        if old != entry:
            return f"{entry['name']} has changed since"
    return "it was made from more snapshots"


def _report(plan: Plan) -> None:
    """Print what the input holds and how well each output can be rebuilt; warn of those unlike their names."""
    headers = [weights.header for weights in plan.inputs]
    nimg = sorted({header.nimg for header in headers})
    stds = sorted({_std_of(header) for header in headers})
    run = f" of run {headers[0].run_id}" if headers[0].run_id else ""
    dist.print0(
        f"{len(headers)} snapshots{run}: EMA {_lengths(stds)} at {len(nimg)} times from {nimg[0]} to {nimg[-1]} images"
    )
    for std in stds:
        stored = {header.nimg for header in headers if header.ema_std == std}
        missing = [time for time in nimg if time not in stored]
        if missing:
            dist.warn0(f"EMA {std:g} has no snapshot at {len(missing)} of these times (the first is {missing[0]})")
    dist.print0(f"{'images':>12} {'std':>7} {'width':>7} {'fit error':>10} {'rounding':>9}  file")
    for i, (output, path) in enumerate(zip(plan.outputs, plan.paths, strict=True)):
        fit = output.fit
        width = "none" if fit.width is None else f"{fit.width:.4f}"
        note = "" if i in plan.todo else "  (exists)"
        dist.print0(
            f"{output.header.nimg:>12} {output.header.ema_std:>7.4g} {width:>7} {fit.error:>10.3%} "
            f"{fit.rounding:>9.3%}  {path.name}{note}"
        )
    poor = {_std_of(output.header) for output in plan.outputs if output.fit.error > _POOR_FIT}
    if poor:
        dist.warn0(
            f"fit error above {_POOR_FIT:.0%} for {_lengths(poor)}: these averages differ from what their names say. "
            "The snapshots are too few or too far apart for such lengths"
        )
    coarse = {_std_of(output.header) for output in plan.outputs if output.fit.rounding > _COARSE}
    if coarse:
        dist.warn0(
            f"rounding above {_COARSE:.0%} for {_lengths(coarse)}: rebuilding magnifies the rounding error of the "
            "input. Use fewer snapshots (--instd, --inprefix) or a greater length"
        )


def _lengths(stds: Iterable[float]) -> str:
    return ", ".join(f"{std:g}" for std in sorted(stds))


def _write(plan: Plan, batch: int) -> None:
    """Write this rank's share of the outputs."""
    share = plan.todo[dist.rank() :: dist.world_size()]
    groups = [share[first : first + batch] for first in range(0, len(share), batch)]
    error = None
    total = len(groups) * count_values(plan.inputs[0])
    with progress_bar(total, "w", hidden=not share, scaled=True) as bar:
        try:
            for group in groups:
                outputs = [plan.outputs[i] for i in group]
                paths = [plan.paths[i] for i in group]
                write_outputs(plan.inputs, outputs, paths, on_progress=bar.update)
        except (ValueError, OSError) as caught:
            error = caught
    dist.raise_together(error)


if __name__ == "__main__":
    main()
