"""dataset_tool.py: conversion of images, refused input, and the problems that check finds."""

import json
import os
import zipfile

import datasets
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edm2kit.cli.dataset import main
from edm2kit.data.convert import pick_balanced
from edm2kit.data.dataset import ImageDataset
from tests.support.dataset_tool import CLASSES, convert, run
from tests.support.pictures import encoded, npy, picture, some_files, with_labels, write_folder, write_zip


@pytest.fixture
def source(tmp_path):
    return write_folder(tmp_path / "source", CLASSES | {"note.txt": b"x"})


@pytest.mark.parametrize("dest", ["out", "out.zip"])
def test_class_folders_become_a_data_set(tmp_path, source, dest):
    output = convert(source, tmp_path / dest)
    assert "6 images; converting 6 to RGB" in output
    assert "Ignoring 1 other file: 1 .txt (such as note.txt)" in output
    assert "2 classes: cat, dog" in output
    dataset = ImageDataset(tmp_path / dest)
    assert [dataset.item_name(k) for k in range(6)] == [f"00000/img{k:08d}.png" for k in range(6)]
    assert (dataset.label_names, dataset.labels.tolist()) == (("cat", "dog"), [0, 0, 0, 1, 1, 1])
    for k in range(6):
        np.testing.assert_array_equal(dataset[k][0], np.asarray(picture(k % 3)).transpose(2, 0, 1))
    assert not (tmp_path / f"{dest}.partial").exists()


