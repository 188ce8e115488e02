"""Data sets that training reads: the Source protocol, ImageDataset for image files, and SOURCES, every kind by name."""

import hashlib
import json
import math
import os
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edm2kit.data.archive import open_archive, spread_evenly
from edm2kit.data.checksums import verify_arrays
from edm2kit.data.image_files import (
    HEIF_EXTENSIONS,
    IMAGE_EXTENSIONS,
    OTHER_TYPES,
    Layout,
    check_item,
    decode_array,
    find_layout,
)
from edm2kit.data.labels import (
    LABELS_FILE,
    ConditionSpace,
    find_extra,
    labels_identity,
    pick_labels,
    read_labels,
    split_folders,
)
from edm2kit.torch_utils.files import check_fields, check_type

FILE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".npy")
UNREAD_TYPES = tuple({*IMAGE_EXTENSIONS, *HEIF_EXTENSIONS, *OTHER_TYPES}.difference(FILE_EXTENSIONS))
ENCODER_FILE = "encoder.json"
_HASHED_BYTES = 1 << 26  # of all items together, for the identity of a data set
_LARGEST_LATENT = 1000
_HUGGING_FACE_FILES = ("dataset_dict.json", "state.json")  # save_to_disk writes one of them into each folder
CONVERT_HINT = (
    "make a training set of the images with "
    "`python scripts/dataset_tool.py convert --source=... --dest=... --resolution=64x64 --transform=center-crop`"
)


class Source(Protocol):
    """A data set for training. Subclass it for a new kind of data and register it with
    `edm2kit.data.dataset.register_source`.

    `item_shape` is (C, H, W) and `item_dtype` uint8 for pixels 0 ... 255, or float32 for raw latents (the means of the
    encoder, then its standard deviations). `labels` are classes, int64 [N], vectors, float32 [N, D], or None;
    `condition_space` describes them. `path` appears in messages. Training forks or pickles the source for its reading
    processes.

    Example::

        class Noise(Source):
            path, item_shape, item_dtype = Path("noise"), (3, 64, 64), np.dtype(np.uint8)
            condition_space, labels = ConditionSpace(), None

            def __len__(self):
                return 1000

            def read(self, indices):
                return np.stack([np.random.default_rng(k).integers(0, 256, self.item_shape, np.uint8) for k in indices])

            def identity(self):
                return {"source": "noise"}
    """

    path: Path
    item_shape: tuple[int, int, int]
    item_dtype: np.dtype
    condition_space: ConditionSpace
    labels: np.ndarray | None

    @abstractmethod
    def __len__(self) -> int:
        """The number of items."""

    def __repr__(self) -> str:
        names = self.label_names or ()
        named = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
        kind = "images" if self.item_dtype == np.uint8 else "latents"
        return (
            f"{type(self).__name__}: {len(self):,} {kind}, {self.item_dtype} {list(self.item_shape)}, "
            f"{self.condition_space}{named}, from {self.path}"
        )

    @abstractmethod
    def read(self, indices: np.ndarray) -> np.ndarray:
        """Items `indices`, int64 [n], as one array [n, C, H, W]; in memory its channels may be last.

        An item must never change, so that resumed runs repeat. Raises ValueError, naming the item, if one cannot be
        read.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON values that distinguish this data set from others, wherever it is stored. Resuming a run checks them."""

    def files_digest(self) -> str | None:
        """A hash of the checksums of all files, if they are known without reading the files; else None."""
        return None

    def files_stamp(self, times: bool = True) -> str | None:
        """A hash of the sizes, and `times` of change, of files without known checksums; None if there are none."""
        return None

    def files_sample(self) -> str | None:
        """A hash of sizes and some of the bytes of files without known checksums; None if there are none."""
        return None

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Item `index` [C, H, W] and its label as the network receives it, float32 [label_dim]."""
        indices = np.array([index])
        return self.read(indices)[0], self.read_labels(indices)[0]

    def read_labels(self, indices: np.ndarray) -> np.ndarray:
        """The labels of items `indices` as the network receives them: float32 [n, label_dim]."""
        if self.labels is None:
            return np.zeros([len(indices), 0], np.float32)
        return self.condition_space.encode(self.labels[indices])

    def item_name(self, index: int) -> str:
        """A file name for item `index`, for data sets that are made from this one."""
        return f"{index // 1000:05d}/img{index:08d}"

    def read_extra(self, name: str) -> bytes | None:
        """The bytes of a file that is stored with the items, such as encoder.json, or None if there is none."""
        return None

    @property
    def needs_decoding(self) -> bool:
        """Whether the items are decoded one by one and `dataset_tool.py convert` can make a copy that is not."""
        return False

    @property
    def left_out(self) -> list[str]:
        """The names of images that are there but are not read, because of their type."""
        return []

    @property
    def label_dim(self) -> int:
        """The number of classes or the length of the label vectors; 0 without labels."""
        return self.condition_space.dimension

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The names of the classes, or None if they have no names."""
        return self.condition_space.class_names

    @property
    def num_channels(self) -> int:
        """Channels as stored; raw latents have twice as many as the latents that the network sees."""
        return self.item_shape[0]

    @property
    def resolution(self) -> int:
        """Height and width as stored."""
        return self.item_shape[1]


