"""The output of dataset_tool.py is complete or absent: stops, full disks, second runs; the zip format; the workers."""

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import zipfile
from functools import partial

import pytest
from click.testing import CliRunner

from edm2kit.cli.dataset import main
from edm2kit.data import output as dataset_output
from edm2kit.data import workers as data_workers
from edm2kit.data.archive import FolderArchive, open_archive
from edm2kit.data.dataset import ImageDataset
from edm2kit.data.output import PartialDataset
from edm2kit.data.workers import run_in_order
from tests.support import ROOT
from tests.support.dataset_tool import CLASSES, convert, run
from tests.support.pictures import encoded, picture, some_files, with_labels, write_folder, write_zip

CROP = ("--resolution", "4", "--transform", "center-crop")


@pytest.fixture
def source(tmp_path):
    return write_folder(tmp_path / "source", CLASSES | {"note.txt": b"x"})


@pytest.mark.parametrize("dest", ["out", "out.zip"])
def test_a_finished_data_set_is_left_alone(tmp_path, source, dest):
    convert(source, tmp_path / dest)
    before = os.stat(tmp_path / dest)
    assert "nothing to do" in convert(source, tmp_path / dest)
    output = convert(source, tmp_path / dest, *CROP, code=1)
    assert "is a data set with resolution [8, 8], now [4, 4]" in output
    assert "delete it or choose another --dest" in output
    assert os.stat(tmp_path / dest).st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("change", [{"labels": 0}, {"label_names": ["dog", "cat"]}, {"labels": "swapped"}])
def test_labels_that_were_changed_are_reported(tmp_path, source, change, capsys):
    convert(source, tmp_path / "out")
    path = tmp_path / "out" / "dataset.json"
    content = json.loads(path.read_text())
    first, second, *others = content["labels"]
    labels = {0: [[first[0], 1], second, *others], "swapped": [second, first, *others]}
    changed = content | {key: labels.get(value, value) if key == "labels" else value for key, value in change.items()}
    path.write_text(json.dumps(changed))
    assert "its labels have changed since it was made" in convert(source, tmp_path / "out", code=1)
    ImageDataset(tmp_path / "out")
    assert "its labels or names of classes have changed since the data set was made" in capsys.readouterr().err
    del changed["labels_crc32"]
    path.write_text(json.dumps(changed))
    assert "nothing to do" in convert(source, tmp_path / "out")
    ImageDataset(tmp_path / "out")
    assert capsys.readouterr().err == ""


def test_a_finished_data_set_from_which_files_were_deleted_is_not_called_complete(tmp_path, source):
    convert(source, tmp_path / "out")
    next((tmp_path / "out").rglob("*.png")).unlink()
    assert "has 5 of its 6 files; delete it" in convert(source, tmp_path / "out", code=1)


@pytest.mark.parametrize("dest", ["out", "out.zip"])
def test_what_a_process_left_that_was_killed_at_the_very_end_is_removed(tmp_path, source, dest, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(dataset_output.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        convert(source, tmp_path / dest, code=1)
    assert (tmp_path / f"{dest}.partial").exists()
    assert "nothing to do" in convert(source, tmp_path / dest)
    assert not (tmp_path / f"{dest}.partial").exists()


def test_a_disk_that_does_not_answer_while_the_source_is_identified_is_an_error(tmp_path, source, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(FolderArchive, "checksum", lambda self, index: (-1, 0))
        assert "cannot be read; run the same command again" in convert(source, tmp_path / "out.zip", code=1)
    convert(source, tmp_path / "out.zip")


@pytest.mark.parametrize("content", [{"x": b"mine"}, with_labels(some_files(1), [0]), {"dataset.json": b"[]"}])
def test_what_others_made_is_left_alone(tmp_path, source, content):
    path = write_folder(tmp_path / "out", content)
    assert "exists and was not made by this command" in convert(source, path, code=1)
    packed = write_zip(tmp_path / "out.zip", content)
    assert "exists and was not made by this command" in convert(source, packed, code=1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "out.zip", "source"]


@pytest.mark.parametrize("dest", ["out", "out.zip"])
def test_an_empty_folder_may_be_the_destination(tmp_path, source, dest):
    (tmp_path / dest).mkdir()
    convert(source, tmp_path / dest)
    assert len(ImageDataset(tmp_path / dest)) == 6


@pytest.fixture
def many(tmp_path):
    return write_folder(tmp_path / "many", {f"{k % 3}/{k}.png": encoded(picture(k)) for k in range(150)})


KILLED = """
import os, signal, sys
from edm2kit.data.output import PartialDataset
from edm2kit.cli.dataset import main
whole_add = PartialDataset.add
def add(self, name, data):
    whole_add(self, name, data)
    if name.endswith("70.png"):
        os.kill(os.getpid(), signal.SIGKILL)
PartialDataset.add = add
main()
"""


@pytest.mark.parametrize("dest", ["out", "out.zip"])
def test_a_killed_command_goes_on_where_it_stopped(tmp_path, many, dest):
    arguments = ["convert", "--source", many, "--dest", tmp_path / dest, "--workers", "2"]
    # the output ends, and this call returns, only once the worker processes are gone as well
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], cwd=ROOT, capture_output=True, timeout=300, check=False
    )
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / dest).exists()
    with PartialDataset(
        tmp_path / dest, json.loads((tmp_path / f"{dest}.partial" / "settings.json").read_text())
    ) as kept:
        assert 20 <= len(kept.names) <= 71
    assert "Wrote 150 images" in convert(many, tmp_path / dest)
    convert(many, tmp_path / f"whole-{dest}")
    assert contents(tmp_path / dest) == contents(tmp_path / f"whole-{dest}")


