"""Arrays of .npz files come back as they were, and hostile files are refused in one line."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edm2kit.torch_utils import arrays
from edm2kit.torch_utils.arrays import map_npz_array, read_npz
from tests.support.hostile_arrays import HOSTILE, described


def write(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("mu.npy", data)
    return path


def test_arrays_come_back(tmp_path):
    expected = {"a": np.arange(6.0).reshape(2, 3), "text": np.array("x"), "nothing": np.zeros((0, 4), np.float32)}
    np.savez(tmp_path / "a.npz", **expected)
    np.savez_compressed(tmp_path / "b.npz", **expected)
    for file in ("a.npz", "b.npz"):
        found = read_npz(tmp_path / file)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, strict=True)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_one_line(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    data, said = HOSTILE[case]
    with pytest.raises(ValueError, match=said) as error:
        read_npz(write(tmp_path / "a.npz", data))
    assert "\n" not in str(error.value)
    assert str(error.value)
    assert not (tmp_path / "flag").exists()


def test_a_bomb_is_refused_before_it_goes_off(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_MAX_BYTES", 10_000)
    bomb = write(tmp_path / "a.npz", described("'<f8'", "(5000,)", bytes(40_000)), zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1000
    with pytest.raises(ValueError, match=r"its arrays have 400\d\d bytes; the limit is 10000"):
        read_npz(bomb)


def test_truncated_anywhere_is_refused(tmp_path):
    file = io.BytesIO()
    np.savez(file, a=np.arange(100.0))
    for end in range(0, len(file.getvalue()), 37):
        (tmp_path / "a.npz").write_bytes(file.getvalue()[:end])
        with pytest.raises(ValueError):
            read_npz(tmp_path / "a.npz")


def test_a_missing_file_is_a_plain_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        read_npz(tmp_path / "none.npz")


def test_a_mapped_array_is_the_same_and_stays_on_disk(tmp_path):
    expected = {"a": np.arange(6.0).reshape(2, 3), "images": np.arange(24, dtype=np.uint8).reshape(2, 3, 4)}
    np.savez(tmp_path / "a.npz", **expected)
    for name, array in expected.items():
        mapped = map_npz_array(tmp_path / "a.npz", name)
        assert isinstance(mapped, np.memmap)
        np.testing.assert_array_equal(mapped, array)
        assert mapped.dtype == array.dtype


def test_what_cannot_be_mapped_is_refused_in_one_line(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(3))
    np.savez(tmp_path / "b.npz", a=np.zeros((3, 4)).T)
    for file, name, reason in (("a", "a", "is compressed"), ("b", "a", "in column order"), ("b", "x", "no item named")):
        with pytest.raises(ValueError, match=reason) as error:
            map_npz_array(tmp_path / f"{file}.npz", name)
        assert "\n" not in str(error.value)
