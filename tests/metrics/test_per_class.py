"""Distances by class: against the plain formula in each class, with few and many images, and what is left out."""

import dataclasses

import numpy as np
import pytest
import scipy.linalg
import torch

from edm2kit.metrics.per_class import ClassDistance, class_table, distances_by_class
from edm2kit.metrics.scoring import image_features, make_scorer, measure_reference


def rows(count, features, seed, shift=0.0):
    found = np.random.default_rng(seed).normal(shift, 1, (count, features)) * np.linspace(0.5, 2, features)
    return torch.from_numpy(found.astype(np.float32))


def plain_frechet(x, y):
    x, y = x.double().numpy(), y.double().numpy()
    a, b = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(scipy.linalg.sqrtm(a).real @ b @ scipy.linalg.sqrtm(a).real).real
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a + b - 2 * root)


@pytest.mark.parametrize(("per_class", "features", "close"), [(40, 5, 1e-6), (8, 12, 1e-5)], ids=["many", "few"])
def test_each_class_has_the_distance_of_its_own_images(per_class, features, close, capsys):
    generated, real = rows(3 * per_class, features, 1, 0.3), rows(6 * per_class, features, 2)
    labels, real_labels = torch.arange(len(generated)) % 3, torch.arange(len(real)) % 3
    found = distances_by_class(generated, labels, real, real_labels, "fd")
    assert list(found) == [0, 1, 2]
    for number, one in found.items():
        expected = plain_frechet(generated[labels == number], real[real_labels == number])
        assert one == ClassDistance(pytest.approx(expected, rel=close), per_class, 2 * per_class)
    assert ("far too large" in capsys.readouterr().err) == (per_class <= features)


def test_equal_images_are_at_zero():
    x = rows(30, 8, 1)
    labels = torch.arange(30) % 6
    for one in distances_by_class(x, labels, x, labels).values():
        assert one.distance == pytest.approx(0, abs=1e-6)


def test_classes_of_one_image_are_left_out_with_a_warning(capsys):
    x, labels = rows(9, 2, 1), torch.tensor([0] * 4 + [1] * 4 + [2])
    found = distances_by_class(x, labels, x[:8], labels[:8], "fd")
    assert list(found) == [0, 1]
    assert "fd: classes with fewer than 2 generated or real images are left out: 2" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no class has at least 2"):
        distances_by_class(x[:3], torch.arange(3), x, labels)


def test_features_that_are_not_numbers_are_refused():
    x, labels = rows(8, 20, 1), torch.zeros(8, dtype=torch.int64)
    broken = x.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        distances_by_class(broken, labels, x, labels)


def test_the_table_has_a_line_per_class_and_the_mean():
    found = {
        "fd_a": {0: ClassDistance(1.5, 10, 20), 3: ClassDistance(2.5, 9, 21)},
        "fd_b": {0: ClassDistance(10, 10, 20), 3: ClassDistance(30, 9, 21)},
    }
    assert class_table(found, ("cat", "", "", "dog")).splitlines() == [
        "class  images  real  fd_a  fd_b",
        "0 cat      10    20   1.5    10",
        "3 dog       9    21   2.5    30",
        "mean                    2    20",
    ]


def images(seed, count=24):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, 8, 8), np.uint8))


def test_a_scorer_measures_them_from_labelled_batches():
    cpu = torch.device("cpu")
    plain = make_scorer(measure_reference(images(0), ["fd_random"]), cpu)
    labels = torch.arange(24) % 2
    real = image_features(images(0), plain.detectors, cpu)
    scorer = dataclasses.replace(plain, real=real, real_labels=labels, per_class=True, names=("fd_random",))
    batches = [(images(1)[:10], labels[:10]), (images(1)[10:], labels[10:])]
    found = scorer.measure(batches).by_class["fd_random"]
    generated = image_features(images(1), plain.detectors, cpu)["fd_random"]
    assert found == distances_by_class(generated, labels, real["fd_random"], labels)
    with pytest.raises(ValueError, match="classes of all generated images"):
        scorer.measure(images(1))
    with pytest.raises(ValueError, match="real images with classes"):
        dataclasses.replace(scorer, real_labels=None).check_names()
