"""Files as other people and other programs make them: names, labels and sizes that are not what they seem."""

import io
import json
import os
import struct
import unicodedata
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edm2kit.cli.image_source import open_images
from edm2kit.data.archive import check_name, open_archive
from edm2kit.data.check import check, look_at
from edm2kit.data.convert import _description, find_labels, plan
from edm2kit.data.dataset import ImageDataset, open_source, reading_notices
from edm2kit.data.image_files import IMAGE_EXTENSIONS, encode_png, open_header, to_8bit
from edm2kit.data.labels import read_labels
from edm2kit.data.output import PartialDataset


def png(value=7, size=8, mode="RGB"):
    file = io.BytesIO()
    color = (value,) * 3 if mode == "RGB" else value
    Image.new(mode, (size, size), color).save(file, "png")
    return file.getvalue()


def write_zip(path, files, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def opened(path):
    return open_archive(path, IMAGE_EXTENSIONS)


@pytest.mark.parametrize(
    "name", ["/etc/x.png", "../x.png", "a/../../x.png", "a//x.png", "", "c:/x.png", "a\0.png", "."]
)
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="not a path below a folder"):
        check_name(name, "source.zip")
    with PartialDataset(tmp_path / "out", {}) as output, pytest.raises(ValueError, match="not a path below a folder"):
        output.add(name, b"data")


@pytest.mark.parametrize(
    "name", ["NUL.png", "a/con", "com1.txt/a.png", "a./b.png", "a /b.png", "b.png ", "a?.png", "ab:c"]
)
def test_names_that_windows_does_not_allow_are_refused_there(name, monkeypatch):
    check_name(name, "source.zip")
    monkeypatch.setattr(os, "name", "nt")
    check_name("console/nullable.png", "source.zip")
    with pytest.raises(ValueError, match="not a path below a folder"):
        check_name(name, "source.zip")


@pytest.mark.parametrize("name", ["a.png", "00000/img00000000.png", "é/ü.png", "..a/b..png", "a b/c.png"])
def test_an_ordinary_name_is_accepted(name):
    check_name(name, "source.zip")


@pytest.mark.parametrize("folder", ["", "photos/", "my/photos/"])
def test_labels_are_found_where_the_images_are(tmp_path, folder):
    labels = json.dumps({"labels": [["a/0.png", 1], ["b/1.png", 0]]})
    files = {f"{folder}a/0.png": png(), f"{folder}b/1.png": png(), f"{folder}dataset.json": labels}
    assert read_labels(opened(write_zip(tmp_path / "set.zip", files))).values.tolist() == [1, 0]


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"./{name}",
        lambda name: name.replace("/", "\\"),
        lambda name: unicodedata.normalize("NFD", name),
    ],
)
def test_label_files_of_other_systems_name_the_same_images(tmp_path, change):
    labels = json.dumps({"labels": [[change("é/0.png"), 3], [change("ü/1.png"), 2]]})
    files = {"é/0.png": png(), "ü/1.png": png(), "dataset.json": labels}
    assert sorted(read_labels(opened(write_zip(tmp_path / "set.zip", files))).values.tolist()) == [2, 3]


def test_zips_without_the_flag_for_utf8_and_with_backslashes_are_read(tmp_path):
    path = write_zip(tmp_path / "set.zip", {"é/0.png": png(), "中\\1.png": png()})
    data = bytearray(path.read_bytes())
    for signature, at in ((b"PK\1\2", 9), (b"PK\3\4", 7)):
        start = data.find(signature)
        while start >= 0:
            data[start + at] &= ~0x08
            start = data.find(signature, start + 4)
    path.write_bytes(data)
    assert opened(path).names == ["é/0.png", "中/1.png"]


def test_a_json_file_of_another_program_leaves_the_class_folders(tmp_path, capsys):
    files = {"cat/0.png": png(), "dog/1.png": png(), "dataset.json": json.dumps({"title": "pets"})}
    assert find_labels(opened(write_zip(tmp_path / "set.zip", files)), "auto").class_names == ("cat", "dog")
    assert ImageDataset(tmp_path / "set.zip").labels is None
    said = 'set.zip/dataset.json: has no "labels", as if it were made for another program; it is not used'
    assert capsys.readouterr().err.count(said) == 2
    with pytest.raises(ValueError, match=r'no dataset\.json with "labels"'):
        find_labels(opened(tmp_path / "set.zip"), "json")


