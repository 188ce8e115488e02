"""--holdout: training is that on the other images, bit for bit, and the losses are those of the longest EMA."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from edm2kit.cli import train
from edm2kit.data.dataset import open_source
from edm2kit.data.holdout import split
from edm2kit.models.encoders import make_encoder
from edm2kit.snapshots.loading import load_snapshot
from edm2kit.training.checkpoint import list_checkpoints
from edm2kit.training.config import TrainConfig
from edm2kit.training.heldout_loss import HeldoutLoss
from edm2kit.training.loss import EDM2Loss, noise_bins
from tests.support import tiny

CHANGES = {"duration_nimg": 2048, "snapshot_every_nimg": 1024, "checkpoint_every_nimg": 1024, "batch_size": 128}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return tiny.make_dataset(tmp_path_factory.mktemp("data"), num_images=60)


def options(folder: Path, data: Path, **changes: object) -> list[str]:
    network = {**tiny.TINY["network"], "dropout": 0.1, "channel_mult": [1], "attn_resolutions": []}
    config = tiny.write_config(folder / "tiny.yaml", network=network, **{**CHANGES, **changes})
    return ["--config", str(config), "--data", str(data), "--device", "cpu", "--samples", "0"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(train.main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory, images) -> Path:
    folder = tmp_path_factory.mktemp("run")
    done = invoke(*options(folder, images), "--outdir", folder / "run", "--holdout", 10)
    assert done.exit_code == 0, done.output
    assert "50 items of 3x8x8" in done.output
    assert "10 more are held out" in done.output
    assert "on 10 held-out images" in done.output
    return folder / "run"


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(list_checkpoints(run_dir)[-1], weights_only=True)["net"]


def test_the_weights_are_those_of_a_run_on_the_other_images_alone(run, images, tmp_path):
    others = shutil.copytree(images, tmp_path / "others")
    labels = json.loads((others / "dataset.json").read_text())["labels"]
    heldout = split(open_source(images), 10)[1]
    gone = {heldout.item_name(k) for k in range(10)}
    for name in gone:
        (others / name).unlink()
    (others / "dataset.json").write_text(json.dumps({"labels": [pair for pair in labels if pair[0] not in gone]}))
    done = invoke(*options(tmp_path, others), "--outdir", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "run" / "heldout.jsonl").exists()
    ours, theirs = final_weights(run), final_weights(tmp_path / "run")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [[json.loads(line)["loss"] for line in (r / "stats.jsonl").open()] for r in (run, tmp_path / "run")]
    assert losses[0] == losses[1]


def test_losses_are_those_of_the_snapshot_on_the_images(run, images):
    records = [json.loads(line) for line in (run / "heldout.jsonl").open()]
    assert [record["nimg"] for record in records] == [1024, 2048]
    config = TrainConfig(**tiny.TINY)
    sides = split(open_source(images), 10)
    net = load_snapshot(run / "network-snapshot-0000002-0.100.safetensors").net
    measured = HeldoutLoss(config, make_encoder({"kind": "rgb"}), *sides, 4, torch.device("cpu")).measure(net)
    assert measured["images"] == records[1]["images"] == 10
    for side in ("heldout", "training"):
        # snapshots are stored in float16
        assert measured[side]["loss"] == pytest.approx(records[1][side]["loss"], abs=2e-3)
        assert records[1][side].keys() <= {"loss", *(name for name, _, _ in noise_bins(-0.4, 1.0))}


def test_means_by_noise_level_and_their_errors(images):
    """A network whose error is known: D = 0 and u = 0, so that the loss is weight * mean(x^2)."""
    training, heldout = split(open_source(images), 30)
    config, encoder = TrainConfig(), make_encoder({"kind": "rgb"})

    class Zero(torch.nn.Module):
        def forward(self, x, sigma, labels=None, return_logvar=False):
            return torch.zeros_like(x), torch.zeros(len(x), 1, 1, 1)

    class Levels(EDM2Loss):
        """Every second image at noise level 0.1, the others at 10."""

        def terms(self, net, images, labels, rng=None):
            sigma = torch.tensor([0.1, 10.0]).repeat(len(images))[: len(images)]
            return super().terms(net, images, labels, rng)._replace(sigma=sigma)

    net = Zero().train()
    before = torch.get_rng_state()
    found = HeldoutLoss(config, encoder, training, heldout, 30, torch.device("cpu"), Levels()).measure(net)
    assert torch.equal(before, torch.get_rng_state())
    assert net.training
    low, high = (next(n for n, a, b in noise_bins(-0.4, 1.0) if a <= sigma < b) for sigma in (0.1, 10.0))
    assert found["heldout"].keys() == {"loss", low, high}
    assert found["gap_error"].keys() == {"loss", low, high}
    mean = 0.5 * (found["heldout"][low] + found["heldout"][high])
    assert found["heldout"]["loss"] == pytest.approx(mean, rel=1e-6)
    again = HeldoutLoss(config, encoder, training, heldout, 8, torch.device("cpu"), Levels()).measure(net)
    assert again["heldout"]["loss"] == pytest.approx(found["heldout"]["loss"], rel=1e-6)


def test_gap_errors_are_standard_errors(images):
    training, heldout = split(open_source(images), 30)
    encoder = make_encoder({"kind": "rgb"})

    class Known:
        """The loss of an image is its mean pixel value; all noise levels are 1."""

        def terms(self, net, images, labels, rng):
            from edm2kit.training.loss import LossTerms

            return LossTerms(images, torch.ones(len(images)))

    found = HeldoutLoss(TrainConfig(), encoder, training, heldout, 7, torch.device("cpu"), Known()).measure(
        torch.nn.Identity()
    )
    variances = []
    for source in (training, heldout):
        values = [float(source[k][0].astype(np.float64).mean() / 127.5 - 1) for k in range(30)]
        variances.append(np.var(values, ddof=1) / 30)
    assert found["gap_error"]["loss"] == pytest.approx(math.sqrt(sum(variances)), rel=1e-5)


def test_a_run_resumes_with_the_same_images_only(run, images, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    done = invoke(*options(tmp_path, images), "--outdir", copy, "--holdout", 12)
    assert done.exit_code == 1
    assert "--holdout was 10.0, is now 12.0" in done.output
    done = invoke(*options(tmp_path, images), "--outdir", copy, "--holdout", 10, "--duration", 3072)
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["nimg"] for line in (copy / "heldout.jsonl").open()] == [1024, 2048, 3072]


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(run, images, tmp_path):
    done = tiny.run("train.py", *options(tmp_path, images), "--outdir", tmp_path / "run", "--holdout", 10, ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = ([json.loads(line) for line in (r / "heldout.jsonl").open()] for r in (run, tmp_path / "run"))
    for first, second in zip(one, two, strict=True):
        assert first["nimg"] == second["nimg"]
        for side in ("heldout", "training", "gap_error"):
            assert second[side] == pytest.approx(first[side], rel=2e-3, abs=2e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"holdout": -0.1}, "--holdout must be a share below 1 or a whole number"),
        ({"holdout": 10.5}, "--holdout must be a share below 1 or a whole number"),
        ({"holdout": 0.1, "snapshot_every_nimg": 0}, "--snapshot 0 writes none"),
    ],
)
def test_wrong_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_an_unreadable_image_is_named(images):
    sides = split(open_source(images), 10)

    class Damaged:
        def __getattr__(self, name):
            return getattr(sides[1], name)

        def __len__(self):
            return 10

        def read(self, indices):
            raise ValueError("img00000040.png: is cut short")

    with pytest.raises(ValueError, match=r"img00000040\.png"):
        HeldoutLoss(TrainConfig(), make_encoder({"kind": "rgb"}), sides[0], Damaged(), 4, torch.device("cpu")).measure(
            torch.nn.Identity()
        )
