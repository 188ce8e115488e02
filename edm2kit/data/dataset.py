"""Training images on disk."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from edm2kit.data.archive import open_archive
from edm2kit.data.image_files import decode_array
from edm2kit.data.labels import read_labels
from edm2kit.data.raw_layout import Layout, find_layout

FILE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".npy")
CONVERT_HINT = (
    "make a training set of the images with "
    "`python scripts/dataset_tool.py convert --source=... --dest=... --resolution=64x64 --transform=center-crop`"
)


class ImageDataset:
    """The training images in a folder or zip: PNG, JPEG or .npy files, in the order of their sorted names.

    `dataset[i]` is (raw, label): raw uint8 [C, H, W] (pixels 0 ... 255; C is 3 or, for grey files, 1) or float32
    [C, H, W] (raw latents: the encoder's means, then its standard deviations); label float32 [label_dim], one-hot,
    empty where there are no labels. The classes come from dataset.json (edm2kit.data.labels.read_labels);
    `use_labels=False` ignores that file. `max_images` keeps that many, evenly spread over the sorted names.

    Pixels are square and their side is a power of two; latents are square. Opening looks at the first file alone, and
    reading any other raises ValueError, naming it, where it differs. Any number of processes may share an instance:
    it can be forked and pickled.
    """

    def __init__(self, path: str | Path, max_images: int | None = None, use_labels: bool = True):
        self._archive = open_archive(path, FILE_EXTENSIONS)
        self._picked = _spread(len(self._archive.names), max_images)
        self._shape, self._dtype = check_first(self._read(0), self._archive.where(self._picked[0]))
        self._layout = self._find_layout()
        found = read_labels(self._archive) if use_labels else None
        self.labels = None if found is None else found.classes[self._picked]
        self.label_names = None if found is None else found.class_names
        self.label_dim = 0 if found is None else found.num_classes

    def __len__(self) -> int:
        return len(self._picked)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        raw = self._read(index)
        if raw.shape != self._shape or raw.dtype != self._dtype:
            raise ValueError(
                f"{self._archive.where(self._picked[index])}: is {raw.dtype} {list(raw.shape)}, but the first file, "
                f"{self._archive.names[self._picked[0]]}, is {self._dtype} {list(self._shape)}; {CONVERT_HINT}"
            )
        label = np.zeros(self.label_dim, np.float32)
        if self.labels is not None:
            label[self.labels[index]] = 1
        return raw, label

    def read_batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Items `indices` [n] together: raw [n, C, H, W], in memory perhaps channels last, and labels [n, label_dim].

        Files that need no decoding (raw_layout.py) are copied into place, some twenty times faster than one by one;
        the checksums that a zip has of them are then not looked at (`scripts/dataset_tool.py check` does).
        """
        labels = np.zeros([len(indices), self.label_dim], np.float32)
        if self.labels is not None:
            labels[np.arange(len(indices)), self.labels[indices]] = 1
        if self._layout is None:
            return np.stack([self[k][0] for k in indices.tolist()]), labels
        split = len(self._layout.start)
        starts, rests, whole = self._archive.read_stored(self._picked[indices], self._layout.num_bytes, split)
        raw, fitting = self._layout.values(starts, rests)
        for k in np.flatnonzero(~(whole & fitting)).tolist():
            raw[k] = self[int(indices[k])][0]
        return raw, labels

    def _find_layout(self) -> Layout | None:
        """The first file's layout; None where it has none, or cannot be read but by unpacking it."""
        layout = find_layout(self._archive.read(self._picked[0]))
        if layout is None:
            return None
        *_, whole = self._archive.read_stored(self._picked[:1], layout.num_bytes, len(layout.start))
        return layout if whole[0] else None

    def _read(self, index: int) -> np.ndarray:
        number = self._picked[index]
        return decode_array(self._archive.read(number), self._archive.where(number))

    @property
    def path(self) -> Path:
        """The folder or zip."""
        return self._archive.path

    @property
    def needs_decoding(self) -> bool:
        """Whether the files, by the first of them, hold something else than the numbers as they are, or compressed."""
        return self._layout is None

    @property
    def raw_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every item as stored."""
        return self._shape

    @property
    def raw_dtype(self) -> np.dtype:
        """uint8 for pixels, float32 for raw latents."""
        return self._dtype

    @property
    def num_channels(self) -> int:
        """Channels as stored; raw latents have twice as many as the latents the network sees."""
        return self._shape[0]

    @property
    def resolution(self) -> int:
        """Height and width as stored."""
        return self._shape[1]

    def file_name(self, index: int) -> str:
        """The name of file `index` within the folder or zip."""
        return self._archive.names[self._picked[index]]

    def read_extra(self, name: str) -> bytes | None:
        """The bytes of a file that is no image, such as encoder.json; None where there is none."""
        return self._archive.read_extra(name)


def check_first(raw: np.ndarray, where: str) -> tuple[tuple[int, int, int], np.dtype]:
    """Shape and dtype of a raw item that a network can be trained on; ValueError, naming `where`, for any other."""
    channels, height, width = raw.shape
    if raw.dtype == np.uint8:
        if height != width or height & (height - 1) or channels not in (1, 3):
            kind = f"{width}x{height} pixels of {channels} channel{'s' * (channels != 1)}"
            raise ValueError(
                f"{where}: is {kind}; training takes square grey or RGB images whose side is a power of two: "
                + CONVERT_HINT
            )
    elif height != width or channels % 2:
        raise ValueError(
            f"{where}: holds {list(raw.shape)} numbers; raw latents are square and have an even number of channels "
            "(means, then standard deviations)"
        )
    return raw.shape, raw.dtype


def _spread(available: int, max_images: int | None) -> np.ndarray:
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images is {max_images}; expected at least 1")
    count = min(available, max_images or available)
    return np.arange(count) * available // count


def data_identity(dataset: ImageDataset) -> dict[str, Any]:
    """Tells one data set from another wherever it lies: shape, number, names and labels of its images."""
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        digest.update(dataset.file_name(index).encode() + b"\n")
    if dataset.labels is not None:
        digest.update(np.ascontiguousarray(dataset.labels, dtype="<i8").tobytes())
    return {
        "num_images": len(dataset),
        "raw_shape": list(dataset.raw_shape),
        "label_dim": dataset.label_dim,
        "sha256": digest.hexdigest(),
    }
