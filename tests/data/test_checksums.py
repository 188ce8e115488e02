"""Files in a folder have checksums in dataset.json: compared at their first use, by check, and before they are kept."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edm2kit.cli import dataset as dataset_tool
from edm2kit.data import archive, encode
from edm2kit.data.array_dataset import ArrayDataset
from edm2kit.data.batches import GlobalOrder, training_batches
from edm2kit.data.dataset import ImageDataset
from edm2kit.data.image_files import encode_npy, encode_png
from edm2kit.data.output import PartialDataset
from tests.support.dataset_tool import convert
from tests.support.pictures import npy, picture, some_files, write_folder

COUNT = 6
SETTINGS = {"made_by": "a test"}


def latents(seed: int = 0) -> list[np.ndarray]:
    """Raw latents of [8, 4, 4]: means, and standard deviations above 0."""
    return list(np.abs(np.random.default_rng(seed).normal(size=[COUNT, 8, 4, 4])).astype(np.float32))


def name(k: int) -> str:
    return f"00000/img{k:08d}.npy"


def write(dest: Path, arrays: list[np.ndarray], labels: list[int] | None = None) -> Path:
    """A data set of arrays, as `dataset_tool.py encode` writes it."""
    with PartialDataset(dest, SETTINGS) as output:
        for k, array in enumerate(arrays):
            output.add(name(k), encode_npy(array))
        output.add("encoder.json", b"{}")
        pairs = None if labels is None else [[name(k), label] for k, label in enumerate(labels)]
        output.finish({"labels": pairs})
    return dest


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "latents", latents(), [0, 1] * 3)


def flip(path: Path, position: int = -3) -> None:
    """Flip the lowest bit of a byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def record(folder: Path) -> dict:
    return json.loads((folder / "dataset.json").read_text())


def test_a_folder_of_arrays_records_size_and_checksum_of_each(folder):
    assert ImageDataset(folder).labels.tolist() == [0, 1] * 3
    files = {name(k): (folder / name(k)).read_bytes() for k in range(COUNT)}
    assert record(folder)["checksums"] == {n: [len(data), zlib.crc32(data)] for n, data in files.items()}
    zipped = ImageDataset(write(folder.with_suffix(".zip"), latents()))
    assert "checksums" not in json.loads(zipped.read_extra("dataset.json"))  # as its index has them


CHANGED = r"img00000003\.npy: has changed since it was written: its size or checksum is not the one in dataset\.json"


@pytest.mark.parametrize("use_labels", [True, False])
@pytest.mark.parametrize("in_order", ["C", "F"])  # arrays in Fortran's order are decoded one by one
def test_a_flipped_bit_is_noticed_when_the_array_is_used(tmp_path, in_order, use_labels):
    arrays = latents()
    with PartialDataset(tmp_path / "d", SETTINGS) as output:
        for k, array in enumerate(arrays):
            output.add(name(k), npy(np.asarray(array, order=in_order)))
        output.finish({"labels": None})
    whole = ImageDataset(tmp_path / "d")
    assert whole.needs_decoding == (in_order == "F")
    np.testing.assert_array_equal(whole.read(np.arange(COUNT)), np.stack(arrays))
    flip(tmp_path / "d" / name(3))
    damaged = ImageDataset(tmp_path / "d", use_labels=use_labels)
    np.testing.assert_array_equal(damaged.read(np.array([2, 4])), np.stack([arrays[2], arrays[4]]))
    for read in (lambda: damaged.read(np.array([2, 3])), lambda: damaged[3]):
        with pytest.raises(ValueError, match=CHANGED):
            read()


def test_training_stops_at_a_flipped_bit(folder):
    flip(folder / name(3))
    dataset = ImageDataset(folder)
    batches = training_batches(dataset, GlobalOrder(COUNT, 0), 0, COUNT, rank=0, world_size=1)
    with pytest.raises(ValueError, match=CHANGED):
        next(batches)


def test_an_array_is_verified_once(folder, monkeypatch):
    dataset = ImageDataset(folder)
    dataset.read(np.arange(COUNT))
    monkeypatch.setattr(archive.zlib, "crc32", lambda data, value=0: pytest.fail("compared again"))
    dataset.read(np.arange(COUNT))


