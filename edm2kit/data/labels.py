"""The class of each image: dataset.json, the folders that images lie in, or a note in the image."""

import json
from collections import Counter
from dataclasses import dataclass

import numpy as np

from edm2kit.data.archive import FolderArchive, ZipArchive
from edm2kit.data.image_files import open_header

RECORD = "generation.json"  # beside generated images: what made them, and the class of each
LABELS_FILE = "dataset.json"
_MAX_CLASSES = 1 << 20


@dataclass(frozen=True)
class Labels:
    """The class of each image, int64 [n] in the order of the archive's names, and what the classes are called.

    `class_names` is None where nobody named them. Classes are 0 ... num_classes - 1; some may have no image.
    """

    classes: np.ndarray
    class_names: tuple[str, ...] | None

    @property
    def num_classes(self) -> int:
        """The largest class + 1, or the number of names where that is more."""
        return max(int(self.classes.max()) + 1, len(self.class_names or ()))


def read_labels(archive: FolderArchive | ZipArchive) -> Labels | None:
    """The labels in the archive's dataset.json; None where there is no such file or it says there are none.

    The file is {"labels": [["00000/img00000000.png", 6], ...] or null}, one entry for each image (specification:
    EDM2's data sets), and may hold our extension "label_names": ["cat", ...]. Raises ValueError naming what is wrong.
    """
    where = f"{archive.path}/{LABELS_FILE}"
    content = read_labels_file(archive)
    if content is None or content.get("labels") is None:
        return None
    by_name = _check_entries(content["labels"], where)
    unlabelled = [name for name in archive.names if name not in by_name]
    if unlabelled:
        raise ValueError(f"{where}: has no label for {_some(unlabelled)}; label every image, or none")
    if len(by_name) > len(archive.names):
        unknown = sorted(set(by_name).difference(archive.names))
        raise ValueError(f"{where}: labels {_some(unknown)}, which {archive.path} does not hold")
    classes = np.array([by_name[name] for name in archive.names], dtype=np.int64)
    return Labels(classes, _check_class_names(content.get("label_names"), int(classes.max()) + 1, where))


def read_labels_file(archive: FolderArchive | ZipArchive) -> dict | None:
    """All of the archive's dataset.json; None where there is no such file, ValueError where it is not a JSON object."""
    data = archive.read_extra(LABELS_FILE)
    if data is None:
        return None
    where = f"{archive.path}/{LABELS_FILE}"
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f'{where}: holds a JSON {type(content).__name__}; expected {{"labels": [[name, class], ...]}}')
    return content


def folder_labels(names: list[str]) -> Labels | None:
    """Classes from top-level folders, in the order of their names; None where images lie in fewer than two.

    Folders that all images share (`train/cat/1.png`, `train/dog/1.png`) are passed over. Raises ValueError where some
    images lie in class folders and others beside them.
    """
    folders = [name.split("/")[:-1] for name in names]
    first, last = min(folders), max(folders)
    depth = next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    tops = [folder[depth] if len(folder) > depth else None for folder in folders]
    if None in tops:
        if any(top is not None for top in tops):
            raise ValueError(f"{names[tops.index(None)]} lies outside the class folders: move it, or use --labels none")
        return None
    class_names = sorted(set(tops))
    number = {name: k for k, name in enumerate(class_names)}
    return Labels(np.array([number[top] for top in tops], dtype=np.int64), tuple(class_names))


def noted_labels(archive: FolderArchive | ZipArchive) -> Labels | None:
    """The class that generate.py noted in each image it drew; None where it noted none.

    Raises ValueError where some images have a class and others none.
    """
    notes = [open_header(archive.read(k), archive.where(k)).info.get("class") for k in range(len(archive.names))]
    if all(note is None for note in notes):
        return None
    without = [name for name, note in zip(archive.names, notes, strict=True) if note is None]
    if without:
        raise ValueError(f"{archive.path}: no class is noted in {_some(without)}; label every image, or none")
    return Labels(np.array([int(note) for note in notes], dtype=np.int64), None)


def _check_entries(entries: object, where: str) -> dict[str, int]:
    if not isinstance(entries, list):
        raise ValueError(f'{where}: "labels" is a {type(entries).__name__}; expected a list of [name, class] or null')
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 2 or type(entry[0]) is not str:
            raise ValueError(f"{where}: the entry {_short(entry)} is not [name, class]")
        if type(entry[1]) is not int or not 0 <= entry[1] < _MAX_CLASSES:
            raise ValueError(f"{where}: {entry[0]} has class {_short(entry[1])}; expected an integer from 0 up")
    by_name: dict[str, int] = dict(entries)
    if len(by_name) < len(entries):
        twice = [name for name, count in Counter(name for name, _ in entries).items() if count > 1]
        raise ValueError(f"{where}: labels {_some(twice)} more than once")
    return by_name


def _check_class_names(names: object, needed: int, where: str) -> tuple[str, ...] | None:
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{where}: "label_names" is not a list of names')
    if len(names) < needed:
        raise ValueError(f'{where}: "label_names" names {len(names)} classes, but the labels go up to {needed - 1}')
    return tuple(names)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
