"""Check that a folder or zip can be trained on, and list everything that is wrong with it."""

import contextlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from edm2kit.data.archive import FolderArchive, ZipArchive, open_archive
from edm2kit.data.dataset import (
    CONVERT_HINT,
    FILE_EXTENSIONS,
    ImageDataset,
    Source,
    check_item,
    open_source,
    split_kind,
)
from edm2kit.data.image_files import decode_array
from edm2kit.data.labels import ConditionSpace, Labels, read_labels
from edm2kit.data.workers import run_in_order
from edm2kit.torch_utils.dist import progress_bar

_MAX_KINDS = 20
_BATCH = 64


@dataclass(frozen=True)
class FileCheck:
    """Callable from the number of a file to (kind, None), such as ("uint8 [3, 64, 64]", None), or ("", problem)."""

    archive: FolderArchive | ZipArchive

    def __call__(self, index: int) -> tuple[str, str | None]:
        where = self.archive.where(index)
        try:
            raw = decode_array(self.archive.read(index), where)
            if not np.isfinite(raw).all():
                raise ValueError(f"{where}: contains numbers that are not finite; encode it again")
            return f"{raw.dtype} {list(raw.shape)}", None
        except ValueError as error:
            return "", str(error)


def check(source: str, workers: int) -> bool:
    """Print the counts, shapes, labels and all problems of a data set; returns True if there are no problems.

    Raises ValueError if there is no data set at `source`.
    """
    source_kind, path = split_kind(source)
    if source_kind != "image_files":
        return _check_source(open_source(source))
    archive = open_archive(path, FILE_EXTENSIONS)
    problems: list[str] = []
    labels = None
    try:
        labels = read_labels(archive)
    except ValueError as error:
        problems.append(str(error))
    kinds: Counter[str] = Counter()
    examples: dict[str, int] = {}
    with (
        contextlib.closing(run_in_order(FileCheck(archive), range(len(archive.names)), workers)) as results,
        progress_bar(len(archive.names)) as bar,
    ):
        for index, (kind, problem) in results:
            bar.update()
            if problem is not None:
                problems.append(problem)
            else:
                kinds[kind] += 1
                examples.setdefault(kind, index)
    if len(kinds) > 1:
        found = ", ".join(f"{kind} ({archive.names[examples[kind]]})" for kind, _ in kinds.most_common(5))
        problems.append(f"the images differ in shape: {found}; {CONVERT_HINT}")
    elif examples:
        first = next(iter(examples.values()))
        try:
            check_item(decode_array(archive.read(first), archive.where(first)), archive.where(first), CONVERT_HINT)
        except ValueError as error:
            problems.append(str(error))
    _report(archive.path, len(archive.names), kinds, labels, problems)
    if not problems:
        if ImageDataset(archive.path).needs_decoding:
            click.echo("Read by decoding each image; scripts/dataset_tool.py convert makes a faster copy")
        else:
            click.echo("Read without decoding")
        click.echo("Ready for training")
    return not problems


def _check_source(source: Source) -> bool:
    """Read every item of a data set that is not made of image files; opening it has checked its shape and labels."""
    problems: list[str] = []
    good = 0
    with progress_bar(len(source)) as bar:
        for start in range(0, len(source), _BATCH):
            indices = np.arange(start, min(start + _BATCH, len(source)))
            try:
                if not np.isfinite(source.read(indices)).all():
                    raise ValueError(f"{source.path}: items {start} to {indices[-1]} hold numbers that are not finite")
                good += len(indices)
            except ValueError as error:
                problems.append(str(error))
            bar.update(len(indices))
    kind = f"{source.item_dtype} {list(source.item_shape)}"
    labels = None if source.labels is None else Labels(source.labels, source.label_names)
    _report(source.path, len(source), Counter({kind: good}), labels, problems)
    if not problems:
        click.echo("Ready for training")
    return not problems


def _report(path: Path, count: int, kinds: Counter[str], labels: Labels | None, problems: list[str]) -> None:
    click.echo(f"{path}: {count} images")
    for kind, number in kinds.most_common(_MAX_KINDS):
        click.echo(f"  {kind}: {number}")
    if len(kinds) > _MAX_KINDS:
        click.echo(f"  ... and {len(kinds) - _MAX_KINDS} other shapes")
    if labels is None:
        click.echo("No labels")
    elif labels.space.kind == "vectors":
        low, high = labels.values.min(), labels.values.max()
        click.echo(f"Labels: vectors of {labels.space.dimension} numbers from {low:g} to {high:g}")
    else:
        _report_classes(labels.values, labels.space)
    for problem in problems:
        click.echo(f"Problem: {problem}")
    if problems:
        click.echo("1 problem" if len(problems) == 1 else f"{len(problems)} problems")


def _report_classes(classes: np.ndarray, space: ConditionSpace) -> None:
    click.echo(f"{space.dimension} classes:")
    for k, count in enumerate(np.bincount(classes, minlength=space.dimension)):
        name = f"{k} {space.class_names[k]}" if space.class_names else str(k)
        click.echo(f"  {name}: {count}")
