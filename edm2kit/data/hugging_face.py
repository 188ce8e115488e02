"""Training data in a Hugging Face `datasets` folder."""

import functools
import hashlib
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from edm2kit.data.archive import read_regular, spread_evenly
from edm2kit.data.dataset import CONVERT_HINT, Source, content_digest
from edm2kit.data.image_files import check_item, decode_array
from edm2kit.data.labels import Labels, labels_identity, labels_of_array, pick_labels

_LABEL_COLUMNS = ("label", "labels", "class", "fine_label")
_OPTIONS = ("split", "image", "label")


class SavedTable:
    """The image files and labels in a folder written by `save_to_disk`, as they are stored.

    `path` is as for `HuggingFaceDataset`. The methods are those of `edm2kit.data.archive.FolderArchive` that
    `edm2kit.data.convert` needs. `names` identify the images: the fingerprint that `datasets` keeps of the content, the
    column and the row. Raises ValueError if the package is missing or the folder does not fit.
    """

    ignored: tuple[str, ...] = ()
    labels_are = "in a column"

    def __init__(self, path: str | Path):
        folder, _, query = str(path).partition("?")
        try:
            options = dict(parse_qsl(query, strict_parsing=bool(query)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}; write for example {folder}?split=train&image=photo") from error
        unknown = sorted(set(options).difference(_OPTIONS))
        if unknown:
            raise ValueError(f"{path}: unknown option {unknown[0]!r}; available options: {', '.join(_OPTIONS)}")
        self.path = Path(folder)
        self._table = _load(self.path, options.get("split"))
        for column in (options.get("image"), options.get("label")):
            if column is not None and column not in self._table.column_names:
                raise ValueError(f"{path}: has no column {column!r}; available: {', '.join(self._table.column_names)}")
        self._column = options.get("image") or _only_column(self._table, "Image")
        if self._column is None:
            raise ValueError(
                f"{path}: has several image columns, or none, among {', '.join(self._table.column_names)}; name one: "
                f"hf:{self.path}?image=COLUMN"
            )
        feature = self._table.features[self._column]
        if type(feature).__name__ != "Image":
            raise ValueError(f"{path}: column {self._column!r} is {feature}; expected a column of type Image")
        # files as they are stored: decoding is ours, with the checks of all other sources
        images = self._table.select_columns([self._column]).cast_column(self._column, type(feature)(decode=False))
        self._images = images.with_format(None)  # whoever saved it may have hidden columns
        usual = [name for name in _LABEL_COLUMNS if name in self._table.column_names]
        self._label_column = options.get("label") or _only_column(self._table, "ClassLabel") or next(iter(usual), None)
        self.fingerprint = f"{self._table._fingerprint}\n{self._column}\n"
        self.names = [f"{self.fingerprint}{k}" for k in range(len(self._table))]

    def where(self, index: int) -> str:
        """The name of image `index` for messages."""
        return f"{self.path}[{index}]"

    def read(self, index: int) -> bytes:
        """The image file in row `index`; raises ValueError if it is in a separate file that cannot be read."""
        image = self._images[index][self._column] or {"bytes": None, "path": None}
        if image["bytes"] is not None:
            return image["bytes"]
        if not image["path"]:
            raise ValueError(f"{self.where(index)}: the column {self._column!r:.60} has no image in this row")
        try:
            return read_regular(image["path"])
        except OSError as error:
            raise ValueError(f"{self.where(index)}: {image['path']} cannot be read: {error.strerror}") from error

    def checksum(self, index: int) -> tuple[int, int]:
        """Zeros, as the fingerprint in the names covers the content; for a separate file, its checksum."""
        if not self._has_files:
            return 0, 0
        image = self._images[index][self._column]
        return (0, 0) if image["bytes"] is not None else (0, zlib.crc32(self.read(index)))

    @functools.cached_property
    def _has_files(self) -> bool:
        """Whether any image is in a separate file: the table has no bytes for it."""
        chunks = self._images.data.column(self._column).chunks
        return any(chunk.field("bytes").null_count for chunk in chunks)

    def read_extra(self, name: str) -> bytes | None:
        """None: there are no other files."""
        return None

    def read_labels(self) -> Labels | None:
        """The labels, or None if there is no label column.

        Raises ValueError if they are neither classes nor vectors.
        """
        column = self._label_column
        if column is None:
            return None
        try:
            values = np.array(self._table.with_format("numpy")[column][:])
        except ValueError as error:
            raise ValueError(f"{self.path}[{column}]: label vectors differ in length: {error}") from error
        names = getattr(self._table.features[column], "names", None)
        return labels_of_array(values, f"{self.path}[{column}]", tuple(names) if names else None)


class HuggingFaceDataset(Source):
    """A folder written by `save_to_disk` of Hugging Face's `datasets`. The source `hf`.

    `path` is FOLDER, or FOLDER?split=train&image=photo&label=kind to name the split of a DatasetDict (default: train)
    and the columns. By default the images come from the only column of type Image, and the labels from the only
    ClassLabel column or else the column label, labels, class or fine_label, if there is one. Labels are classes
    (integers, named by ClassLabel) or vectors (lists of floats); `use_labels=False` ignores them. `max_images` keeps
    that many items, evenly spread. Needs the package `datasets` (the extra `datasets`). Raises ValueError if it is
    missing, or if the folder does not fit.

    Example::

        datasets.load_dataset("cifar10", split="train").save_to_disk("cifar10")
        dataset = HuggingFaceDataset("cifar10?image=img&label=label")
    """

    def __init__(self, path: str | Path, max_images: int | None = None, use_labels: bool = True):
        self._table = SavedTable(path)
        self.path = self._table.path
        self._picked = spread_evenly(len(self._table.names), max_images)
        first = self._decode(0)
        check_item(first, self._table.where(0), CONVERT_HINT)
        self.item_shape, self.item_dtype = first.shape, first.dtype
        found = self._table.read_labels() if use_labels else None
        self.labels, self.condition_space = pick_labels(found, self._picked)

    def __len__(self) -> int:
        return len(self._picked)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Items `indices` as one array [n, C, H, W]."""
        items = [self._decode(k) for k in indices.tolist()]
        for k, raw in zip(indices.tolist(), items, strict=True):
            if raw.shape != self.item_shape:
                raise ValueError(
                    f"{self._table.where(self._picked[k])}: is {raw.dtype} {list(raw.shape)}, but the first image is "
                    f"{self.item_dtype} {list(self.item_shape)}; {CONVERT_HINT}"
                )
        return np.stack(items)

    def _decode(self, index: int) -> np.ndarray:
        row = int(self._picked[index])
        return decode_array(self._table.read(row), self._table.where(row))

    def identity(self) -> dict[str, Any]:
        """The number, shape and labels of the images, the fingerprint that `datasets` keeps, and a hash of some pixels.

        The fingerprint does not cover images in separate files.
        """
        digest = hashlib.sha256(self._table.fingerprint.encode())
        return {
            "source": "hf",
            "num_images": len(self),
            "raw_shape": list(self.item_shape),
            **labels_identity(self, digest),
            "content": content_digest(self),
        }


def is_saved_dataset(path: Path) -> bool:
    """Whether `path` is a folder that `save_to_disk` has written."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def _load(path: Path, split: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{path} needs the package datasets: pip install edm2kit[datasets]") from error
    if not is_saved_dataset(path):
        raise ValueError(f"{path}: is not a folder written by save_to_disk of Hugging Face's datasets")
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow and json raise many types for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: cannot be read: {reason:.300}") from error
    if isinstance(loaded, datasets.DatasetDict):
        split = split or "train"
        if split not in loaded:
            raise ValueError(f"{path}: has no split {split!r}; available: {', '.join(loaded)}; add ?split=NAME")
        loaded = loaded[split]
    elif split is not None:
        raise ValueError(f"{path}: has no splits; leave out split={split}")
    return loaded


def _only_column(table: Any, feature: str) -> str | None:
    """The only column with features of this class of `datasets`, or None if there are none or several."""
    found = [name for name, value in table.features.items() if type(value).__name__ == feature]
    return found[0] if len(found) == 1 else None