@pytest.mark.parametrize("what", ["without a record", "with a part of it", "in a folder around it", "from elsewhere"])
def test_folders_of_other_kinds_are_read_as_before(folder, what, tmp_path):
    content = record(folder)
    if what == "without a record":
        del content["checksums"]
    elif what == "with a part of it":
        del content["checksums"][name(3)]
    elif what == "from elsewhere":  # the record of another system
        content["checksums"] = {f".\\{key}".replace("/", "\\"): value for key, value in content["checksums"].items()}
    (folder / "dataset.json").write_text(json.dumps(content))
    if what == "in a folder around it":
        (tmp_path / "around").mkdir()
        folder = folder.rename(tmp_path / "around" / "inside").parent
    np.testing.assert_array_equal(ImageDataset(folder).read(np.arange(COUNT)), np.stack(latents()))
    flip(next(folder.rglob(Path(name(3)).name)))
    if what in ("without a record", "with a part of it"):
        assert ImageDataset(folder).read(np.array([3])).shape == (1, 8, 4, 4)
    else:
        with pytest.raises(ValueError, match=CHANGED):
            ImageDataset(folder).read(np.array([3]))


@pytest.mark.parametrize(
    ("checksums", "reason"),
    [
        ([], r'"checksums" is a list; expected \{name'),
        ({name(0): 7}, r"img00000000\.npy has the checksum 7; expected \[bytes, CRC-32\]"),
        ({name(0): [7, -1]}, r"has the checksum \[7, -1\]"),
        ({name(0): [7, 1 << 32]}, "has the checksum"),
        ({name(0): [True, 5]}, "has the checksum"),
        ({name(0): [1e3, 5]}, "has the checksum"),
        ({"../../x.npy": [7, 5]}, r"contains the name '\.\./\.\./x\.npy', which is not a path below a folder"),
        ({"/etc/x.npy": [7, 5]}, "which is not a path below a folder"),
        ({name(0): [7, 5], f"./{name(0)}": [7, 5]}, "not a path below"),
        ({f"{name(0)}": [7, 5], name(0).replace("/", "\\"): [7, 5]}, "lists 00000/img00000000.npy more than once"),
    ],
)
def test_a_damaged_record_is_named(folder, checksums, reason, capsys):
    (folder / "dataset.json").write_text(json.dumps({**record(folder), "checksums": checksums}))
    with pytest.raises(ValueError, match=rf"latents/dataset\.json: .*{reason}"):
        ImageDataset(folder)
    assert len(ImageDataset(folder, use_labels=False)) == COUNT
    assert "the arrays are read without comparing checksums" in capsys.readouterr().err


def test_check_lists_a_flipped_bit_and_accepts_edited_pictures(folder, tmp_path):
    def check(source):
        return CliRunner().invoke(dataset_tool.main, ["check", "--source", str(source), "--workers", "1"])

    assert check(folder).exit_code == 0
    flip(folder / name(3))
    (folder / name(4)).write_bytes(encode_npy(latents(1)[4]))
    found = check(folder)
    assert found.exit_code == 1
    assert found.output.count("has changed since it was written") == 2
    assert "2 problems" in found.output
    pictures = tmp_path / "pictures"
    convert(write_folder(tmp_path / "source", some_files(COUNT)), pictures)
    (pictures / "00000/img00000001.png").write_bytes(encode_png(picture(99)))
    assert check(pictures).exit_code == 0


@pytest.mark.parametrize("dest", ["pictures", "pictures.zip"])
def test_a_finished_data_set_is_only_kept_if_its_files_are_the_ones_that_were_written(tmp_path, dest):
    source = write_folder(tmp_path / "source", some_files(COUNT))
    convert(source, tmp_path / dest)
    assert "nothing to do" in convert(source, tmp_path / dest)
    if dest == "pictures":
        other = encode_png(picture(99))  # as large as the one before, and a valid picture
        path = tmp_path / dest / "00000/img00000001.png"
        assert len(other) == path.stat().st_size
        path.write_bytes(other)
        assert "img00000001.png: has changed since it was written" in convert(source, tmp_path / dest, code=1)
    else:
        flip(tmp_path / dest, 100)
        assert "is damaged in the zip" in convert(source, tmp_path / dest, code=1)


def as_they_are(raw: np.ndarray) -> list[bytes]:
    return [encode_npy(item) for item in raw]


def run(source, dest: Path) -> None:
    job = encode.make_job(source, dest, ".npy", as_they_are, {}, {})
    encode.run(job, batch=64, workers=1)


