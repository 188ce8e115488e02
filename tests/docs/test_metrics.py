"""The snippets of docs/metrics.md run, and its tables are those of the program."""

import numpy as np
import torch

from edm2kit.metrics import measure_reference, save_reference
from edm2kit.metrics.detectors.registry import DETECTORS
from edm2kit.metrics.registry import METRICS
from tests.docs.support import code_blocks, page


def images(seed, count=12):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, 8, 8), np.uint8))


def test_the_snippets_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_reference(tmp_path / "photos.npz", measure_reference(images(0), ["fd_random"]))
    names = {
        "device": torch.device("cpu"),
        "real_images": images(0),
        "images": images(1),
        "batches": images(1).split(4),
    }
    for block in code_blocks(page("docs/metrics.md"), "python"):
        exec(block, names)
    assert "fd_lite0.kid" in capsys.readouterr().out


def test_every_detector_and_metric_is_named():
    text = page("docs/metrics.md")
    for name in [*DETECTORS, *METRICS, "fdr"]:
        assert f"`{name}`" in text
