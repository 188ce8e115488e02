"""A rank that the others wait for is named within a minute; nobody waits for ever."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest
import torch

from edm2kit.torch_utils import dist, heartbeat
from edm2kit.torch_utils.heartbeat import Heartbeat, ask, once
from tests.support import ROOT

WHO = f"process {os.getpid()} on {socket.gethostname()}"


class MemoryStore:
    """A store for one process."""

    def __init__(self):
        self.values = {}

    def set(self, key, value):
        self.values[key] = value.encode()

    def get(self, key):
        return self.values[key]

    def check(self, keys):
        return all(key in self.values for key in keys)


class Ranks:
    """Heartbeats of `count` ranks that share a store and a clock; `said` is what each of them says."""

    def __init__(self, count):
        store = MemoryStore()
        self.now, self.steps, self.said = 0.0, [0] * count, [[] for _ in range(count)]
        self.all = [
            Heartbeat(store, k, count, lambda k=k: self.steps[k], self.said[k].append, lambda: self.now)
            for k in range(count)
        ]

    def run(self, seconds, without=()):
        for _ in range(0, seconds, 5):
            self.now += 5
            for k, one in enumerate(self.all):
                if k not in without:
                    one.beat()


def test_a_heartbeat_keeps_one_entry_in_the_store_for_each_rank():
    ranks = Ranks(3)
    for step in range(100):
        ranks.steps = [step] * 3
        ranks.run(30)
    assert len(ranks.all[0].store.values) == 3


def test_ranks_that_go_on_are_not_named():
    ranks = Ranks(3)
    for step in range(20):
        ranks.steps = [step] * 3
        ranks.run(30)
    assert ranks.said == [[], [], []]


def test_ranks_that_compute_for_long_without_meeting_are_not_named():
    ranks = Ranks(2)
    ranks.run(600)
    assert ranks.said == [[], []]


@pytest.mark.parametrize("stopped", [0, 1, 2])
def test_a_stopped_rank_is_named_once_by_the_lowest_other_and_again_when_it_is_back(stopped):
    ranks = Ranks(3)
    ranks.run(20)
    ranks.run(300, without=[stopped])
    speaker = 1 if stopped == 0 else 0
    name = f"rank {stopped} ({WHO})"
    assert ranks.said[speaker] == [f"{name} has not reported for 60 s; the other ranks wait for it"]
    silent_sec = 300 if stopped < speaker else 295  # a later rank's last report is seen at the next look
    assert ranks.all[speaker].late() == [f"{name} has not reported for {silent_sec} s"]
    ranks.run(10)
    assert ranks.said[speaker][1:] == [f"{name} is back"]
    assert [said for k, said in enumerate(ranks.said) if k not in (speaker, stopped)] == [[]]


def test_a_rank_that_never_starts_is_named():
    ranks = Ranks(2)
    ranks.run(60, without=[1])
    assert ranks.said[0] == ["rank 1 has not started in 60 s; the other ranks wait for it"]


def test_a_rank_that_is_alive_but_busy_is_named_by_those_who_wait_for_it():
    ranks = Ranks(3)
    ranks.run(20)
    ranks.steps = [1, 0, 1]
    ranks.run(120)
    busy = f"rank 1 ({WHO}) is alive, but has been busy for 60 s; the other ranks wait for it"
    assert ranks.said == [[busy], [], []]
    ranks.steps = [1, 1, 1]
    ranks.run(10)
    assert ranks.said[0][1:] == [f"rank 1 ({WHO}) is back"]


def test_a_rank_that_has_finished_is_not_missed_and_one_that_failed_is_named_at_once():
    ranks = Ranks(3)
    ranks.run(10)
    ranks.all[1].leave(failed=False)
    ranks.all[2].leave(failed=True)
    ranks.run(300, without=[1, 2])
    assert ranks.said[0] == [f"rank 2 ({WHO}) has ended with an error; the other ranks wait for it"]


def test_a_restarted_group_ignores_the_reports_of_the_former_one(monkeypatch):
    store = MemoryStore()
    Heartbeat(store, 1, 2, lambda: 9, print).beat()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = Heartbeat(store, 0, 2, lambda: 0, print, late_sec=-1)
    again.beat()
    assert again.late()[0].startswith("rank 1 has not started")


def test_a_question_to_a_store_that_does_not_answer_keeps_nobody_waiting(monkeypatch):
    monkeypatch.setattr(heartbeat, "_ANSWER_SEC", 0.05)
    never = threading.Event()
    assert ask(never.wait, "no answer") == "no answer"
    monkeypatch.undo()
    assert ask(lambda: "here", "no answer") == "here"

    def broken():
        raise RuntimeError("connection reset by peer")

    assert ask(broken, "no answer") == "no answer"
    never.set()


def test_of_ranks_that_cannot_meet_the_first_works_and_the_others_wait(monkeypatch):
    store, at_work, may_end, worked = torch.distributed.HashStore(), threading.Event(), threading.Event(), []
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)

    def work():
        at_work.set()
        may_end.wait()
        worked.append(1)

    first = threading.Thread(target=once, args=["checkpoint", work, 60])
    first.start()
    at_work.wait()
    threading.Timer(0.05, may_end.set).start()
    once("checkpoint", work, 60)
    assert worked == [1]
    first.join()
    with pytest.raises(FileNotFoundError):
        once("failing", lambda: os.remove("missing"), 60)
    once("failing", work, 60)  # which the first one has tried
    assert worked == [1]


def test_ranks_without_a_store_do_the_work_themselves(monkeypatch):
    worked = []
    assert not torch.distributed.is_initialized()
    once("checkpoint", lambda: worked.append(1), 60)
    assert worked == [1]


def test_the_time_to_wait_can_be_chosen():
    assert dist.timeout_sec() == 1800
    assert dist.timeout_sec(7) == 7
    with dist.waiting_at_most(90):
        assert dist.timeout_sec() == dist.timeout_sec(7) == 90
    assert dist.timeout_sec() == 1800


_STOPPED = """
import os, signal, sys, time
from datetime import timedelta
import click, torch
from edm2kit.cli import click_types as cli
from edm2kit.torch_utils import dist, heartbeat