def test_the_zip_is_a_plain_uncompressed_one(tmp_path, source):
    convert(source, tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.testzip() is None
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.namelist()[-1] == "dataset.json"
        archive.extractall(tmp_path / "unpacked")
    assert os.stat(tmp_path / "unpacked" / "dataset.json").st_size > 0
    assert len(ImageDataset(tmp_path / "unpacked")) == 6


def test_zips_and_several_processes_give_the_same_bytes(tmp_path, source):
    convert(source, tmp_path / "one.zip")
    packed = write_zip(tmp_path / "source.zip", CLASSES, zipfile.ZIP_DEFLATED)
    arguments = ["convert", "--source", str(packed), "--dest", str(tmp_path / "two.zip"), "--workers", "2"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert (tmp_path / "two.zip").read_bytes() == (tmp_path / "one.zip").read_bytes()


def test_labels_of_the_source_are_kept(tmp_path):
    source = write_folder(tmp_path / "d", with_labels(CLASSES, [4, 0, 1, 1, 2, 2], label_names=list("abcdef")))
    convert(source, tmp_path / "out")
    dataset = ImageDataset(tmp_path / "out")
    assert dataset.labels.tolist() == [1, 2, 2, 4, 0, 1]  # cat comes before dog
    assert dataset.label_names == tuple("abcdef")


def test_labels_can_be_chosen(tmp_path):
    source = write_folder(tmp_path / "d", with_labels(CLASSES, [4, 0, 1, 1, 2, 2]))
    convert(source, tmp_path / "none", "--labels", "none")
    assert ImageDataset(tmp_path / "none").labels is None
    assert json.loads((tmp_path / "none" / "dataset.json").read_text())["labels"] is None
    convert(source, tmp_path / "folders", "--labels", "folders")
    assert ImageDataset(tmp_path / "folders").label_names == ("cat", "dog")
    flat = write_folder(tmp_path / "flat", some_files(2))
    convert(flat, tmp_path / "flat-out")
    assert ImageDataset(tmp_path / "flat-out").labels is None
    assert "contains no dataset.json" in convert(flat, tmp_path / "x", "--labels", "json", code=1)
    assert "are not in two or more class folders" in convert(flat, tmp_path / "x", "--labels", "folders", code=1)


@pytest.mark.parametrize(
    ("transform", "resolution", "side"),
    [("center-crop", "16", 16), ("center-crop-wide", "16x8", 16), ("center-crop-dhariwal", "16x16", 16)],
)
def test_transforms_unify_sizes(tmp_path, transform, resolution, side):
    files = {f"{k}.png": encoded(picture(k, size)) for k, size in enumerate([(40, 30), (9, 50), (16, 16)])}
    source = write_folder(tmp_path / "d", files)
    convert(source, tmp_path / "out", "--transform", transform, "--resolution", resolution)
    assert [raw.shape for raw, _ in map(ImageDataset(tmp_path / "out").__getitem__, range(3))] == [(3, side, side)] * 3


def test_squares_are_resized_without_a_transform(tmp_path):
    files = {"a.png": encoded(picture(0, (8, 8))), "b.png": encoded(picture(1, (20, 20)))}
    convert(write_folder(tmp_path / "d", files), tmp_path / "out", "--resolution", "8")
    expected = picture(1, (20, 20)).resize((8, 8), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(ImageDataset(tmp_path / "out")[1][0].transpose(1, 2, 0), np.asarray(expected))


def test_grey_stays_grey_only_if_all_are(tmp_path):
    grey = {"a.png": encoded(picture(0, mode="L")), "b.png": encoded(picture(1, mode="LA"))}
    convert(write_folder(tmp_path / "grey", grey), tmp_path / "grey-out")
    assert ImageDataset(tmp_path / "grey-out").item_shape == (1, 8, 8)
    mixed = grey | {"c.png": encoded(picture(2).convert("P")), "d.jpg": encoded(picture(3), "jpeg")}
    convert(write_folder(tmp_path / "mixed", mixed), tmp_path / "mixed-out")
    dataset = ImageDataset(tmp_path / "mixed-out")
    assert [dataset[k][0].shape for k in range(4)] == [(3, 8, 8)] * 4
    np.testing.assert_array_equal(dataset[0][0], np.stack([np.asarray(picture(0, mode="L"))] * 3))


def test_max_images_takes_equally_from_each_class():
    classes = np.array([0, 0, 0, 0, 2, 1, 1, 1, 0, 0])
    assert pick_balanced(10, classes, None).tolist() == list(range(10))
    assert pick_balanced(10, classes, 20).tolist() == list(range(10))
    assert pick_balanced(10, classes, 3).tolist() == [0, 4, 5]
    assert pick_balanced(10, classes, 6).tolist() == [0, 1, 2, 4, 5, 6]
    assert pick_balanced(10, classes, 8).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert pick_balanced(10, None, 3).tolist() == [0, 1, 2]


def test_max_images_keeps_the_class_numbers(tmp_path, source):
    convert(source, tmp_path / "out", "--max-images", 3)
    assert ImageDataset(tmp_path / "out").labels.tolist() == [0, 0, 1]


def test_the_tool_reads_what_it_writes(tmp_path, source):
    convert(source, tmp_path / "one.zip")
    convert(tmp_path / "one.zip", tmp_path / "two.zip")
    first, second = ImageDataset(tmp_path / "one.zip"), ImageDataset(tmp_path / "two.zip")
    assert (second.label_names, second.labels.tolist()) == (first.label_names, first.labels.tolist())
    assert all((first[k][0] == second[k][0]).all() for k in range(6))


@pytest.mark.parametrize(
    ("files", "options", "code", "reason"),
    [
        ({}, (), 1, "contains no images"),
        ({"a.txt": b"x"}, (), 1, "it contains 1 other file, such as a.txt"),
        ({"a.npy": npy(np.zeros((8, 4, 4), np.float32))}, (), 1, "contains no images"),
        (CLASSES, ("--transform", "crop"), 2, "'crop' is not one of 'none', 'center-crop'"),
        (CLASSES, ("--resolution", "8x"), 2, "'8x' is not a size; write for example 64 or 64x64"),
        (CLASSES, ("--resolution", "12"), 1, "12x12: the width must be a power of two"),
        (CLASSES, ("--resolution", "0"), 1, "0x0: the width must be a power of two"),
        (CLASSES, ("--resolution", "8x4"), 1, "8x4: width and height must be equal for none"),
        (CLASSES, ("--max-images", "0"), 2, "0 is not in the range"),
        (CLASSES, ("--transform", "center-crop"), 1, "center-crop needs --resolution, for example"),
        (CLASSES, ("--transform", "center-crop-wide", "--resolution", "8"), 1, "needs a width above the height"),
        (CLASSES | {"z.png": encoded(picture(0))}, (), 1, "z.png is outside the class folders"),
        (with_labels(CLASSES, [0, 1, 2, 0, 1, -2]), (), 1, "cat/2.png has the label -2; expected a class"),
        ({"a.png": encoded(picture(0, (12, 12)))}, (), 1, "a.png is 12x12; training needs squares whose side"),
        ({"a.png": encoded(picture(0, (8, 4)))}, (), 1, "a.png is 8x4; training needs squares"),
        ({"a.png": encoded(picture(0, (8, 4)))}, ("--resolution", "8"), 1, "a.png is 8x4 and would be distorted"),
        ({"a.png": b"x"}, (), 1, "none of the 1 images can be read"),
        ({"a.png": encoded(picture(0)), "b.png": b"x"}, (), 1, "b.png: is not an image, or is cut short within its"),
        ({"a.png": encoded(picture(0))[:150]}, ("--skip-broken",), 1, "none of the 1 images can be read"),
    ],
)
def test_wrong_input_is_refused_in_one_line_and_leaves_nothing(tmp_path, files, options, code, reason):
    source = write_folder(tmp_path / "d", files)
    source.mkdir(exist_ok=True)
    output = convert(source, tmp_path / "out.zip", *options, code=code)
    error = output[output.index("Error: ") :]
    assert reason in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.zip").exists()


def test_images_of_two_sizes_are_both_named(tmp_path):
    files = {"a.png": encoded(picture(0)), "b.png": encoded(picture(1, (4, 4)))}
    output = convert(write_folder(tmp_path / "d", files), tmp_path / "out", "--skip-broken", code=1)
    assert f"{tmp_path}/d/a.png is 8x8, {tmp_path}/d/b.png is 4x4; add --resolution and a --transform" in output
    assert not (tmp_path / "out").exists()


def test_a_missing_source_and_a_destination_within_it_are_refused(tmp_path, source):
    assert "nothing: no such file or folder" in convert(tmp_path / "nothing", tmp_path / "out", code=1)
    assert "is inside --source" in convert(source, source / "out", code=1)


def test_broken_images_can_be_left_out(tmp_path):
    files = CLASSES | {"cat/1.png": b"x", "dog/0.png": CLASSES["dog/0.png"][:120]}
    source = write_folder(tmp_path / "d", files)
    assert "d/cat/1.png: is not an image" in convert(source, tmp_path / "out", code=1)
    output = convert(source, tmp_path / "out", "--skip-broken")
    assert f"Skipped: {tmp_path}/d/cat/1.png: is not an image" in output
    assert f"Skipped: {tmp_path}/d/dog/0.png: the image is damaged" in output
    assert "Wrote 4 images" in output
    assert "Skipped 2 images that could not be read" in output
    dataset = ImageDataset(tmp_path / "out")
    assert dataset.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(dataset[1][0], np.asarray(picture(2)).transpose(2, 0, 1))


def test_check_reports_a_good_data_set(tmp_path, source):
    convert(source, tmp_path / "out.zip")
    output = run("check", "--source", tmp_path / "out.zip")
    for line in ("6 images", "  uint8 [3, 8, 8]: 6", "2 classes:", "  0 cat: 3", "  1 dog: 3", "Ready for training"):
        assert f"{line}\n" in output


def test_check_counts_unnamed_and_empty_classes(tmp_path):
    path = write_folder(tmp_path / "d", with_labels(some_files(3), [0, 2, 2]))
    output = run("check", "--source", path)
    assert "3 classes:\n  0: 1\n  1: 0\n  2: 2\n" in output


def test_check_names_everything_that_is_wrong(tmp_path):
    bad = {
        "a.png": b"x",
        "b.png": encoded(picture(0))[:100],
        "c.png": encoded(picture(0, mode="RGBA")),
        "d.png": encoded(picture(0, (4, 4))),
        "e.npy": npy(np.full((2, 4, 4), np.nan, np.float32)),
        "dataset.json": b"{",
    }
    output = run("check", "--source", write_folder(tmp_path / "d", some_files(3) | bad), code=1)
    for problem in (
        "d/a.png: is not an image",
        "d/b.png: the image is damaged",
        "d/c.png: its pixels are RGBA",
        "d/e.npy: contains numbers that are not finite",
        "d/dataset.json: is not JSON",
        "the images differ in shape: uint8 [3, 8, 8] (00000/img00000000.png), uint8 [3, 4, 4] (d.png)",
    ):
        assert f"Problem: {tmp_path}/{problem}" in output or f"Problem: {problem}" in output
    assert "6 problems" in output


def test_check_knows_what_training_takes(tmp_path):
    output = run("check", "--source", write_folder(tmp_path / "d", some_files(2, size=(12, 12))), code=1)
    assert "1 problem\n" in output
    assert "is 12x12 pixels of 3 channels; training takes square grey or RGB images" in output
    assert "no such file" in run("check", "--source", tmp_path / "none", code=1)


def test_label_vectors_are_kept_and_checked(tmp_path):
    vectors = [[k / 4, -1.0] for k in range(6)]
    source = write_folder(tmp_path / "d", with_labels(CLASSES, vectors))
    assert "label vectors of 2 numbers" in convert(source, tmp_path / "out.zip", "--max-images", "5")
    dataset = ImageDataset(tmp_path / "out.zip")
    by_name = dict(zip(CLASSES, vectors, strict=True))
    np.testing.assert_array_equal(dataset.labels, np.float32([by_name[name] for name in sorted(CLASSES)[:5]]))
    assert dataset.condition_space.kind == "vectors"
    assert "Labels: vectors of 2 numbers from -1 to 1.25\n" in run("check", "--source", tmp_path / "out.zip")


def test_check_reads_arrays(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((5, 3, 8, 8), np.uint8))
    np.save(tmp_path / "labels.npy", np.arange(5))
    output = run("check", "--source", tmp_path / "x.npy")
    for line in ("x.npy: 5 images", "  uint8 [3, 8, 8]: 5", "5 classes:", "  4: 1", "Ready for training"):
        assert f"{line}\n" in output
    np.save(tmp_path / "y.npy", np.full((5, 2, 8, 8), np.nan, np.float32))
    (tmp_path / "labels.npy").unlink()
    assert "items 0 to 4 hold numbers that are not finite" in run("check", "--source", tmp_path / "y.npy", code=1)


def test_images_of_a_hugging_face_folder_are_converted(tmp_path):
    images = [picture(0, (20, 12)), picture(1, (9, 16)), picture(2)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    table = datasets.Dataset.from_dict({"image": images, "label": [1, 0, 1]}, features)
    table.save_to_disk(tmp_path / "hf")
    crop = ("--resolution", "8", "--transform", "center-crop")
    convert(tmp_path / "hf", tmp_path / "out.zip", *crop)
    dataset = ImageDataset(tmp_path / "out.zip")
    assert (dataset.label_names, dataset.labels.tolist()) == (("cat", "dog"), [1, 0, 1])
    np.testing.assert_array_equal(dataset[2][0], np.asarray(picture(2)).transpose(2, 0, 1))
    assert "nothing to do" in convert(f"hf:{tmp_path / 'hf'}", tmp_path / "out.zip", *crop)
    assert "No labels" in convert(tmp_path / "hf", tmp_path / "none.zip", *crop, "--labels", "none")
    assert "its labels are in a column" in convert(tmp_path / "hf", tmp_path / "x", *crop, "--labels", "json", code=1)
    table.select([0, 1, 2, 0]).save_to_disk(tmp_path / "more")
    assert "images 3, now 4" in convert(tmp_path / "more", tmp_path / "out.zip", *crop, code=1)