def contents(path):
    if path.is_file():
        return path.read_bytes()
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


class FullDisk:
    """PartialDataset.add that fails after some files."""

    def __init__(self, monkeypatch, room):
        self.room, self.add = room, PartialDataset.add
        monkeypatch.setattr(PartialDataset, "add", lambda output, name, data: self(output, name, data))

    def __call__(self, output, name, data):
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= 1
        self.add(output, name, data)


@pytest.mark.parametrize("dest", ["out", "out.zip"])
def test_a_full_disk_leaves_nothing_under_the_final_name(tmp_path, source, dest, monkeypatch):
    with monkeypatch.context() as patch:
        FullDisk(patch, room=4)
        output = convert(source, tmp_path / dest, code=1)
        assert f"Error: {tmp_path}/{dest}.partial: cannot be written: No space left on device" in output
    with monkeypatch.context() as patch:
        FullDisk(patch, room=2)  # enough for the images, but not for dataset.json
        convert(source, tmp_path / dest, code=1)
    assert not (tmp_path / dest).exists()
    monkeypatch.setattr("edm2kit.data.convert.Converter.__call__", None)  # no image is converted twice
    assert "Wrote 6 images" in convert(source, tmp_path / dest)
    assert len(ImageDataset(tmp_path / dest)) == 6


@pytest.mark.parametrize("damage", ["garbage at the end", "a bit in the middle", "cut"])
def test_a_damaged_unfinished_zip_is_truncated_to_its_complete_files(tmp_path, source, damage, monkeypatch):
    convert(source, tmp_path / "whole.zip")
    with monkeypatch.context() as patch:
        FullDisk(patch, room=5)
        convert(source, tmp_path / "out.zip", code=1)
    file = tmp_path / "out.zip.partial" / "data"
    data = bytearray(file.read_bytes())
    if damage == "garbage at the end":
        data += b"PK\x03\x04" + bytes(10_000)
    elif damage == "a bit in the middle":
        data[len(data) // 2] ^= 1
    else:
        del data[-3:]
    file.write_bytes(data)
    convert(source, tmp_path / "out.zip")
    assert contents(tmp_path / "out.zip") == contents(tmp_path / "whole.zip")


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:60] + b"!" + data[61:]])
def test_files_that_a_power_cut_or_a_disk_damaged_are_written_again(tmp_path, source, monkeypatch, damage):
    with monkeypatch.context() as patch:
        FullDisk(patch, room=4)
        convert(source, tmp_path / "out", code=1)
    path = tmp_path / "out.partial" / "data" / "00000" / "img00000002.png"
    path.write_bytes(damage(path.read_bytes()))
    convert(source, tmp_path / "out")
    run("check", "--source", tmp_path / "out")


def test_an_unfinished_data_set_with_other_settings_is_refused(tmp_path, source, monkeypatch):
    with monkeypatch.context() as patch:
        FullDisk(patch, room=2)
        convert(source, tmp_path / "out", code=1)
    output = convert(source, tmp_path / "out", *CROP, code=1)
    assert "out.partial contains an unfinished data set with resolution [8, 8], now [4, 4]" in output
    write_folder(source, {"cat/0.png": encoded(picture(77))[:-1] + b"more"})
    assert "with source_content" in convert(source, tmp_path / "out", code=1)


def test_two_commands_do_not_write_the_same_data_set(tmp_path, source, monkeypatch):
    with monkeypatch.context() as patch:
        FullDisk(patch, room=2)
        convert(source, tmp_path / "out", code=1)
    settings = json.loads((tmp_path / "out.partial" / "settings.json").read_text())
    with PartialDataset(tmp_path / "out", settings):
        assert "another process is writing there" in convert(source, tmp_path / "out", code=1)
    convert(source, tmp_path / "out")


def test_a_zip_of_more_files_than_a_plain_zip_can_count(tmp_path):
    names = [f"{k}.png" for k in range(66_000)]
    with PartialDataset(tmp_path / "out.zip", {}) as output:
        for name in names:
            output.add(name, name.encode())
        output.finish({})
    archive = open_archive(tmp_path / "out.zip", (".png",))
    assert archive.names == sorted(names)
    assert archive.read(65_999) == archive.names[65_999].encode()
    with zipfile.ZipFile(tmp_path / "out.zip") as plain:
        assert len(plain.namelist()) == 66_001
        assert plain.read("65999.png") == b"65999.png"


