"""What fd_lite0 sees: the measure itself, on features whose answer is known."""

import torch

from edm2kit.experiments.lite_features import document_parts, measure, neighbour_accuracy
from edm2kit.metrics.registry import METRICS


def test_neighbours_of_separate_classes_are_always_right():
    classes = torch.arange(60) % 3
    features = torch.eye(3)[classes] + 0.01 * torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    assert neighbour_accuracy(features[:30], classes[:30], features[30:], classes[30:]) == 1
    assert neighbour_accuracy(features[:30], (classes[:30] + 1) % 3, features[30:], classes[30:]) == 0


def test_a_detector_is_measured_and_tabled():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (100, 3, 8, 8), dtype=torch.uint8, generator=generator)
    found = measure("fd_random", images, torch.arange(100) % 5, 50)
    assert found["references"] == 75
    assert 0 <= found["neighbour_accuracy"] <= 1
    assert found["distances"]["blurred"] > found["distances"]["real"] > 0
    parts = document_parts({"detectors": {"fd_random": found}})
    assert parts["lite"].count("\n") == 2
    for name in METRICS:
        assert f"`{name}`" in parts["metrics"]
