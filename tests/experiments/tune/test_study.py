"""One study for several processes: nothing is measured twice, and a killed process's work is taken up again."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from edm2kit.experiments.tune.budget import Budget
from edm2kit.experiments.tune.halving import rungs_for
from edm2kit.experiments.tune.search import Plan, run_search
from edm2kit.experiments.tune.space import BASELINE
from edm2kit.experiments.tune.study import SharedStudy
from tests.support import ROOT
from tests.support.tuning import simulated_space, true_value

SETTINGS = {"metric": "fd_random", "rungs": [4, 12]}


def wanting(key: str, num_images: int = 4):
    return lambda evaluations: (key, {"way": "autoguidance", "weight": 3}, num_images, num_images)


def in_child(work) -> int:
    """Run `work` in a forked process; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_measurement_is_claimed_once_and_recorded(tmp_path):
    with SharedStudy(tmp_path, SETTINGS) as study:
        claim = study.claim(wanting("a"))
        (under_way,) = study.evaluations()
        assert (under_way.key, under_way.value, under_way.cost) == ("a", None, 4)
        study.finish(claim, 2.5, {"fd_random": 2.5}, 1.0)
        (done,) = study.evaluations()
        assert (done.value, done.seconds, done.values["weight"]) == (2.5, 1.0, 3)
        assert study.results()[0]["results"] == {"fd_random": 2.5}
    with SharedStudy(tmp_path, SETTINGS) as again:
        assert again.evaluations() == [done]


def test_a_killed_process_s_measurement_is_claimed_again_before_anything_else(tmp_path):
    def die():
        with SharedStudy(tmp_path, SETTINGS) as study:
            study.claim(wanting("a", 12))
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    with SharedStudy(tmp_path, SETTINGS) as study:
        assert [one.value for one in study.evaluations()] == [None]
        claim = study.claim(wanting("b"))
        assert (claim.key, claim.num_images) == ("a", 12)
        study.finish(claim, 1.0, {}, 1.0)
        assert study.claim(wanting("b")).key == "b"
        assert Counter(one.key for one in study.evaluations()) == {"a": 1, "b": 1}


def test_a_living_process_keeps_its_measurement(tmp_path):
    with SharedStudy(tmp_path, SETTINGS) as study:
        study.claim(wanting("a"))

        def other():
            with SharedStudy(tmp_path, SETTINGS) as second:
                assert second.claim(wanting("b")).key == "b"

        assert in_child(other) == 0


def test_a_measurement_that_kills_three_processes_is_named(tmp_path):
    def die():
        with SharedStudy(tmp_path, SETTINGS) as study:
            study.claim(wanting("a heavy one"))
            os._exit(9)

    for _ in range(3):
        assert in_child(die) == 9
    with SharedStudy(tmp_path, SETTINGS) as study, pytest.raises(ValueError, match=r"3 processes died.*a heavy one"):
        study.claim(wanting("b"))


def test_two_processes_share_a_search_and_repeat_nothing(tmp_path):
    space, plan = simulated_space(), Plan(rungs_for(36, 2), Budget(images=200), 0)
    pipes = [os.pipe(), os.pipe()]

    def work(me: int):
        met = []

        def measure(candidate, num_images):
            if not met:  # the first measurement of each waits for that of the other
                os.write(pipes[1 - me][1], b"x")
                met.append(os.read(pipes[me][0], 1))
            return true_value(candidate), {"by": os.getpid()}

        with SharedStudy(tmp_path, SETTINGS) as study:
            run_search(study, space, plan, BASELINE, measure)

    children = []
    for me in range(2):
        child = os.fork()
        if child == 0:
            try:
                work(me)
            finally:
                os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    with SharedStudy(tmp_path, SETTINGS) as study:
        found = study.results()
    assert max(Counter((one["key"], one["num_images"]) for one in found).values()) == 1
    assert len({one["results"]["by"] for one in found}) == 2
    assert sum(one["cost"] for one in found) <= 200
    assert max(one["num_images"] for one in found) == 36


def test_a_folder_with_another_search_is_refused(tmp_path):
    with SharedStudy(tmp_path, SETTINGS):
        pass
    with pytest.raises(ValueError, match=r"other settings \(metric .*fid.*choose another --outdir"):
        SharedStudy(tmp_path, {**SETTINGS, "metric": "fid"})
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json is damaged"):
        SharedStudy(tmp_path, SETTINGS)