def test_offsets_beyond_four_gib_are_written_in_the_wide_form(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_output, "_LIMIT_32", 1001)
    with PartialDataset(tmp_path / "out.zip", {}) as output:
        for k in range(30):
            output.add(f"{k}.png", bytes([k]) * 90)
        output.finish({})
    data = (tmp_path / "out.zip").read_bytes()
    assert data.count(b"PK\x06\x06") == 1
    # the limit that stands in the file is not the real one: put that in its place
    (tmp_path / "out.zip").write_bytes(data.replace((1001).to_bytes(4, "little"), b"\xff" * 4))
    archive = open_archive(tmp_path / "out.zip", (".png",))
    assert all(archive.read(k) == bytes([int(archive.names[k][:-4])]) * 90 for k in range(30))
    with zipfile.ZipFile(tmp_path / "out.zip") as plain:
        assert plain.testzip() is None


def test_no_process_is_left_when_a_command_fails(tmp_path, many):
    write_folder(many, {"0/x.png": b"x"})
    arguments = ["convert", "--source", str(many), "--dest", str(tmp_path / "out"), "--workers", "2"]
    result = CliRunner().invoke(main, arguments)  # `result` holds the traceback, and with it every local variable
    assert "x.png: is not an image" in result.output
    assert multiprocessing.active_children() == []


def test_a_worker_that_dies_is_an_error():
    with pytest.raises(ValueError, match=r"a worker process died \(out of memory\?\)"):
        list(run_in_order(os._exit, range(100), workers=2))


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_errors_reach_the_caller(workers):
    assert list(run_in_order(partial(pow, 2), range(100), workers)) == [(k, 2**k) for k in range(100)]
    with pytest.raises(ZeroDivisionError):
        list(run_in_order(partial(divmod, 1), range(-50, 50), workers))


def _stop_oneself(item):
    if item == 40:
        os.kill(os.getpid(), signal.SIGSTOP)
    return item


def test_a_worker_that_is_stopped_is_named_and_given_up(monkeypatch, capsys):
    monkeypatch.setattr(data_workers, "LOOK_SEC", 0.2)
    with data_workers.dist.waiting_at_most(0.6), pytest.raises(ValueError, match=r"worker processes \(\d+, \d+\) have"):
        list(run_in_order(_stop_oneself, range(100), workers=2))
    assert "have finished nothing for 0 s: one may be stopped" in capsys.readouterr().err


def test_the_folder_for_unfinished_files_is_never_somebody_elses(tmp_path):
    (tmp_path / "a.zip.partial").mkdir()
    (tmp_path / "a.zip.partial" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds others; move it"):
        PartialDataset(tmp_path / "a.zip", {})
    assert (tmp_path / "a.zip.partial" / "thesis.tex").read_text() == "years of work"


def test_a_file_in_the_place_of_unfinished_files_is_left_alone(tmp_path):
    (tmp_path / "a.zip.partial").write_text("years of work")
    with pytest.raises(ValueError, match="is a file; move it"):
        PartialDataset(tmp_path / "a.zip", {})
    assert (tmp_path / "a.zip.partial").read_text() == "years of work"


def test_far_more_workers_than_work_are_not_started():
    with contextlib.closing(run_in_order(partial(pow, 2), range(20), 100_000)) as results:
        assert list(results) == [(k, 2**k) for k in range(20)]


@pytest.mark.parametrize("method", ["add", "finish"])
def test_a_full_disk_is_reported_with_its_place(tmp_path, monkeypatch, method):
    output = PartialDataset(tmp_path / "a.zip", {})

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output._writer, method, full)
    with output, pytest.raises(OSError, match=r"No space left on device: '.*a\.zip\.partial'"):
        output.finish({"labels": None})  # also adds a file


def test_other_names_of_the_classes_are_other_data(tmp_path):
    for names in (["a", "b"], ["b", "a"]):
        files = with_labels(some_files(4), [0, 1, 0, 1], label_names=names)
        source = write_folder(tmp_path / "named", files)
        told = convert(source, tmp_path / "named.zip", code=int(names[0] == "b"))
    assert "named.zip is a data set with class_names" in told
    path = tmp_path / "named.zip"
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    content = json.loads(files["dataset.json"])
    assert content["settings"].pop("class_names")  # which earlier versions did not record
    write_zip(path, {**files, "dataset.json": json.dumps(content).encode()})
    assert "nothing to do" in convert(source, path)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000])
def test_damaged_settings_of_an_unfinished_data_set_are_named(tmp_path, text):
    (tmp_path / "set.zip.partial").mkdir()
    (tmp_path / "set.zip.partial" / "settings.json").write_text(text)
    (tmp_path / "set.zip.partial" / "data").write_bytes(b"")
    with pytest.raises(ValueError, match=r"settings\.json is damaged.*; delete "):
        PartialDataset(tmp_path / "set.zip", {})
