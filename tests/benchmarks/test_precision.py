"""Half precision against float32 and other seeds: the comparison of sets of images, and what the page says of it."""

import pytest
import torch

from benchmarks import precision, report
from benchmarks.precision import FLOAT32, OTHER_SEEDS
from benchmarks.precision_report import verdict
from edm2kit.metrics.detectors.registry import load_detector
from edm2kit.metrics.scoring import measure_reference

SIZE = 24
CPU = torch.device("cpu")


def pictures(seed: int) -> torch.Tensor:
    """Random smooth images, uint8 [SIZE, 3, 16, 16]."""
    coarse = torch.rand(SIZE, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear") * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def rows():
    first = pictures(0)
    nearly = (first.int() + torch.tensor([0, 2, 0, 0] * 4)).clamp(0, 255).to(torch.uint8)
    sets = {FLOAT32: first, OTHER_SEEDS: pictures(1), "near": nearly, "far": 255 - pictures(2)}
    return precision.compare(sets, load_detector("fd_random"), measure_reference(pictures(3), ["fd_random"]), CPU)


def test_pixels_are_compared_image_by_image():
    dark, light = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    assert precision.pixel_difference(dark, light) == precision.pixel_difference(light, dark) == 255
    light[0] = 0
    assert precision.pixel_difference(dark, light) == 127.5


def test_each_set_stands_beside_float32_and_beside_other_seeds(rows):
    assert rows[FLOAT32]["pixels"] == 0
    assert rows[FLOAT32]["from_fp32"] is None
    assert rows[OTHER_SEEDS]["from_others"] is None
    assert rows[FLOAT32]["from_others"] == pytest.approx(rows[OTHER_SEEDS]["from_fp32"], rel=1e-3)  # both ways
    assert 0.3 < rows["near"]["pixels"] <= 0.5 < rows[OTHER_SEEDS]["pixels"]
    assert 0 <= rows["near"]["from_fp32"] < rows[OTHER_SEEDS]["from_fp32"]
    assert rows["near"]["from_others"] == pytest.approx(rows[FLOAT32]["from_others"], rel=0.2)
    for row in rows.values():
        value, low, high = row["from_real"]
        assert low < value < high


def test_without_a_reference_nothing_is_compared_with_it(rows):
    sets = {FLOAT32: pictures(0), OTHER_SEEDS: pictures(1)}
    found = precision.compare(sets, load_detector("fd_random"), None, CPU)
    assert "from_real" not in found[FLOAT32]
    assert found[OTHER_SEEDS]["from_fp32"] == rows[OTHER_SEEDS]["from_fp32"]


def test_ways_that_this_machine_is_slow_at_are_named(monkeypatch):
    monkeypatch.setattr(
        precision, "slow_precision", lambda dtype, device: "no instructions" if dtype == torch.float16 else None
    )
    monkeypatch.setattr(precision, "can_compile", lambda: True)
    ways, skipped = precision.ways_here(compiled=True, half=False, device=CPU)
    assert set(ways) == {"bf16", "bf16, compiled"}
    assert skipped == {"images in fp16": "no instructions"}
    ways, skipped = precision.ways_here(compiled=False, half=True, device=CPU)
    assert set(ways) == {"bf16", "fp16"}
    assert "--compiled" in skipped["images in bf16, compiled"]


def test_a_gpu_has_all_ways(monkeypatch):
    monkeypatch.setattr(precision, "slow_precision", lambda dtype, device: None)
    monkeypatch.setattr(precision, "can_compile", lambda: False)  # that is a question for CPUs
    ways, skipped = precision.ways_here(compiled=True, half=False, device=torch.device("cuda"))
    assert ways == precision.WAYS
    assert skipped == {}


PROVENANCE = {"commit": "0" * 40, "python": "3.11", "torch": "2.13", "numpy": "2", "hardware": "a CPU"}


def row(pixels, from_fp32, from_others, real):
    return {
        "pixels": pixels,
        "from_fp32": from_fp32,
        "from_others": from_others,
        "from_real": [real, real - 2, real + 2],
    }


def test_the_page_has_a_row_and_a_verdict_for_each_way():
    ways = {
        FLOAT32: row(0.0, None, 60.0, 90.0),
        OTHER_SEEDS: row(40.0, 60.0, None, 91.0),
        "bf16": row(0.4, 0.6, 60.1, 90.5),
    }
    record = {"job": "precision", "detector": "fd_x", "num": 7, "reference": {}, "presets": {"tiny": ways}}
    record |= {"command": "", "provenance": PROVENANCE, "notes": {"skipped": {"images in fp16": "this CPU is slow"}}}
    record["reference"] = {"file": "real.npz", "num_images": 9}
    text = report.performance_text({"precision": record})
    assert "| tiny | fp32 | 0.00 |  | 60.00 | 90.0 (88.0 to 92.0) |" in text
    assert "| tiny | bf16 | 0.40 | 0.60 | 60.10 | 90.5 (88.5 to 92.5) |" in text
    assert "- tiny, bf16: no worse than other seeds; 1.0% of their difference in pixels, 1.0% of the distance" in text
    assert text.count("no worse") == 1
    assert "images in fp16 (record `precision`, a CPU, torch 2.13, Python 3.11): that CPU is slow" in text


@pytest.mark.parametrize(
    ("worse", "named"),
    [
        (row(50.0, 0.6, 60.0, 90.0), "the images **changed more**"),
        (row(0.4, 70.0, 60.0, 90.0), "the set **changed more**"),
        (row(0.4, 0.6, 60.0, 99.0), "the distance from real images **changed more**"),
    ],
)
def test_a_way_that_changes_more_than_other_seeds_is_reported(worse, named):
    assert named in verdict("x", worse, row(0.0, None, 60.0, 90.0), row(40.0, 60.0, None, 91.0))
