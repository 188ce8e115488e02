"""Convert images of any size in a folder, a zip, a Hugging Face folder or CIFAR's archive to a training set."""

import contextlib
import hashlib
import os
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np

from edm2kit.data.archive import FolderArchive, ZipArchive, open_archive, other_files
from edm2kit.data.check import look_at
from edm2kit.data.cifar import CifarArchive, is_cifar_archive
from edm2kit.data.crops import TRANSFORMS
from edm2kit.data.dataset import split_kind
from edm2kit.data.hugging_face import SavedTable
from edm2kit.data.image_files import (
    HEIF_EXTENSIONS,
    HEIF_NEEDS,
    IMAGE_EXTENSIONS,
    OTHER_TYPES,
    STORES,
    heif_is_readable,
    is_grey,
    open_header,
    open_image,
    stored_bytes,
    to_8bit,
)
from edm2kit.data.labels import (
    LABELS_FILE,
    RECORD,
    Labels,
    find_extra,
    folder_labels,
    names_digest,
    noted_labels,
    read_labels,
    read_labels_file,
    split_folders,
    splits_among,
)
from edm2kit.data.output import PartialDataset, announce_size, is_finished
from edm2kit.data.workers import run_in_order
from edm2kit.torch_utils.dist import one_line, progress_bar

Archive = FolderArchive | ZipArchive | SavedTable | CifarArchive
_VIDEOS = (".mov", ".mp4", ".m4v", ".avi", ".mkv", ".webm", ".3gp", ".mpg", ".mpeg", ".wmv")
_MAX_KINDS = 4
_MAX_SIDE = 8192  # the largest power of two whose square open_image reads


@dataclass(frozen=True)
class BrokenImage:
    """An image that cannot be read, and why."""

    reason: str


@dataclass(frozen=True)
class Converter:
    """Callable from the number of a source image to the bytes of its PNG file, or BrokenImage.

    `as_stored` leaves EXIF orientation and colour profiles alone; `store` is a key of STORES. `size` is (width, height)
    for the transform. `model` names the image whose size all others must have, or is None if
    the transform makes sizes equal. Raises ValueError if an image does not suit the transform.
    """

    archive: Archive
    transform: str
    size: tuple[int, int]
    channels: int
    model: str | None
    as_stored: bool = False
    store: str = "plain"

    def __call__(self, index: int) -> bytes | BrokenImage:
        where = self.archive.where(index)
        try:
            image = to_8bit(open_image(self.archive.read(index), where, self.as_stored), self.channels, where)
        except ValueError as error:
            return BrokenImage(str(error))
        if self.model is not None and image.size != self.size:
            raise ValueError(
                f"the images differ in size: {self.model} is {_text(self.size)}, {where} is {_text(image.size)}; add "
                "--resolution and a --transform"
            )
        try:
            return STORES[self.store](TRANSFORMS[self.transform](image, *self.size))
        except ValueError as error:
            raise ValueError(f"{where} {error}") from error


def convert(
    source: str,
    dest: Path,
    *,
    resolution: tuple[int, int] | None,
    transform: str,
    max_images: int | None,
    label_source: str,
    workers: int,
    skip_broken: bool,
    picked: np.ndarray | None = None,
    as_stored: bool = False,
    store: str = "plain",
) -> None:
    """Write the training set `dest`, or resume writing it.

    `source` is a folder, a zip, a Hugging Face folder, or the archive of CIFAR-10 or CIFAR-100. `picked` are the
    numbers of the images to convert, int64 [n], instead of all or `max_images` of them. Photos are turned upright and
    converted to sRGB unless `as_stored`. `store` is a key of STORES.
    Raises ValueError for wrong input, including a source image that cannot be read unless `skip_broken`, and OSError if
    writing fails. In both cases there is nothing at `dest`, and calling this again resumes.
    """
    check_transform(transform, resolution)
    archive = open_pictures(source, skip_broken)
    if dest.resolve().is_relative_to(archive.path.resolve()):
        raise ValueError(f"--dest {dest} is inside --source {source}; choose a folder outside")
    labels = find_labels(archive, label_source)
    classes = labels.values if labels is not None and labels.space.kind == "classes" else None
    indices = pick_balanced(len(archive.names), classes, max_images) if picked is None else picked
    converter = replace(plan(archive, indices, transform, resolution), as_stored=as_stored, store=store)
    sample = look_at(archive, indices, min(converter.size), as_stored)
    for line in [*_description(archive, len(indices), labels, converter.channels), *sample.warnings]:
        click.echo(one_line(line))
    settings = {
        "images": len(indices),
        "source_content": _digest(archive, indices, labels, skip_broken),
        "resolution": list(converter.size),
        "transform": transform,
        "channels": converter.channels,
        "class_names": None if labels is None else names_digest(labels.class_names, labels.space.dimension),
    }
    # settings that were added later appear if they are not the default, so that older work is recognised
    if as_stored:
        settings["as_stored"] = True
    if store != "plain":
        settings["store"] = store
    if is_finished(dest, settings):
        click.echo(f"{dest} is complete and was made with these settings: nothing to do")
        return
    width = converter.size[0]
    click.echo(announce_size(dest, len(indices), stored_bytes(width, width, converter.channels), store == "compact"))
    broken = _write(converter, indices, labels, PartialDataset(dest, settings), workers, skip_broken, sample.enlarged)
    for item in broken:
        click.echo(one_line(f"Skipped: {item.reason}"))
    click.echo(f"Wrote {len(indices) - len(broken)} images to {dest}")
    if broken:
        click.echo(f"Skipped {len(broken)} images that could not be read")