class ImageDataset(Source):
    """The training images in a folder or zip: PNG, JPEG or .npy files, sorted by name. The source `image_files`.

    `dataset[i]` is (raw, label): raw uint8 [C, H, W] (pixels 0 ... 255; C is 3, or 1 for grey files) or float32
    [C, H, W] (raw latents); label float32 [label_dim], one-hot for classes, empty without labels. Labels come from
    dataset.json (see `edm2kit.data.labels.read_labels`); `use_labels=False` ignores that file. `max_images` keeps that
    many images, evenly spread over the sorted names.

    Pixels must be square with a power of two as side; latents must be square. Opening a data set checks the first file
    only. Reading another one raises ValueError, naming it, if it differs in shape or type. Processes may share an
    instance: it can be forked and pickled.

    Example::

        dataset = ImageDataset("img64.zip")
        raw, label = dataset[0]
        batch = dataset.read(np.arange(32))  # uint8 [32, 3, 64, 64]
    """

    def __init__(self, path: str | Path, max_images: int | None = None, use_labels: bool = True):
        self._archive = open_archive(path, FILE_EXTENSIONS)
        if self._archive.names[0].lower().endswith(".npy"):  # other files have checksums of their own
            verify_arrays(self._archive, needed=use_labels)
        self.path = self._archive.path
        self._picked = spread_evenly(len(self._archive.names), max_images)
        first = int(self._picked[0])
        data, where = self._archive.read(first), self._archive.where(first)
        raw = decode_array(data, where)
        check_item(raw, where, CONVERT_HINT)
        self.item_shape, self.item_dtype = raw.shape, raw.dtype
        self._layout = find_layout(data)
        if self._layout is not None and not self._read_stored(self._picked[:1], self._layout)[1][0]:
            self._layout = None  # compressed in the zip
        found = read_labels(self._archive) if use_labels else None
        self.labels, self.condition_space = pick_labels(found, self._picked)

    def __len__(self) -> int:
        return len(self._picked)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        # decodes the file and verifies its checksum, which `read` does once
        return self._decode(index), self.read_labels(np.array([index]))[0]

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Items `indices` as one array [n, C, H, W], in memory perhaps channels last.

        Files that need no decoding are copied into place, about 20 times as fast as one by one. Their checksums, of the
        zip or the PNG, are verified when a process reads them for the first time.
        """
        if self._layout is None:
            return np.stack([self._decode(k) for k in indices.tolist()])
        raw, fitting = self._read_stored(self._picked[indices], self._layout)
        for k in np.flatnonzero(~fitting).tolist():
            raw[k] = self._decode(int(indices[k]))
        return raw

    def _read_stored(self, numbers: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        """The arrays in the files `numbers` of the archive, and whether each file really has the layout."""
        starts, rests, whole = self._archive.read_stored(numbers, layout.num_bytes, len(layout.start))
        raw, fitting = layout.values(starts, rests)
        return raw, whole & fitting

    def _decode(self, index: int) -> np.ndarray:
        number = int(self._picked[index])
        where = self._archive.where(number)
        raw = decode_array(self._archive.read(number), where)
        if raw.shape != self.item_shape or raw.dtype != self.item_dtype:
            raise ValueError(
                f"{where}: is {raw.dtype} {list(raw.shape)}, but the first file, {self.item_name(0)}, is "
                f"{self.item_dtype} {list(self.item_shape)}; {CONVERT_HINT}"
            )
        return raw

    def identity(self) -> dict[str, Any]:
        """The number, shape, names and labels of the images, and a hash of the pixels of up to 4096 images.

        It does not depend on how the files store the pixels: a converted copy with the same names has the same.
        """
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(os.fsencode(self.item_name(index)) + b"\n")
        return {
            "num_images": len(self),
            "raw_shape": list(self.item_shape),
            **labels_identity(self, digest),
            "content": content_digest(self),
        }

    def files_digest(self) -> str | None:
        """Of a zip, which holds a checksum of each file."""
        return self._archive.digest(self._picked)

    def files_stamp(self, times: bool = True) -> str | None:
        """Of a folder."""
        return self._archive.stamp(self._picked, times)

    def files_sample(self) -> str | None:
        """Of a folder."""
        return self._archive.sample(self._picked)

    @property
    def needs_decoding(self) -> bool:
        """Whether the first file is compressed, in itself or within the zip."""
        return self._layout is None

    def item_name(self, index: int) -> str:
        """The name of file `index` within the folder or zip."""
        return self._archive.names[self._picked[index]]

    def read_extra(self, name: str) -> bytes | None:
        """The bytes of another file in the folder or zip, such as encoder.json, or None if there is none."""
        found = find_extra(self._archive, name)
        return None if found is None else found[1]

    @property
    def left_out(self) -> list[str]:
        """The names of images that training does not read, because of their type."""
        return [name for name in self._archive.ignored if name.lower().endswith(UNREAD_TYPES)]


def content_digest(source: Source) -> str:
    """A hash of 64 MiB of the items, at least 256 and at most 4096 of them, evenly spread."""
    item_bytes = math.prod(source.item_shape) * source.item_dtype.itemsize
    count = min(max(_HASHED_BYTES // item_bytes, 256), 4096)
    digest = hashlib.sha256()
    for indices in np.array_split(spread_evenly(len(source), count), 16):
        if len(indices):
            digest.update(np.ascontiguousarray(source.read(indices)).tobytes())
    return digest.hexdigest()


def latent_trouble(raw: np.ndarray) -> str | None:
    """What shows that items `raw` [..., C, H, W] are not raw latents as EDM2 stores them; None if nothing does."""
    if raw.dtype == np.uint8:
        return None
    half = raw.shape[-3] // 2
    if raw[..., half:, :, :].min() < 0:
        return (
            f"the last {half} of {2 * half} channels are standard deviations, but some are negative: these latents do "
            "not come from `python scripts/dataset_tool.py encode`"
        )
    largest = float(np.abs(raw).max())
    if largest > _LARGEST_LATENT:
        return f"raw latents of a VAE stay below {_LARGEST_LATENT}, but these reach {largest:g}: scale them back"
    return None


class SourceOpener(Protocol):
    """Opens a data set; called by position. `max_images` keeps that many items, evenly spread."""

    def __call__(self, path: str, max_images: int | None, use_labels: bool, /) -> Source: ...


def open_arrays(path: str, max_images: int | None, use_labels: bool) -> Source:
    """Open .npy files of many items each."""
    from edm2kit.data.array_dataset import ArrayDataset  # that file builds on this one

    return ArrayDataset(path, max_images, use_labels)


def open_hugging_face(path: str, max_images: int | None, use_labels: bool) -> Source:
    """Open a folder that Hugging Face's `save_to_disk` has written."""
    from edm2kit.data.hugging_face import HuggingFaceDataset  # that file builds on this one

    return HuggingFaceDataset(path, max_images, use_labels)


