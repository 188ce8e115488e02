"""What docs/edm2-options.md says about options that have EDM2's names."""

import dataclasses

import click
import numpy as np
import pytest

from edm2kit.cli import dataset, metrics, train
from edm2kit.data.convert import pick_balanced
from edm2kit.training.config import TrainConfig, config_from_dict, preset_path, read_yaml
from tests.support import ROOT

PAGE = (ROOT / "docs" / "edm2-options.md").read_text()


def test_every_option_of_the_page_exists():
    scripts = {"train.py": train.main, "calculate_metrics.py": metrics.main, "dataset_tool.py": dataset.main}
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    for row in rows:
        command = None
        for word in row.replace("`", "").replace(",", "").split():
            if word in scripts:
                command = scripts[word]
            elif word.startswith("--"):
                assert any(word in parameter.opts for parameter in command.params), word
            elif isinstance(command, click.Group):
                command = command.commands[word]
    assert len(rows) == 9


def test_what_train_does_without_a_preset_differs_from_theirs_as_stated():
    theirs = config_from_dict(read_yaml(preset_path("edm2-img512-s")), "preset")
    defaults = TrainConfig()
    different = {}
    for field in dataclasses.fields(TrainConfig):
        values = getattr(theirs, field.name), getattr(defaults, field.name)
        if values[0] != values[1]:
            different[field.name] = values
    # the default network is the preset's
    assert different.pop("network") == ({"model_channels": 192, "dropout": 0.0}, {})
    assert different == {"duration_nimg": (2 << 30, 1 << 30), "precision": ("fp16", "fp32")}
    assert (defaults.loss_scaling, defaults.adam_eps, defaults.adam_betas) == (1.0, 1e-8, (0.9, 0.99))
    intervals = (defaults.status_every_nimg, defaults.snapshot_every_nimg, defaults.checkpoint_every_nimg)
    assert intervals == (128 << 10, 8 << 20, 128 << 20)


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5])
def test_calc_selects_the_images_that_theirs_does(seed):
    indices = np.arange(1000)
    np.random.RandomState(seed % (1 << 31)).shuffle(indices)
    assert metrics._select(1000, 50, seed) == sorted(indices[:50].tolist())
    assert metrics._select(50, 50, seed) == list(range(50))


def test_convert_takes_equally_many_of_each_class():
    classes = np.array([0, 0, 0, 1, 1, 1])
    assert pick_balanced(6, classes, 2).tolist() == [0, 3]
    assert pick_balanced(6, None, 2).tolist() == [0, 1]
