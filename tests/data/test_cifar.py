"""CIFAR's archive is read as published, in the layout of Python 2's pickles, and nothing in it is executed."""

import gzip
import io
import struct
import tarfile

import numpy as np
import pytest

from edm2kit.data import cifar
from edm2kit.data.archive import open_archive
from edm2kit.data.cifar import CifarArchive, is_cifar_archive
from edm2kit.data.convert import convert
from edm2kit.data.dataset import open_source
from edm2kit.data.image_files import decode_array
from edm2kit.torch_utils.pickles.reader import UnsafePickleError, load_arrays, load_pickle

NAMES = ["airplane", "automobile", "bird"]


def text(value):
    return b"U" + struct.pack("<B", len(value)) + value.encode()


def number(value):
    return b"K" + struct.pack("<B", value)


def sequence(items):
    return b"](" + b"".join(items) + b"e"


def array(pixels):
    """A numpy array as Python 2 pickled it with protocol 2."""
    rows, width = pixels.shape
    data = pixels.tobytes()
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n"
        + (b"cnumpy\nndarray\n" + number(0) + b"\x85" + text("b") + b"\x87R")
        + (b"(" + number(1) + number(rows) + b"M" + struct.pack("<H", width) + b"\x86")
        + (b"cnumpy\ndtype\n" + text("u1") + number(0) + number(1) + b"\x87R")
        + (b"(" + number(3) + text("|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + number(0) + b"tb")
        + (b"\x89" + b"T" + struct.pack("<i", len(data)) + data + b"tb")
    )


def python2_pickle(entries):
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u."


def batch(pixels, classes, key="labels"):
    names = [text(f"{k}.png") for k in range(len(classes))]
    labels = sequence(number(k) for k in classes)
    return python2_pickle({"batch_label": text("b"), key: labels, "data": array(pixels), "filenames": sequence(names)})


def meta(names=NAMES):
    labels = sequence(text(name) for name in names)
    return python2_pickle({"num_cases_per_batch": b"M\x10'", "label_names": labels, "num_vis": b"M\x00\x0c"})


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def pixels():
    return np.random.RandomState(0).randint(0, 256, [6, 3072], np.uint8)


@pytest.fixture
def files(pixels):
    folder = "cifar-10-batches-py/"
    return {
        folder + "data_batch_2": batch(pixels[2:5], [1, 0, 2]),
        folder + "data_batch_1": batch(pixels[:2], [2, 1]),
        folder + "test_batch": batch(pixels[5:], [0]),
        folder + "batches.meta": meta(),
        folder + "readme.html": b"<html>",
    }


def test_images_classes_and_names_are_those_of_the_archive(files, pixels, tmp_path):
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", files)
    archive = CifarArchive(path)
    assert archive.names[0] == "data_batch_1/00000.png"
    assert archive.names[2] == "data_batch_2/00000.png"
    read = [decode_array(archive.read(k), archive.where(k)) for k in range(5)]
    np.testing.assert_array_equal(read, pixels[:5].reshape(5, 3, 32, 32))
    labels = archive.read_labels()
    assert labels.values.tolist() == [2, 1, 1, 0, 2]
    assert labels.class_names == tuple(NAMES)


def test_the_dataset_tool_converts_it(files, pixels, tmp_path):
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", files)
    options = {"resolution": None, "transform": "none", "max_images": None, "workers": 1, "skip_broken": False}
    convert(str(path), tmp_path / "out.zip", label_source="auto", **options)
    convert(f"{path}?split=test", tmp_path / "test.zip", label_source="none", **options)
    source, test = open_source(tmp_path / "out.zip"), open_source(tmp_path / "test.zip")
    np.testing.assert_array_equal(source.read(np.arange(5)), pixels[:5].reshape(5, 3, 32, 32))
    assert source.labels.tolist() == [2, 1, 1, 0, 2]
    assert source.condition_space.class_names == tuple(NAMES)
    np.testing.assert_array_equal(test.read(np.arange(1)), pixels[5:].reshape(1, 3, 32, 32))
    assert test.condition_space.kind == "none"


def test_the_fine_classes_of_cifar_100_are_its_classes(pixels, tmp_path):
    fine = python2_pickle({"fine_label_names": sequence([text("apple"), text("bee")]), "coarse_label_names": b"]"})
    path = write_tar(
        tmp_path / "cifar-100-python.tar.gz", {"train": batch(pixels, [0, 1] * 3, "fine_labels"), "meta": fine}
    )
    assert CifarArchive(path).read_labels().class_names == ("apple", "bee")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("data_batch_1", b"\x80\x02cos\nsystem\n(U\x02lst\x85R.", "os.system"),
        ("data_batch_1", b"\x80\x02}U\x01aI1\nsu.", "INT"),
        ("data_batch_1", b"\x80\x02T\xff\xff\xff\xff.", "a string of -1 bytes"),
        ("data_batch_1", b"\x80\x02T\xff\xff\xff\x7f.", "truncated"),
        ("data_batch_1", b"\x80\x02].", "no entry 'data'"),
        ("data_batch_1", batch(np.zeros([2, 3072], np.uint8), [0]), "a class for each of its 2 images"),
        ("data_batch_1", batch(np.zeros([2, 3071], np.uint8), [0, 1]), "not rows of 3072 bytes"),
        ("data_batch_1", batch(np.zeros([1, 3072], np.uint8), [3]), "image of class 3, but 3 class names"),
        ("other", b"", "contains no CIFAR pickles for split=train"),
    ],
)
def test_what_is_not_a_cifar_pickle_is_refused_by_name(name, data, message, tmp_path):
    path = write_tar(tmp_path / "cifar.tar.gz", {f"x/{name}": data, "x/batches.meta": meta()})
    with pytest.raises(ValueError, match=message) as error:
        CifarArchive(path)
    assert "cifar.tar.gz" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_cut_short_or_not_a_tar_is_refused(files, tmp_path):
    path = write_tar(tmp_path / "cifar.tar.gz", files)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(ValueError, match="cannot be read as a tar archive"):
        CifarArchive(path)
    path.write_bytes(b"no tar")
    with pytest.raises(ValueError, match="download it again"):
        CifarArchive(path)
    with pytest.raises(ValueError, match="available: split=train, split=test"):
        CifarArchive(f"{path}?split=validation")


