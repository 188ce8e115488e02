"""All metrics of a pass: the same bits for any batches, intervals, several references, a loop, refusals."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from edm2kit.metrics.detectors import registry
from edm2kit.metrics.detectors.inception import InceptionV3
from edm2kit.metrics.detectors.registry import DETECTORS, Detector, DetectorSpec, detect, load_detector, load_detectors
from edm2kit.metrics.moments import FeatureStatistics
from edm2kit.metrics.reference import Reference, load_reference, save_adm_reference
from edm2kit.metrics.registry import METRICS
from edm2kit.metrics.scoring import (
    Evaluator,
    image_features,
    image_statistics,
    make_scorer,
    measure_reference,
    score_images,
)

CPU = torch.device("cpu")
NAMES = ["precision", "recall", "density", "coverage", "kid", "mind", "fd_infinity", "vendi", "authpct", "ct"]


def images(seed, count=300, size=8):
    rng = np.random.default_rng(seed)
    smooth = rng.integers(0, 256, (count, 3, 2, 2)).repeat(size // 2, axis=2).repeat(size // 2, axis=3)
    noise = rng.integers(-20, 21, (count, 3, size, size))
    return torch.from_numpy(np.clip(smooth + noise, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def reference():
    return measure_reference(images(0), ["fd_random"])


@pytest.fixture(scope="module")
def scorer(reference):
    plain = make_scorer(reference, CPU, ["all"])
    sets = [image_features(images(seed), plain.detectors, CPU) for seed in (0, 1)]
    return dataclasses.replace(plain, real=sets[0], heldout=sets[1], replicates=200)


@pytest.fixture(scope="module")
def measured(scorer):
    return scorer.measure(images(2))


def test_all_metrics_come_from_one_pass_with_intervals(measured):
    expected = ["fd_random", *(f"fd_random.{name}" for name in NAMES)]
    assert list(measured.values) == expected
    assert set(measured.intervals) == set(expected)
    for name, (low, high) in measured.intervals.items():
        assert low <= measured.values[name] <= high, name
    assert measured.num_images == 300


def test_batches_do_not_change_a_bit(scorer, measured):
    for batch in (1, 7, 64):
        again = scorer.measure(images(2).split(batch))
        assert again.values == measured.values
        assert again.intervals == measured.intervals


def test_plain_distances_have_the_same_bits_in_any_batches(reference):
    plain = make_scorer(reference, CPU)
    assert len({plain.score(images(2, 1100).split(batch))["fd_random"] for batch in (1, 10, 1100)}) == 1


def test_an_interval_does_not_change_the_value(reference, measured):
    assert make_scorer(reference, CPU).score(images(2))["fd_random"] == pytest.approx(measured.values["fd_random"])


def test_a_loop_updates_and_computes(scorer, measured, reference):
    evaluator = Evaluator(scorer)
    for batch in images(2).split(50):
        evaluator.update(batch)
    assert evaluator.compute() == dict(measured.values)
    evaluator.update(images(5))
    assert evaluator.compute() == scorer.score(images(5))  # it forgot the first ones
    plain = Evaluator(make_scorer(reference, CPU))
    plain.update(images(2))
    assert list(plain.compute()) == ["fd_random"]


def test_a_notebook_gives_real_images(reference):
    found = score_images(images(2), reference, ["kid", "fd_random.recall"], real=images(0))
    assert set(found) == {"fd_random", "fd_random.kid", "fd_random.recall"}
    with pytest.raises(ValueError, match="needs real images"):
        score_images(images(2), reference, ["kid"])


def test_several_references_are_scored_in_one_pass(scorer):
    other = measure_reference(images(7), ["fd_random"])
    found = dataclasses.replace(scorer, names=None, real=None, more={"val.npz": other}).measure(images(2))
    assert list(found.values) == ["fd_random", "fd_random@val.npz"]
    assert found.values["fd_random@val.npz"] == score_images(images(2), other)["fd_random"]
    assert set(found.intervals) == set(found.values)


def test_images_of_another_size_than_the_reference_are_warned_of(reference, capsys):
    sized = dataclasses.replace(reference, source={"image_size": [16, 16]})
    make_scorer(sized, CPU).score(images(2))
    assert "those of the reference were [16, 16]" in capsys.readouterr().err
    make_scorer(dataclasses.replace(reference, source={"image_size": [8, 8]}), CPU).score(images(2))
    assert "of the reference" not in capsys.readouterr().err


def test_copies_of_one_image_are_refused(scorer):
    with pytest.raises(ValueError, match="copies of one image"):
        scorer.measure(images(2)[:1].expand(300, -1, -1, -1))


def test_some_copies_are_warned_of(scorer, capsys):
    scorer.measure(torch.cat([images(2)[:1].expand(50, -1, -1, -1), images(2)[:200]]))
    assert "exact copies" in capsys.readouterr().err


def test_fewer_images_than_neighbours_are_refused(scorer):
    with pytest.raises(ValueError, match="expected more images"):
        dataclasses.replace(scorer, names=("recall",)).measure(images(2, 4))


class Broken(nn.Module):
    def forward(self, batch):
        return torch.full([len(batch), 236], torch.nan)


def test_features_that_are_not_numbers_are_refused(scorer):
    detector = dataclasses.replace(scorer.detectors[0], net=Broken())
    with pytest.raises(ValueError, match="not finite"):
        dataclasses.replace(scorer, detectors=[detector]).measure(images(2))


class TwoOutputs(nn.Module):
    """Counts its passes."""

    calls = 0

    def forward(self, batch):
        return self.outputs(batch)["features"]

    def outputs(self, batch):
        type(self).calls += 1
        x = batch.flatten(1).float()
        return {"features": x[:, :3], "spatial": x[:, 3:5]}


def test_detectors_of_one_network_share_its_pass(monkeypatch):
    monkeypatch.setattr(TwoOutputs, "calls", 0)
    common = {"build": TwoOutputs, "sha256": "0", "preprocessing": "none"}
    monkeypatch.setitem(registry.DETECTORS, "fd_two", DetectorSpec(num_features=3, **common))
    monkeypatch.setitem(registry.DETECTORS, "sfd_two", DetectorSpec(num_features=2, output="spatial", **common))
    detectors = load_detectors(["sfd_two", "fd_two"])
    spatial, pooled = detect(detectors, images(0, 4))
    assert TwoOutputs.calls == 1
    assert spatial.tolist() == images(0, 4).flatten(1)[:, 3:5].tolist()
    assert pooled.tolist() == images(0, 4).flatten(1)[:, :3].tolist()
    assert load_detector("sfd_two")(images(0, 4)).shape == (4, 2)


def test_sfid_reads_the_first_seven_channels_of_mixed_6_in_the_order_of_tensorflow():
    torch.manual_seed(0)
    net = InceptionV3()
    seen = []
    net.get_submodule("Mixed_6d.branch1x1").register_forward_hook(lambda module, args, output: seen.append(output))
    outputs = net.outputs(images(0, 2))
    assert DETECTORS["sfid"].num_features == 2023
    # [N, C, H, W] -> height, width, channel
    expected = np.stack([np.transpose(one[:7], (1, 2, 0)).ravel() for one in seen[0].numpy()])
    assert np.array_equal(outputs["spatial"].numpy(), expected)
    assert torch.equal(outputs["features"], net(images(0, 2)))


def test_reference_batches_of_adm_are_written_and_read(tmp_path):
    def random_statistics(name):
        rows = np.random.default_rng(0).normal(size=(20, DETECTORS[name].num_features))
        return FeatureStatistics(rows.mean(axis=0), np.cov(rows, rowvar=False), DETECTORS[name].fingerprint)

    reference = Reference(20, {name: random_statistics(name) for name in ("fid", "sfid")})
    pixels = images(0, 20).permute(0, 2, 3, 1).numpy()
    save_adm_reference(tmp_path / "adm.npz", reference, pixels)
    with np.load(tmp_path / "adm.npz") as arrays:
        assert set(arrays.files) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s"}
        assert np.array_equal(arrays["arr_0"], pixels)
    found = load_reference(tmp_path / "adm.npz")
    for name in ("fid", "sfid"):
        assert np.array_equal(found.of(name).mean, reference.of(name).mean)
        assert np.array_equal(found.of(name).covariance, reference.of(name).covariance)
    np.savez(tmp_path / "samples.npz", arr_0=pixels)
    with pytest.raises(ValueError, match="images without statistics"):
        load_reference(tmp_path / "samples.npz")


def test_the_classifier_score_is_that_of_the_head():
    detector = load_detector("fd_lite0")
    reference = Reference(*image_statistics(images(0, 8), [detector], CPU))
    found = make_scorer(reference, CPU, ["classifier_score"]).measure(images(1, 8))
    probabilities = detector.net.fc(detector(images(1, 8))).double().softmax(dim=1).numpy()
    divergence = probabilities * (np.log(probabilities) - np.log(probabilities.mean(axis=0)))
    assert found.values["fd_lite0.classifier_score"] == pytest.approx(np.exp(divergence.sum(axis=1).mean()), rel=1e-6)


def test_metrics_are_entries_of_a_plain_table():
    assert isinstance(METRICS, dict)
    assert isinstance(load_detector("fd_random"), Detector)
