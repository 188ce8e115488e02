"""Batches of files that need no decoding: the same values as one file at a time, also with other files among them."""

import struct
import zipfile
import zlib
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.plain_io import PlainDataset
from edm2kit.data.dataset import ImageDataset, reading_notices
from edm2kit.data.image_files import encode_png, find_layout
from tests.support.dataset_tool import convert, run
from tests.support.pictures import encoded, npy, picture, some_files, with_labels, write_folder, write_zip

COUNT = 7
INDICES = np.array([3, 0, 6, 6, 1, 5])


def latents(dtype) -> list[bytes]:
    return [npy(np.random.default_rng(k).standard_normal((8, 4, 4)).astype(dtype)) for k in range(COUNT)]


# a 256x256 picture takes four blocks of a PNG, since one holds at most 64 KiB
FILES = {
    "RGB": ("png", [encode_png(picture(k)) for k in range(COUNT)]),
    "grey": ("png", [encode_png(picture(k, mode="L")) for k in range(COUNT)]),
    "long": ("png", [encode_png(picture(k, (256, 256))) for k in range(COUNT)]),
    "latents": ("npy", latents(np.float32)),
    "half latents": ("npy", latents(np.float16)),
    "pixels as npy": ("npy", [npy(np.asarray(picture(k)).transpose(2, 0, 1).copy()) for k in range(COUNT)]),
}


def named(suffix: str, files: list[bytes]) -> dict[str, bytes]:
    return {f"{k % 2}/{'x' * k}{k}.{suffix}": data for k, data in enumerate(files)}  # names of different lengths


def one_by_one(dataset: ImageDataset, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.stack(column) for column in zip(*[dataset[int(k)] for k in indices], strict=True))


def assert_same(dataset: ImageDataset, indices: np.ndarray = INDICES) -> None:
    together = dataset.read(indices), dataset.read_labels(indices)
    for found, wanted in zip(together, one_by_one(dataset, indices), strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


@pytest.fixture
def decoded(monkeypatch):
    """The numbers of the files that are read one by one."""
    numbers, read = [], ImageDataset._decode
    monkeypatch.setattr(ImageDataset, "_decode", lambda self, index: numbers.append(index) or read(self, index))
    return numbers


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, None], ids=["zip", "deflated", "folder"])
@pytest.mark.parametrize(("suffix", "files"), FILES.values(), ids=FILES)
def test_a_batch_holds_what_its_files_hold(tmp_path, decoded, suffix, files, method):
    content = with_labels(named(suffix, files), [k % 3 for k in range(COUNT)])
    path = tmp_path / "d.zip"
    write_folder(path, content) if method is None else write_zip(path, content, method)
    dataset = ImageDataset(path)
    decoded.clear()
    raw, labels = dataset.read(INDICES), dataset.read_labels(INDICES)
    assert decoded == ([] if method != zipfile.ZIP_DEFLATED else INDICES.tolist())
    assert dataset.needs_decoding == (method == zipfile.ZIP_DEFLATED)
    assert_same(dataset)
    if method is not None:
        plain = PlainDataset(path).batch(INDICES)
        np.testing.assert_array_equal(raw, plain[0].numpy())
        np.testing.assert_array_equal(labels, plain[1].numpy())


def test_what_other_tools_wrote_is_decoded(tmp_path, decoded):
    for kind in ("png", "jpeg"):
        files = {name: encoded(picture(k, (16, 16)), kind) for k, name in enumerate(some_files(COUNT))}
        dataset = ImageDataset(write_zip(tmp_path / f"{kind}.zip", files))
        assert dataset.needs_decoding
        assert_same(dataset)
    fortran = npy(np.asfortranarray(np.random.default_rng(0).standard_normal((8, 4, 4)).astype(np.float32)))
    assert find_layout(fortran) is None
    assert find_layout(npy(np.zeros((8, 4, 4), np.float32, order="F"))) is None


def test_the_same_images_are_the_same_data_however_they_are_stored(tmp_path):
    ours = {name: encode_png(picture(k)) for k, name in enumerate(some_files())}
    paths = [write_zip(tmp_path / f"{k}.zip", files) for k, files in enumerate((some_files(), ours))]
    slow, fast = map(ImageDataset, paths)
    assert (slow.needs_decoding, fast.needs_decoding) == (True, False)
    assert slow.identity() == fast.identity()
    np.testing.assert_array_equal(slow.read(np.arange(6)), fast.read(np.arange(6)))


