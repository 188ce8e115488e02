"""Files are read and written side by side, and a disk that does not answer is named instead of waited for."""

import contextlib
import subprocess
import sys
import threading

import pytest

from edm2kit.torch_utils import dist, file_threads
from edm2kit.torch_utils.file_threads import FileThreads
from tests.support import ROOT, tiny


def test_results_and_errors_come_in_the_order_of_the_work():
    with FileThreads(3) as threads:
        jobs = [threads.submit(str(k), divmod, 7, k) for k in range(4)]
        with pytest.raises(ZeroDivisionError):
            jobs[0].result()
        assert [job.result() for job in jobs[1:]] == [(7, 0), (3, 1), (2, 1)]


@pytest.mark.parametrize(("complete", "expected"), [(False, [0]), (True, [0, 1, 2])])
def test_work_under_way_is_completed_at_the_end_and_work_that_has_not_begun_if_wanted(complete, expected):
    begun, may_end, done = threading.Event(), threading.Event(), []

    def work(k):
        begun.set()
        may_end.wait()
        done.append(k)

    with contextlib.suppress(KeyError), FileThreads(1, complete) as threads:
        for k in range(3):
            threads.submit(str(k), work, k)
        begun.wait()
        threading.Timer(0.05, may_end.set).start()
        raise KeyError("the end comes early")
    assert done == expected


def test_a_file_that_cannot_be_read_is_named_and_given_up(monkeypatch, capsys):
    monkeypatch.setattr(file_threads, "LOOK_SEC", 0.02)
    stuck = threading.Event()
    with dist.waiting_at_most(0.1), FileThreads(2) as threads:
        jobs = [threads.submit(f"{name}.png", work) for name, work in (("a", list), ("b", stuck.wait), ("c", dict))]
        assert jobs[2].result() == {}
        with pytest.raises(ValueError, match=r"b\.png: not done after 0 s; its disk may not answer\. Run the same"):
            jobs[1].result()
    stuck.set()
    assert "Warning: b.png: not done after 0 s; its disk may not answer (gives up after 0 s; see --timeout)" in (
        capsys.readouterr().err
    )


def test_the_process_of_a_thread_that_never_returns_can_end(tmp_path):
    code = (
        "import os, sys\n"
        "from edm2kit.torch_utils import dist\n"
        "from edm2kit.torch_utils.file_threads import FileThreads\n"
        "os.mkfifo(sys.argv[1])\n"
        "with dist.waiting_at_most(0.1), FileThreads(1) as threads:\n"
        "    threads.submit(sys.argv[1], open, sys.argv[1]).result()"
    )
    line = [sys.executable, "-c", code, str(tmp_path / "pipe")]  # to which nobody writes
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=tiny.environment(), timeout=120)
    assert done.returncode == 1
    assert f"ValueError: {tmp_path / 'pipe'}: not done after 0 s" in done.stderr
