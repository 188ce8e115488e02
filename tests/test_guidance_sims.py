"""SIMS has no code of its own; docs/guidance.md gives its commands, and these are its promises."""

import math
import re
from pathlib import Path

import pytest
import torch

from guidance.registry import Choice, Parts, guide
from sampling.solvers import edm_sampler
from tests.fakes import Gaussian

ROOT = Path(__file__).parents[1]


def spread(net, gnet, weight, num_steps=256):
    noise = torch.tensor([-1.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    guided = guide(Choice("pair", weight), Parts(net, gnet))
    x = edm_sampler(guided, noise, num_steps=num_steps, dtype=torch.float64)
    return (x[1] - x[0]).item() / 2


@pytest.mark.parametrize("drift", [-0.2, 0.1, 0.3])
def test_omega_1_undoes_a_drift_that_repeats_itself(drift):
    # specs section 10: the base network's variance is off by (1 + drift), that of its copy by (1 + drift)^2
    v = 0.25
    base, copy = Gaussian(0.2, v * (1 + drift)), Gaussian(0.2, v * (1 + drift) ** 2)
    assert spread(base, copy, 2.0) == pytest.approx(math.sqrt(v), rel=5e-4)
    assert abs(spread(base, copy, 1.0) / math.sqrt(v) - 1) > 0.04


def test_an_untrained_copy_changes_nothing():
    base = Gaussian(0.2, 0.3)
    assert spread(base, Gaussian(0.2, 0.3), 3.0, 32) == spread(base, base, 1.0, 32)


def test_the_commands_in_the_document_exist():
    text = (ROOT / "docs" / "guidance.md").read_text()
    block = text.split("## SIMS")[1].split("```")[1].replace("\\\n", " ")
    commands = re.findall(r"[\w/]+\.py .+", block)
    assert len(commands) == 4
    sources = {
        "generate.py": "generate.py pipelines/options.py",
        "train.py": "train.py",
        "scripts/dataset_tool.py": "scripts/dataset_tool.py",
    }
    for command in commands:
        script = command.split()[0]
        known = " ".join((ROOT / file).read_text() for file in sources[script].split())
        for option in re.findall(r"--[\w-]+", command):
            assert f'"{option}"' in known, (script, option)
