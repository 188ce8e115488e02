"""Images of any size in a folder or zip -> a training set."""

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from edm2kit.data.archive import FolderArchive, ZipArchive, open_archive
from edm2kit.data.crops import TRANSFORMS
from edm2kit.data.image_files import IMAGE_EXTENSIONS, encode_png, is_grey, open_header, open_image, to_8bit
from edm2kit.data.labels import LABELS_FILE, RECORD, Labels, folder_labels, noted_labels, read_labels
from edm2kit.data.output import PartialDataset, is_finished
from edm2kit.data.workers import run_in_order
from edm2kit.torch_utils.progress import progress_bar

Archive = FolderArchive | ZipArchive


@dataclass(frozen=True)
class Broken:
    """An image that cannot be read, and why."""

    reason: str


@dataclass(frozen=True)
class Converter:
    """Callable from the number of a source image to the bytes of its PNG, or Broken.

    `size` is (width, height) for the transform; `model` is the image that the others must equal in size, or None
    where the transform unifies. Raises ValueError where the transform refuses.
    """

    archive: Archive
    transform: str
    size: tuple[int, int]
    channels: int
    model: str | None

    def __call__(self, index: int) -> bytes | Broken:
        where = self.archive.where(index)
        try:
            image = to_8bit(open_image(self.archive.read(index), where), self.channels, where)
        except ValueError as error:
            return Broken(str(error))
        if self.model is not None and image.size != self.size:
            raise ValueError(
                f"the images differ in size: {self.model} is {_text(self.size)}, {where} is {_text(image.size)}; add "
                "--resolution and a --transform"
            )
        try:
            return encode_png(TRANSFORMS[self.transform](image, *self.size))
        except ValueError as error:
            raise ValueError(f"{where} {error}") from error


def convert(
    source: Path,
    dest: Path,
    *,
    resolution: tuple[int, int] | None,
    transform: str,
    max_images: int | None,
    label_source: str,
    workers: int,
    skip_broken: bool,
) -> None:
    """Write the training set `dest`, or finish writing it.

    Raises ValueError for wrong input, a source image that cannot be read included, unless `skip_broken`; OSError
    where writing fails. Either way nothing is at `dest`, and calling again goes on where this one stopped.
    """
    check_transform(transform, resolution)
    if dest.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"--dest {dest} lies within --source {source}; choose a place outside")
    archive = open_archive(source, IMAGE_EXTENSIONS)
    labels = find_labels(archive, label_source)
    indices = pick_balanced(len(archive.names), None if labels is None else labels.classes, max_images)
    converter = plan(archive, indices, transform, resolution)
    click.echo(_describe(archive, indices, labels, converter))
    settings = {
        "images": len(indices),
        "source_digest": _digest(archive, indices, labels),
        "resolution": list(converter.size),
        "transform": transform,
        "channels": converter.channels,
    }
    if is_finished(dest, settings):
        click.echo(f"{dest} is already there, whole and made with these settings: nothing to do")
        return
    broken = _write(converter, indices, labels, PartialDataset(dest, settings), workers, skip_broken)
    for item in broken:
        click.echo(f"Left out: {item.reason}")
    left_out = f"; {len(broken)} could not be read and were left out" if broken else ""
    click.echo(f"Wrote {len(indices) - len(broken)} images to {dest}{left_out}")


def check_transform(transform: str, resolution: tuple[int, int] | None) -> None:
    """Raise ValueError where the transform and the resolution do not go together, or make no training set."""
    if resolution is None:
        if transform != "none":
            raise ValueError(f"--transform {transform} needs --resolution, for example --resolution 64x64")
        return
    width, height = resolution
    if width < 1 or width & (width - 1):
        raise ValueError(f"--resolution {_text(resolution)}: the width must be a power of two, as training needs it")
    if transform == "center-crop-wide" and not width > height > 0:
        raise ValueError(
            f"--resolution {_text(resolution)}: center-crop-wide needs a width above the height, for example 256x144; "
            "for square pictures use center-crop"
        )
    if transform != "center-crop-wide" and width != height:
        raise ValueError(f"--resolution {_text(resolution)}: width and height must be equal for {transform}")


def find_labels(archive: Archive, label_source: str) -> Labels | None:
    """The labels of the source images: from dataset.json (json), top-level folders, whichever is there (auto), or None.

    What generate.py drew lies in folders that are no classes, and says itself which class it is of.
    """
    has_file = archive.read_extra(LABELS_FILE) is not None
    if label_source == "json" and not has_file:
        raise ValueError(f"{archive.path}: holds no {LABELS_FILE}; use --labels folders or --labels none")
    if label_source == "json" or (label_source == "auto" and has_file):
        return read_labels(archive)
    if label_source == "none":
        return None
    if label_source == "auto" and archive.read_extra(RECORD) is not None:
        return noted_labels(archive)
    labels = folder_labels(archive.names)
    if labels is None and label_source == "folders":
        raise ValueError(f"{archive.path}: the images do not lie in two or more class folders")
    return labels


