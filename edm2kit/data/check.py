"""Is a folder or zip a data set to train on? What is in it, and everything that is wrong with it."""

import contextlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from edm2kit.data.archive import FolderArchive, ZipArchive, open_archive
from edm2kit.data.dataset import CONVERT_HINT, FILE_EXTENSIONS, ImageDataset, check_first
from edm2kit.data.image_files import decode_array
from edm2kit.data.labels import Labels, read_labels
from edm2kit.data.workers import run_in_order
from edm2kit.torch_utils.progress import progress_bar


@dataclass(frozen=True)
class Checker:
    """Callable from the number of a file to (kind, None), such as ("uint8 [3, 64, 64]", None), or (None, problem)."""

    archive: FolderArchive | ZipArchive

    def __call__(self, index: int) -> tuple[str | None, str | None]:
        where = self.archive.where(index)
        try:
            raw = decode_array(self.archive.read(index), where)
            if not np.isfinite(raw).all():
                raise ValueError(f"{where}: holds numbers that are not finite; encode it again")
            return f"{raw.dtype} {list(raw.shape)}", None
        except ValueError as error:
            return None, str(error)


def check(source: Path, workers: int) -> bool:
    """Print counts, shapes, classes and every problem of the data set `source`; True if there is no problem.

    Raises ValueError where `source` is not a folder or zip with images at all.
    """
    archive = open_archive(source, FILE_EXTENSIONS)
    problems: list[str] = []
    labels = None
    try:
        labels = read_labels(archive)
    except ValueError as error:
        problems.append(str(error))
    kinds: Counter[str] = Counter()
    examples: dict[str, int] = {}
    with (
        contextlib.closing(run_in_order(Checker(archive), range(len(archive.names)), workers)) as results,
        progress_bar(len(archive.names)) as bar,
    ):
        for index, (kind, problem) in results:
            bar.update()
            if problem is not None:
                problems.append(problem)
            else:
                kinds[kind] += 1
                examples.setdefault(kind, index)
    problems.extend(_check_kinds(archive, kinds, examples))
    _report(archive, kinds, labels, problems)
    return not problems


def _check_kinds(archive: FolderArchive | ZipArchive, kinds: Counter[str], examples: dict[str, int]) -> list[str]:
    if len(kinds) > 1:
        found = ", ".join(f"{kind} ({archive.names[examples[kind]]})" for kind, _ in kinds.most_common(5))
        return [f"the images differ in shape: {found}; {CONVERT_HINT}"]
    try:
        for index in examples.values():
            check_first(decode_array(archive.read(index), archive.where(index)), archive.where(index))
    except ValueError as error:
        return [str(error)]
    return []


def _report(
    archive: FolderArchive | ZipArchive, kinds: Counter[str], labels: Labels | None, problems: list[str]
) -> None:
    click.echo(f"{archive.path}: {len(archive.names)} images")
    for kind, count in kinds.most_common(20):
        click.echo(f"  {kind}: {count}")
    if len(kinds) > 20:
        click.echo(f"  ... and {len(kinds) - 20} other shapes")
    if labels is None:
        click.echo("No labels")
    else:
        names = labels.class_names or [""] * labels.num_classes
        click.echo(f"{labels.num_classes} classes:")
        for k, count in enumerate(np.bincount(labels.classes, minlength=labels.num_classes)):
            click.echo(f"  {k} {names[k]}: {count}".replace(" :", ":"))
    if not problems:
        decoded = ImageDataset(archive.path).needs_decoding
        click.echo("Read by decoding each image; convert makes a faster copy" if decoded else "Read without decoding")
    for problem in problems:
        click.echo(f"Problem: {problem}")
    click.echo(f"{len(problems)} problems" if problems else "Ready for training")
