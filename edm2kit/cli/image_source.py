"""Images to score: a folder or zip of any images, a data set, or the .npz written by generate.py."""

import hashlib
import unicodedata
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from edm2kit.data.archive import open_archive
from edm2kit.data.dataset import open_source, split_kind
from edm2kit.data.image_files import (
    HEIF_EXTENSIONS,
    HEIF_NEEDS,
    IMAGE_EXTENSIONS,
    OTHER_TYPES,
    heif_is_readable,
    open_image,
    to_8bit,
)
from edm2kit.data.labels import (
    RECORD,
    SPLIT_NAME,
    Labels,
    find_extra,
    folder_labels,
    labels_of_array,
    noted_labels,
    read_labels,
    read_labels_file,
    split_folders,
)
from edm2kit.metrics.reference import Reference
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.arrays import BROKEN, check_index, map_npz_array, read_npz_array
from edm2kit.torch_utils.dist import progress_bar
from edm2kit.torch_utils.file_threads import FileThreads, Job

_BATCHES_AHEAD = 2
_HASHED_IMAGES = 256
_SCORES_NEED_PIXELS = "metrics compare images, not latents: use the images that the latents were encoded from"


class ScoredImages(Protocol):
    """Images that are read by number."""

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """The name of image `index` for messages."""
        ...

    def read(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [3, H, W]; raises ValueError, naming the image, if it cannot be read."""
        ...


class ArchiveImages:
    """The images in a folder and its subfolders, or in a zip, sorted by name.

    Opening reads no image, and warns of images whose type is not read. Raises ValueError if there are none, or HEIC
    photos without the package that reads them.
    """

    def __init__(self, path: Path):
        self._archive = open_archive(path, (*IMAGE_EXTENSIONS, *HEIF_EXTENSIONS, ".npy"))
        photos = [name for name in self._archive.names if name.lower().endswith(HEIF_EXTENSIONS)]
        if photos and not heif_is_readable():
            raise ValueError(f"{path}: {len(photos)} HEIC photos, such as {photos[0]}, {HEIF_NEEDS}")
        unread = [name for name in self._archive.ignored if name.lower().endswith(OTHER_TYPES)]
        if unread:
            dist.warn0(
                f"{path}: {len(unread)} images of types that are not read are left out, such as {unread[0]}; convert "
                "them to PNG"
            )
        first = self._archive.names[0].rpartition("/")[0]
        if SPLIT_NAME.search(first) and (splits := split_folders(self._archive.names)):
            dist.warn0(
                f"{path}: the folders {', '.join(splits)} look like splits of one data set; the images of all of them "
                "are used. Give one of them if that is not meant"
            )
        for name in self._archive.names:
            if name.lower().endswith(".npy"):
                raise ValueError(f"{path}: contains {name}, which is not an image; {_SCORES_NEED_PIXELS}")

    def __len__(self) -> int:
        return len(self._archive.names)

    def labels(self) -> Labels | None:
        """The label of each image, or None."""
        found = read_labels(self._archive)
        if found is None and find_extra(self._archive, RECORD) is None:  # folders of generate.py hold a thousand seeds
            found = folder_labels(self._archive.names)
        return noted_labels(self._archive) if found is None else found

    def crop(self) -> str | None:
        """How dataset_tool.py made the images, such as "center-crop to 256x256"; None if something else made them."""
        settings = (read_labels_file(self._archive) or {}).get("settings")
        if not isinstance(settings, dict) or settings.get("transform") in (None, "none"):
            return None
        resolution = settings.get("resolution")
        size = "x".join(map(str, resolution)) if isinstance(resolution, list) else resolution
        return f"{settings['transform']} to {size}"

    def where(self, index: int) -> str:
        return self._archive.where(index)

    def read(self, index: int) -> np.ndarray:
        where = self.where(index)
        image = to_8bit(open_image(self._archive.read(index), where), 3, where)
        return np.asarray(image).transpose(2, 0, 1)


class SourceImages:
    """The pixels of a training set that is not made of image files (see `edm2kit.data.dataset`).

    Raises ValueError if there is no data set, or if it contains latents.
    """

    def __init__(self, path: str):
        self._path = path
        self._source = open_source(path, use_labels=False)
        if self._source.item_dtype != np.uint8:
            raise ValueError(f"{path}: contains latents; {_SCORES_NEED_PIXELS}")

    def __len__(self) -> int:
        return len(self._source)

    def labels(self) -> Labels | None:
        """The label of each image, or None."""
        source = open_source(self._path)
        return None if source.labels is None else Labels(source.labels, source.label_names, source.label_dim)

    def where(self, index: int) -> str:
        return f"{self._source.path}[{index}]"

    def read(self, index: int) -> np.ndarray:
        _, height, width = self._source.item_shape
        return np.broadcast_to(self._source.read(np.array([index]))[0], (3, height, width))


class NpzImages:
    """The array `images`, uint8 [N, H, W, 1 or 3], of an uncompressed .npz, memory-mapped; `arr_0` in those of ADM.

    Classes are in `labels` [N]; beside `arr_0`, they may also be in `arr_1`, where the sampling script of ADM puts
    them. Raises ValueError if the file does not contain that array.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                check_index(archive)
                members = archive.namelist()
            arrays = [member.removesuffix(".npy") for member in members]
            name = next((one for one in ("images", "arr_0") if one in arrays), None)
            if name is None:
                found = dist.one_line(", ".join(arrays[:4])) or "nothing"
                raise ValueError(f"it holds {found}; expected `images` or `arr_0`")
            self._labels = next((one for one in ("labels", "arr_1") if one in arrays), None)
            if name == "images" and self._labels == "arr_1":
                self._labels = None
            self._has_names = "label_names" in arrays
            self._images = map_npz_array(path, name)
        except BROKEN as error:
            raise ValueError(f"{path}: contains no array of images, or is damaged: {error}") from error
        if self._images.dtype != np.uint8 or self._images.ndim != 4 or self._images.shape[3] not in (1, 3):
            raise ValueError(
                f"{path}: `{name}` is {self._images.dtype} {list(self._images.shape)}; expected uint8 [N, H, W, 1 or 3]"
            )
        if not self._images.size:
            raise ValueError(f"{path}: `{name}` is {list(self._images.shape)}: it contains no images")

    def __len__(self) -> int:
        return len(self._images)

    def labels(self) -> Labels | None:
        """The array of classes beside the images, as generate.py or ADM write it, or None."""
        if self._labels is None:
            return None
        values = read_npz_array(self._path, self._labels)
        if values.shape != (len(self),):
            raise ValueError(f"{self._path}: `{self._labels}` has shape {list(values.shape)}; expected [{len(self)}]")
        found = labels_of_array(values, str(self._path))
        if not self._has_names:
            return found
        names = read_npz_array(self._path, "label_names")
        if names.ndim != 1 or names.dtype.kind != "U" or found.values.ndim != 1 or len(names) <= found.values.max():
            raise ValueError(
                f"{self._path}: `label_names` is {names.dtype} {list(names.shape)}; expected one per class"
            )
        return Labels(found.values, tuple(names.tolist()))

    def where(self, index: int) -> str:
        return f"{self._path}[{index}]"

    def read(self, index: int) -> np.ndarray:
        height, width, _ = self._images.shape[1:]
        return np.broadcast_to(self._images[index], (height, width, 3)).transpose(2, 0, 1)


def open_images(path: str | Path) -> ScoredImages:
    """The images at `path`: a folder or .zip, an .npz of generate.py, or another data set such as .npy arrays.

    Raises ValueError if there are none.
    """
    if Path(path).is_file() and _is_npz(Path(path)):
        return NpzImages(Path(path))
    kind, rest = split_kind(path)
    return ArchiveImages(Path(rest)) if kind == "image_files" else SourceImages(str(path))


def _is_npz(path: Path) -> bool:
    """Whether a file has the suffix .npz or, with another one than .zip, holds what generate.py --npz writes."""
    if path.suffix.lower() in (".npz", ".zip"):  # the index of a zip of a million images takes seconds
        return path.suffix.lower() == ".npz"
    try:
        with zipfile.ZipFile(path) as archive:
            return {"images.npy", "seeds.npy"} <= set(archive.namelist())
    except BROKEN:
        return False


def warn_of_another_crop(images: ScoredImages, what: str, reference: Reference) -> None:
    """Warn if `images`, called `what`, were cropped or resized otherwise than the reference's, as far as known."""
    size, expected_size = list(images.read(0).shape[1:]), reference.source.get("image_size")
    crop = images.crop() if isinstance(images, ArchiveImages) and "crop" in reference.source else None
    expected = reference.source.get("crop")
    if None not in (crop, expected) and crop != expected:
        dist.warn0(
            f"{what} was made with {crop}, the images of the reference with {expected}: the crop alone moves a "
            "distance by several tenths or more. Convert both with one --transform of scripts/dataset_tool.py"
        )
    elif expected_size not in (None, size):
        dist.warn0(
            f"{what} has images of {size} pixels (height, width), those of the reference were {expected_size}: resize "
            "one of them with scripts/dataset_tool.py"
        )


def pixels_sha256(images: ScoredImages) -> str:
    """SHA-256 of the pixels of up to 256 images, evenly spread, and of their number: to recognise a set again."""
    digest = hashlib.sha256(str(len(images)).encode())
    for index in np.unique(np.linspace(0, len(images) - 1, _HASHED_IMAGES).round().astype(int)).tolist():
        pixels = images.read(index)
        digest.update(str(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


def image_labels(images: ScoredImages) -> Labels | None:
    """The classes of all images and their names: from dataset.json, class folders, or notes of generate.py.

    None if they are unknown. Raises ValueError if only some of the images have one.
    """
    found = images.labels() if isinstance(images, ArchiveImages | SourceImages | NpzImages) else None
    return None if found is None or found.values.ndim != 1 else found


def image_classes(images: ScoredImages, names: Sequence[str] | None = None) -> torch.Tensor | None:
    """The class of every image, int64 [N], None if unknown; `names` are those of the classes in another set.

    If both sets name their classes, equal names get equal numbers. Raises ValueError if a name is not among `names`,
    or only some of the images have a class.
    """
    found = image_labels(images)
    if found is None:
        return None
    numbers = class_numbers(found.class_names, names, np.unique(found.values).tolist())
    return torch.from_numpy(found.values) if numbers is None else numbers[torch.from_numpy(found.values)]


def class_numbers(
    generated: Sequence[str] | None, real: Sequence[str] | None, used: Iterable[int]
) -> torch.Tensor | None:
    """The number of each class of generated images among the names of real ones, int64 [K], -1 if it is not there.

    None if the numbers are the same or not both are named. Raises ValueError if one of the `used` classes is not there.
    """
    if generated is None or real is None:
        return None
    # systems differ in how they store an accent: as part of the letter, or after it
    generated, real = ([unicodedata.normalize("NFC", name) for name in names] for names in (generated, real))
    if generated == real:
        return None
    unknown = [generated[number] for number in used if generated[number] not in real]
    if unknown:
        raise ValueError(
            f"the generated images have the class {unknown[0]!r}, which the real images lack; their classes are "
            f"{', '.join(real[:5])}{', ...' if len(real) > 5 else ''}"
        )
    return torch.tensor([real.index(name) if name in real else -1 for name in generated])


def renumbered(classes: torch.Tensor | None, numbers: torch.Tensor | None) -> torch.Tensor | None:
    """Classes with the `numbers` of `class_numbers`; unchanged if there are none."""
    return classes if classes is None or numbers is None else numbers[classes.cpu()]


def selection(available: int, num: int, seed: int) -> list[int]:
    """Sorted positions of `num` of `available` images, those that EDM2's code selects with this seed."""
    return np.sort(np.random.RandomState(seed % (1 << 31)).permutation(available)[:num]).tolist()


def labelled_batches(
    images: ScoredImages, indices: Sequence[int], classes: torch.Tensor | None, batch_size: int, workers: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """This rank's batches as from `image_batches`, with the classes of their images, picked from those of all."""
    batches = image_batches(images, indices, batch_size, workers)
    starts = range(0, len(indices), batch_size)[dist.rank() :: dist.world_size()]
    for start, pixels in zip(starts, batches, strict=True):
        yield pixels, None if classes is None else classes[indices[start : start + batch_size]]


def image_batches(
    images: ScoredImages, indices: Sequence[int] | np.ndarray, batch_size: int, workers: int
) -> Iterator[torch.Tensor]:
    """This rank's batches of the images `indices`, uint8 [N, 3, H, W], with a progress bar on rank 0.

    Batch k belongs to rank k modulo the number of ranks, so the batches do not depend on that number. `workers` threads
    read ahead. Raises ValueError, naming the image, if one is damaged, differs in size from the first one, or cannot be
    read for as long as `dist.timeout_sec` allows.
    """
    starts = range(0, len(indices), batch_size)[dist.rank() :: dist.world_size()]
    ahead: deque[list[Job[np.ndarray]]] = deque()
    with FileThreads(workers) as threads, progress_bar(len(starts), "batch") as bar:
        expected = threads.submit(images.where(indices[0]), images.read, indices[0]).result().shape

        def submit(index: int) -> Job[np.ndarray]:
            return threads.submit(images.where(index), _read, images, index, expected)

        for start in starts:
            ahead.append([submit(index) for index in indices[start : start + batch_size]])
            if len(ahead) > _BATCHES_AHEAD:
                yield _stack(ahead.popleft())
                bar.update()
        while ahead:
            yield _stack(ahead.popleft())
            bar.update()


def _stack(reading: list[Job[np.ndarray]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([job.result() for job in reading]))


def _read(images: ScoredImages, index: int, expected: tuple[int, ...]) -> np.ndarray:
    pixels = images.read(index)
    if pixels.shape != expected:
        raise ValueError(
            f"{images.where(index)}: is {pixels.shape[2]}x{pixels.shape[1]} pixels, but the first image is "
            f"{expected[2]}x{expected[1]}; metrics need images of one size (make them with "
            "scripts/dataset_tool.py convert)"
        )
    return pixels
