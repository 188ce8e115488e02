"""Every source: the same contract, and the choice of one by what is at a path."""

import json
import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from edm2kit.data import dataset as sources
from edm2kit.data.array_dataset import ArrayDataset
from edm2kit.data.batches import GlobalOrder, training_batches
from edm2kit.data.dataset import ENCODER_FILE, SOURCES, EncoderRecord, ImageDataset, open_source, read_encoder_record
from edm2kit.data.hugging_face import HuggingFaceDataset, SavedTable
from edm2kit.data.labels import ConditionSpace
from tests.support.hostile_arrays import HOSTILE
from tests.support.pictures import encoded, npy, picture, some_files, with_labels, write_folder
from tests.support.tiny import make_dataset

COUNT, CLASSES = 10, [k % 3 for k in range(10)]
PIXELS = np.stack([np.asarray(picture(k)).transpose(2, 0, 1) for k in range(COUNT)])


def write_arrays(path: Path, *, shards: int = 2, labels: object = CLASSES) -> Path:
    path.mkdir(parents=True)
    for k, part in enumerate(np.array_split(PIXELS, shards)):
        np.save(path / f"part{k}.npy", part)
    if labels is not None:
        np.save(path / "labels.npy", labels)
    return path


def write_hugging_face(path: Path, labels: object = CLASSES, names: object = ("a", "b", "c")) -> Path:
    columns = {"image": [picture(k) for k in range(COUNT)]}
    features = {"image": datasets.Image()}
    if labels is not None:
        columns["label"] = list(labels)
        features["label"] = datasets.ClassLabel(names=list(names))
    datasets.Dataset.from_dict(columns, datasets.Features(features)).save_to_disk(path)
    return path


WRITERS = {
    "image_files": lambda path: write_folder(path, with_labels(some_files(COUNT), CLASSES)),
    "arrays": write_arrays,
    "hf": write_hugging_face,
}


@pytest.fixture(params=SOURCES)
def kind(request):
    return request.param


@pytest.fixture
def path(kind, tmp_path):
    return WRITERS[kind](tmp_path / "data")


def test_the_content_of_a_path_decides_the_source(kind, path):
    assert type(open_source(path)) is type(SOURCES[kind](str(path), None, True))
    assert type(open_source(f"{kind}:{path}")) is type(open_source(path))


def test_items_and_labels_are_the_same_from_every_source(path):
    source = open_source(path)
    indices = np.array([7, 0, 7, 3])
    raw = source.read(indices)
    assert raw.dtype == source.item_dtype == np.uint8
    np.testing.assert_array_equal(raw, PIXELS[indices])
    np.testing.assert_array_equal(source.read_labels(indices), np.eye(3, dtype=np.float32)[[1, 0, 1, 0]])
    assert (len(source), source.item_shape, source.labels.tolist()) == (COUNT, (3, 8, 8), CLASSES)
    assert (source.condition_space.kind, source.label_dim) == ("classes", 3)
    item, label = source[3]
    np.testing.assert_array_equal(item, PIXELS[3])
    np.testing.assert_array_equal(label, [1, 0, 0])


def test_labels_and_items_can_be_left_out(path):
    unlabelled = open_source(path, use_labels=False)
    assert (unlabelled.labels, unlabelled.condition_space) == (None, ConditionSpace())
    assert unlabelled.read_labels(np.arange(2)).shape == (2, 0)
    few = open_source(path, max_images=4)
    assert (len(few), few.labels.tolist(), few.label_dim) == (4, [CLASSES[k] for k in (0, 2, 5, 7)], 3)
    np.testing.assert_array_equal(few.read(np.arange(4)), PIXELS[[0, 2, 5, 7]])


def test_an_identity_belongs_to_the_content_and_not_to_the_place(path, tmp_path):
    moved = shutil.copytree(path, tmp_path / "elsewhere")
    identity = open_source(path).identity()
    assert open_source(moved).identity() == identity == json.loads(json.dumps(identity))
    assert open_source(path, max_images=9).identity() != identity
    assert open_source(path, use_labels=False).identity() != identity


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_resume_in_the_same_global_order(path, workers):
    source = open_source(path)
    arguments = {"rank": 0, "world_size": 1, "workers": workers}
    whole = training_batches(source, GlobalOrder(COUNT, 1), 0, 4, **arguments)
    resumed = training_batches(pickle.loads(pickle.dumps(source)), GlobalOrder(COUNT, 1), 8, 4, **arguments)
    expected = [next(whole) for _ in range(5)][2:]
    for batch in expected:
        again = next(resumed)
        assert again.positions.equal(batch.positions)
        assert again.raw.equal(batch.raw)
        assert again.labels.equal(batch.labels)
    whole.close()
    resumed.close()


