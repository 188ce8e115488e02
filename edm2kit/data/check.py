"""Check that a folder or zip can be trained on, and list everything that is wrong with it."""

import contextlib
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from edm2kit.data.archive import FolderArchive, ZipArchive, open_archive
from edm2kit.data.checksums import verify_arrays
from edm2kit.data.cifar import CifarArchive
from edm2kit.data.dataset import (
    CONVERT_HINT,
    FILE_EXTENSIONS,
    UNREAD_TYPES,
    ImageDataset,
    Source,
    latent_trouble,
    open_source,
    split_kind,
)
from edm2kit.data.hugging_face import SavedTable
from edm2kit.data.image_files import (
    check_item,
    decode_array,
    has_other_profile,
    open_image,
    orientation,
    to_8bit,
)
from edm2kit.data.labels import ConditionSpace, Labels, read_labels
from edm2kit.data.workers import run_in_order
from edm2kit.torch_utils.dist import one_line, progress_bar

_MAX_KINDS = 20
_BATCH = 64
_SAMPLED = 64  # images that are looked at before a conversion
_ALMOST_BLACK = 16  # of 255
_UNREADABLE = (ValueError, OSError, SyntaxError, KeyError, TypeError, IndexError, struct.error)


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
            if trouble := latent_trouble(raw):
                raise ValueError(f"{where}: {trouble}")
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
        if archive.names[0].lower().endswith(".npy"):
            verify_arrays(archive, needed=True)
        labels = read_labels(archive)
    except ValueError as error:
        problems.append(str(error))
    unread = [name for name in archive.ignored if name.lower().endswith(UNREAD_TYPES)]
    if unread:
        total = len(unread) + len(archive.names)
        problems.append(f"training does not read {len(unread)} of {total} images, such as {unread[0]}; {CONVERT_HINT}")
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
                raw = source.read(indices)
                if not np.isfinite(raw).all():
                    raise ValueError(f"{source.path}: items {start} to {indices[-1]} hold numbers that are not finite")
                if trouble := latent_trouble(raw):
                    raise ValueError(f"{source.path}: items {start} to {indices[-1]}: {trouble}")
                good += len(indices)
            except ValueError as error:
                problems.append(str(error))
            bar.update(len(indices))
    kind = f"{source.item_dtype} {list(source.item_shape)}"
    labels = None if source.labels is None else Labels(source.labels, source.label_names, source.label_dim)
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
        click.echo(one_line(f"Problem: {problem}"))
    if problems:
        click.echo("1 problem" if len(problems) == 1 else f"{len(problems)} problems")


def _report_classes(classes: np.ndarray, space: ConditionSpace) -> None:
    click.echo(f"{space.dimension} classes:")
    for k, count in enumerate(np.bincount(classes, minlength=space.dimension)):
        click.echo(one_line(f"  {space.name_class(k)}: {count}"))
    empty = space.empty_classes(classes)
    if empty:
        click.echo(
            f"Warning: {len(empty)} of {space.dimension} classes have no image; they are not generated by default"
        )


@dataclass(frozen=True)
class Sample:
    """What a sample of the source images shows: `warnings`, and the fraction of images smaller than the result."""

    warnings: list[str]
    enlarged: float


def look_at(
    archive: FolderArchive | ZipArchive | SavedTable | CifarArchive,
    indices: np.ndarray,
    side: int,
    as_stored: bool = False,
) -> Sample:
    """Look at a sample of the pictures for faults that all are likely to share, before they become `side` pixels.

    Raises ValueError if the range of values makes every picture black.
    """
    turned = profiles = small = deep = brightest = highest = animated = count = 0
    for index in indices[np.linspace(0, len(indices) - 1, min(_SAMPLED, len(indices))).astype(int)].tolist():
        where = archive.where(index)
        try:
            image = open_image(archive.read(index), where, as_stored=True)
            values = np.asarray(to_8bit(image, 3, where))
        except _UNREADABLE:
            continue  # reported when it is converted
        count += 1
        turned += orientation(image) != 1
        profiles += has_other_profile(image)
        small += min(image.size) < side
        with contextlib.suppress(*_UNREADABLE, EOFError):  # looking for a second frame may meet damage in it
            animated += bool(getattr(image, "is_animated", False))
        brightest = max(brightest, int(values.max()))
        if image.mode.startswith("I"):
            deep += 1
            highest = max(highest, int(np.asarray(image).max()))
    lines = []
    if turned and as_stored:
        lines.append(f"Warning: {turned} of {count} sampled images stay turned or mirrored (EXIF orientation)")
    elif turned:
        lines.append(f"{turned} of {count} sampled images are stored turned or mirrored; they become upright (EXIF)")
    if profiles and not as_stored:
        lines.append(f"{profiles} of {count} sampled images have another color profile; they are converted to sRGB")
    if animated:
        lines.append(f"{animated} of {count} sampled images are animations or have several pages; the first is used")
    if small:
        lines.append(f"Warning: {small} of {count} sampled images are smaller than {side} pixels and are enlarged")
    if count and brightest < _ALMOST_BLACK:
        reason = f"the {count} sampled images are almost black: no value is above {brightest} of 255"
        if deep == count and highest:
            raise ValueError(
                f"{archive.path}: {reason}, as their 16-bit values only go up to {highest}; scale them to 65535 first"
            )
        lines.append(f"Warning: {reason}; scale the values first, unless this is meant")
    return Sample(lines, round(small / count, 3) if count else 0.0)