def pick_balanced(num_images: int, classes: np.ndarray | None, max_images: int | None) -> np.ndarray:
    """Numbers of at most `max_images` images, in order: the first of each class, as many of one as of another.

    Classes with fewer images than their share give all they have; the others share the rest. int64 [n].
    """
    if max_images is None or max_images >= num_images:
        return np.arange(num_images)
    if classes is None:
        return np.arange(max_images)
    by_class = np.argsort(classes, kind="stable")
    starts = np.searchsorted(classes[by_class], classes[by_class])
    turn = np.arange(num_images) - starts  # an image's number within its class
    # take turns: the first image of every class, then the second of every class, ...
    return np.sort(by_class[np.lexsort((by_class, turn))[:max_images]])


def plan(archive: Archive, indices: np.ndarray, transform: str, resolution: tuple[int, int] | None) -> Converter:
    """Settle size and channels from the headers of the images, as far as they need to be read.

    The result is grey where every image is. Raises ValueError where no image can be read, or the size is none that
    can be trained on.
    """
    first = None
    for index in indices.tolist():
        try:
            header = open_header(archive.read(index), archive.where(index))
        except ValueError:
            continue
        first = first or (header.size, archive.where(index))
        if not is_grey(header):
            break
    if first is None:
        raise ValueError(f"{archive.path}: none of the {len(indices)} images can be read")
    channels = 1 if is_grey(header) else 3
    if resolution is not None:
        return Converter(archive, transform, resolution, channels, None)
    (width, height), where = first
    if width != height or width & (width - 1):
        raise ValueError(
            f"{where} is {width}x{height}; training needs squares whose side is a power of two: add for example "
            "--resolution 64x64 --transform center-crop"
        )
    return Converter(archive, transform, (width, height), channels, where)


def _write(
    converter: Converter,
    indices: np.ndarray,
    labels: Labels | None,
    output: PartialDataset,
    workers: int,
    skip_broken: bool,
) -> list[Broken]:
    names = {index: f"{k // 1000:05d}/img{k:08d}.png" for k, index in enumerate(indices.tolist())}
    try:
        with output:
            broken = _convert_rest(converter, names, output, workers, skip_broken)
            written = {index: name for index, name in names.items() if index not in broken}
            if not written:
                raise ValueError(f"{converter.archive.path}: none of the {len(indices)} images can be read")
            output.finish(_dataset_json(written, labels))
    except OSError as error:
        raise OSError(
            f"{output.folder}: cannot be written: {error.strerror or error}; run the same command again to go on"
        ) from error
    return list(broken.values())


def _convert_rest(
    converter: Converter, names: dict[int, str], output: PartialDataset, workers: int, skip_broken: bool
) -> dict[int, Broken]:
    """Write the images that are not in `output` yet; returns those that cannot be read."""
    todo = [index for index, name in names.items() if name not in output.names]
    broken: dict[int, Broken] = {}
    with (
        contextlib.closing(run_in_order(converter, todo, workers)) as results,
        progress_bar(len(names), initial=len(names) - len(todo)) as bar,
    ):
        for index, result in results:
            bar.update()
            if isinstance(result, bytes):
                output.add(names[index], result)
            elif skip_broken:
                broken[index] = result
            else:
                raise ValueError(f"{result.reason}; --skip-broken leaves such images out")
    return broken


def _dataset_json(names: dict[int, str], labels: Labels | None) -> dict:
    if labels is None:
        return {"labels": None}
    content: dict = {"labels": [[name, int(labels.classes[index])] for index, name in names.items()]}
    if labels.class_names is not None:
        content["label_names"] = list(labels.class_names)
    return content


def _digest(archive: Archive, indices: np.ndarray, labels: Labels | None) -> str:
    """A hash of names, sizes and classes: enough to tell that a source has changed, without reading it."""
    digest = hashlib.sha256()
    for index in indices.tolist():
        label = "" if labels is None else labels.classes[index]
        digest.update(f"{archive.names[index]}\0{archive.num_bytes(index)}\0{label}\n".encode())
    return digest.hexdigest()


def _describe(archive: Archive, indices: np.ndarray, labels: Labels | None, converter: Converter) -> str:
    colour = "grey" if converter.channels == 1 else "RGB"
    lines = [f"{archive.path}: {len(archive.names)} images; converting {len(indices)} to {colour}"]
    others = [name for name in archive.ignored if name not in (LABELS_FILE, RECORD)]
    if others:
        lines.append(f"Passing over {len(others)} other files, such as {others[0]}")
    if labels is None:
        lines.append("No labels")
    else:
        some = ": " + ", ".join(labels.class_names[:5]) if labels.class_names else ""
        lines.append(f"{labels.num_classes} classes{some}{', ...' if some and labels.num_classes > 5 else ''}")
    return "\n".join(lines)


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