def test_only_tar_archives_are_taken_for_cifar(tmp_path):
    assert is_cifar_archive("a/cifar-10-python.tar.gz?split=test")
    assert not is_cifar_archive("cifar.zip")
    with pytest.raises(ValueError, match="no such file"):
        open_archive(tmp_path / "cifar.zip", (".png",))


def test_strings_of_python_2_stay_refused_in_snapshots():
    data = b"\x80\x02U\x01a."
    assert load_arrays(data, "x") == "a"
    with pytest.raises(UnsafePickleError, match="SHORT_BINSTRING"):
        load_pickle(io.BytesIO(data))


class Zeros:
    """So many bytes, which compress to almost nothing."""

    def __init__(self, count):
        self.left = count

    def read(self, size):
        size = min(size, self.left)
        self.left -= size
        return bytes(size)


@pytest.mark.parametrize(
    ("mode", "members"),
    [
        ("gz", [("x/data_batch_1", 1 << 20), ("x/data_batch_2", 1 << 20)]),
        ("bz2", [("x/video.mp4", 3 << 20)]),
        ("xz", [("x/video.mp4", 3 << 20)]),
        ("", [("x/video.mp4", 3 << 20)]),
    ],
)
def test_an_archive_that_unpacks_to_more_than_cifars_is_read_no_further(tmp_path, monkeypatch, mode, members):
    monkeypatch.setattr(cifar, "_MAX_BYTES", 3 << 19)  # 268 MB in earnest
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, f"w:{mode}") as archive:
        for name, size in members:
            entry = tarfile.TarInfo(name)
            entry.size = size
            archive.addfile(entry, Zeros(size))
    with pytest.raises(ValueError, match=r"unpacks to more than 1572864 bytes|appears twice or claims 1048576 bytes"):
        CifarArchive(path)


def test_a_name_of_gigabytes_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "_MAX_BYTES", 1 << 20)
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    with gzip.open(tmp_path / "a.tgz", "wb") as file:
        file.write(entry.tobuf(tarfile.GNU_FORMAT) + b"a" * (2 << 20))
    with pytest.raises(ValueError, match="unpacks to more than 1048576 bytes"):
        CifarArchive(tmp_path / "a.tgz")


def test_a_class_beyond_64_bits_is_refused(tmp_path):
    huge = b"\x8a\x0a" + (1 << 70).to_bytes(10, "little")  # LONG1
    data = python2_pickle({"labels": b"](" + huge + b"e", "data": array(np.zeros([1, 3072], np.uint8))})
    path = write_tar(tmp_path / "cifar.tar.gz", {"x/data_batch_1": data})
    with pytest.raises(ValueError, match="does not have a class for each of its 1 images"):
        CifarArchive(path)
