"""Write many images to one .npz file without holding all of them in memory."""

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from edm2kit.torch_utils.files import atomic_write


def write_npz(path: Path, seeds: Sequence[int], images: Iterable[tuple[np.ndarray, int | None]]) -> None:
    """Write `images` [N, H, W, C] uint8, `seeds` [N] int64 and, if the images have classes, `labels` [N] int64.

    `images` yields (pixels uint8 [C, H, W], class or None) for each seed, all of one size.
    """
    labels = []
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            for k, (pixels, label) in enumerate(images):
                pixels = pixels.transpose(1, 2, 0)
                if k == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(seeds), *pixels.shape)}
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(pixels.tobytes())
                if label is not None:
                    labels.append(label)
        for name, values in (("seeds", list(seeds)), ("labels", labels)):
            if values:
                with archive.open(f"{name}.npy", "w") as member:
                    np.save(member, np.array(values, dtype=np.int64))
