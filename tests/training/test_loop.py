"""The training loop: label dropout hits the stated fraction of images, whatever the batch, and changes nothing else."""

import math

import pytest
import torch
from click.testing import CliRunner

from edm2kit.cli import train
from edm2kit.training import loop
from edm2kit.training.config import TrainConfig
from edm2kit.training.loop import drop_labels
from tests.support import tiny

NUM = 2000
LABELS = torch.eye(4)[torch.arange(NUM) % 4]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_of_empty_rows_is_binomial(share):
    dropped = drop_labels(LABELS, range(NUM), share, seed=0)
    empty = dropped.sum(dim=1) == 0
    assert abs(empty.sum().item() - share * NUM) < 4 * math.sqrt(NUM * share * (1 - share))
    assert torch.equal(dropped[~empty], LABELS[~empty])
    assert dropped.dtype == LABELS.dtype


def test_the_ends_are_all_and_none():
    assert torch.equal(drop_labels(LABELS, range(NUM), 0.0, seed=0), LABELS)
    assert drop_labels(LABELS, range(NUM), 1.0, seed=0).count_nonzero() == 0


def test_an_image_does_not_depend_on_its_batch_but_on_position_and_seed():
    whole = drop_labels(LABELS, range(NUM), 0.5, seed=0)
    assert torch.equal(drop_labels(LABELS[700:710], range(700, 710), 0.5, seed=0), whole[700:710])
    assert not torch.equal(drop_labels(LABELS, range(NUM), 0.5, seed=1), whole)
    assert not torch.equal(drop_labels(LABELS, range(1, NUM + 1), 0.5, seed=0), whole)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="--label-dropout must be between 0 and 1"):
        TrainConfig(label_dropout=share)


def test_train_py_drops_labels_in_the_loss_and_keeps_the_noise(tmp_path, monkeypatch):
    data, seen = tiny.make_dataset(tmp_path / "data"), {}

    class Watching(loop.EDM2Loss):
        def terms(self, net, images, labels, rng=None):
            terms = super().terms(net, images, labels, rng)
            seen.setdefault(run, []).append((labels, terms.sigma))
            return terms

    monkeypatch.setattr(loop, "EDM2Loss", Watching)
    config = tiny.write_config(tmp_path / "tiny.yaml", duration_nimg=32)
    for run, more in (("plain", []), ("dropped", ["--label-dropout", "0.5"])):
        command = ["--config", config, "--data", data, "--device", "cpu", "--samples", 0, "--outdir", tmp_path / run]
        done = CliRunner().invoke(train.main, [str(word) for word in [*command, *more]])
        assert done.exit_code == 0, done.output
    assert len(seen["plain"]) == len(seen["dropped"]) == 2
    for k, ((labels, sigma), (dropped, same)) in enumerate(zip(seen["plain"], seen["dropped"], strict=True)):
        assert torch.equal(sigma, same)
        assert torch.equal(dropped, drop_labels(labels, range(16 * k, 16 * k + 16), 0.5, seed=0))
        assert 0 < (dropped.sum(dim=1) == 0).sum() < 16
