"""A run that goes on holds no more objects: status lines, snapshots, sheets of samples and checkpoints leave none."""

import gc
from collections import Counter
from functools import partial

from click.testing import CliRunner

from edm2kit.cli import train
from edm2kit.sampling.solvers import Sampler
from edm2kit.training.log import RunLog
from edm2kit.training.loop import Trainer
from tests.support import tiny

COUNTED_STEPS = (5, 9, 13)  # by the first one, caches are full


class Planted:
    """One is kept at each step, to see that it is found."""


def test_a_step_leaves_no_object_behind_but_the_one_that_is_planted(tmp_path, monkeypatch):
    data = tiny.make_dataset(tmp_path / "data")
    duration = 16 * (COUNTED_STEPS[-1] + 1)
    config = tiny.write_config(tmp_path / "tiny.yaml", duration_nimg=duration, keep_checkpoints=2)
    words = ["--config", config, "--data", data, "--outdir", tmp_path / "run", "--samples", 1, "--device", "cpu"]
    status, planted, counts = RunLog.status, [], []

    def count(self, nimg, elapsed_sec, stats):
        status(self, nimg, elapsed_sec, stats)
        planted.append(Planted())
        if nimg // 16 in COUNTED_STEPS:
            gc.collect()
            counts.append(Counter(type(found) for found in gc.get_objects()))

    monkeypatch.setattr(RunLog, "status", count)
    monkeypatch.setattr(Trainer, "is_due", lambda self, every_nimg, at_end: True)  # each step does everything
    monkeypatch.setattr(train, "Sampler", partial(Sampler, num_steps=2))
    done = CliRunner().invoke(train.main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert len(planted) == COUNTED_STEPS[-1] + 1
    first, second, third = counts
    steps = COUNTED_STEPS[1] - COUNTED_STEPS[0]
    growing = {kind for kind in third if min(third[kind] - second[kind], second[kind] - first[kind]) >= steps}
    assert growing == {Planted}
