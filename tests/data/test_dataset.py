"""ImageDataset: items and labels, and the files that it refuses."""

import pickle
import zipfile
from multiprocessing import get_context

import numpy as np
import pytest

from edm2kit.data.dataset import ImageDataset
from tests.support.pictures import encoded, npy, picture, some_files, with_labels, write_folder, write_zip

WRITERS = {
    "folder": lambda path, files: write_folder(path / "d", files),
    "stored": lambda path, files: write_zip(path / "d.zip", files),
    "deflated": lambda path, files: write_zip(path / "d.zip", files, zipfile.ZIP_DEFLATED),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_items_are_pixels_and_one_hot_labels_in_the_order_of_names(tmp_path, write):
    files = with_labels(some_files(5), [2, 0, 3, 0, 1], label_names=["a", "b", "c", "d", "e"])
    dataset = ImageDataset(write(tmp_path, dict(reversed(files.items()))))
    assert (len(dataset), dataset.item_shape, dataset.item_dtype) == (5, (3, 8, 8), np.uint8)
    assert (dataset.resolution, dataset.num_channels) == (8, 3)
    assert (dataset.label_dim, dataset.label_names) == (5, ("a", "b", "c", "d", "e"))
    assert dataset.labels.tolist() == [2, 0, 3, 0, 1]
    for k in range(5):
        raw, label = dataset[k]
        np.testing.assert_array_equal(raw, np.asarray(picture(k)).transpose(2, 0, 1))
        np.testing.assert_array_equal(label, np.eye(5, dtype=np.float32)[dataset.labels[k]])
        assert label.dtype == np.float32
        assert dataset.item_name(k) == f"00000/img{k:08d}.png"


def test_jpeg_and_upper_case_names(tmp_path):
    files = {"a.JPG": encoded(picture(0), "jpeg"), "b.Jpeg": encoded(picture(1), "jpeg"), "c.png": encoded(picture(2))}
    dataset = ImageDataset(write_folder(tmp_path, files))
    assert [dataset[k][0].shape for k in range(3)] == [(3, 8, 8)] * 3


def test_grey_keeps_one_channel(tmp_path):
    dataset = ImageDataset(write_folder(tmp_path, some_files(2, mode="L")))
    assert dataset.item_shape == (1, 8, 8)
    np.testing.assert_array_equal(dataset[1][0][0], np.asarray(picture(1, mode="L")))


def test_raw_latents(tmp_path):
    latents = np.random.default_rng(0).standard_normal((2, 8, 6, 6)).astype(np.float16)
    dataset = ImageDataset(write_zip(tmp_path / "d.zip", {f"{k}.npy": npy(x) for k, x in enumerate(latents)}))
    assert (dataset.item_shape, dataset.item_dtype, dataset.label_dim) == ((8, 6, 6), np.float32, 0)
    np.testing.assert_array_equal(dataset[1][0], latents[1].astype(np.float32))


def test_label_free(tmp_path):
    dataset = ImageDataset(write_folder(tmp_path, some_files(2)))
    assert (dataset.label_dim, dataset.labels, dataset.label_names) == (0, None, None)
    assert dataset[0][1].shape == (0,)


def test_labels_can_be_left_aside_even_if_they_are_wrong(tmp_path):
    path = write_folder(tmp_path, some_files(2) | {"dataset.json": b"{"})
    assert ImageDataset(path, use_labels=False).label_dim == 0
    with pytest.raises(ValueError, match=r"dataset\.json: is not JSON"):
        ImageDataset(path)


def test_a_thousand_classes(tmp_path):
    dataset = ImageDataset(write_folder(tmp_path, with_labels(some_files(2), [999, 0])))
    assert dataset.label_dim == 1000
    assert np.flatnonzero(dataset[0][1]).tolist() == [999]


def test_max_images_are_spread_evenly_and_keep_all_classes(tmp_path):
    path = write_folder(tmp_path, with_labels(some_files(10), list(range(10))))
    dataset = ImageDataset(path, max_images=4)
    assert (len(dataset), dataset.labels.tolist(), dataset.label_dim) == (4, [0, 2, 5, 7], 10)
    np.testing.assert_array_equal(dataset[2][0], np.asarray(picture(5)).transpose(2, 0, 1))
    assert len(ImageDataset(path, max_images=99)) == 10
    with pytest.raises(ValueError, match="max_images is 0"):
        ImageDataset(path, max_images=0)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(tmp_path, write, method):
    dataset = ImageDataset(write(tmp_path, with_labels(some_files(4), [0, 1, 2, 3])))
    dataset[0]  # whatever a first read leaves behind must not disturb the others
    with get_context(method).Pool(2) as pool:
        for (raw, label), (raw2, label2) in zip(pool.map(dataset.__getitem__, range(4)), dataset, strict=False):
            np.testing.assert_array_equal(raw, raw2)
            np.testing.assert_array_equal(label, label2)
    assert len(pickle.loads(pickle.dumps(dataset))) == 4


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(picture(0, (8, 6))), r"is 8x6 pixels of 3 channels; .*dataset_tool\.py convert"),
        (encoded(picture(0, (12, 12), "L")), r"is 12x12 pixels of 1 channel; .*power of two"),
        (encoded(picture(0, (8, 8), "RGBA")), r"its pixels are RGBA, .*dataset_tool\.py convert"),
        (encoded(picture(0))[:100], "damaged or cut short"),
        (b"text", "is not an image"),
        (npy(np.zeros((4, 8, 8), np.uint8)), "is 8x8 pixels of 4 channels"),
        (npy(np.zeros((8, 8, 6), np.float32)), r"contains \[8, 8, 6\] numbers; raw latents are square"),
        (npy(np.zeros((7, 8, 8), np.float32)), "even number of channels"),
    ],
)
def test_opening_refuses_a_first_file_that_cannot_be_trained_on(tmp_path, data, reason):
    with pytest.raises(ValueError, match=rf"d\.zip/a/x\.png: .*{reason}"):
        ImageDataset(write_zip(tmp_path / "d.zip", {"a/x.png": data}))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            encoded(picture(0, (16, 16))),
            r"is uint8 \[3, 16, 16\], but the first file, 00000/img00000000\.png, is uint8",
        ),
        (encoded(picture(0, mode="L")), r"is uint8 \[1, 8, 8\], but the first"),
        (npy(np.zeros((3, 8, 8), np.float32)), r"is float32 \[3, 8, 8\], but the first"),
        (encoded(picture(0))[:100], "damaged or cut short"),
    ],
)
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_reading_refuses_a_later_file_that_differs(tmp_path, write, data, reason):
    dataset = ImageDataset(write(tmp_path, some_files(2) | {"z.png": data}))
    dataset[1]
    with pytest.raises(ValueError, match=rf"z\.png: .*{reason}"):
        dataset[2]


def test_opening_decodes_the_first_file_alone(tmp_path):
    files = some_files(1) | {f"broken{k}.png": b"x" for k in range(50)}
    assert len(ImageDataset(write_folder(tmp_path, files))) == 51


def test_a_cut_zip_is_refused(tmp_path):
    path = write_zip(tmp_path / "d.zip", some_files(4))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"d\.zip: not a zip archive, or cut short"):
        ImageDataset(path)
