"""Image labels: classes or float vectors, from dataset.json, class folders, or notes inside generated images."""

import hashlib
import itertools
import json
import re
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from edm2kit.data.archive import FolderArchive, ZipArchive
from edm2kit.data.image_files import open_header
from edm2kit.torch_utils.arrays import BROKEN, map_npy
from edm2kit.torch_utils.dist import one_line, progress_bar, warn0
from edm2kit.torch_utils.files import short_json

if TYPE_CHECKING:
    from edm2kit.data.dataset import Source

T = TypeVar("T")
RECORD = "generation.json"  # written beside generated images: how they were made
LABELS_FILE = "dataset.json"
LABELS_CRC = "labels_crc32"  # in that file
# the names of splits: val, Train, test_set, train2017, imagenet-val, and trainA of data sets for translation
SPLIT_NAME = re.compile(
    r"(?i:(?:^|[\W\d_])(?:train|training|val|valid|validation|test|testing|dev|eval)(?=[\W\d_]|$))"
    r"|(?:^|/)(?:train|val|test)[AB](?=/|$)"
)
_OTHER_KEYS_OF_NAMES = ("class_names", "classes", "names", "categories", "label_name", "labels_names")
_MAX_CLASSES = 1 << 20
# a network has weights for each class, and each image a number: a label that is an identification number would cost
# gigabytes
_MANY_CLASSES, _CLASSES_PER_IMAGE = 1 << 16, 4
_JSON_VALUES, _JSON_VALUES_PER_IMAGE = 1 << 20, 1 << 14  # in a file about images: labels are at most vectors
_MANY_FILES = 5000  # to open one by one takes seconds
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class ConditionSpace:
    """The conditions that a data set offers to a network.

    `dimension` is the number of classes, or the length of the vectors (0 for kind "none"). `class_names` has one name
    per class, or is None if the classes have no names.
    """

    kind: Literal["none", "classes", "vectors"] = "none"
    dimension: int = 0
    class_names: tuple[str, ...] | None = None

    def encode(self, labels: np.ndarray) -> np.ndarray:
        """What the network receives for `labels`: float32 [n, dimension].

        Classes, int64 [n], become one-hot rows. Vectors, float32 [n, dimension], are returned unchanged.
        """
        if self.kind == "vectors":
            return np.asarray(labels, np.float32)
        rows = np.zeros([len(labels), self.dimension], np.float32)
        if self.kind == "classes":
            rows[np.arange(len(labels)), labels] = 1
        return rows

    def empty_classes(self, labels: np.ndarray) -> list[int]:
        """The classes that none of `labels`, int64 [n], has; [] for vectors."""
        if self.kind != "classes":
            return []
        return np.flatnonzero(np.bincount(labels, minlength=self.dimension) == 0).tolist()

    def name_class(self, index: int) -> str:
        """The number of a class and, if it has one, its name."""
        return f"{index} {self.class_names[index]}" if self.class_names else str(index)

    def __str__(self) -> str:
        if self.kind == "none":
            return "no labels"
        return f"{self.dimension} classes" if self.kind == "classes" else f"label vectors of {self.dimension} numbers"


@dataclass(frozen=True)
class Labels:
    """One label per image: `values` are classes, int64 [n], or vectors, float32 [n, D].

    Classes count from 0. Some classes may have no image; `class_names`, if known, names all of them. `num_classes` says
    how many there are if they have no names and the last ones have no image; 0 if it is unknown.
    """

    values: np.ndarray
    class_names: tuple[str, ...] | None = None
    num_classes: int = 0

    @property
    def space(self) -> ConditionSpace:
        """The number of classes is the largest class + 1, or the number of names or `num_classes` if that is larger."""
        if self.values.ndim == 2:
            return ConditionSpace("vectors", self.values.shape[1])
        count = max(int(self.values.max()) + 1, len(self.class_names or ()), self.num_classes)
        return ConditionSpace("classes", count, self.class_names)

    def to_json(self, names: list[str]) -> dict[str, Any]:
        """The content of dataset.json for images of these names, one per label."""
        content: dict[str, Any] = {"labels": [list(pair) for pair in zip(names, self.values.tolist(), strict=True)]}
        if self.class_names is not None:
            content["label_names"] = list(self.class_names)
        elif self.space.kind == "classes" and self.space.dimension > int(self.values.max()) + 1:
            content["num_classes"] = self.space.dimension
        return content


