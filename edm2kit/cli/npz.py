"""One .npz of many images, written without holding them all."""

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from edm2kit.torch_utils.files import atomic_write


def write_npz(path: Path, seeds: Sequence[int], images: Iterable[tuple[np.ndarray, int | None]]) -> None:
    """Write images [N,H,W,C] uint8, seeds [N] int64 and, where images have classes, labels [N] int64.

    `images` yields one (pixels uint8 [C,H,W], class or None) per seed, all of one size.
    """
    labels = []
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            for k, (pixels, label) in enumerate(images):
                pixels = pixels.transpose(1, 2, 0)
                if k == 0:
                    _header(member, (len(seeds), *pixels.shape), np.uint8)
                member.write(pixels.tobytes())
                labels += [] if label is None else [label]
        for name, values in (("seeds", list(seeds)), ("labels", labels)):
            if values:
                with archive.open(f"{name}.npy", "w") as member:
                    np.save(member, np.array(values, dtype=np.int64))


def _header(member: IO[bytes], shape: tuple[int, ...], dtype: type) -> None:
    description = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, description)
