"""Turn published snapshots (NVIDIA's pickles) into snapshots of this project."""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import click
from tqdm import tqdm

from edm2kit.cli import click_types as cli
from edm2kit.snapshots.file_format import read_header
from edm2kit.snapshots.published import convert_published, is_published_pickle
from edm2kit.torch_utils.dist import progress_bar
from edm2kit.torch_utils.files import fetch


@click.command(cls=cli.Command)
@click.option("--source", required=True, metavar="PATH|URL|DIR", help="A published .pkl, or a folder of them.")
@click.option("--dest", required=True, type=click.Path(path_type=Path), help="A .safetensors file, or a folder.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Files at once.")
@click.option("--overwrite", is_flag=True, help="Write files anew that are there.")
def main(source: str, dest: Path, workers: int, overwrite: bool) -> None:
    """Write snapshots in this project's format: safetensors weights, and a header that tells all about them.

    The pickles are read without executing anything in them, a tensor at a time. In a folder, files keep their names
    but for the ending, files that are there already are kept, and one that cannot be read does not stop the others.

    \b
    python scripts/convert_snapshot.py --source edm2-img512-xs-2147483-0.135.pkl --dest xs.safetensors
    python scripts/convert_snapshot.py --source raw-snapshots/edm2-img512-xs --dest snapshots --workers 4
    """
    jobs = _jobs(source, dest)
    failures, kept = [], 0
    with (
        cli.interrupt_on_sigterm(),
        ThreadPoolExecutor(workers) as pool,
        progress_bar(len(jobs), "file", hidden=len(jobs) == 1) as bar,
    ):
        try:
            running = {pool.submit(_convert, path, target, overwrite): path for path, target in jobs}
            for done in as_completed(running):
                bar.update()
                if isinstance(done.exception(), (ValueError, OSError)):
                    failures.append(str(done.exception()))
                    if len(jobs) > 1:
                        tqdm.write(f"Error: {failures[-1]}", file=sys.stderr)
                else:
                    kept += not done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failures and len(jobs) == 1:
        raise ValueError(failures[0])
    if failures:
        raise ValueError(f"{len(failures)} of {len(jobs)} files were not converted; the reasons stand above")
    click.echo(f"{len(jobs) - kept} converted, {kept} there already, in {jobs[0][1].parent}")


def _jobs(source: str, dest: Path) -> Sequence[tuple[Path, Path]]:
    """(pickle, snapshot to write) for each file."""
    path = fetch(source)
    if path.is_dir():
        if dest.suffix == ".safetensors" or dest.is_file():
            raise ValueError(f"{source} is a folder, so --dest must be one too; got {dest}")
        jobs = [(pickle, dest / f"{pickle.stem}.safetensors") for pickle in sorted(_pickles(path))]
        if not jobs:
            raise ValueError(f"{source}: no .pkl file in this folder")
        return jobs
    if not is_published_pickle(path):
        raise ValueError(f"{source} is not a pickle; only published .pkl snapshots need converting")
    return [(path, dest if dest.suffix == ".safetensors" else dest / f"{path.stem}.safetensors")]


def _pickles(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.suffix == ".pkl" and path.is_file())


def _convert(path: Path, target: Path, overwrite: bool) -> bool:
    """Whether there was anything to do."""
    if target.exists() and not overwrite:
        # whole, since files appear only when they are; but is it this one?
        origin = read_header(target).training_config.get("published_file")
        if origin != path.name:
            raise ValueError(f"{target} is there and does not come from {path.name}; --overwrite replaces it")
        return False
    convert_published(path, target)
    return True


if __name__ == "__main__":
    main()