def test_splits_are_not_taken_for_classes_unless_asked(tmp_path):
    archive = opened(write_zip(tmp_path / "set.zip", {"train/a/0.png": png(), "val/a/1.png": png()}))
    with pytest.raises(ValueError, match="look like splits"):
        find_labels(archive, "auto")
    assert find_labels(archive, "folders").class_names == ("train", "val")


@pytest.mark.parametrize(
    "folders",
    [("training_set", "test_set"), ("imagenet-train", "imagenet-val"), ("train2017", "val2017"), ("trainA", "trainB")],
)
def test_folders_named_after_splits_are_splits(tmp_path, folders):
    archive = opened(write_zip(tmp_path / "set.zip", {f"{name}/0.png": png() for name in folders}))
    with pytest.raises(ValueError, match="look like splits"):
        find_labels(archive, "auto")


@pytest.mark.parametrize("folders", [("train", "bus"), ("trainer", "tester"), ("contest", "value"), ("brain", "eval")])
def test_other_folders_are_classes(tmp_path, folders):
    archive = opened(write_zip(tmp_path / "set.zip", {f"{name}/0.png": png() for name in folders}))
    assert set(find_labels(archive, "auto").class_names) == set(folders)


@pytest.mark.parametrize("name", ["set", "set.zip"])
def test_one_flipped_bit_of_an_image_is_found_when_it_is_first_read(tmp_path, name):
    rng = np.random.default_rng(0)
    with PartialDataset(tmp_path / name, {}) as output:
        for k in range(3):
            output.add(f"{k}.png", encode_png(Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))))
        output.finish({"labels": None})
    sound = ImageDataset(tmp_path / name)
    assert not sound.needs_decoding
    expected = sound.read(np.arange(3))
    damaged = tmp_path / name / "1.png" if name == "set" else tmp_path / name
    data = bytearray(damaged.read_bytes())
    data[data.find(b"1.png") + 100] ^= 16  # within the pixels of image 1
    damaged.write_bytes(data)
    dataset = ImageDataset(tmp_path / name)
    assert np.array_equal(dataset.read(np.array([0, 2])), expected[[0, 2]])
    with pytest.raises(ValueError, match=r"1\.png: .*(checksum is wrong|damaged or cut short)"):
        dataset.read(np.arange(3))
    # what was verified once is not verified again
    assert np.array_equal(sound.read(np.array([0, 2])), expected[[0, 2]])
    assert not np.array_equal(sound.read(np.arange(3)), expected)


def test_latents_that_are_not_raw_are_reported(tmp_path, capsys):
    rng = np.random.default_rng(0)
    mean, std = rng.standard_normal((2, 4, 8, 8)), np.full((2, 4, 8, 8), 0.1)
    cases = {"raw": (mean, std), "sampled": (mean, mean), "large": (mean * 1e6, std), "half": (mean, std * 0)}
    for name, parts in cases.items():
        np.save(tmp_path / f"{name}.npy", np.concatenate(parts, axis=1).astype(np.float32))
    assert check(str(tmp_path / "raw.npy"), 1)
    assert check(str(tmp_path / "half.npy"), 1)
    assert not check(str(tmp_path / "sampled.npy"), 1)
    assert "the last 4 of 8 channels are standard deviations, but some are negative" in capsys.readouterr().out
    assert not check(str(tmp_path / "large.npy"), 1)
    assert "stay below 1000, but these reach" in capsys.readouterr().out
    assert "some are negative" in reading_notices(open_source(tmp_path / "sampled.npy"))[0]
    assert reading_notices(open_source(tmp_path / "raw.npy")) == []


def test_names_that_lead_elsewhere_are_not_left_out_as_hidden(tmp_path):
    hidden = [".x.png", "a/.x.png", ".git/x.png", "__MACOSX/x.png", "b/../.x/y.png"]
    shown = ["../x.png", "a/../x.png", "a/./x.png", "a/x.png", "_MACOSX/x.png"]
    archive = opened(write_zip(tmp_path / "set.zip", {name: png() for name in hidden + shown}))
    assert archive.names == sorted(shown)