def open_pictures(source: str, skip_broken: bool = False) -> Archive:
    """The images at `source`, with the methods of FolderArchive.

    Raises ValueError if there are none, or HEIC photos that cannot be read, unless `skip_broken` leaves these out.
    """
    kind, path = split_kind(source)
    if kind == "hf":
        return SavedTable(path)
    if is_cifar_archive(path):
        return CifarArchive(path)
    if heif_is_readable():
        return open_archive(path, (*IMAGE_EXTENSIONS, *HEIF_EXTENSIONS))
    archive = open_archive(path, IMAGE_EXTENSIONS, or_else=HEIF_EXTENSIONS)
    photos = [name for name in (*archive.names, *archive.ignored) if name.lower().endswith(HEIF_EXTENSIONS)]
    has_others = not archive.names[0].lower().endswith(HEIF_EXTENSIONS)
    if photos and not (skip_broken and has_others):
        raise ValueError(
            f"{path}: {len(photos)} HEIC photos, such as {photos[0]}, {HEIF_NEEDS}. Or use --skip-broken to leave them "
            "out"
        )
    return archive


def check_transform(transform: str, resolution: tuple[int, int] | None) -> None:
    """Raise ValueError if the transform does not work with the resolution, or the result cannot be trained on."""
    if resolution is None:
        if transform != "none":
            raise ValueError(f"--transform {transform} needs --resolution, for example --resolution 64x64")
        return
    width, height = resolution
    if max(width, height) > _MAX_SIDE:
        raise ValueError(f"--resolution {_text(resolution)} is beyond {_MAX_SIDE} pixels a side")
    if width < 1 or width & (width - 1):
        raise ValueError(f"--resolution {_text(resolution)}: the width must be a power of two for training")
    if transform == "center-crop-wide" and not width > height > 0:
        raise ValueError(
            f"--resolution {_text(resolution)}: center-crop-wide needs a width above the height, for example 256x144; "
            "for square images use center-crop"
        )
    if transform != "center-crop-wide" and width != height:
        raise ValueError(f"--resolution {_text(resolution)}: width and height must be equal for {transform}")


def find_labels(archive: Archive, label_source: str) -> Labels | None:
    """The labels of the source images, or None.

    `label_source` is json (dataset.json), folders (top-level folders), none, or auto: dataset.json if there is one,
    else the classes that generate.py noted in its own images, else top-level folders. Hugging Face folders and CIFAR
    archives store labels with their images. Raises ValueError if labels are requested that are not there.
    """
    if isinstance(archive, SavedTable | CifarArchive):
        if label_source in ("json", "folders"):
            raise ValueError(f"{archive.path}: its labels are {archive.labels_are}; use --labels auto or --labels none")
        return archive.read_labels() if label_source == "auto" else None
    if label_source == "none":
        return None
    # a dataset.json without "labels" belongs to another program
    content = None if label_source == "folders" else read_labels_file(archive)
    has_file = "labels" in (content or {})
    if label_source == "json":
        if not has_file:
            raise ValueError(
                f'{archive.path}: contains no {LABELS_FILE} with "labels"; use --labels folders or --labels none'
            )
        return read_labels(archive)
    if label_source == "folders":
        labels = folder_labels(archive.names)
        if labels is None:
            raise ValueError(f"{archive.path}: the images are not in two or more class folders; use --labels none")
        return labels
    if has_file or content:
        found = read_labels(archive)  # warns if the file belongs to another program
        if has_file:
            return found
    if find_extra(archive, RECORD) is not None:
        return noted_labels(archive)
    labels = folder_labels(archive.names)
    if splits := split_folders(archive.names):
        raise ValueError(
            f"{archive.path}: its folders {', '.join(splits)} look like splits of one data set, not "
            "like classes. Convert one of them (the folder one level below), or use --labels folders to take them as "
            "classes, or --labels none"
        )
    return labels


