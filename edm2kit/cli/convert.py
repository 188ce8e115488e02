"""Convert NVIDIA's published snapshots (pickles) to the format of this project."""

from edm2kit.cli import help_pages

if __name__ == "__main__":
    help_pages.answer("convert")  # before torch is imported

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import click
from tqdm import tqdm

from edm2kit.cli import click_types as cli
from edm2kit.snapshots.file_format import read_header
from edm2kit.snapshots.loading import is_published_pickle
from edm2kit.snapshots.published import convert_published
from edm2kit.torch_utils.cache import fetch
from edm2kit.torch_utils.dist import one_line, progress_bar
from edm2kit.torch_utils.files import remove_partial_files, sampled_sha256


@click.command(cls=cli.Command)
@click.option("--source", required=True, metavar="PATH|URL|DIR", help="A published .pkl, or a folder of them")
@click.option("--dest", required=True, type=click.Path(path_type=Path), help="A .safetensors file, or a folder")
@click.option("--workers", metavar="N", type=cli.AtLeast(int, 1), default=2, help="Files to convert at the same time")
@click.option("--overwrite", is_flag=True, help="Replace existing files")
def main(source: str, dest: Path, workers: int, overwrite: bool) -> None:
    """Convert published snapshots to this project's format: safetensors weights with a descriptive header.

    Pickles are read one tensor at a time, without executing anything in them. In a folder, files keep their names
    except for the suffix, existing files are skipped, and one that cannot be read does not stop the others.

    \b
    python scripts/convert_snapshot.py --source edm2-img512-xs-2147483-0.135.pkl --dest xs.safetensors
    python scripts/convert_snapshot.py --source raw-snapshots/edm2-img512-xs --dest snapshots --workers 4
    """
    jobs = find_pickles(source, dest)
    failures, skipped = [], 0
    with (
        cli.interrupt_on_sigterm(),
        ThreadPoolExecutor(workers) as pool,
        progress_bar(len(jobs), "file", hidden=len(jobs) == 1) as bar,
    ):
        try:
            for done in as_completed([pool.submit(convert, path, target, overwrite) for path, target in jobs]):
                bar.update()
                try:
                    skipped += not done.result()
                except (ValueError, OSError) as error:
                    failures.append(str(error))
                    if len(jobs) > 1:
                        tqdm.write(one_line(f"Error: {error}"), file=sys.stderr)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failures and len(jobs) == 1:
        raise ValueError(failures[0])
    if failures:
        raise ValueError(f"{len(failures)} of {len(jobs)} files were not converted, for the reasons above")
    click.echo(f"Converted {len(jobs) - skipped} snapshots to {jobs[0][1].parent}; {skipped} already existed")


def find_pickles(source: str, dest: Path) -> Sequence[tuple[Path, Path]]:
    """(pickle, snapshot to write) for each file. Raises ValueError if there is none."""
    path = fetch(source)
    if not path.is_dir():
        if not is_published_pickle(path):
            raise ValueError(f"{source} is not a pickle; only published .pkl snapshots need converting")
        target = dest if dest.suffix.lower() == ".safetensors" else dest / f"{path.stem}.safetensors"
        return [(path, target)]
    if dest.suffix.lower() == ".safetensors" or dest.is_file():
        raise ValueError(f"{source} is a folder, so --dest must be a folder too; got {dest}")
    jobs = []
    for file in sorted(path.glob("*.pkl")):
        if file.is_file():
            jobs.append((file, dest / f"{file.stem}.safetensors"))
    if not jobs:
        raise ValueError(f"{source}: no .pkl file in this folder; give one with published snapshots")
    return jobs


def convert(path: Path, target: Path, overwrite: bool) -> bool:
    """Convert one pickle; return whether that was necessary.

    Raises ValueError if the target exists and does not come from this pickle.
    """
    cli.check_output(target, "safetensors file")
    if target.exists() and not overwrite:
        # a file that exists is complete, because it appears when the last byte is written; but is it this one?
        origin = read_header(target).training_config
        if origin.get("published_file") != path.name:
            raise ValueError(f"{target} exists and does not come from {path.name}; use --overwrite to replace it")
        content = sampled_sha256(path)  # files of earlier versions do not say which
        if origin.get("published_content", content) != content:
            raise ValueError(f"{target} was made from another {path.name} than {path}; use --overwrite to replace it")
        remove_partial_files(target.parent)  # of killed processes
        return False
    convert_published(path, target)
    return True


if __name__ == "__main__":
    main()