def test_encode_compares_the_finished_arrays(tmp_path):
    source = write_folder(tmp_path / "source", some_files(COUNT))
    run(ImageDataset(source), tmp_path / "out")
    run(ImageDataset(source), tmp_path / "out")
    flip(tmp_path / "out" / name(3))
    with pytest.raises(ValueError, match=CHANGED):
        run(ImageDataset(source), tmp_path / "out")


@pytest.mark.parametrize("dest", ["out", "out.zip"])
def test_encode_notices_a_source_of_the_same_size_beyond_the_sample_of_pixels(tmp_path, monkeypatch, dest):
    def no_pixels(source):
        return "not looked at"

    for module in ("dataset", "array_dataset"):
        monkeypatch.setattr(f"edm2kit.data.{module}.content_digest", no_pixels)
    arrays = [array[:3].astype(np.uint8) for array in latents()]
    source = write_folder(tmp_path / "d", {name(k): encode_npy(array) for k, array in enumerate(arrays)})
    run(ImageDataset(source), tmp_path / dest)
    run(ImageDataset(source), tmp_path / dest)
    (source / name(3)).touch()  # a copy of the folder is the same data set
    run(ImageDataset(source), tmp_path / dest)
    flip(source / name(3))
    with pytest.raises(ValueError, match=r"is a data set with source_sample .*, now .*; delete it or choose another"):
        run(ImageDataset(source), tmp_path / dest)


def test_encode_notices_another_large_array_of_the_same_size(tmp_path, monkeypatch):
    monkeypatch.setattr("edm2kit.data.array_dataset.content_digest", lambda source: "not looked at")
    monkeypatch.setattr("edm2kit.data.array_dataset._HASHED_ITEMS", 1)
    np.save(tmp_path / "x.npy", np.zeros([20, 3, 8, 8], np.uint8))
    run(ArrayDataset(tmp_path / "x.npy"), tmp_path / "out")
    flip(tmp_path / "x.npy")
    with pytest.raises(ValueError, match="is a data set with source_sample"):
        run(ArrayDataset(tmp_path / "x.npy"), tmp_path / "out")


def test_data_sets_of_earlier_versions_are_still_recognised(tmp_path):
    source = write_folder(tmp_path / "source", some_files(COUNT))
    run(ImageDataset(source), tmp_path / "out")
    content = record(tmp_path / "out")
    del content["checksums"], content["settings"]["source_sample"]
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(content))
    run(ImageDataset(source), tmp_path / "out")  # raises if it is taken for another one


def unfinished(dest: Path, arrays: list[np.ndarray], count: int) -> Path:
    """What a process leaves that stops after so many files."""
    with PartialDataset(dest, SETTINGS) as output:
        for k in range(count):
            output.add(name(k), encode_npy(arrays[k]))
    return dest.with_name(f"{dest.name}.partial")


def complete(dest: Path, arrays: list[np.ndarray]) -> None:
    """Go on in an unfinished folder of which the first three files are kept."""
    with PartialDataset(dest, SETTINGS) as output:
        assert output.names == {name(k) for k in range(3)}
        for k in (5, 4, 3):
            output.add(name(k), encode_npy(arrays[k]))
        output.add("encoder.json", b"{}")
        output.finish({"labels": None})


@pytest.mark.parametrize("what", ["a bit", "zeros", "the journal's end", "a line of the journal"])
def test_files_that_do_not_fit_the_journal_are_written_again(tmp_path, what):
    arrays = latents()
    partial = unfinished(tmp_path / "d", arrays, 4)
    path, journal = partial / "data" / name(3), partial / "checksums"
    if what == "a bit":
        flip(path)
    elif what == "zeros":  # as a power cut leaves them
        path.write_bytes(bytes(path.stat().st_size))
    elif what == "the journal's end":
        journal.write_bytes(journal.read_bytes()[:-9])
    else:
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join([*lines[:3], b'["' + b"[" * 50_000 + b"\n"]))
    complete(tmp_path / "d", arrays)
    write(tmp_path / "whole", arrays)
    for file in (tmp_path / "whole").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "d" / file.relative_to(tmp_path / "whole")).read_bytes()
    assert not partial.exists()


def test_unfinished_work_of_an_earlier_version_is_kept(tmp_path):
    arrays = latents()
    partial = unfinished(tmp_path / "d", arrays, 4)
    (partial / "checksums").unlink()
    (partial / "data" / name(3)).write_bytes(b"")
    complete(tmp_path / "d", arrays)
    assert record(tmp_path / "d") == record(write(tmp_path / "whole", arrays))