WORKER = """
import sys
from pathlib import Path
from edm2kit.experiments.tune.budget import Budget
from edm2kit.experiments.tune.halving import rungs_for
from edm2kit.experiments.tune.search import Plan, run_search
from edm2kit.experiments.tune.space import BASELINE
from edm2kit.experiments.tune.study import SharedStudy
from tests.support.tuning import simulated_space, true_value

def measure(candidate, num_images):
    print("measures", flush=True)
    return true_value(candidate), {}

with SharedStudy(Path(sys.argv[1]), {}) as study:
    run_search(study, simulated_space(), Plan(rungs_for(36, 2), Budget(images=600), 0), BASELINE, measure)
"""


@pytest.mark.slow
def test_killed_at_random_moments_the_same_command_ends_with_the_same_search(tmp_path):
    command = [sys.executable, "-c", WORKER]
    subprocess.run([*command, tmp_path / "whole"], cwd=ROOT, check=True, capture_output=True)
    # at any moment, but not three times in the same measurement, which a search refuses to try a fourth time
    for lines in np.random.default_rng().integers(2, 12, 5):
        process = subprocess.Popen([*command, tmp_path / "killed"], cwd=ROOT, stdout=subprocess.PIPE)
        for _ in range(lines):
            process.stdout.readline()
        process.kill()
        process.wait()
    done = subprocess.run([*command, tmp_path / "killed"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = []
    for name in ("whole", "killed"):
        with SharedStudy(tmp_path / name, {}) as study:
            trials = study.results()
        assert max(Counter((one["key"], one["num_images"]) for one in trials).values()) == 1
        assert sum(one["cost"] for one in trials) <= 600
        found.append({(one["key"], one["num_images"]): one["value"] for one in trials})
    assert found[0] == found[1]
    assert json.loads((tmp_path / "killed" / "settings.json").read_text()) == {}


def test_a_database_that_cannot_be_read_or_written_is_one_line(tmp_path):
    with SharedStudy(tmp_path / "good", {"metric": "fd_lite0"}) as study:
        database = tmp_path / "good" / "study.db"
        data = database.read_bytes()
        database.write_bytes(data[:2000] + bytes(len(data) - 2000))
        with pytest.raises(
            ValueError, match=r"study\.db cannot be read or written \(.*free some space and run the same"
        ):
            study.claim(lambda evaluations: ("a", {}, 4, 4))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "study.db").write_bytes(b"not a database" * 100)
    with pytest.raises(ValueError, match=r"study\.db cannot be read or written \(file is not a database\)"):
        SharedStudy(tmp_path / "bad", {"metric": "fd_lite0"})


def set_attribute(database, name, value):
    with contextlib.closing(sqlite3.connect(database)) as opened, opened:
        found = opened.execute("UPDATE trial_user_attributes SET value_json = ? WHERE key = ?", (value, name))
        assert found.rowcount


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("worker", '"../../victim"', r"worker is '\.\./\.\./victim', which is not the name of a process"),
        ("worker", "5", "worker must be str; got 5"),
        ("values", "[1]", "values must be a mapping"),
        ("num_images", '"many"', "num_images must be int; got 'many'"),
        ("cost", "{", r"study\.db cannot be read or written"),
    ],
)
def test_a_database_from_elsewhere_removes_no_file_and_what_is_wrong_in_it_is_named(tmp_path, name, value, reason):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    with SharedStudy(tmp_path / "search", SETTINGS) as study:
        study.claim(wanting("a"))
    set_attribute(tmp_path / "search" / "study.db", name, value)
    with SharedStudy(tmp_path / "search", SETTINGS) as again:
        for use in (again.evaluations, lambda: again.claim(wanting("b"))):
            with pytest.raises(ValueError, match=reason) as caught:
                use()
            assert "\n" not in str(caught.value)
    assert victim.read_text() == "precious"


def test_what_is_behind_the_names_of_a_search_may_not_change(tmp_path):
    with SharedStudy(tmp_path, {**SETTINGS, "contents": {"guide": "a"}}):
        pass
    with pytest.raises(ValueError, match=r"other settings \(contents\.guide \"a\", now \"b\"\)"):
        SharedStudy(tmp_path, {**SETTINGS, "contents": {"guide": "b"}})
    (tmp_path / "older").mkdir()
    with SharedStudy(tmp_path / "older", SETTINGS):  # as earlier versions recorded it
        pass
    with SharedStudy(tmp_path / "older", {**SETTINGS, "contents": {"guide": "b"}}):
        pass
