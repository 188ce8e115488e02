"""What docs/differences.md says about options that have the names of NVlabs/edm2."""

import dataclasses
import re

import click
import numpy as np
import pytest

from edm2kit.cli import dataset, generate, metrics, phema, train
from edm2kit.cli.image_source import selection
from edm2kit.training.config import TrainConfig, config_from_dict, preset_path, read_yaml
from tests.support import ROOT

PAGE = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
COMMANDS = {
    "train.py": train.main,
    "generate.py": generate.main,
    "calculate_metrics.py": metrics.main,
    "reconstruct_phema.py": phema.main,
    "scripts/dataset_tool.py": dataset.main,
}
ROWS = [
    (row[0], option)
    for row in re.findall(r"^\| `([\w./]+\.py)` \|([^|]*)\|", PAGE, re.MULTILINE)
    for option in re.findall(r"`(--[\w-]+)`", row[1])
]


def options_of(command):
    """All options of a command, or of all subcommands of a group."""
    commands = command.commands.values() if isinstance(command, click.Group) else [command]
    return {
        name for one in commands for parameter in one.params for name in (*parameter.opts, *parameter.secondary_opts)
    }


@pytest.mark.parametrize(("script", "option"), ROWS)
def test_every_option_exists_in_its_command(script, option):
    assert option in options_of(COMMANDS[script])


def test_no_option_is_both_the_same_and_different():
    assert len(ROWS) == len(set(ROWS))
    assert len(ROWS) > 50


def test_training_without_a_preset_differs_from_theirs_as_stated():
    theirs = config_from_dict(read_yaml(preset_path("edm2-img512-s")), "preset")
    defaults = TrainConfig()
    different = {}
    for field in dataclasses.fields(TrainConfig):
        values = getattr(theirs, field.name), getattr(defaults, field.name)
        if values[0] != values[1]:
            different[field.name] = values
    # the default network is the preset's
    assert different.pop("network") == ({"model_channels": 192, "dropout": 0.0}, {})
    assert different == {
        "duration_nimg": (2 << 30, 1 << 30),
        "precision": ("fp16", "fp32"),
        "encoder": ({"kind": "vae"}, {"kind": "auto"}),
    }
    assert (defaults.loss_scaling, defaults.adam_eps, defaults.adam_betas) == (1.0, 1e-8, (0.9, 0.99))
    intervals = (defaults.status_every_nimg, defaults.snapshot_every_nimg, defaults.checkpoint_every_nimg)
    assert intervals == (128 << 10, 8 << 20, 128 << 20)


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5])
def test_calc_selects_the_images_that_theirs_does(seed):
    indices = np.arange(1000)
    np.random.RandomState(seed % (1 << 31)).shuffle(indices)
    assert selection(1000, 50, seed) == sorted(indices[:50].tolist())
    assert selection(50, 50, seed) == list(range(50))