def test_training_on_files_that_need_decoding_suggests_converting_them(tmp_path):
    slow = write_folder(tmp_path / "slow", some_files())
    assert "Read by decoding each image; scripts/dataset_tool.py convert makes" in run("check", "--source", slow)
    (notice,) = reading_notices(ImageDataset(slow))
    assert f"convert --source {slow} --dest" in notice
    convert(slow, tmp_path / "fast.zip")
    assert "Read without decoding" in run("check", "--source", tmp_path / "fast.zip")
    assert reading_notices(ImageDataset(tmp_path / "fast.zip")) == []
    assert ImageDataset(slow).identity() == ImageDataset(tmp_path / "fast.zip").identity()


def test_other_files_among_them_are_decoded(tmp_path, decoded):
    files = named("png", [encode_png(picture(k)) for k in range(COUNT)])
    names = sorted(files)
    files[names[3]] = encoded(picture(9))  # compressed
    files[names[5]] = filtered(files[names[5]])  # as long, stored, but of differences
    assert len(files[names[5]]) == len(files[names[0]])
    dataset = ImageDataset(write_zip(tmp_path / "d.zip", files))
    decoded.clear()
    dataset.read(np.arange(COUNT))
    assert decoded == [3, 5]
    assert_same(dataset, np.arange(COUNT))


def filtered(png: bytes) -> bytes:
    """The file of an 8x8 picture with another first row: each pixel is stored as its difference from the one before."""
    rows = bytes([1]) + png[49 : 48 + 8 * 25]
    stream = b"IDAT" + zlib.compress(rows, 0)
    return png[:33] + png[33:37] + stream + struct.pack(">L", zlib.crc32(stream)) + png[-12:]


@pytest.mark.parametrize("at", [0, 20, 45, 48, 48 + 25])
def test_bytes_between_the_pixels_are_compared(at):
    data = encode_png(picture(0))
    layout = find_layout(data)
    files = np.frombuffer(data, np.uint8)[None].repeat(2, axis=0)
    files[1, at] ^= 1
    raw, fitting = layout.values(files[:, :48], files[:, 48:])
    assert fitting.tolist() == [True, False]
    np.testing.assert_array_equal(raw[0], np.asarray(picture(0)).transpose(2, 0, 1))


def test_the_header_of_every_block_is_compared():
    data = encode_png(picture(0, (256, 256)))
    layout = find_layout(data)
    assert len(layout.blocks) == 4
    for first, content in layout.between:
        assert len(content) == 5
        files = np.frombuffer(data, np.uint8)[None].copy()
        files[0, 48 + first + 1] ^= 1
        assert not layout.values(files[:, :48], files[:, 48:])[1].any()


def test_a_damaged_file_is_named(tmp_path):
    files = named("npy", latents(np.float32))
    path = write_zip(tmp_path / "d.zip", files)
    dataset = ImageDataset(path)
    whole = path.read_bytes()
    second = sorted(files)[1]
    offset = whole.index(b"PK\x03\x04", whole.index(second.encode()) - 30)
    for damaged in (whole[:offset] + b"XX" + whole[offset + 2 :], whole[: offset + 200]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"d\.zip/\S*\.npy: (is not where|is damaged)"):
            dataset.read(np.arange(COUNT))


def test_extra_bytes_before_a_file_are_skipped(tmp_path, decoded):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for k in range(4):
            info = zipfile.ZipInfo(f"{k}.png")
            info.extra = b"UT\x04\x00" + bytes(4) if k != 2 else b""
            archive.writestr(info, encode_png(picture(k)))
    dataset = ImageDataset(tmp_path / "d.zip")
    assert_same(dataset, np.arange(4))
    decoded.clear()
    dataset.read(np.arange(4))
    assert decoded == [2]


def test_systems_without_scattered_reading_read_one_by_one(tmp_path, monkeypatch, decoded):
    monkeypatch.delattr("os.preadv")
    dataset = ImageDataset(write_zip(tmp_path / "d.zip", named(*FILES["latents"])))
    assert_same(dataset)
    assert len(decoded) == 2 * len(INDICES)


def test_a_layout_is_of_one_size_of_picture(tmp_path):
    layout = find_layout(encode_png(picture(0)))
    assert (layout.shape, layout.dtype) == ((8, 8, 3), np.uint8)
    assert replace(layout, num_bytes=1) != layout
    assert find_layout(encode_png(picture(0, (16, 16)))).num_bytes > layout.num_bytes


def test_a_row_longer_than_a_block_needs_decoding():
    data = encode_png(picture(0, (1 << 16, 1), "L"))
    assert find_layout(data) is None
