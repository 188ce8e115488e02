"""Whatever happens to a command, the same command again completes it, with the bytes of an uninterrupted one.

The short form: a few faults of each kind. The long form is `python -m tests.faults`.
"""

import json
import random
import signal
import sys

import pytest

from tests.faults.__main__ import added, summary
from tests.faults.breaking import Fault
from tests.faults.families import FAMILIES, leftovers, results
from tests.faults.processes import Ending, Server
from tests.faults.trial import Verdict, attempt, draw, get_ready, is_refused, kinds_of, plan

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, and processes that fork")

# a seed of its own: the long form has other trials
SEED = 7


@pytest.fixture(scope="module")
def server():
    with Server(["generate", "reconstruct", "train"]) as found:
        yield found


@pytest.fixture(scope="module")
def ready(server, tmp_path_factory):
    """The first variant of a family, by name."""
    known = {}

    def find(name):
        if name not in known:
            place = tmp_path_factory.mktemp(name)
            (place / "inputs").mkdir()
            FAMILIES[name].prepare(place / "inputs", server)
            known[name] = get_ready(FAMILIES[name], FAMILIES[name].variants[0], place / "inputs", place / "run", server)
        return known[name]

    return find


@pytest.mark.parametrize("kind", ["kill", "kill inside a write", "disk full", "bit flip", "two jobs", "closed output"])
def test_generating_survives(ready, server, tmp_path, kind):
    verdict = attempt(ready("generate"), kind, random.Random(f"{kind} {SEED}"), tmp_path / "trial", server)
    assert not verdict.problems
    assert verdict.outcome in ("equal", "refused")


@pytest.mark.parametrize("kind", ["kill by processor time", "file size limit", "read-only"])
def test_rebuilding_survives(ready, server, tmp_path, kind):
    verdict = attempt(ready("reconstruct"), kind, random.Random(f"{kind} {SEED}"), tmp_path / "trial", server)
    assert not verdict.problems


@pytest.mark.parametrize("kind", ["kill", "signal", "input/output error"])
def test_training_survives(ready, server, tmp_path, kind):
    verdict = attempt(ready("train"), kind, random.Random(f"{kind} {SEED}"), tmp_path / "trial", server)
    assert not verdict.problems


def test_faults_do_happen(ready, server, tmp_path):
    one = ready("generate")
    folder = tmp_path / "trial"
    folder.mkdir()
    (folder / "net.safetensors").write_bytes((one.folder / "net.safetensors").read_bytes())
    middle = one.events[0] // 2
    (ending,) = server.run(folder, [one.variant.job], Fault("kill", middle))
    assert ending.codes == (-signal.SIGKILL,)
    assert 0 < len(results(folder)) < len(one.expected)
    (ending,) = server.run(folder, [one.variant.job], Fault("disk full", 1))
    assert ending.codes == (1,)
    assert "Error: " in ending.text
    assert "No space left on device" in ending.text


def test_every_kind_of_fault_is_tried_equally_often_and_the_same_seed_gives_the_same_faults(ready):
    family = FAMILIES["train"]
    pairs = [(variant, kind) for variant in family.variants for kind in kinds_of(variant)]
    tried = [(variant.name, kind) for variant, kind, _ in plan(family, 2 * len(pairs), 0)]
    assert {tried.count((variant.name, kind)) for variant, kind in pairs} == {2}
    assert tried == [(variant.name, kind) for variant, kind, _ in plan(family, 2 * len(pairs), 0)]
    one = ready("generate")
    assert draw("kill", one, random.Random("a")) == draw("kill", one, random.Random("a"))


def test_damage_and_leftovers_are_noticed(ready, tmp_path):
    one = ready("generate")
    out = tmp_path / "out"
    out.mkdir()
    (out / "generation.json").write_text(json.dumps({"settings": {"steps": 2}, "runs": []}))
    before = results(tmp_path)
    (out / "generation.json").write_text(json.dumps({"settings": {"steps": 2}, "runs": ["another"]}))
    assert results(tmp_path) == before
    (out / "generation.json").write_text(json.dumps({"settings": {"steps": 3}, "runs": []}))
    assert results(tmp_path) != before
    (out / ".a.png.0123456789ab.tmp").write_bytes(b"half")
    assert leftovers(tmp_path) == ["out/.a.png.0123456789ab.tmp"]
    (out / "a.png").write_bytes(b"\x89PNG, almost")
    assert is_refused(out / "a.png")
    assert len(one.expected) == 10


def test_a_broken_promise_is_counted_as_one():
    fault = Fault("kill", 3)
    good, bad = Verdict("kill", "folder", fault), Verdict("kill", "folder", fault, problems=["hangs"])
    found = summary([(0, good), (1, bad)])
    assert found["kinds"] == {"kill": {"equal": 1, "broken": 1}}
    assert [one["number"] for one in found["problems"]] == [1]
    before = {"faults": 5, "kinds": {"kill": {"equal": 4}, "clock": {"equal": 1}}, "problems": [], "elapsed_sec": 2.0}
    both = added(before, found | {"seed": 0, "elapsed_sec": 1.5})
    assert (both["faults"], both["elapsed_sec"], both["problems"]) == (7, 3.5, found["problems"])
    assert both["kinds"] == {"clock": {"equal": 1}, "kill": {"equal": 5, "broken": 1}}
    assert not Ending((0, 1), "", 1.0, False, 0).succeeded
    assert Ending((0, -9), "", 1.0, False, 0).killed