heartbeat.BEAT_SEC, heartbeat.LATE_SEC = 0.1, 1

@click.command(cls=cli.Command)
@cli.timeout_option()
def main():
    with dist.session("cpu"):
        impatient = torch.distributed.new_group(timeout=timedelta(seconds=1))
        dist.barrier()
        if dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()
        time.sleep(2)  # 20 beats, in which rank 1 is back
        if dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        torch.distributed.all_reduce(torch.zeros(1), group=impatient)

main()
"""


def test_a_stopped_process_is_named_waited_for_and_given_up(tmp_path):
    (tmp_path / "run.py").write_text(_STOPPED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "run.py"), "--timeout", "200s"]
    jobs = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(k)}, stderr=subprocess.PIPE, text=True)
        for k in range(2)
    ]
    # a slow machine may name it before its first report
    name = rf"rank 1( \(process {jobs[1].pid} on {re.escape(socket.gethostname())}\))?"
    late = rf"{name} has not (reported for|started in) \d+ s"
    try:
        told = (line for line in jobs[0].stderr if line.startswith(("Warning: ", "Error: ")))
        os.waitid(os.P_PID, jobs[1].pid, os.WSTOPPED)
        warning = next(told)
        expected = rf"Warning: {late}; the other ranks wait for it \(gives up after 200 s; see --timeout\)\n"
        assert re.fullmatch(expected, warning)
        jobs[1].send_signal(signal.SIGCONT)
        rest = list(told)
        assert jobs[0].wait(timeout=60) == 1
    finally:
        for job in jobs:
            job.send_signal(signal.SIGKILL)
            job.communicate()
    assert any(re.match(f"Warning: {name} is back", line) for line in rest)
    assert rest[-1].startswith("Error: waited 200 s for the other ranks and gave up: ")


def test_errors_of_the_group_say_who_is_missing():
    stopped = ["rank 3 (process 7 on a) has not reported for 61 s"]
    silent = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/buffer.cc:81] Timed out waiting 1000ms for recv"
    )
    closed = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    assert heartbeat.is_of_group(silent)
    assert heartbeat.is_of_group(closed)
    assert not heartbeat.is_of_group(RuntimeError("shapes do not match"))
    assert heartbeat.reason_of_loss(str(silent), stopped, 90).startswith(
        "waited 90 s for the other ranks and gave up: rank 3 (process 7 on a) has not reported for 61 s. Run the same"
    )
    assert "all of them report that they are alive" in heartbeat.reason_of_loss(str(silent), [], 90)
    assert heartbeat.reason_of_loss(str(closed), stopped, 90).startswith(
        "another rank has ended: rank 3 (process 7 on a)"
    )


def test_a_rank_that_gives_up_early_names_those_that_missed_three_reports():
    ranks = Ranks(3)
    ranks.run(10)
    ranks.run(20, without=[2])
    assert ranks.said == [[], [], []]
    assert [re.sub(r"\(.*\)", "(who)", text) for text in ranks.all[0].late()] == [
        "rank 2 (who) has not reported for 15 s"
    ]


class Listening(Ranks):
    """Ranks that go on, except for those `without`, while one of them listens; `passed` seconds so far."""

    def __init__(self, count, without=()):
        super().__init__(count)
        self.without, self.passed = without, 0.0
        for one in self.all:
            one.pause = self.pass_time

    def pass_time(self, seconds):
        self.passed += seconds
        self.now += seconds
        if self.passed // 5 > (self.passed - seconds) // 5:
            for k, one in enumerate(self.all):
                if k not in self.without:
                    one.beat()


@pytest.mark.parametrize("waited", [1, 3, 12])
def test_a_rank_that_gives_up_after_a_short_wait_names_the_one_that_is_stopped(waited):
    ranks = Listening(4, without=[2])
    ranks.run(20)
    ranks.steps = [8, 8, 8, 8]
    ranks.all[3].leave(failed=False)
    ranks.now += waited  # the last report of rank 2 is seen only then
    found = ranks.all[0].late(waited)
    assert [re.sub(r"\(.*\)", "(who)", text) for text in found] == ["rank 2 (who) has not reported for 10 s"]
    assert ranks.said == [[], [], [], []]


def test_a_rank_that_gives_up_after_a_short_wait_names_the_one_that_is_busy():
    ranks = Listening(3)
    ranks.run(20)
    ranks.steps = [8, 8, 7]  # rank 1 has come as far, but not reported it yet
    ranks.now += 3
    found = ranks.all[0].late(3)
    assert [re.sub(r"\(.*\)", "(who)", text) for text in found] == ["rank 2 (who) is alive, but has been busy for 8 s"]
    assert ranks.passed == pytest.approx(5, abs=0.2)
    assert ranks.said == [[], [], []]


def test_a_rank_that_gives_up_for_another_reason_does_not_listen():
    ranks = Listening(3, without=[2])
    ranks.run(20)
    assert (ranks.all[0].late(), ranks.passed) == ([], 0)


def test_a_store_that_does_not_answer_is_named_instead_of_waited_for(monkeypatch):
    asked, end = threading.Event(), threading.Event()

    class Silent:
        """The store of a machine behind a network that is down."""

        def set(self, key, value):
            pass

        def check(self, keys):
            asked.set()
            end.wait()
            raise RuntimeError("connection timed out")

    monkeypatch.setattr(torch.distributed, "TCPStore", lambda *arguments, **settings: Silent())
    for name, seconds in {"_ANSWER_SEC": 0.05, "_STORE_WAIT_SEC": 0.05}.items():
        monkeypatch.setattr(heartbeat, name, seconds)
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with heartbeat.watching(1, 2, lambda: 0, print) as late_ranks:
        assert asked.wait(60)
        assert late_ranks(None) == ["node0, port 29500, where the ranks find each other, does not answer"]
    end.set()