SOURCES: dict[str, SourceOpener] = {"image_files": ImageDataset, "arrays": open_arrays, "hf": open_hugging_face}


def register_source(name: str, opener: SourceOpener) -> None:
    """Make a kind of data set available as `name`: `--data name:PATH` calls `opener(PATH, max_images, use_labels)`.

    Registering the same opener again does nothing. Raises ValueError if the name is taken by another kind.
    """
    if SOURCES.setdefault(name, opener) is not opener:
        raise ValueError(f"a kind of data set called {name!r} exists already; choose another name")


def open_source(path: str | Path, max_images: int | None = None, use_labels: bool = True) -> Source:
    """Open the data set at `path`.

    A prefix names the kind, as in `hf:FOLDER?image=photo` or `arrays:FOLDER`. Without a prefix, the kind depends on
    what is at the path: a .npy file or a folder of .npy files with four dimensions (arrays), a folder written by
    Hugging Face's `save_to_disk` (hf), or a folder or zip of images (image_files). `max_images` keeps that many items,
    evenly spread; `use_labels=False` ignores labels. Raises ValueError if there is no data set.

    Example::

        source = open_source("img64.zip")
        pixels = source.read(np.arange(32))  # uint8 [32, 3, 64, 64]
        labels = source.read_labels(np.arange(32))  # float32 [32, source.label_dim]
    """
    kind, rest = split_kind(path)
    return SOURCES[kind](rest, max_images, use_labels)