def labels_of_array(values: np.ndarray, where: str, class_names: tuple[str, ...] | None = None) -> Labels:
    """Labels from an array: integers [n] are classes, floats [n, D] are vectors.

    Raises ValueError, starting with `where`, for any other array, negative classes, and numbers that are not finite.
    """
    if values.ndim == 1 and np.issubdtype(values.dtype, np.integer):
        if values.min() < 0 or values.max() >= _MAX_CLASSES:
            raise ValueError(
                f"{where}: classes run from {values.min()} to {values.max()}; number the classes from 0 and label "
                "every image, or none"
            )
        return _with_usual_numbers(Labels(values.astype(np.int64), class_names), where)
    if values.ndim == 2 and values.shape[1] > 0 and np.issubdtype(values.dtype, np.floating):
        with np.errstate(over="ignore"):  # reported below
            vectors = values.astype(np.float32)
        if not np.isfinite(vectors).all():
            raise ValueError(f"{where}: label vectors hold numbers that are not finite")
        return Labels(vectors)
    raise ValueError(
        f"{where}: labels are {values.dtype} {list(values.shape)}; expected classes, integers [N], or vectors, floats "
        "[N, D]"
    )


def read_labels(archive: FolderArchive | ZipArchive) -> Labels | None:
    """The labels in the archive's dataset.json, or None if that file is missing or contains no labels.

    The file is {"labels": [["00000/img00000000.png", 6], ...] or null}, with one entry per image. A label is a class
    or a list of floats (the format of NVlabs/edm2). Two extensions are for classes: "label_names": ["cat", ...], and
    "num_classes": 10 if they have no names and the last ones no images.
    Raises ValueError if the file breaks these rules.
    """
    where = f"{archive.path}/{LABELS_FILE}"
    content = read_labels_file(archive)
    if content and "labels" not in content:
        warn0(f'{where}: has no "labels", as if it were made for another program; it is not used')
    if content is None or content.get("labels") is None:
        return None
    if not labels_are_as_written(content):
        warn0(
            f"{where}: its labels or names of classes have changed since the data set was made. If you changed them, "
            f'remove "{LABELS_CRC}" from the file'
        )
    found = find_extra(archive, LABELS_FILE)
    by_name = align_names(_check_entries(content["labels"], where), archive.names, found[0] if found else "", where)
    unlabelled = [name for name in archive.names if name not in by_name]
    unknown = sorted(set(by_name).difference(archive.names))
    if unlabelled:
        hint = f" (it labels {_some(unknown)}, which is not in {archive.path})" if unknown else ""
        raise ValueError(f"{where}: has no label for {_some(unlabelled)}{hint}; label every image, or none")
    if unknown:
        raise ValueError(f"{where}: labels {_some(unknown)}, which is not in {archive.path}")
    values = [by_name[name] for name in archive.names]
    class_names = content.get("label_names")
    other_names = next((key for key in _OTHER_KEYS_OF_NAMES if isinstance(content.get(key), list | dict)), None)
    if class_names is None and other_names is not None:
        warn0(f'{where}: "{other_names}" is not read; names of classes are called "label_names", a list')
    if isinstance(values[0], list):
        if class_names is not None:
            raise ValueError(f'{where}: "label_names" names classes, but the labels are vectors; remove the names')
        return labels_of_array(np.array(values, np.float64), where)
    classes = np.array(values, np.int64)
    last = int(classes.max())
    if class_names is None:
        count = 0 if content.get("num_classes") is None else content["num_classes"]
        if type(count) is not int or (count and not last < count <= _MAX_CLASSES):
            raise ValueError(f'{where}: "num_classes" is {short_json(count)}, but the labels go up to {last}')
        return _with_usual_numbers(Labels(classes, num_classes=count), where)
    if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
        raise ValueError(f'{where}: "label_names" is not a list of names')
    if len(class_names) <= last:
        raise ValueError(f'{where}: "label_names" names {len(class_names)} classes, but the labels go up to {last}')
    return _with_usual_numbers(Labels(classes, tuple(class_names)), where)


