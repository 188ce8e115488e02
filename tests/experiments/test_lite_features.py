"""What fd_lite0 sees: the measure itself, on features whose answer is known."""

import pytest
import torch

from edm2kit.experiments.lite_features import document_parts, measure, measure_cost, neighbour_accuracy
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
    cost = {"detector": "fd_x", "images": 1000, "ratio": 1.25, "metrics": {}, "load": 0.5}
    cost |= {name: {"cpu_sec": seconds} for name, seconds in (("pass", 8.0), ("besides", 2.0))}
    parts = document_parts({"detectors": {"fd_random": found}, "cost": cost})
    assert parts["lite"].count("\n") == 2
    for name in METRICS:
        assert f"`{name}`" in parts["metrics"]


def test_all_metrics_are_compared_with_a_pass():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8, generator=generator)
    cost = measure_cost("fd_random", images.split(16), 200)
    assert cost["ratio"] == pytest.approx(1 + cost["besides"]["cpu_sec"] / cost["pass"]["cpu_sec"])
    assert cost["images_read"] == 64
    assert cost["pass"]["cpu_sec"] > 0
    wanted = [name for name, metric in METRICS.items() if metric.in_all and not metric.detectors]
    assert list(cost["metrics"]) == ["interval", "pairs", *wanted]
    cost |= {"ratio": 1.25, "pass": {"cpu_sec": 80.0}, "besides": {"cpu_sec": 20.0}}
    cost["metrics"] |= {"pairs": {"cpu_sec": 12.0}, "vendi": {"cpu_sec": 0.0}}
    table = document_parts({"detectors": {}, "cost": cost})["cost"]
    assert "A pass of 200 images with all metrics of `fd_random` costs **1.25 times** the pass" in table
    assert "| all other metrics, all intervals | 20.0 | 0.250 |" in table
    assert "of these: pairs of images (`precision`, `recall`, `density`, `coverage`, `kid`, `knn_agreement`" in table
    assert "`vendi`" not in table