def split_kind(path: str | Path) -> tuple[str, str]:
    """The key of SOURCES for `path`, and the path without its prefix; image_files if nothing else fits.

    Raises ValueError for a URL and an empty path.
    """
    kind, colon, rest = str(path).partition(":")
    if not str(path) or (kind in SOURCES and colon and not rest):
        raise ValueError("the path of the data set is empty")
    if rest.startswith("//"):
        raise ValueError(f"{path} is a URL; data sets are read from disk: download it, and give its path")
    if kind in SOURCES and colon:
        return kind, rest
    from edm2kit.data.array_dataset import is_array_dataset
    from edm2kit.data.hugging_face import is_saved_dataset

    folder = Path(str(path).partition("?")[0])
    if folder.suffix.lower() == ".npy" and folder.is_file():
        return "arrays", str(path)
    if any((folder / name).is_file() for name in _HUGGING_FACE_FILES) and is_saved_dataset(folder):
        return "hf", str(path)
    has_arrays = next(folder.glob("*.[nN][pP][yY]"), None) is not None
    return "arrays" if has_arrays and is_array_dataset(Path(path)) else "image_files", str(path)


@dataclass(frozen=True)
class EncoderRecord:
    """The VAE that made raw latents: `vae_name`, its hub name or folder, and `vae_sha256` of its weights."""

    vae_name: str
    vae_sha256: str

    def to_json(self) -> bytes:
        """The content of encoder.json."""
        return json.dumps(asdict(self)).encode()


def read_encoder_record(source: Source) -> EncoderRecord | None:
    """The data set's encoder.json, or None for pixels and for latents made by other tools.

    Raises ValueError if the file is damaged.
    """
    data = source.read_extra(ENCODER_FILE)
    if data is None:
        return None
    try:
        content = json.loads(data)
        check_type(content, Mapping[str, Any], "the record")
        check_fields(content, EncoderRecord)
        record = EncoderRecord(**content)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{source.path}/{ENCODER_FILE}: is damaged: {error}") from error
    return record


def enlarged_fraction(source: Source) -> float:
    """The fraction of the images that `dataset_tool.py convert` had to enlarge, from its sample; 0 if unknown."""
    try:
        found = json.loads(source.read_extra(LABELS_FILE) or b"{}").get("enlarged", 0.0)
    except (ValueError, AttributeError, RecursionError):
        return 0.0
    return found if isinstance(found, int | float) and 0 <= found <= 1 else 0.0


def reading_notices(source: Source) -> list[str]:
    """Advice on reading all images, and on reading them faster, if there is any."""
    trouble = latent_trouble(source.read(spread_evenly(len(source), 64)))
    notices = [f"{source.path}: {trouble}"] if trouble else []
    if isinstance(source, ImageDataset) and (
        splits := split_folders([source.item_name(k) for k in range(len(source))])
    ):
        notices.append(
            f"{source.path} holds the folders {', '.join(splits)}, which look like splits of one data set; all of them "
            "are trained on. Give one of them if that is not meant"
        )
    if source.left_out:
        total = len(source.left_out) + len(source)
        notices.append(
            f"{len(source.left_out)} of {total} images of {source.path} are left out, such as {source.left_out[0]}: "
            "training does not read their type. `python scripts/dataset_tool.py convert` does"
        )
    if source.needs_decoding:
        notices.append(
            f"the images of {source.path} are decoded one by one, in --workers processes. `python scripts/"
            f"dataset_tool.py convert --source {source.path} --dest FASTER.zip` stores them uncompressed: some twenty "
            "times faster to read. If images keep their names (00000/img00000000.png), a run resumes with either"
        )
    return notices
