"""Many images in one .npz file with a record beside it: written from a folder of parts, which is removed at the end."""

import contextlib
import shutil
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edm2kit.guidance.records import settings_differences
from edm2kit.torch_utils.arrays import read_npz_array, verify_npz
from edm2kit.torch_utils.files import atomic_write, exclusive, write_json


def write_npz(
    path: Path,
    seeds: Sequence[int],
    images: Iterable[tuple[np.ndarray, int | None]],
    class_names: Sequence[str] | None = None,
) -> None:
    """Write `images` [N, H, W, C] uint8, `seeds` [N] int64 and, if the images have classes, `labels` [N] int64.

    `label_names` [K], text, is there if the classes have names. `images` yields (pixels uint8 [C, H, W], class or None)
    for each seed, all of one size.
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
        if labels and class_names is not None:
            with archive.open("label_names.npy", "w") as member:
                np.save(member, np.array(list(class_names), dtype=np.str_))


def record_of(npz: Path) -> Path:
    """Where the record of the images in `npz` is."""
    return npz.with_name(f"{npz.name}.json")


def check_npz(
    npz: Path,
    record: Mapping[str, Any] | None,
    parts: Path,
    parts_record: Mapping[str, Any] | None,
    seeds: tuple[int, ...],
    settings: Mapping[str, Any],
) -> bool:
    """Whether `npz`, which exists, holds the images of this run. Raises ValueError if it holds others that must stay.

    `record` is the one beside it, `parts_record` that of the folder `parts` with its unfinished images. Removes this
    folder if a killed process has left it beside the complete file.
    """
    if record is None:
        if parts_record is not None and not settings_differences(parts_record["settings"], settings):
            return False  # a process was killed after it had written the images, before their record
        raise ValueError(f"{npz} exists, but its record {record_of(npz).name} does not; use --overwrite to replace it")
    changed = settings_differences(record["settings"], settings)
    if changed:
        raise ValueError(
            f"{npz} was made with other settings ({'; '.join(changed[:4])}); use --overwrite to replace it"
        )
    try:
        verify_npz(npz)
        found = read_npz_array(npz, "seeds")
    except ValueError as error:
        raise ValueError(f"{npz} is damaged ({error}); use --overwrite to replace it") from error
    if found.tolist() != list(seeds):
        raise ValueError(f"{npz} holds other seeds; choose another file, or use --overwrite to replace it")
    if parts.exists():
        with contextlib.suppress(ValueError), exclusive(parts):  # unless another process is at work
            remove_parts(parts)
    return True


def pack(
    npz: Path,
    parts: Path,
    record: Mapping[str, Any] | None,
    seeds: Sequence[int],
    images: Iterable[tuple[np.ndarray, int | None]],
) -> None:
    """Write `images` of the folder `parts` to `npz`, their `record` beside it, and remove the folder."""
    record_of(npz).unlink(missing_ok=True)  # the old one would vouch for the new images
    runs = [] if record is None else record["runs"]
    write_npz(npz, seeds, images, runs[-1].get("label_names") if runs else None)
    write_json(record_of(npz), record)
    remove_parts(parts)


def remove_parts(folder: Path) -> None:
    """Remove a folder of images, its records last: without them, nobody could tell whose images are left."""
    for path in folder.rglob("*.png"):
        path.unlink()
    shutil.rmtree(folder)
