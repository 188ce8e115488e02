"""EMA lengths compared on networks whose best length is known, and copies found where they were planted."""

import dataclasses

import numpy as np
import pytest
import torch

from edm2kit.data.dataset import open_source
from edm2kit.experiments.runs import copies, ema_lengths
from edm2kit.experiments.runs.folder import RunFolder
from edm2kit.snapshots.file_format import Header
from edm2kit.training.config import TrainConfig
from tests.support import tiny


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return open_source(tiny.make_dataset(tmp_path_factory.mktemp("images"), num_images=40))


class Fake:
    """A network with a known error: D = x0 + bias is not possible without x0, so it scales what it gets."""

    def __init__(self, scale: float):
        self.net, self.encoder = Scaled(scale), None


class Scaled(torch.nn.Module):
    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, x, sigma, labels=None, return_logvar=False):
        c_skip = 0.25 / (sigma**2 + 0.25)
        return self.scale * c_skip[:, None, None, None] * x, torch.zeros(len(x), 1, 1, 1)


def run_with(images, *times: int) -> RunFolder:
    header = Header({}, {"kind": "rgb"}, 0, 0.05, None, "float16", "run", {})
    headers = {f"{t}": dataclasses.replace(header, nimg=t) for t in times}
    config = TrainConfig(data=str(images.path), encoder={"kind": "rgb"}, cond=False)
    return RunFolder(images.path, config, {}, [], [], 0, headers, {})


@pytest.mark.parametrize(
    ("scales", "found"), [({0.05: 0.5, 0.1: 0.9, 0.14: 1.0}, True), ({0.05: 0.5, 0.1: 1.0, 0.14: 0.9}, False)]
)
def test_the_best_length_is_found_by_loss(images, monkeypatch, scales, found):
    from edm2kit.models.encoders import make_encoder

    snapshots = []
    for std, scale in scales.items():
        snapshot = Fake(scale)
        snapshot.encoder = make_encoder({"kind": "rgb"})
        snapshots.append((std, snapshot))
    monkeypatch.setattr(ema_lengths, "rebuilt", lambda run: iter(snapshots))
    monkeypatch.setattr(ema_lengths, "load_weights", lambda weights, device, dtype: weights)
    check = ema_lengths.check_by_loss(run_with(images, 1, 2), images, None, torch.device("cpu"), 30)
    assert "training images (there are no held-out ones" in check.seen
    assert len(check.rows) == 3
    assert [("0.14 is" in one.evidence, "--outstd 0.14" in one.advice) for one in check.findings] == [
        (True, True)
    ] * found
    heldout = ema_lengths.check_by_loss(run_with(images, 1, 2), images, images, torch.device("cpu"), 30)
    assert "on 30 held-out images" in heldout.seen


def test_one_time_is_not_enough(images):
    check = ema_lengths.check_by_loss(run_with(images, 5), images, None, torch.device("cpu"), 30)
    assert "snapshots at two times are needed" in check.not_looked


def test_authpct_is_that_of_the_metric_and_copies_are_close():
    rng = np.random.default_rng(0)
    training = torch.from_numpy(rng.standard_normal((200, 8)).astype(np.float32))
    fresh = torch.from_numpy(rng.standard_normal((100, 8)).astype(np.float32))
    found = copies.nearest_images(training, fresh)
    assert 0.3 < found.share < 0.7
    distances = torch.cdist(fresh.double(), training.double())
    assert (found.nearest == distances.argmin(dim=1).numpy()).all()
    own = torch.cdist(training.double(), training.double()).fill_diagonal_(torch.inf).amin(dim=1)
    assert found.closeness == pytest.approx((distances.amin(dim=1) / own[found.nearest]).numpy(), rel=1e-5)
    copied = copies.nearest_images(training, training[:100] + 1e-3 * fresh)
    assert copied.share == 0
    assert (copied.nearest == np.arange(100)).all()
    assert copied.closeness.max() < 0.01


class Engine:
    def __init__(self, images):
        self.engine, self.images = self, images

    def batches(self, seeds, batch_size):
        for start in range(0, len(seeds), batch_size):
            yield type("Batch", (), {"images": self.images[start : min(start + batch_size, len(seeds))]})


@pytest.mark.parametrize("copying", [True, False])
def test_a_network_that_copies_is_found(images, tmp_path, monkeypatch, capsys, copying):
    half = np.arange(0, 40, 2)
    from edm2kit.data.holdout import Part

    training, heldout = Part(images, half, {}), Part(images, half + 1, {})
    made = training.read(np.arange(20)) if copying else heldout.read(np.arange(20))[:, :, ::-1].copy()
    monkeypatch.setattr(copies, "prepare", lambda request, device: Engine(torch.from_numpy(made)))
    sheet = tmp_path / "pairs.png"
    arguments = (run_with(images, 5), training, None, torch.device("cpu"), 20, sheet, "fd_random")
    check = copies.check_copies(*arguments)
    assert len(check.findings) == copying
    assert sheet.exists()
    assert "of 20 generated images, by fd_random features, against 20 training images" in check.seen
    if copying:
        assert "AuthPct 0.0%" in check.findings[0].evidence
        assert training.item_name(0) in check.rows[0]
    shown = capsys.readouterr().err
    assert "generated images: 100%" in shown
    assert "features of training images: 100%" in shown
    compared = copies.check_copies(*arguments[:2], heldout, *arguments[3:])
    assert "of 20 held-out images" in compared.seen
    assert len(compared.findings) == copying


def test_what_cannot_be_compared_is_said(images, monkeypatch):
    class Latents:
        item_dtype = np.dtype(np.float32)

    run = run_with(images, 5)
    assert "latents" in copies.check_copies(run, Latents(), None, torch.device("cpu"), 8).not_looked
    empty = dataclasses.replace(run, headers={})
    assert "no snapshot" in copies.check_copies(empty, images, None, torch.device("cpu"), 8).not_looked

    def missing(names, device):
        raise ValueError("install the extra lite")

    monkeypatch.setattr(copies, "load_detectors", missing)
    assert "install the extra lite" in copies.check_copies(run, images, None, torch.device("cpu"), 8).not_looked