def labels_checksum(content: Mapping[str, Any]) -> str:
    """A CRC-32 of the labels, their names and the names of classes in `content` of dataset.json."""
    entries = content["labels"]
    names = "\n".join(name for name, _ in entries).encode("utf-8", "surrogatepass")
    others = [[label for _, label in entries], content.get("label_names"), content.get("num_classes")]
    return f"{zlib.crc32(repr(others).encode('utf-8', 'surrogatepass'), zlib.crc32(names)):08x}"


def labels_are_as_written(content: Mapping[str, Any]) -> bool:
    """Whether the labels in dataset.json are those that `dataset_tool.py` wrote; True if it holds no checksum."""
    try:
        return content.get("labels") is None or content.get(LABELS_CRC) in (None, labels_checksum(content))
    except (TypeError, ValueError):
        return False


def _with_usual_numbers(labels: Labels, where: str) -> Labels:
    """`labels`; ValueError, starting with `where`, if they have far more classes than images."""
    count, images = labels.space.dimension, len(labels.values)
    if count > max(_MANY_CLASSES, _CLASSES_PER_IMAGE * images):
        raise ValueError(
            f"{where}: has {images} images and classes up to {count - 1}; a network has weights for each class: number "
            "the classes that there are from 0"
        )
    return labels


def read_labels_file(archive: FolderArchive | ZipArchive) -> dict[str, Any] | None:
    """The content of the archive's dataset.json, or None if it has none.

    Raises ValueError if the file is not a JSON object.
    """
    found = find_extra(archive, LABELS_FILE)
    if found is None:
        return None
    folder, data = found
    where = f"{archive.path}/{folder}{LABELS_FILE}"
    try:
        content = _json_about(data, len(archive.names))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f'{where}: contains a JSON {type(content).__name__}; expected {{"labels": [[name, label], ...]}}'
        )
    return content


def _json_about(data: bytes, num_images: int) -> Any:
    """The content of a JSON file about so many images; ValueError for one of more values than they can have.

    A zip of kilobytes may hold a file that takes gigabytes as objects.
    """
    if data.count(b",") > _JSON_VALUES + _JSON_VALUES_PER_IMAGE * num_images:
        raise ValueError(f"it has {data.count(b',')} values, more than {num_images} images can have")
    return json.loads(data, object_pairs_hook=_without_repetition)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {next(k for k in names if names.count(k) > 1)!r:.60} twice; remove one")
    return content


def find_extra(archive: FolderArchive | ZipArchive, name: str) -> tuple[str, bytes] | None:
    """The folder ("" or for example "photos/") and the bytes of the file `name` that belongs to the images.

    It is at the top, or in a folder that all images share, as in a zip of a folder. None if the archive has none.
    """
    first, last = (path.split("/")[:-1] for path in (archive.names[0], archive.names[-1]))
    shared = [part for part, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]
    for depth in range(len(shared) + 1):
        folder = "".join(f"{part}/" for part in shared[:depth])
        data = archive.read_extra(folder + name)
        if data is not None:
            return folder, data
    return None


