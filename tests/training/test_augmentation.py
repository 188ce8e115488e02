"""Mirrored and augmented training images: exact where they can be, and known to the network."""

import dataclasses
import math

import pytest
import torch
from click.testing import CliRunner

from edm2kit.cli import generate, train
from edm2kit.models.networks import build_network
from edm2kit.snapshots.file_format import read_header
from edm2kit.snapshots.loading import load_snapshot
from edm2kit.training.augmentation import NUM_LABELS, augment, flip_half
from edm2kit.training.config import TrainConfig, refuse_changes, run_id
from tests.support import golden, tiny

IMAGES = torch.rand([64, 3, 16, 16], generator=torch.Generator().manual_seed(0)) * 2 - 1
POSITIONS = range(1000, 1064)


def test_half_of_the_images_are_mirrored_and_nothing_else_happens():
    flipped = flip_half(IMAGES, POSITIONS, seed=0)
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(flipped, IMAGES, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(flipped, IMAGES, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 20 < sum(mirrored) < 44


def test_what_happens_to_an_image_depends_on_its_position_alone():
    images, labels = augment(IMAGES, POSITIONS, seed=3, probability=0.5)
    for rows in (slice(0, 1), slice(10, 17)):
        some, their_labels = augment(IMAGES[rows], list(POSITIONS)[rows], seed=3, probability=0.5)
        assert torch.equal(some, images[rows])
        assert torch.equal(their_labels, labels[rows])
    assert not torch.equal(labels, augment(IMAGES, POSITIONS, seed=4, probability=0.5)[1])


def test_without_other_transformations_images_are_only_mirrored_and_the_label_says_so():
    images, labels = augment(IMAGES, POSITIONS, seed=0, probability=0.0)
    assert labels.shape == (64, NUM_LABELS)
    assert not labels[:, 1:].any()
    for before, after, label in zip(IMAGES, images, labels, strict=True):
        assert torch.equal(after, before.flip(2) if label[0] else before)
    assert 20 < labels[:, 0].sum() < 44


def test_each_transformation_has_the_distribution_of_table_6():
    positions = range(5_000)
    _, labels = augment(torch.zeros(5_000, 1, 2, 2), positions, seed=1, probability=0.12)
    a0, a1, a2, cosine, sine, b, c, a6, a7 = labels.double().T
    assert a0.mean().item() == pytest.approx(0.5, abs=0.03)
    assert a1.mean().item() == pytest.approx(0.06, abs=0.01)
    for values in (a2, sine, b, a6, a7):
        assert (values != 0).double().mean().item() == pytest.approx(0.12, abs=0.02)
    # independent of each other, except for the two shifts
    assert ((a2 != 0) & (sine != 0)).double().mean().item() == pytest.approx(0.0144, abs=0.005)
    assert torch.equal(a6 != 0, a7 != 0)
    for normal in (a2[a2 != 0], a6[a6 != 0]):
        assert normal.std().item() == pytest.approx(1, abs=0.2)
    assert torch.allclose((cosine + 1) ** 2 + sine**2, torch.ones(5_000).double(), atol=1e-5)
    strength = torch.hypot(b, c)[b != 0]
    assert strength.square().mean().item() == pytest.approx(1, abs=0.2)


def only(monkeypatch, **numbers: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture with a bright spot right of and above its centre, after one transformation; and its labels."""
    picture = torch.zeros(1, 1, 32, 32)
    picture[0, 0, 12:14, 22:24] = 1
    draws = {"chosen": torch.ones(1, 5), "coins": torch.ones(1, 2), "angles": torch.full([1, 2], 0.5)}
    draws["chosen"][0, int(numbers["which"])] = 0.0
    draws["angles"][0, 0] = numbers.get("turn", 0.5)
    normal = torch.full([1, 4], numbers.get("normal", 1.0))
    values = iter(draws.values())
    monkeypatch.setattr("edm2kit.torch_utils.rng.StackedGenerator.rand", lambda *_: next(values))
    monkeypatch.setattr("edm2kit.torch_utils.rng.StackedGenerator.randn", lambda *_: normal)
    return augment(picture, [0], seed=0, probability=0.5)


def centre(picture: torch.Tensor) -> tuple[float, float]:
    """Where the mass of a picture is, (x, y) in pixels from the middle, y down."""
    mass = picture[0, 0] / picture.sum()
    places = torch.arange(32) - 15.5
    return float((mass.sum(0) * places).sum()), float((mass.sum(1) * places).sum())


@pytest.mark.parametrize(
    ("numbers", "expected", "label"),
    [
        # the spot is at (7, -3)
        ({"which": 1}, (7 * 2**0.2, -3 * 2**0.2), (2, 1.0)),  # scaling
        ({"which": 2, "turn": 0.75}, (-3, -7), (4, 1.0)),  # a quarter turn against the clock, as rows go down
        ({"which": 3}, (7 * 2**0.2, -3 / 2**0.2), (5, 1.0)),  # wider and lower
        ({"which": 4}, (7 + 4, -3 + 4), (7, 1.0)),  # an eighth of 32 pixels, to the right and down
    ],
)
def test_each_transformation_moves_the_picture_as_its_label_says(monkeypatch, numbers, expected, label):
    picture, labels = only(monkeypatch, **numbers)
    assert centre(picture) == pytest.approx(expected, abs=0.15)
    assert labels[0, label[0]].item() == pytest.approx(label[1], abs=1e-6)


def test_labels_reach_the_network_and_zeros_are_the_same_as_none():
    architecture = {**golden.architecture("cond"), "augment_dim": 9}
    torch.manual_seed(0)
    net = build_network(architecture)
    for name, parameter in net.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(parameter, 0.5)
    x, sigma, labels = torch.randn(2, 3, 16, 16), torch.ones(2), torch.eye(4)[:2]
    with torch.no_grad():
        plain = net(x, sigma, labels)
        assert torch.equal(plain, net(x, sigma, labels, augment=torch.zeros(2, 9)))
        assert not torch.equal(plain, net(x, sigma, labels, augment=torch.ones(2, 9)))
    with pytest.raises(ValueError, match="does not support the edit 'augment'"):
        golden.network("cond")(x, sigma, labels, augment=torch.zeros(2, 9))


def invoke(command, *arguments: object) -> str:
    done = CliRunner().invoke(command, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_an_augmented_run_resumes_to_the_same_bits_and_its_snapshots_generate(tmp_path):
    data = tiny.make_dataset(tmp_path / "data")
    config = tiny.write_config(tmp_path / "tiny.yaml", flip=True, augment=0.3, duration_nimg=96)
    common = ["--config", config, "--data", data, "--device", "cpu", "--samples", 0]
    invoke(train.main, *common, "--outdir", tmp_path / "whole")
    invoke(train.main, *common, "--outdir", tmp_path / "parts", "--duration", 64)
    invoke(train.main, *common, "--outdir", tmp_path / "parts")
    name = "network-snapshot-0000000-0.050.safetensors"
    whole, parts = (load_snapshot(tmp_path / folder / name).net.state_dict() for folder in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert whole["unet.augment_gain"] != 0
    assert read_header(tmp_path / "whole" / name).architecture["augment_dim"] == 9
    net = tmp_path / "whole" / name
    invoke(generate.main, "--net", net, "--seeds", "0", "--steps", 2, "--outdir", tmp_path / "out", "--device", "cpu")
    # fine-tuning can add augmentation to a network without it, and keeps it
    tiny.write_config(tmp_path / "tiny.yaml")
    invoke(train.main, *common, "--outdir", tmp_path / "plain")
    assert "augment_dim" not in read_header(tmp_path / "plain" / name).architecture  # as in snapshots from before
    start = ["--init-from", tmp_path / "plain" / name, "--data", data, "--device", "cpu", "--samples", 0]
    start += ["--duration", 32, "--batch", 16, "--snapshot", 1000, "--workers", 0]
    invoke(train.main, *start, "--augment", 0.3, "--outdir", tmp_path / "tuned")
    start[1] = tmp_path / "tuned" / name
    invoke(train.main, *start, "--outdir", tmp_path / "tuned again")
    assert read_header(tmp_path / "tuned again" / name).architecture["augment_dim"] == 9


def test_latents_and_other_networks_are_refused(tmp_path):
    data = tiny.make_dataset(tmp_path / "data")
    config = tiny.write_config(tmp_path / "tiny.yaml", network={"kind": "dit"})
    refused = CliRunner().invoke(
        train.main,
        ["--config", str(config), "--data", str(data), "--outdir", str(tmp_path / "run"), "--augment", "0.1"],
    )
    assert refused.exit_code == 1
    assert "a dit network takes no augmentation labels" in refused.output


def test_runs_from_before_keep_their_names_and_refuse_to_be_augmented():
    config = TrainConfig()
    changed = dataclasses.replace(config, augment=0.1)
    assert run_id(config, {"a": 1}) == "377d71852ff2fba6"
    assert run_id(changed, {"a": 1}) != run_id(config, {"a": 1})
    with pytest.raises(ValueError, match=r"--augment was 0.0, is now 0.1"):
        refuse_changes({"batch_size": 2048}, changed, "runs/a")


def test_probabilities_are_checked():
    with pytest.raises(ValueError, match="--augment must be between 0 and 1"):
        TrainConfig(augment=1.5)
    assert math.isclose(TrainConfig(augment=0.12).augment, 0.12)
