"""Several metrics in one pass."""

import numpy as np
import pytest
import torch

from edm2kit.metrics.detectors.registry import load_detector
from edm2kit.metrics.frechet import frechet_distance
from edm2kit.metrics.moments import FeatureStatistics
from edm2kit.metrics.reference import Reference, save_reference
from edm2kit.metrics.scoring import (
    distances,
    image_features,
    image_statistics,
    make_scorer,
    measure_reference,
    score_images,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def detector():
    return load_detector("fd_random")


def images(seed, count=40):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, 8, 8), np.uint8))


def test_statistics_are_those_of_the_features_whatever_the_batches(detector):
    features = detector(images(0)).double().numpy()
    for batch in (1, 7, 40):
        count, statistics = image_statistics(images(0).split(batch), [detector], CPU)
        found = statistics["fd_random"]
        assert count == 40
        assert found.fingerprint == detector.fingerprint
        np.testing.assert_allclose(found.mean, features.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False), atol=1e-6)


def test_a_scorer_gives_the_distance_from_its_reference(detector, tmp_path, capsys):
    _, real = image_statistics([images(0)], [detector], CPU)
    count, fake = image_statistics([images(1)], [detector], CPU)
    save_reference(tmp_path / "ref.npz", Reference(count, real))
    expected = frechet_distance(*vars_of(fake), *vars_of(real))
    scorer = make_scorer(tmp_path / "ref.npz", CPU)
    assert scorer.score([images(1)]) == {"fd_random": pytest.approx(expected, rel=1e-9)}
    assert scorer.score([images(0)])["fd_random"] == pytest.approx(0, abs=1e-9)
    assert "40 images is far too large" in capsys.readouterr().err


def vars_of(statistics):
    return statistics["fd_random"].mean, statistics["fd_random"].covariance


def test_a_notebook_scores_images_in_two_calls(detector, tmp_path):
    reference = measure_reference(images(0), ["fd_random"])
    _, fake = image_statistics([images(1)], [detector], CPU)
    expected = {"fd_random": pytest.approx(distances(fake, reference)["fd_random"], rel=1e-9)}
    assert score_images(images(1), reference) == expected
    assert score_images(images(1).split(7), reference, ["fd_random"]) == expected
    save_reference(tmp_path / "ref.npz", reference)
    assert score_images(images(1), tmp_path / "ref.npz") == expected


def test_features_are_those_of_the_detector(detector):
    found = image_features(images(0).split(7), [detector], CPU)
    torch.testing.assert_close(found["fd_random"], detector(images(0)))


def test_too_few_images_are_refused(detector):
    for count in (0, 1):
        with pytest.raises(ValueError, match=f"at least 2 images; got {count}"):
            image_statistics([images(0, count)], [detector], CPU)


def test_an_error_among_the_batches_is_raised(detector):
    with pytest.raises(ValueError, match="broken"):
        image_statistics(broken(), [detector], CPU)


def broken():
    yield images(0)
    raise ValueError("broken")


def test_what_the_reference_lacks_is_refused_before_weights_are_sought(detector, tmp_path):
    _, real = image_statistics([images(0)], [detector], CPU)
    save_reference(tmp_path / "ref.npz", Reference(40, real))
    with pytest.raises(ValueError, match="no fid, only fd_random"):
        make_scorer(tmp_path / "ref.npz", CPU, ["fid"])


def test_distances_refuse_statistics_of_another_detector(detector):
    _, real = image_statistics([images(0)], [detector], CPU)
    other = {"fd_random": FeatureStatistics(*vars_of(real), "another")}
    with pytest.raises(ValueError, match="another detector"):
        distances(real, Reference(40, other))
