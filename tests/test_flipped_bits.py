"""A flipped bit in what surrounds pixels and weights is noticed: a file is read as it was, or refused."""

import contextlib
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from benchmarks.fuzz import PARSERS
from edm2kit.cli.image_source import NpzImages, image_labels
from edm2kit.cli.npz import write_npz
from edm2kit.data.archive import open_archive
from edm2kit.data.array_dataset import ArrayDataset
from edm2kit.data.dataset import ImageDataset
from edm2kit.data.image_files import decode_array
from edm2kit.data.labels import LABELS_FILE, folder_labels, read_label_vectors, read_labels
from edm2kit.data.output import PartialDataset
from edm2kit.torch_utils.arrays import read_npz, read_npz_array
from edm2kit.torch_utils.safetensors_files import damaged_part, safetensors_bytes
from tests.support.pictures import npy, some_files, with_labels, write_zip

Read = Callable[[Path], object]


def changed_unnoticed(path: Path, read: Read, places: Iterable[int]) -> list[int]:
    """The bytes of a file in which a flipped bit changes what `read` returns; another error than ValueError is raised.

    The file is as before afterwards.
    """
    whole, found = path.read_bytes(), []
    expected = pickle.dumps(read(path))
    for place in places:
        for bit in range(8):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            with contextlib.suppress(ValueError):
                if pickle.dumps(read(path)) != expected:
                    found.append(place)
    path.write_bytes(whole)
    assert pickle.dumps(read(path)) == expected
    return found


def index_of(path: Path) -> range:
    """Where the index of a zip is."""
    data = path.read_bytes()
    return range(data.index(b"PK\1\2"), len(data))


def test_the_index_of_an_npz(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.arange(6).reshape(2, 3), b=np.arange(2))
    assert not changed_unnoticed(tmp_path / "a.npz", read_npz, index_of(tmp_path / "a.npz")[16:])


def test_the_header_of_an_array_in_an_npz(tmp_path):
    # beyond what zipfile reads at once: numpy would not read to the end, where the checksum is compared
    np.savez(tmp_path / "a.npz", seeds=np.arange(1200))
    start = (tmp_path / "a.npz").read_bytes().index(b"\x93NUMPY")
    for read in (read_npz, lambda path: read_npz_array(path, "seeds")):
        assert not changed_unnoticed(tmp_path / "a.npz", read, range(start + 50, start + 80))  # the shape is there


def test_labels_of_generated_images_do_not_disappear(tmp_path):
    path, pixels = tmp_path / "a.npz", np.zeros((3, 4, 4), np.uint8)
    write_npz(path, [3, 4], [(pixels, 0), (pixels, 1)], ["cat", "dog"])
    data = path.read_bytes()
    entries = [match.start() for match in re.finditer(b"PK\1\2", data)]
    lengths = [start + k for start in entries for k in (28, 30, 32)]  # of the name, the extra fields, the comment
    names = [place for start in entries for place in range(start + 46, data.index(b".npy", start))]
    assert not changed_unnoticed(path, lambda path: image_labels(NpzImages(path)), lengths + names)


@pytest.mark.parametrize("labels", ["dataset.json", "folders"])
def test_names_in_a_zip(tmp_path, labels):
    pictures = list(some_files(2).values())
    files = {"a/0.png": pictures[0], "b/1.png": pictures[1]}
    path = write_zip(tmp_path / "a.zip", with_labels(files, [1, 0]) if labels == "dataset.json" else files)

    def read(path: Path) -> object:
        archive = open_archive(path, (".png",))
        found = read_labels(archive) or folder_labels(archive.names)
        source = ImageDataset(path)
        return found, archive.names, [archive.read(k) for k in range(len(archive.names))], source.read(np.arange(2))

    data = path.read_bytes()
    places = [place for name in (*files, LABELS_FILE) for place in range(data.rfind(name.encode()), len(data))[:12]]
    assert not changed_unnoticed(path, read, places)


def test_names_in_an_unfinished_zip(tmp_path):
    files = {f"{k}.png": data for k, data in enumerate(some_files(4).values())}

    def write(count: int) -> None:
        with PartialDataset(tmp_path / "a.zip", {}) as output:
            for name in list(files)[:count]:
                if name not in output.names:
                    output.add(name, files[name])
            if count == len(files):
                output.finish({})

    write(3)
    unfinished = tmp_path / "a.zip.partial"
    kept = {path.name: path.read_bytes() for path in unfinished.iterdir()}
    for name in list(files)[:3]:
        for bit in range(8):
            data = bytearray(kept["data"])
            data[data.index(name.encode())] ^= 1 << bit
            unfinished.mkdir(exist_ok=True)
            for file, content in {**kept, "data": data}.items():
                (unfinished / file).write_bytes(content)
            write(4)
            archive = open_archive(tmp_path / "a.zip", (".png",))
            assert {name: archive.read(k) for k, name in enumerate(archive.names)} == files
            (tmp_path / "a.zip").unlink()


def test_an_unfinished_zip_of_an_earlier_version_is_kept(tmp_path):
    files = some_files(3)
    with PartialDataset(tmp_path / "a.zip", {}) as output:
        for name, data in files.items():
            output.add(name, data)
    (tmp_path / "a.zip.partial" / "checksums").unlink()
    for _ in range(2):
        with PartialDataset(tmp_path / "a.zip", {}) as output:
            assert output.names == set(files)


def test_headers_of_npy_files(tmp_path):
    images, vectors = tmp_path / "a.npy", tmp_path / "vectors.npy"
    images.write_bytes(npy(np.zeros((2, 3, 4, 4), np.uint8)))
    vectors.write_bytes(npy(np.ones((2, 3), np.float32)))
    header = [*range(20), *range(50, 90), 127]
    assert not changed_unnoticed(images, lambda path: ArrayDataset(path).read(np.arange(2)), header)
    # the type, which says how its bytes are ordered, has no checksum
    assert not changed_unnoticed(vectors, read_label_vectors, [place for place in header if place != 21])


def test_an_npy_file_with_bytes_behind_its_array_is_refused(tmp_path):
    data = npy(np.zeros((8, 4, 4), np.float32))
    decode_array(data, "a.npy")
    with pytest.raises(ValueError, match=r"a\.npy: .* it has 641 bytes, but its header says 640"):
        decode_array(data + b"\0", "a.npy")
    (tmp_path / "images.npy").write_bytes(npy(np.zeros((2, 3, 4, 4), np.uint8)) + b"\0")
    with pytest.raises(ValueError, match="it has 225 bytes, but its header says 224"):
        ArrayDataset(tmp_path)


def test_a_compressed_archive_of_cifar(tmp_path):
    parser = PARSERS["CIFAR archive"]
    path = tmp_path / "a.tar.gz"
    path.write_bytes(parser.seeds(tmp_path)[2])
    places = range(60, path.stat().st_size, 6)
    assert not changed_unnoticed(path, lambda path: parser.parse(path.read_bytes(), tmp_path), places)


def test_notes_in_a_file_of_weights(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes({"a": torch.ones(2)}, {"sigma_data": "0.5"}))

    def read(path: Path) -> object:
        try:
            with safe_open(path, "pt") as file:
                notes, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError("not a file of weights") from error
        if part := damaged_part(tensors, notes):
            raise ValueError(part)
        return notes.get("sigma_data"), {name: tensor.numpy() for name, tensor in tensors.items()}

    assert not changed_unnoticed(path, read, range(8, path.stat().st_size))