def pick_balanced(num_images: int, classes: np.ndarray | None, max_images: int | None) -> np.ndarray:
    """Numbers of at most `max_images` images, in order: the first ones of each class, equally many per class.

    A class with fewer images than its share contributes all of them; the other classes fill up. int64 [n].
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
    """Decide size and channels from the headers of the images, reading only as many as necessary.

    The result is grey if all images are. Raises ValueError if no image can be read, or if the size does not suit
    training.
    """
    first = reason = None
    grey = True
    for index in indices.tolist():
        try:
            header = open_header(archive.read(index), archive.where(index))
        except ValueError as error:
            reason = reason or error
            continue
        first = first or (header.size, archive.where(index))
        if not is_grey(header):
            grey = False
            break
    if first is None:
        raise ValueError(f"{archive.path}: none of the {len(indices)} images can be read; the first: {reason}")
    channels = 1 if grey else 3
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
    enlarged: float,
) -> list[BrokenImage]:
    """Write the images that are not in `output` yet, then dataset.json; returns the images that cannot be read.

    `enlarged` is the fraction of images that are enlarged, which dataset.json records.
    """
    names = {index: f"{k // 1000:05d}/img{k:08d}.png" for k, index in enumerate(indices.tolist())}
    todo = [index for index, name in names.items() if name not in output.names]
    broken: dict[int, BrokenImage] = {}
    try:
        with output:
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
                        raise ValueError(f"{result.reason}; use --skip-broken to leave such images out")
            written = [index for index in names if index not in broken]
            if not written:
                reason = next(iter(broken.values())).reason
                raise ValueError(
                    f"{converter.archive.path}: none of the {len(indices)} images can be read; the first: {reason}"
                )
            content: dict = {"labels": None}
            if labels is not None:
                kept = Labels(labels.values[written], labels.class_names, labels.space.dimension)
                content = kept.to_json([names[index] for index in written])
            if enlarged:
                content["enlarged"] = enlarged
            output.finish(content)
    except OSError as error:
        raise OSError(
            f"{output.folder}: cannot be written: {error.strerror or error}; run the same command again to resume"
        ) from error
    return list(broken.values())


def _digest(archive: Archive, indices: np.ndarray, labels: Labels | None, skip_broken: bool) -> str:
    """A hash of names, contents and labels: it shows that a source has changed, without decoding the images.

    Raises ValueError if an image cannot be read, unless `skip_broken` allows that.
    """
    digest = hashlib.sha256()
    for index in indices.tolist():
        label = "" if labels is None else labels.values[index].tolist()
        size, checksum = archive.checksum(index)
        if size < 0 and not skip_broken:  # the hash would be another one as soon as the disk answers again
            raise ValueError(
                f"{archive.where(index)}: cannot be read; run the same command again, or use --skip-broken"
            )
        digest.update(os.fsencode(archive.names[index]) + f"\0{(size, checksum)}\0{label}\n".encode())
    return digest.hexdigest()


def _description(archive: Archive, count: int, labels: Labels | None, channels: int) -> list[str]:
    color = "grey" if channels == 1 else "RGB"
    lines = [f"{archive.path}: {len(archive.names)} images; converting {count} to {color}"]
    others = [name for name in archive.ignored if name not in (LABELS_FILE, RECORD)]
    if others:
        lines.append(f"Ignoring {other_files(len(others))}: {_kinds(others)}")
    unread = [name for name in others if name.lower().endswith((*OTHER_TYPES, *HEIF_EXTENSIONS))]
    if unread:
        lines.append(
            f"Warning: {len(unread)} of them are images of types that are not read; convert {unread[0]} to PNG"
        )
    if labels is None:
        return [*lines, "No labels"]
    summary = str(labels.space)
    if labels.class_names:
        summary += ": " + ", ".join(labels.class_names[:5])
        if len(labels.class_names) > 5:
            summary += ", ..."
    lines.append(summary)
    if splits := splits_among(labels.class_names or ()):
        lines.append(
            f"Warning: the classes {', '.join(splits)} have the names of splits. Convert the folder one level below if "
            "they are"
        )
    empty = labels.space.empty_classes(labels.values)
    if empty:
        names = ", ".join(labels.space.name_class(k) for k in empty[:5])
        lines.append(f"Warning: {len(empty)} of {labels.space.dimension} classes have no image: {names}")
    elif labels.class_names and isinstance(archive, FolderArchive):
        lines += _empty_folders(archive, labels.class_names)
    return lines


def _kinds(names: list[str]) -> str:
    """What kinds of files these are, the most frequent first: "12 videos (such as a.mov), 3 .txt (such as b.txt)"."""
    kinds = ["video" if name.lower().endswith(_VIDEOS) else Path(name).suffix.lower() or "no suffix" for name in names]
    counts = Counter(kinds).most_common()
    parts = []
    for kind, count in counts[:_MAX_KINDS]:
        plural = "s" if kind == "video" and count > 1 else ""
        parts.append(f"{count} {kind}{plural} (such as {names[kinds.index(kind)]})")
    if len(counts) > _MAX_KINDS:
        parts.append(f"{len(counts) - _MAX_KINDS} other kinds")
    return ", ".join(parts)


def _empty_folders(archive: FolderArchive, class_names: tuple[str, ...]) -> list[str]:
    """A warning if there are folders beside the class folders that contain no images."""
    parts = archive.names[0].split("/")
    here = next((k for k, part in enumerate(parts[:-1]) if unicodedata.normalize("NFC", part) in class_names), None)
    if here is None:
        return []
    folders = sorted(
        unicodedata.normalize("NFC", folder.name)
        for folder in Path(archive.path, *parts[:here]).iterdir()
        if folder.is_dir()
    )
    empty = [name for name in folders if name not in class_names and not name.startswith((".", "__MACOSX"))]
    if not empty:
        return []
    return [f"Warning: these folders contain no image and are not classes: {', '.join(empty[:5])}"]


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
