"""Training data in large .npy arrays."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from edm2kit.data.archive import read_regular, spread_evenly, stamp
from edm2kit.data.dataset import Source, content_digest
from edm2kit.data.image_files import check_item
from edm2kit.data.labels import labels_identity, labels_of_array, pick_labels
from edm2kit.torch_utils.arrays import map_npy
from edm2kit.torch_utils.dist import one_line
from edm2kit.torch_utils.files import sampled_sha256

LABELS_ARRAY = "labels.npy"
_HINT = "resize the images before saving the array"
_DTYPES = (np.uint8, np.float16, np.float32)
_HASHED_ITEMS = 256  # evenly spread; `content_digest`, which came later, hashes more


class ArrayDataset(Source):
    """One .npy file, or a folder of them (joined in the order of their names). The source `arrays`.

    An array is uint8 [N, 1 or 3, H, W] (pixels) or float16 or float32 [N, C, H, W] (raw latents: means, then standard
    deviations). Labels are in labels.npy beside the arrays: classes, integers [N], or vectors, floats [N, D];
    `use_labels=False` ignores that file. A folder of latents may have the encoder.json of `dataset_tool.py encode`.
    Arrays are memory-mapped: only the items that are read take memory. `max_images` keeps that many items, evenly
    spread. Raises ValueError if the files do not form one data set.

    Example::

        np.save("train/images.npy", images)  # uint8 [60000, 1, 32, 32]
        np.save("train/labels.npy", classes)  # int64 [60000]
        dataset = ArrayDataset("train")
    """

    def __init__(self, path: str | Path, max_images: int | None = None, use_labels: bool = True):
        self.path = Path(path)
        self._arguments = (self.path, max_images, use_labels)
        self._files = files = _array_files(self.path)
        if not files:
            raise ValueError(f"{path}: contains no .npy array; expected one .npy file or a folder of them")
        self._arrays = [_load(file) for file in files]
        for file, array in zip(files, self._arrays, strict=True):
            if (
                array.ndim == 4
                and array.shape[3] in (1, 3)
                and array.shape[1] not in (1, 3)
                and array.dtype == np.uint8
            ):
                raise ValueError(
                    f"{file}: is {list(array.shape)}, with channels last; expected [N, C, H, W]: save "
                    "images.transpose(0, 3, 1, 2)"
                )
            if array.ndim != 4 or array.dtype not in _DTYPES or 0 in array.shape:
                raise ValueError(
                    f"{file}: is {array.dtype} {list(array.shape)}; expected pixels uint8 [N, C, H, W] or raw latents "
                    "float16 or float32 [N, C, H, W]"
                )
            if array.shape[1:] != self._arrays[0].shape[1:] or array.dtype != self._arrays[0].dtype:
                raise ValueError(
                    f"{file}: is {array.dtype} {list(array.shape)}, but {files[0].name} is {self._arrays[0].dtype} "
                    f"{list(self._arrays[0].shape)}; all arrays of a data set need the same item shape and type"
                )
        self._ends = np.cumsum([len(array) for array in self._arrays])
        self._picked = spread_evenly(int(self._ends[-1]), max_images)
        first = self.read(np.array([0]))[0]
        check_item(first, str(files[0]), _HINT)
        self.item_shape, self.item_dtype = first.shape, first.dtype

        labels_file = files[0].parent / LABELS_ARRAY
        found = None
        if use_labels and labels_file.exists():
            values = np.atleast_1d(_load(labels_file))
            if len(values) != self._ends[-1]:
                raise ValueError(f"{labels_file}: has {len(values)} labels for {self._ends[-1]} images")
            found = labels_of_array(values, str(labels_file))
        self.labels, self.condition_space = pick_labels(found, self._picked)

    def __reduce__(self) -> tuple[Any, ...]:
        # another process maps the files itself; pickling a memory map would copy its content
        return ArrayDataset, self._arguments

    def __len__(self) -> int:
        return len(self._picked)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Items `indices` as one array [n, C, H, W]; float16 becomes float32."""
        rows = self._picked[indices]
        numbers = np.searchsorted(self._ends, rows, side="right")
        model = self._arrays[0]
        raw = np.empty([len(rows), *model.shape[1:]], np.uint8 if model.dtype == np.uint8 else np.float32)
        for number in np.unique(numbers).tolist():
            array = self._arrays[number]
            mine = numbers == number
            raw[mine] = array[rows[mine] - (self._ends[number] - len(array))]
        return raw

    def identity(self) -> dict[str, Any]:
        """The number and shape of the items, all labels, and a hash of up to 4096 items."""
        digest = hashlib.sha256(self.read(spread_evenly(len(self), _HASHED_ITEMS)).tobytes())
        return {
            "source": "arrays",
            "num_images": len(self),
            "raw_shape": list(self.item_shape),
            **labels_identity(self, digest),
            "content": content_digest(self),
        }

    def files_stamp(self, times: bool = True) -> str:
        """Of the arrays."""
        return stamp([str(file) for file in self._files], times)

    def files_sample(self) -> str:
        """Of the arrays: 64 pieces of each."""
        return hashlib.sha256("".join(map(sampled_sha256, self._files)).encode()).hexdigest()

    def read_extra(self, name: str) -> bytes | None:
        """The bytes of another file beside the arrays, such as encoder.json, or None if there is none."""
        folder = self.path if self.path.is_dir() else self.path.parent
        return read_regular(folder / name) if (folder / name).is_file() else None


def is_array_dataset(path: Path) -> bool:
    """Whether `path` is a .npy file, or a folder whose first .npy file has four dimensions."""
    if path.is_file():
        return path.suffix.lower() == ".npy"
    files = _array_files(path)
    if not files:
        return False
    try:
        return _load(files[0]).ndim == 4  # a folder of latents, one file each, has three
    except ValueError:
        return False


def _array_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.glob("*.[nN][pP][yY]") if file.name != LABELS_ARRAY and file.name[0] != ".")


def _load(file: Path) -> np.ndarray:
    if not file.is_file():
        raise ValueError(f"{file}: is a folder, device or pipe; expected a .npy file")
    try:
        return map_npy(file)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: the .npy file is damaged or cut short: {one_line(str(error))}") from error
