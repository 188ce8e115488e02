"""Every kind of data set by name, and the choice of one by what is at a path."""

from pathlib import Path
from typing import Protocol

from edm2kit.data.array_dataset import ArrayDataset, is_array_dataset
from edm2kit.data.dataset import ImageDataset, Source
from edm2kit.data.hugging_face import SAVED_FILES, HuggingFaceDataset, is_saved_dataset


class SourceOpener(Protocol):
    """Opens a data set; called by position. `max_images` keeps that many items, evenly spread."""

    def __call__(self, path: str, max_images: int | None, use_labels: bool, /) -> Source: ...


SOURCES: dict[str, SourceOpener] = {
    "image_files": ImageDataset,
    "arrays": ArrayDataset,
    "hf": HuggingFaceDataset,
}


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
    """The key of SOURCES for `path`, and the path without its prefix; image_files if nothing else fits."""
    kind, _, rest = str(path).partition(":")
    if kind in SOURCES:
        return kind, rest
    folder = Path(str(path).partition("?")[0])
    if any((folder / name).is_file() for name in SAVED_FILES) and is_saved_dataset(folder):
        return "hf", str(path)
    has_arrays = folder.suffix == ".npy" or next(folder.glob("*.npy"), None) is not None
    return "arrays" if has_arrays and is_array_dataset(Path(path)) else "image_files", str(path)
