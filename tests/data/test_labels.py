"""Labels from dataset.json, from folders, and from notes in images."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from edm2kit.data.archive import open_archive
from edm2kit.data.dataset import open_source
from edm2kit.data.labels import (
    ConditionSpace,
    _noted_classes,
    folder_labels,
    labels_of_array,
    noted_labels,
    read_label_vectors,
    read_labels,
)
from tests.support.hostile_arrays import HOSTILE
from tests.support.pictures import some_files, with_labels, write_folder, write_zip

FILES = {"a.png": b"1", "b/c.png": b"2", "b/d.png": b"3"}


def labels_of(tmp_path, files):
    return read_labels(open_archive(write_folder(tmp_path / "d", files), (".png",)))


def test_labels_come_in_the_order_of_the_files(tmp_path):
    labels = labels_of(tmp_path, with_labels(dict(reversed(FILES.items())), [4, 0, 2]))
    assert labels.values.tolist() == [2, 0, 4]
    assert labels.values.dtype == np.int64
    assert (labels.space.dimension, labels.class_names) == (5, None)


def test_names_may_be_more_than_the_classes_used(tmp_path):
    labels = labels_of(tmp_path, with_labels(FILES, [1, 0, 1], label_names=["x", "y", "z"]))
    assert (labels.space.dimension, labels.class_names) == (3, ("x", "y", "z"))


@pytest.mark.parametrize("content", [None, {}, {"labels": None}])
def test_label_free(tmp_path, content):
    more = {} if content is None else {"dataset.json": json.dumps(content).encode()}
    assert labels_of(tmp_path, FILES | more) is None


GOOD = [["a.png", 0], ["b/c.png", 1], ["b/d.png", 2]]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "is not JSON: "),
        (b"\xff\xfe{", "is not JSON: "),
        (b"[" * 100_000, "is not JSON: "),
        ([], r"contains a JSON list; expected \{"),
        ({"labels": {"a.png": 0}}, '"labels" is a dict; expected a list'),
        ({"labels": [*GOOD, ["b/x.png", 0]]}, r"labels b/x\.png, which is not in .*/d"),
        ({"labels": [*GOOD, ["x", 0], ["y", 0]]}, "labels x and 1 more, which is not in"),
        ({"labels": GOOD[:1]}, r"no label for b/c\.png and 1 more; label every image, or none"),
        ({"labels": []}, r"no label for a\.png and 2 more"),
        ({"labels": [*GOOD, GOOD[0]]}, r"labels a\.png more than once"),
        ({"labels": [["a.png", -1], *GOOD[1:]]}, r"a\.png has the label -1; expected a class, an integer"),
        ({"labels": [["a.png", 1.5], *GOOD[1:]]}, r"a\.png has the label 1\.5; expected a class, an integer"),
        (
            {"labels": [["a.png", True], *GOOD[1:]]},
            r"a\.png has the label true; expected a class, an integer",
        ),
        (
            {"labels": [["a.png", "cat"], *GOOD[1:]]},
            r'a\.png has the label "cat"; expected a class, an integer',
        ),
        (
            {"labels": [["a.png", 10**30], *GOOD[1:]]},
            r"a\.png has the label 10+; expected a class, an integer",
        ),
        ({"labels": [["a.png"], *GOOD[1:]]}, r'entry \["a\.png"\] is not \[name, label\]'),
        ({"labels": ["a.png", *GOOD[1:]]}, r'entry "a\.png" is not'),
        ({"labels": [[["a.png"], 0], *GOOD[1:]]}, r'entry \[\["a\.png"\], 0\] is not'),
        ({"labels": GOOD, "label_names": "abc"}, '"label_names" is not a list of names'),
        ({"labels": GOOD, "label_names": ["x", "y", 3]}, '"label_names" is not a list of names'),
        ({"labels": GOOD, "label_names": ["x", "y"]}, '"label_names" names 2 classes, but the labels go up to 2'),
    ],
)
def test_a_wrong_labels_file_is_refused(tmp_path, content, reason):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(ValueError, match=rf"d/dataset\.json: .*{reason}"):
        labels_of(tmp_path, FILES | {"dataset.json": data})


def test_a_key_that_is_given_twice_is_refused(tmp_path):
    data = b'{"labels": [["0.png", 0], ["1.png", 1]], "label_names": ["a", "b"], "labels": null}'
    with pytest.raises(ValueError, match=r"dataset\.json: is not JSON: it has the key 'labels' twice; remove one"):
        labels_of(tmp_path, {**some_files(2), "dataset.json": data})


def test_folders_are_classes_in_the_order_of_their_names():
    labels = folder_labels(["dog/1.png", "cat/x/2.png", "dog/3.png"])
    assert (labels.values.tolist(), labels.class_names) == ([1, 0, 1], ("cat", "dog"))


def test_folders_that_all_images_share_are_skipped():
    labels = folder_labels(["data/train/dog/1.png", "data/train/cat/2.png"])
    assert (labels.values.tolist(), labels.class_names) == ([1, 0], ("cat", "dog"))


@pytest.mark.parametrize("names", [["1.png"], ["1.png", "2.png"], ["all/1.png", "all/2.png"]])
def test_one_folder_or_none_makes_no_classes(names):
    assert folder_labels(names) is None


def test_images_beside_class_folders_are_refused():
    with pytest.raises(ValueError, match=r"2\.png is outside the class folders"):
        folder_labels(["cat/1.png", "2.png", "dog/3.png"])


def noted(index):
    """A PNG with the class that generate.py would note, or none."""
    notes, file = PngImagePlugin.PngInfo(), io.BytesIO()
    if index is not None:
        notes.add_text("class", str(index))
    Image.new("RGB", (2, 2)).save(file, "PNG", pnginfo=notes)
    return file.getvalue()


@pytest.mark.parametrize(("classes", "found"), [([7, 0, 11], [7, 0, 11]), ([None] * 3, None)])
def test_classes_may_be_noted_in_the_images(tmp_path, classes, found):
    files = {name: noted(index) for name, index in zip(FILES, classes, strict=True)}
    labels = noted_labels(open_archive(write_folder(tmp_path / "d", files), (".png",)))
    assert (None if labels is None else labels.values.tolist()) == found


def test_classes_noted_in_some_images_only_are_refused(tmp_path):
    files = {"a.png": noted(1), "b.png": noted(None), "c.png": noted(None)}
    with pytest.raises(ValueError, match=r"no class is noted in b\.png and 1 more"):
        noted_labels(open_archive(write_folder(tmp_path / "d", files), (".png",)))


VECTORS = [[0.5, -1.0], [2, 0.25], [1e-3, 3.0]]


def test_lists_of_floats_are_vectors(tmp_path):
    labels = labels_of(tmp_path, with_labels(FILES, VECTORS))
    assert labels.values.dtype == np.float32
    np.testing.assert_array_equal(labels.values, np.array(VECTORS, np.float32))
    assert labels.space == ConditionSpace("vectors", 2)
    assert str(labels.space) == "label vectors of 2 numbers"
    np.testing.assert_array_equal(labels.space.encode(labels.values[1:]), labels.values[1:])
    assert labels.to_json(["x", "y", "z"])["labels"][0] == ["x", [0.5, -1.0]]


@pytest.mark.parametrize(
    ("vectors", "reason"),
    [
        ([[0.5], [1.0, 2.0], [3.0]], r"b/c\.png has the label \[1\.0, 2\.0\]; expected a vector, 1 finite numbers"),
        ([[0.5], 3, [3.0]], r"b/c\.png has the label 3; expected a vector, 1 finite numbers"),
        ([3, [0.5], 3], r"b/c\.png has the label \[0\.5\]; expected a class"),
        ([[0.5], ["x"], [3.0]], r'b/c\.png has the label \["x"\]; expected a vector, 1 finite'),
        ([[0.5], [float("nan")], [3.0]], r"b/c\.png has the label \[NaN\]; expected a vector, 1 finite"),
        ([[0.5], [10**400], [3.0]], r"b/c\.png has the label \[10+"),
        ([[0.5], [1e300], [3.0]], r"b/c\.png has the label \[1e\+300\]"),
        ([[], [], []], r"a\.png has the label \[\]; expected a vector, 1 finite numbers"),
    ],
)
def test_wrong_vectors_are_refused(tmp_path, vectors, reason):
    with pytest.raises(ValueError, match=rf"d/dataset\.json: {reason}"):
        labels_of(tmp_path, with_labels(FILES, vectors))


def test_vectors_have_no_class_names(tmp_path):
    with pytest.raises(ValueError, match='"label_names" names classes, but the labels are vectors'):
        labels_of(tmp_path, with_labels(FILES, VECTORS, label_names=["x", "y"]))


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_of_vectors_is_refused(tmp_path, case):
    (tmp_path / "x.npy").write_bytes(HOSTILE[case][0])
    with pytest.raises(ValueError, match=r"x\.npy: is neither a \.npy array nor a JSON list"):
        read_label_vectors(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("last", "more"), [(99_999, {}), (3, {"num_classes": 100_000}), (3, {"label_names": ["a"] * 100_000})]
)
def test_far_more_classes_than_images_are_a_mistake(tmp_path, last, more):
    mistake = r"has 4 images and classes up to 99999; a network has weights for each class: number"
    with pytest.raises(ValueError, match=mistake):
        open_source(write_folder(tmp_path / "d", with_labels(some_files(4), [0, 1, 2, last], **more)))
    with pytest.raises(ValueError, match=mistake):
        labels_of_array(np.array([0, 1, 2, 99_999]), "x")
    assert labels_of_array(np.array([0, 21_840]), "x").space.dimension == 21_841  # a few images of ImageNet-21k


@pytest.mark.parametrize("name", ["dataset.json", "generation.json"])
def test_a_small_zip_does_not_become_gigabytes_of_labels(tmp_path, name):
    content = b'{"labels": null, "runs": [' + b"[]," * 1_200_000 + b"[]]}"
    path = write_zip(tmp_path / "d.zip", {**some_files(4), name: content}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    archive = open_archive(path, (".png",))
    with pytest.raises(ValueError, match=r"it has 1200001 values, more than 4 images can have"):
        read_labels(archive) if name == "dataset.json" else _noted_classes(archive)