def align_names(by_name: dict[str, T], names: Sequence[str], folder: str, where: str) -> dict[str, T]:
    """The values by the archive's own `names`: theirs may start in `folder`, or be written as another system does."""
    known = set(names)
    if known.issuperset(by_name):
        return by_name
    aligned: dict[str, T] = {}
    for name, value in by_name.items():
        plain = name.replace("\\", "/").removeprefix("./")
        forms = [name, folder + name, plain, folder + plain]
        # systems differ in how they store an accent: as part of the letter, or after it
        forms += [unicodedata.normalize(form, folder + plain) for form in ("NFC", "NFD")]
        fitting = next((form for form in forms if form in known), name)
        if fitting in aligned:
            raise ValueError(f"{where}: lists {fitting} more than once")
        aligned[fitting] = value
    return aligned


def read_label_vectors(path: str | Path) -> np.ndarray:
    """Label vectors from a file: a .npy array [K, D], or a JSON list of K lists of D numbers. float32 [K, D].

    Raises ValueError if the file is neither, and OSError if it cannot be opened.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".npy":
            values = np.asarray(map_npy(path))
        else:
            values = np.array(json.loads(path.read_bytes()), np.float64)
    except FileNotFoundError:
        raise
    except (*BROKEN, UnicodeDecodeError) as error:
        reason = one_line(str(error))
        raise ValueError(f"{path}: is neither a .npy array nor a JSON list of label vectors: {reason}") from error
    if values.ndim != 2 or not values.size or not np.issubdtype(values.dtype, np.number):
        raise ValueError(f"{path}: is {values.dtype} {list(values.shape)}; expected label vectors [K, D]")
    return labels_of_array(values.astype(np.float64), str(path)).values


def folder_labels(names: list[str]) -> Labels | None:
    """Classes from the top-level folders, sorted by name; None if there are fewer than two folders.

    Folders that all images share are skipped: `train/cat/1.png` and `train/dog/1.png` have classes cat and dog. Raises
    ValueError if some images are in class folders and others are not.
    """
    # macOS stores accents after their letters; in one form, a class has one name and one place in the order
    folders = [unicodedata.normalize("NFC", name).split("/")[:-1] for name in names]
    first, last = min(folders), max(folders)
    common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    shared = len(list(common))  # depth of the folders that all images share
    outside = [name for name, folder in zip(names, folders, strict=True) if len(folder) == shared]
    if len(outside) == len(names):
        return None
    if outside:
        raise ValueError(f"{outside[0]} is outside the class folders; move it, or use --labels none")
    class_names, classes = np.unique([folder[shared] for folder in folders], return_inverse=True)
    return Labels(classes.astype(np.int64), tuple(class_names.tolist()))


def split_folders(names: Sequence[str]) -> list[str]:
    """The folders of a data set that is one level too high, such as train and val; [] if its folders are others."""
    if not SPLIT_NAME.search(names[0].rpartition("/")[0]):
        return []  # most data sets, without looking at every name
    try:
        found = folder_labels(list(names))
    except ValueError:
        return []
    classes = [] if found is None else list(found.class_names or ())
    return classes if all(map(SPLIT_NAME.search, classes)) else []


def splits_among(classes: Sequence[str]) -> list[str]:
    """The names of classes that are those of splits, if there are at least two."""
    found = [name for name in classes if SPLIT_NAME.search(name)]
    return found if len(found) > 1 else []


def noted_labels(archive: FolderArchive | ZipArchive) -> Labels | None:
    """The classes that generate.py noted in its images, or None if it noted none.

    Raises ValueError if only some of the images have a class.
    """
    classes: list[int] = []
    without: list[str] = []
    with progress_bar(len(archive.names), "file", what="classes", hidden=len(archive.names) < _MANY_FILES) as bar:
        for index, name in enumerate(archive.names):
            note = open_header(archive.read(index), archive.where(index)).info.get("class")
            if note is None:
                without.append(name)
            elif isinstance(note, str) and re.fullmatch("[0-9]{1,7}", note):
                classes.append(int(note))
            else:
                raise ValueError(
                    f"{archive.where(index)}: the class noted in it is {note!r:.60}; expected a number from 0"
                )
            bar.update()
    if not classes:
        return None
    if without:
        raise ValueError(f"{archive.path}: no class is noted in {_some(without)}; label every image, or none")
    names, count = _noted_classes(archive)
    if max(classes) >= count:
        names, count = None, 0  # of another network
    return _with_usual_numbers(Labels(np.array(classes, np.int64), names, count), str(archive.path))


def _noted_classes(archive: FolderArchive | ZipArchive) -> tuple[tuple[str, ...] | None, int]:
    """The names and the number of classes that generate.py recorded beside its images; None and 0 if it did not."""
    found = find_extra(archive, RECORD)
    try:
        runs = None if found is None else _json_about(found[1], len(archive.names)).get("runs")
        run = runs[-1] if runs else {}  # none before the first run has ended
        names, count = run.get("label_names"), run.get("num_classes", 0)
        if names is not None and not (len(names) == count and all(isinstance(name, str) for name in names)):
            raise ValueError(f"{len(names)} names of {count} classes")
        return None if names is None else tuple(names), int(count)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{archive.path}/{RECORD}: is damaged ({error}); delete it, or generate the images again"
        ) from error


def pick_labels(found: Labels | None, picked: np.ndarray) -> tuple[np.ndarray | None, ConditionSpace]:
    """The labels of the items `picked`, and the condition space of all labels `found`."""
    if found is None:
        return None, ConditionSpace()
    return found.values[picked], found.space


def labels_identity(source: "Source", digest: "hashlib._Hash") -> dict[str, Any]:
    """The part of an identity that covers the labels; `digest` has hashed the items."""
    if source.labels is None:
        return {"label_dim": 0, "sha256": digest.hexdigest()}
    vectors = source.condition_space.kind == "vectors"
    digest.update(np.ascontiguousarray(source.labels, dtype="<f4" if vectors else "<i8").tobytes())
    identity: dict[str, Any] = {"label_dim": source.label_dim, "sha256": digest.hexdigest()}
    if vectors:
        identity["label_kind"] = "vectors"
    return identity


def names_digest(class_names: Sequence[str] | None, num_classes: int) -> str:
    """A hash of the names and the number of classes, which `labels_identity` does not cover."""
    return hashlib.sha256(json.dumps([class_names, num_classes]).encode()).hexdigest()[:16]


def _check_entries(entries: object, where: str) -> dict[str, Any]:
    """The label of each file name: all of them classes, or all of them vectors of one length."""
    if not isinstance(entries, list):
        raise ValueError(f'{where}: "labels" is a {type(entries).__name__}; expected a list of [name, label] or null')
    by_name: dict[str, Any] = {}
    length = None  # of the vectors; None if the labels are classes
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 2 or type(entry[0]) is not str:
            raise ValueError(f"{where}: the entry {short_json(entry, 60)} is not [name, label]")
        name, label = entry
        if not by_name and isinstance(label, list):
            length = max(len(label), 1)
        fits = _is_class(label) if length is None else _is_vector(label, length)
        if not fits:
            expected = "a class, an integer from 0 up" if length is None else f"a vector, {length} finite numbers"
            raise ValueError(f"{where}: {name} has the label {short_json(label, 60)}; expected {expected}")
        if name in by_name:
            raise ValueError(f"{where}: labels {name} more than once")
        by_name[name] = label
    return by_name


def _is_class(label: object) -> bool:
    return type(label) is int and 0 <= label < _MAX_CLASSES


def _is_vector(label: object, length: int) -> bool:
    if not isinstance(label, list) or len(label) != length:
        return False
    return all(type(value) in (int, float) and abs(value) <= _MAX_FLOAT32 for value in label)


def _some(names: list[str]) -> str:
    first = one_line(names[0])
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"