def test_an_encrypted_zip_is_told_from_a_damaged_one(tmp_path):
    data = bytearray(write_zip(tmp_path / "set.zip", {"0.png": png()}).read_bytes())
    data[data.find(b"PK\1\2") + 8] |= 1
    (tmp_path / "set.zip").write_bytes(data)
    with pytest.raises(ValueError, match=r"set\.zip: the zip is encrypted; unpack it"):
        opened(tmp_path / "set.zip")


def test_names_of_classes_cannot_pose_as_other_lines(tmp_path, capsys):
    content = {"labels": [["0.png", 0], ["1.png", 1]], "label_names": ["cat\n0 problems\x1b[2K", "a\tb"]}
    source = write_zip(tmp_path / "set.zip", {"0.png": png(), "1.png": png(200), "dataset.json": json.dumps(content)})
    assert check(str(source), 1)
    lines = capsys.readouterr().out.splitlines()
    assert r"  0 cat\n0 problems\x1b[2K: 1" in lines
    assert r"  1 a\tb: 1" in lines


def test_names_of_classes_under_another_key_are_reported(tmp_path, capsys):
    content = {"labels": [["0.png", 0]], "classes": ["cat"]}
    archive = opened(write_zip(tmp_path / "set.zip", {"0.png": png(), "dataset.json": json.dumps(content)}))
    assert read_labels(archive).class_names is None
    assert '"classes" is not read; names of classes are called "label_names"' in capsys.readouterr().err


def test_labels_of_files_with_another_suffix_are_named(tmp_path):
    content = {"labels": [["0.png", 0]]}
    archive = opened(write_zip(tmp_path / "set.zip", {"0.jpg": png(), "dataset.json": json.dumps(content)}))
    with pytest.raises(ValueError, match=r"has no label for 0\.jpg \(it labels 0\.png, which is not in "):
        read_labels(archive)


