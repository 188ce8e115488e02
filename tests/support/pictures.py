"""Small image files, and folders and zips of them."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int = 0, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    """Random pixels; `size` is (width, height)."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), np.uint8)
    return Image.frombytes(mode, size, pixels.tobytes())


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    """The file of an image."""
    file = io.BytesIO()
    image.save(file, format=kind)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    """The .npy file of an array."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def some_files(count: int = 6, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> dict[str, bytes]:
    """`count` different PNG files, by name."""
    return {f"00000/img{k:08d}.png": encoded(picture(k, size, mode)) for k in range(count)}


def with_labels(files: dict[str, bytes], labels: list[int], **more: object) -> dict[str, bytes]:
    """`files` and a dataset.json that gives them `labels`, in order."""
    content = {"labels": [[name, label] for name, label in zip(files, labels, strict=True)], **more}
    return files | {"dataset.json": json.dumps(content).encode()}


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    """Write the files into a folder."""
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """Write the files into a zip."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def cell(sheet: np.ndarray, rows: int, row: int, column: int, size: int, captions: bool = False) -> np.ndarray:
    """The image in a cell of a `labelled_sheet` as it was before it was enlarged; `sheet` is [H, W] or [H, W, 3]."""
    factor = max(1, 128 // size)
    step = size * factor + 4 + (16 if captions else 0)
    y, x = len(sheet) - (rows - row) * step, 4 + column * (size * factor + 4)
    large = sheet[y:, x:][: size * factor, : size * factor]
    small = large[::factor, ::factor]
    assert np.array_equal(large, small.repeat(factor, axis=0).repeat(factor, axis=1))
    return small