def test_image_folders_keep_the_identity_that_older_runs_recorded(tmp_path):
    folder = make_dataset(tmp_path / "d", num_images=5)
    identity = ImageDataset(folder).identity()
    assert len(identity.pop("content")) == 64  # which older runs did not record
    assert identity == {
        "num_images": 5,
        "raw_shape": [3, 8, 8],
        "label_dim": 4,
        "sha256": "eab804eab935e37cab53044a37af0e2334e9e1ed75d0a05b28d3e7ebb00fe2e6",
    }
    identity = ImageDataset(folder, use_labels=False).identity()
    del identity["content"]
    assert identity == {
        "num_images": 5,
        "raw_shape": [3, 8, 8],
        "label_dim": 0,
        "sha256": "f47936c083b51d03bae4b3ab0dc3b004c7f96ceebf252cf77095952862d1aedf",
    }


def test_a_folder_of_latents_is_not_taken_for_arrays(tmp_path):
    files = {f"{k}.npy": npy(np.ones((8, 4, 4), np.float32)) for k in range(3)}
    assert type(open_source(write_folder(tmp_path / "d", files))) is ImageDataset


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        open_source(tmp_path / "none")


# arrays


def test_one_array_file_with_labels_beside_it(tmp_path):
    folder = write_arrays(tmp_path / "d", shards=1)
    source = open_source(folder / "part0.npy")
    np.testing.assert_array_equal(source.read(np.arange(COUNT)), PIXELS)
    assert source.labels.tolist() == CLASSES


def test_the_division_into_shards_does_not_matter(tmp_path):
    one, four = (ArrayDataset(write_arrays(tmp_path / str(n), shards=n)) for n in (1, 4))
    assert one.identity() == four.identity()
    np.testing.assert_array_equal(one.read(np.arange(COUNT)), four.read(np.arange(COUNT)))


def test_half_precision_latents_become_float32(tmp_path):
    latents = np.random.default_rng(0).standard_normal((4, 8, 6, 6)).astype(np.float16)
    np.save(tmp_path / "x.npy", latents)
    source = ArrayDataset(tmp_path / "x.npy")
    assert (source.item_shape, source.item_dtype, source.label_dim) == ((8, 6, 6), np.float32, 0)
    np.testing.assert_array_equal(source.read(np.arange(4)), latents.astype(np.float32))


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        (
            "a.npy",
            npy(PIXELS[:, :, :4]),
            r"a\.npy: is uint8 \[10, 3, 4, 8\], but part0\.npy|part0\.npy: is .*a\.npy is",
        ),
        ("z.npy", npy(PIXELS.astype(np.int32)), r"z\.npy: is int32 .*expected pixels uint8 \[N, C, H, W\]"),
        ("z.npy", npy(PIXELS)[:200], r"z\.npy: the \.npy file is damaged or cut short"),
        ("z.npy", npy(PIXELS[:0]), r"z\.npy: is uint8 \[0, 3, 8, 8\]"),
        ("labels.npy", npy(np.zeros(3, int)), r"labels\.npy: has 3 labels for 10 images"),
        ("labels.npy", npy(np.full(10, -1)), r"labels\.npy: classes run from -1 to -1; number the classes from 0"),
        ("labels.npy", npy(np.full((10, 2), np.nan)), r"labels\.npy: label vectors hold numbers that are not finite"),
        ("labels.npy", npy(np.full((10, 2), 1)), r"labels\.npy: labels are int64 \[10, 2\]; expected classes"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, name, data, reason):
    folder = write_arrays(tmp_path / "d")
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        open_source(f"arrays:{folder}")


def test_arrays_that_cannot_be_trained_on_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 12, 12), np.uint8))
    with pytest.raises(ValueError, match=r"x\.npy: is 12x12 pixels of 3 channels; .*resize the images before saving"):
        open_source(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"contains no \.npy array"):
        open_source(f"arrays:{tmp_path / 'none'}")


def test_arrays_of_latents_may_have_an_encoder_record(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4, 8, 6, 6), np.float32))
    assert read_encoder_record(open_source(tmp_path / "x.npy")) is None
    (tmp_path / ENCODER_FILE).write_bytes(EncoderRecord("some/vae", "0123").to_json())
    assert read_encoder_record(open_source(tmp_path / "x.npy")) == EncoderRecord("some/vae", "0123")
    assert read_encoder_record(open_source(tmp_path)) == EncoderRecord("some/vae", "0123")


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_array_is_refused(tmp_path, case):
    folder = write_arrays(tmp_path / "d")
    (folder / "x.npy").write_bytes(HOSTILE[case][0])
    with pytest.raises(ValueError, match=r"x\.npy: the \.npy file is damaged or cut short"):
        open_source(folder)


# Hugging Face


def test_class_names_come_from_the_features(tmp_path):
    assert open_source(write_hugging_face(tmp_path / "d")).label_names == ("a", "b", "c")


