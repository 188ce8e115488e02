"""A folder belongs to one run at a time, and to nobody once that run has ended, however it ended."""

import errno
import os
import subprocess
import sys

import pytest

from edm2kit.torch_utils import locks
from edm2kit.torch_utils.locks import LOCK_NAME, exclusive, file_lock
from tests.support import ROOT

_HOLD = """
import sys
from edm2kit.torch_utils.locks import exclusive

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


def test_a_lock_file_removed_in_between_is_created_again(tmp_path, monkeypatch):
    """The former owner removes the file after we opened it: the lock on the old one would keep nobody out."""
    acquire, calls = locks._acquire, []

    def late(file, path, when_held):
        if not calls:
            path.unlink()
        calls.append(path)
        acquire(file, path, when_held)

    monkeypatch.setattr(locks, "_acquire", late)
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


@pytest.mark.skipif(locks.fcntl is None, reason="no fcntl on this system")
def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(file, mode):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with exclusive(tmp_path):
        pass
    assert "has no file locks" in capsys.readouterr().err