def test_animations_are_reported_and_damaged_notes_are_not(tmp_path, recwarn):
    frames = [Image.new("P", (8, 8), k) for k in (100, 200)]
    frames[0].putpalette([k for k in range(256) for _ in range(3)])
    moving, noted = io.BytesIO(), io.BytesIO()
    frames[0].save(moving, "gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (8, 8), "white").save(noted, "jpeg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    clear = Image.new("P", (8, 8), 200)
    clear.putpalette([k for k in range(256) for _ in range(3)])
    palette = io.BytesIO()
    clear.save(palette, "png", transparency=bytes(range(256)))
    second = moving.getvalue().rfind(b"\x2c")  # where the second frame is described
    damaged = moving.getvalue()[: second + 1] + b"\xff" * 12
    for end in (damaged, moving.getvalue()[: second + 3], moving.getvalue()[:second] + b"\x21\xff"):
        look_at(opened(write_zip(tmp_path / "damaged.zip", {"0.gif": end})), np.arange(1), 8)
    files = {"0.gif": moving.getvalue(), "1.jpg": noted.getvalue(), "2.png": palette.getvalue()}
    lines = look_at(opened(write_zip(tmp_path / "set.zip", files)), np.arange(3), 8).warnings
    assert lines == ["1 of 3 sampled images are animations or have several pages; the first is used"]
    assert [str(warning.message) for warning in recwarn if "unclosed" not in str(warning.message)] == []


def test_a_member_that_unpacks_to_far_more_than_an_image_is_refused_unread(tmp_path):
    files = {"0.png": png(), "1.png": bytes(1 << 25), "dataset.json": bytes(1 << 25)}
    archive = opened(write_zip(tmp_path / "set.zip", files, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="claims 33554432 bytes"):
        archive.read(1)
    with pytest.raises(ValueError, match="claims 33554432 bytes"):
        ImageDataset(tmp_path / "set.zip")


def test_an_image_of_gigabytes_is_refused_by_its_header():
    data = bytearray(png())
    data[16:24] = struct.pack(">2L", 13000, 13000)
    data[29:33] = struct.pack(">L", zlib.crc32(bytes(data[12:29])))
    with pytest.raises(ValueError, match="claims 13000x13000 pixels"):
        open_header(bytes(data), "x.png")


def test_pictures_of_the_wrong_range_are_reported(tmp_path):
    dark = opened(write_zip(tmp_path / "dark.zip", {"0.png": png(1), "1.png": png(2)}))
    assert "almost black: no value is above 2 of 255" in look_at(dark, np.arange(2), 8).warnings[0]
    deep = opened(write_zip(tmp_path / "deep.zip", {"0.png": png(4000, mode="I;16")}))
    with pytest.raises(ValueError, match="16-bit values only go up to 4000"):
        look_at(deep, np.arange(1), 8)
    fine = opened(write_zip(tmp_path / "fine.zip", {"0.png": png(200)}))
    assert look_at(fine, np.arange(1), 8).warnings == []


def test_the_reason_is_given_if_no_image_can_be_read(tmp_path):
    archive = opened(write_zip(tmp_path / "set.zip", {"0.png": b"no image"}))
    with pytest.raises(ValueError, match=r"none of the 1 images can be read; the first: .*0.png: is not an image"):
        plan(archive, np.arange(1), "none", None)


def test_the_identity_of_a_data_set_covers_its_pixels(tmp_path):
    first = write_zip(tmp_path / "a.zip", {"0.png": png(1), "1.png": png(2)})
    other = write_zip(tmp_path / "b.zip", {"0.png": png(1), "1.png": png(3)})
    packed = write_zip(tmp_path / "c.zip", {"0.png": png(1), "1.png": png(2)}, compression=zipfile.ZIP_DEFLATED)
    assert ImageDataset(first).identity() != ImageDataset(other).identity()
    assert ImageDataset(first).identity() == ImageDataset(packed).identity()


@pytest.mark.parametrize("size", [100, 1 << 17])
def test_the_checksum_of_a_file_shows_other_content_of_the_same_size(tmp_path, size):
    before = np.random.default_rng(0).bytes(size)
    (tmp_path / "x.png").write_bytes(before)
    checksum = opened(tmp_path).checksum(0)
    (tmp_path / "x.png").write_bytes(before[:-1] + b"?")
    assert opened(tmp_path).checksum(0) != checksum
    assert checksum[0] == size


def test_folders_of_systems_and_network_disks_hold_no_photos(tmp_path):
    hidden = ["@eaDir/x.jpg/SYNOPHOTO_THUMB_XL.jpg", "cat/@eaDir/x.png", "$RECYCLE.BIN/x.png", "lost+found/x.png"]
    files = {name: png() for name in ["cat/0.png", "dog/1.png", "cat/__MACOSX/x.png", ".Trash-0/x.png", *hidden]}
    shown = ["cat/0.png", "dog/1.png"]
    assert opened(write_zip(tmp_path / "set.zip", files)).names == shown
    for name, data in files.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    assert opened(tmp_path / "set").names == shown


def test_hidden_folders_that_cannot_be_read_are_left_out(tmp_path, monkeypatch):
    for folder in ("cat", "lost+found", ".Trash-0"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.png").write_bytes(png())
    scandir = os.scandir

    def refuse(path):
        if Path(path).name in ("lost+found", ".Trash-0"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert opened(tmp_path).names == ["cat/0.png"]


def unicode_path(entry, text):
    """The extra field of an entry that says its name in UTF-8 (APPNOTE 4.6.9)."""
    content = b"\1" + struct.pack("<L", zlib.crc32(entry)) + text.encode()
    return struct.pack("<2H", 0x7075, len(content)) + content


@pytest.mark.parametrize(
    ("written", "extra", "read"),
    [
        (b"\x82/0.png", unicode_path(b"\x82/0.png", "caf\u00e9/0.png"), "caf\u00e9/0.png"),  # code page 437 or 850
        (b"#U732b/0.png", unicode_path(b"#U732b/0.png", "\u732b/0.png"), "\u732b/0.png"),
        (b"\x82/0.png", unicode_path(b"other", "\u732b/0.png"), "\u00e9/0.png"),  # of a name that was changed later
        (b"\x82/0.png", b"up\xff\xff", "\u00e9/0.png"),
        (b"\x82/0.png", unicode_path(b"\x82/0.png", "")[:-4] + b"\0", "\u00e9/0.png"),
    ],
)
def test_names_in_an_extra_field_come_before_those_of_a_code_page(tmp_path, written, extra, read):
    info = zipfile.ZipInfo("x" * len(written))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr(info, png())
        info.extra = extra  # of the index alone, as the first one is written already
    data = (tmp_path / "set.zip").read_bytes().replace(b"x" * len(written), written)
    (tmp_path / "set.zip").write_bytes(data)
    archive = opened(tmp_path / "set.zip")
    assert archive.names == [read]
    assert archive.read(0) == png()


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (b"\0\0\0\x1cftypheic", "is a HEIC photo"),
        (b"\0\0\0\x20ftypavif", "is an AVIF image, which is not read; convert it to PNG"),
        (b"\0\0\0\x20ftypisom", "is a video"),
        (b"\xff\x0a", "is a JPEG XL image"),
        (b"<!DOCTYPE HTML><html>", "is a web page, not an image"),
        (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS"),
        (b"II*\0", "is a TIFF that is cut short, or of a kind that is not read, such as 16 bits"),
        (b"%PDF-1.7", "is a PDF document"),
        (b"\x89PNG\r\n\x1a\n", "is not an image, or is cut short within its header"),
        (b"nothing", "is not an image, or is cut short within its header"),
        (b"", "is not an image, or is cut short within its header"),
    ],
)
def test_what_is_called_jpg_and_is_something_else_is_named(start, reason, monkeypatch):
    monkeypatch.setattr("edm2kit.data.image_files.heif_is_readable", lambda: False)
    with pytest.raises(ValueError, match=f"^x.jpg: {reason}"):
        open_header(start + (bytes(64) if start else b""), "x.jpg")


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("one.jpg", png(), "is a single image, not a folder or zip of images; give its folder"),
        ("set.rar", b"Rar!\x1a\x07\1\0", "is an archive of a kind that is not read; unpack it"),
        ("set.tar", bytes(257) + b"ustar\0" + bytes(300), "is an archive of a kind that is not read; unpack it"),
        ("list.json", b'{"images": []}', "is a JSON file"),
        ("set.zip", b"PK\3\4" + bytes(99), "not a zip archive, or cut short"),
        ("empty.zip", b"", "not a zip archive, or cut short"),
    ],
)
def test_a_source_that_is_no_zip_is_named(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        opened(tmp_path / name)


def test_a_16_bit_tiff_of_three_colours_is_told_from_a_damaged_file(tmp_path):
    tags = [(256, 4, 1), (257, 4, 1), (258, 3, 3), (259, 3, 1), (262, 3, 2), (273, 4, 1), (277, 3, 1), (279, 4, 1)]
    values = {256: 2, 257: 2, 258: 200, 259: 1, 262: 2, 273: 206, 277: 3, 279: 24}
    entries = b"".join(struct.pack("<2H2L", tag, kind, count, values[tag]) for tag, kind, count in tags)
    data = b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + bytes(4)
    data = data.ljust(200, b"\0") + struct.pack("<3H", 16, 16, 16) + bytes(24)
    with pytest.raises(ValueError, match=r"x\.tif: is a TIFF .* 16 bits for each of three colors; save it as PNG"):
        open_header(data, "x.tif")


def test_pixels_that_cannot_become_rgb_are_named():
    with pytest.raises(ValueError, match=r"x\.tif: its pixels are La, which cannot become RGB; save it as RGB"):
        to_8bit(Image.new("La", (8, 8)), 3, "x.tif")


def test_accents_of_macos_make_no_other_class_and_no_other_order(tmp_path):
    composed, apart = (unicodedata.normalize(form, "\u00e9t\u00e9") for form in ("NFC", "NFD"))
    files = {f"{folder}/{k}.png": png() for k, folder in enumerate((composed, apart, "zebra"))}
    labels = find_labels(opened(write_zip(tmp_path / "set.zip", files)), "auto")
    assert labels.class_names == ("zebra", composed)
    assert sorted(labels.values.tolist()) == [0, 1, 1]


def test_splits_beside_other_folders_are_reported(tmp_path):
    for folders, count in ((("train", "val", "cat"), 1), (("train", "bus"), 0)):
        archive = opened(write_zip(tmp_path / "set.zip", {f"{name}/0.png": png() for name in folders}))
        lines = _description(archive, len(folders), find_labels(archive, "auto"), 3)
        assert sum("have the names of splits" in line for line in lines) == count


def test_all_splits_together_are_reported_where_images_are_trained_on_and_scored(tmp_path, capsys):
    for name in ("train/cat/0.png", "val/cat/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(png(200))
    assert "the folders train, val, which look like splits" in reading_notices(open_source(tmp_path))[0]
    open_images(tmp_path)
    assert "the folders train, val look like splits of one data set" in capsys.readouterr().err
    assert not any("look like splits" in notice for notice in reading_notices(open_source(tmp_path / "train")))