def test_columns_and_splits_can_be_named(tmp_path):
    def table(first: int) -> datasets.Dataset:
        pictures = [picture(first + k) for k in range(3)]
        columns = {"photo": pictures, "other": pictures[::-1], "kind": [0, 1, 2]}
        images = {"photo": datasets.Image(), "other": datasets.Image()}
        return datasets.Dataset.from_dict(columns, datasets.Features({**images, "kind": datasets.Value("int64")}))

    datasets.DatasetDict({"train": table(0), "test": table(5)}).save_to_disk(tmp_path / "d")
    source = open_source(f"hf:{tmp_path / 'd'}?image=photo&label=kind")
    np.testing.assert_array_equal(source.read(np.arange(3)), PIXELS[:3])
    assert source.labels.tolist() == [0, 1, 2]
    test = open_source(f"{tmp_path / 'd'}?split=test&image=other")
    np.testing.assert_array_equal(test.read(np.array([0])), PIXELS[[7]])
    assert test.labels is None
    for query, reason in (
        ("", "has several image columns, or none, among photo, other, kind; name one"),
        ("?image=photo&split=dev", "has no split 'dev'; available: train, test"),
        ("?image=none", "has no column 'none'; available: photo, other, kind"),
        ("?image=kind", "column 'kind' is .*; expected a column of type Image"),
        ("?images=photo", "unknown option 'images'; available options: split, image, label"),
    ):
        with pytest.raises(ValueError, match=reason):
            open_source(f"hf:{tmp_path / 'd'}{query}")


def test_lists_of_floats_are_label_vectors(tmp_path):
    vectors = [[k / 10, 1.0] for k in range(COUNT)]
    columns = {"image": [picture(k) for k in range(COUNT)], "label": vectors}
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "d")
    source = open_source(tmp_path / "d")
    assert source.condition_space == ConditionSpace("vectors", 2)
    np.testing.assert_array_equal(source.labels, np.array(vectors, np.float32))


def test_files_that_the_table_only_points_to(tmp_path):
    paths = []
    for k in range(3):
        paths.append(str(tmp_path / f"{k}.png"))
        Image.fromarray(PIXELS[k].transpose(1, 2, 0)).save(paths[-1])
    table = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "d")
    source = open_source(tmp_path / "d")
    np.testing.assert_array_equal(source.read(np.arange(3)), PIXELS[:3])


def test_the_identity_covers_images_in_separate_files(tmp_path, monkeypatch):
    # earlier versions of datasets left them where they are
    monkeypatch.setattr(datasets.arrow_writer, "embed_table_storage", lambda table, **settings: table)
    Image.fromarray(PIXELS[0].transpose(1, 2, 0)).save(tmp_path / "0.png")
    table = datasets.Dataset.from_dict({"image": [str(tmp_path / "0.png")]}).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "d")
    before = open_source(tmp_path / "d").identity(), SavedTable(tmp_path / "d").checksum(0)
    Image.fromarray(PIXELS[1].transpose(1, 2, 0)).save(tmp_path / "0.png")
    after = open_source(tmp_path / "d").identity(), SavedTable(tmp_path / "d").checksum(0)
    assert before[0]["sha256"] == after[0]["sha256"]
    assert before[0]["content"] != after[0]["content"]
    assert before[1] != after[1]
    monkeypatch.undo()
    within = write_hugging_face(tmp_path / "within")
    assert SavedTable(within).checksum(0) == (0, 0)


def test_the_identity_of_arrays_covers_more_than_the_items_that_older_runs_recorded(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, [1000, 3, 8, 8], np.uint8)
    np.save(tmp_path / "a.npy", images)
    before = open_source(tmp_path / "a.npy").identity()
    images[501] = 0
    np.save(tmp_path / "a.npy", images)
    after = open_source(tmp_path / "a.npy").identity()
    assert before["sha256"] == after["sha256"]
    assert before["content"] != after["content"]


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (picture(0, (16, 16)), r"d\[2\]: is uint8 \[3, 16, 16\], but the first image is uint8 \[3, 8, 8\]"),
        ({"bytes": encoded(picture(0))[:100], "path": None}, r"d\[2\]: the image is damaged or cut short"),
    ],
)
def test_a_later_image_that_differs_is_named(tmp_path, last, reason):
    images = [picture(0), picture(1), last]
    datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()})).save_to_disk(
        tmp_path / "d"
    )
    source = open_source(tmp_path / "d")
    with pytest.raises(ValueError, match=reason):
        source.read(np.arange(3))


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a folder written by save_to_disk"):
        open_source(f"hf:{make_dataset(tmp_path / 'd', 2)}")
    path = write_hugging_face(tmp_path / "hf")
    next(path.glob("*.arrow")).write_bytes(b"no table")
    with pytest.raises(ValueError, match="hf: cannot be read"):
        HuggingFaceDataset(path)


def test_a_registered_kind_opens_by_its_prefix_and_its_name_is_not_given_twice(monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", dict(sources.SOURCES))

    def opener(path, max_images, use_labels):
        return path, max_images, use_labels

    sources.register_source("mine", opener)
    sources.register_source("mine", opener)
    assert sources.open_source("mine:here", 5, use_labels=False) == ("here", 5, False)
    with pytest.raises(ValueError, match="'mine' exists already"):
        sources.register_source("mine", ImageDataset)
