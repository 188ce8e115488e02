"""Files are complete or absent, a folder belongs to one run at a time, and records compare setting by setting."""

import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

from edm2kit.torch_utils import files
from edm2kit.torch_utils.files import (
    HAS_LOCKS,
    LOCK_NAME,
    atomic_write,
    differences,
    driver_version,
    exclusive,
    file_lock,
    plain_json,
    provenance,
    remove_partial_files,
    sha256_of,
    short_json,
    write_json,
)
from tests.support import ROOT

BODY = bytes(range(256)) * 2048


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "deep" / "a.txt"
    with atomic_write(target, "w") as file:
        file.write("old")
    with pytest.raises(TypeError), atomic_write(target, "w") as file:
        file.writelines(["new", None])
    assert target.read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


def test_sha256_of_a_file_longer_than_one_chunk(tmp_path):
    (tmp_path / "a").write_bytes(BODY * 5)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(BODY * 5).hexdigest()


def test_writers_at_the_same_time_do_not_mix(tmp_path):
    with atomic_write(tmp_path / "a", "w") as first, atomic_write(tmp_path / "a", "w") as second:
        first.write("first")
        second.write("second")
    assert (tmp_path / "a").read_text() == "first"  # whole, and the one that ended last


def test_a_full_disk_is_told_with_the_file(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*picture.png'"),
        atomic_write(tmp_path / "picture.png"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


# locks

_HOLD = """
import sys
from edm2kit.torch_utils.files import exclusive

with exclusive(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], env=environment, **pipes) as process:
        process.stdout.readline()
        yield process
        process.kill()


def test_a_second_run_is_refused_and_told_who_is_first(tmp_path, holder):
    with pytest.raises(ValueError, match=rf"another run \(process {holder.pid} on .*\); wait"), exclusive(tmp_path):
        pass


def test_a_killed_job_leaves_nothing_locked(tmp_path, holder):
    holder.kill()
    holder.wait()
    with exclusive(tmp_path):
        assert (tmp_path / LOCK_NAME).read_text().startswith(f"process {os.getpid()} on ")


def test_the_folder_is_created_and_left_clean_even_after_an_error(tmp_path):
    with pytest.raises(KeyError), exclusive(tmp_path / "a" / "b"):
        raise KeyError
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_two_folders_do_not_disturb_each_other(tmp_path):
    with exclusive(tmp_path / "a"), exclusive(tmp_path / "b"):
        assert (tmp_path / "a" / LOCK_NAME).exists()
        assert (tmp_path / "b" / LOCK_NAME).exists()


def test_a_lock_that_is_a_link_neither_empties_nor_creates_a_file(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for target in (victim, tmp_path / "nowhere"):
        (tmp_path / "run" / ".running").unlink(missing_ok=True)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / ".running").symlink_to(target)
        with pytest.raises(ValueError, match=r"\.running is a link, which leads out of its folder"):
            exclusive(tmp_path / "run").__enter__()
    assert victim.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


def test_a_lock_file_removed_in_between_is_created_again(tmp_path, monkeypatch):
    """The former owner removes the file after we opened it: the lock on the old one would keep nobody out."""
    acquire, calls = files._acquire, []

    def late(file, path, when_held, shared):
        if not calls:
            path.unlink()
        calls.append(path)
        acquire(file, path, when_held, shared)

    monkeypatch.setattr(files, "_acquire", late)
    with exclusive(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / LOCK_NAME).exists()


def test_a_waiting_process_continues_once_the_other_has_ended(tmp_path, holder):
    owners = []

    def end_the_holder(owner):
        owners.append(owner)
        holder.kill()

    with file_lock(tmp_path / LOCK_NAME, end_the_holder):
        assert owners[0].startswith(f"process {holder.pid} on ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(files.fcntl is None, reason="no fcntl on this system")
def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(file, mode):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with exclusive(tmp_path):
        pass
    assert "has no file locks" in capsys.readouterr().err


_FORK = """
import os, sys, time
from edm2kit.torch_utils.files import exclusive

with exclusive(sys.argv[1]):
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_children_of_a_killed_process_hold_nothing(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", _FORK, str(tmp_path)], env=environment, **pipes) as process:
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        try:
            with exclusive(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_partial_files_of_a_killed_process_are_removed_and_those_in_use_stay(tmp_path):
    (tmp_path / ".training-state-0000000008.pt.0123456789ab.tmp").write_bytes(b"half")
    (tmp_path / ".mine.tmp").write_bytes(b"not ours")
    with atomic_write(tmp_path / "a", "w") as file:
        file.write("whole")
        with exclusive(tmp_path):
            assert len(list(tmp_path.glob(".*.tmp"))) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "a"]
    assert (tmp_path / "a").read_text() == "whole"


@pytest.mark.skipif(not HAS_LOCKS, reason="without file locks, partial files are not removed")
def test_the_first_file_that_a_process_writes_to_a_folder_removes_what_a_killed_one_left(tmp_path):
    (tmp_path / ".b.0123456789ab.tmp").write_bytes(b"half")
    write_json(tmp_path / "a", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(not HAS_LOCKS, reason="without file locks, partial files are not removed")
@pytest.mark.parametrize(
    "call", [(os, "replace"), (files.fcntl, "flock")], ids=["before the rename", "before the lock"]
)
def test_another_writer_never_removes_a_file_in_use(tmp_path, monkeypatch, call):
    module, name = call
    real, calls = getattr(module, name), []

    def after_a_sweep(*args):
        calls.append(args)
        if len(calls) == 1:
            remove_partial_files(tmp_path)
        return real(*args)

    monkeypatch.setattr(module, name, after_a_sweep)
    with atomic_write(tmp_path / "a", "w") as file:
        file.write("complete")
    assert calls
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "complete"


# records


def test_equal_settings_have_no_differences():
    settings = {"solver": {"num_steps": 32, "rho": 7.0}, "classes": [1, 2]}
    assert differences(settings, json.loads(json.dumps(settings))) == []


def test_every_difference_is_named_with_both_values():
    recorded = {"solver": {"num_steps": 32, "rho": 7.0}, "net": "a"}
    current = {"solver": {"num_steps": 16, "rho": 7.0}, "net": "a", "vae": None, "batch": 4}
    assert differences(recorded, current) == ["solver.num_steps 32, now 16", "batch null, now 4"]
    assert differences(None, {"net": "a"}, "teacher") == ['teacher null, now {"net": "a"}']


def test_long_values_are_cut():
    assert short_json("a" * 40) == '"' + "a" * 20 + "..."
    assert short_json([1, 2]) == "[1, 2]"


def test_values_become_plain_json():
    value = {3: (1, range(2)), "dtype": torch.float32, "S_max": math.inf, "none": None, "on": True}
    assert plain_json(value) == {"3": [1, [0, 1]], "dtype": "torch.float32", "S_max": "inf", "none": None, "on": True}


def test_a_record_is_written_as_json(tmp_path):
    write_json(tmp_path / "new" / "record.json", {"a": [1]})
    assert json.loads((tmp_path / "new" / "record.json").read_text()) == {"a": [1]}


def test_records_made_on_a_gpu_name_its_software(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    assert provenance("cuda:0").keys() - provenance("cpu").keys() == {"cuda", "cudnn", "driver"}


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\n", "580.159.04"),
        ("GCC version: 13.3.0\n", "unknown"),
    ],
)
def test_the_driver_names_its_version_with_closed_and_open_modules(text, version):
    assert driver_version(text) == version


def test_names_that_are_not_utf8_can_be_written(tmp_path):
    with atomic_write(tmp_path / "card.md", "w") as file:
        file.write("caf\udce9 of caf\u00e9")
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == "caf\\udce9 of caf\u00e9"


@pytest.mark.parametrize("name", ["n" * 240 + ".npz", "\u00e9" * 120 + ".npz"])
def test_a_long_name_is_written_as_it_is(tmp_path, name):
    with atomic_write(tmp_path / name) as file:
        file.write(b"content")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_git_that_does_not_answer_is_not_waited_for(monkeypatch):
    def stuck(words, **settings):
        raise subprocess.TimeoutExpired(words, settings["timeout"])

    monkeypatch.setattr(subprocess, "run", stuck)
    assert files.code_commit.__wrapped__() == "unknown"
