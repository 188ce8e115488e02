"""Images of any origin to be scored: a folder, a zip, or the .npz that generate.py writes."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from edm2kit.data.archive import open_archive
from edm2kit.data.image_files import IMAGE_EXTENSIONS, open_image, to_8bit
from edm2kit.torch_utils import dist
from edm2kit.torch_utils.arrays import map_npz_array
from edm2kit.torch_utils.dist import progress_bar

_BATCHES_AHEAD = 2


class ArchiveImages:
    """The images in a folder (and those below it) or a zip, in the order of their sorted names.

    Opening looks at no image; raises ValueError where there are none.
    """

    def __init__(self, path: Path):
        self._archive = open_archive(path, (*IMAGE_EXTENSIONS, ".npy"))
        latents = next((name for name in self._archive.names if name.endswith(".npy")), None)
        if latents is not None:
            raise ValueError(
                f"{path}: holds {latents}, which is no image; metrics are of images, not of latents: give the folder "
                "or zip that the latents were encoded from"
            )

    def __len__(self) -> int:
        return len(self._archive.names)

    def where(self, index: int) -> str:
        """Image `index` as named in messages."""
        return self._archive.where(index)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [3, H, W]; raises ValueError, naming the file, where it cannot be read."""
        where = self.where(index)
        image = to_8bit(open_image(self._archive.read(index), where), 3, where)
        return np.asarray(image).transpose(2, 0, 1)


class NpzImages:
    """The array `images`, uint8 [N, H, W, 1 or 3], of an uncompressed .npz, mapped and not loaded.

    Raises ValueError where there is none.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            self._images = map_npz_array(path, "images")
        except ValueError as error:
            raise ValueError(f"{path}: holds no array of images, or is damaged: {error}") from error
        if self._images.dtype != np.uint8 or self._images.ndim != 4 or self._images.shape[3] not in (1, 3):
            raise ValueError(
                f"{path}: `images` is {self._images.dtype} {list(self._images.shape)}; expected uint8 [N, H, W, 1 or 3]"
            )

    def __len__(self) -> int:
        return len(self._images)

    def where(self, index: int) -> str:
        """Image `index` as named in messages."""
        return f"{self._path}[{index}]"

    def read(self, index: int) -> np.ndarray:
        """Image `index` as uint8 [3, H, W]."""
        height, width, _ = self._images.shape[1:]
        return np.broadcast_to(self._images[index], (height, width, 3)).transpose(2, 0, 1)


def open_images(path: str | Path) -> ArchiveImages | NpzImages:
    """The images at `path`, a folder, a .zip or an .npz. Raises ValueError where there are none."""
    path = Path(path)
    return NpzImages(path) if path.suffix == ".npz" and path.is_file() else ArchiveImages(path)


def image_batches(
    images: ArchiveImages | NpzImages, indices: Sequence[int], batch_size: int, workers: int
) -> Iterator[torch.Tensor]:
    """This rank's batches of the images `indices`, uint8 [N, 3, H, W], with a progress bar on rank 0.

    Batch k belongs to rank k modulo the number of ranks, so that the batches are the same for any number of them.
    `workers` threads read ahead. Raises ValueError, naming the file, for an image that is damaged or has another
    size than the first of all.
    """
    starts = range(0, len(indices), batch_size)[dist.rank() :: dist.world_size()]
    expected = images.read(indices[0]).shape
    ahead: deque = deque()
    with (
        ThreadPoolExecutor(workers) as pool,
        progress_bar(len(starts), "batch") as bar,
    ):
        for start in starts:
            ahead.append([pool.submit(_read, images, index, expected) for index in indices[start : start + batch_size]])
            if len(ahead) > _BATCHES_AHEAD:
                yield _stack(ahead.popleft())
                bar.update()
        while ahead:
            yield _stack(ahead.popleft())
            bar.update()


def _stack(reading: list) -> torch.Tensor:
    return torch.from_numpy(np.stack([job.result() for job in reading]))


def _read(images: ArchiveImages | NpzImages, index: int, expected: tuple[int, ...]) -> np.ndarray:
    pixels = images.read(index)
    if pixels.shape != expected:
        raise ValueError(
            f"{images.where(index)}: is {pixels.shape[2]}x{pixels.shape[1]} pixels, the first image "
            f"{expected[2]}x{expected[1]}; metrics need images of one size (scripts/dataset_tool.py convert makes them)"
        )
    return pixels
