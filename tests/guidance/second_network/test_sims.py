"""SIMS has no code of its own; docs/guidance.md gives its commands, and these are its promises."""

import contextlib
import math
import re

import click
import pytest
import torch
from click.testing import CliRunner

from edm2kit.cli import dataset as dataset_tool
from edm2kit.cli import generate, train
from edm2kit.data.dataset import ImageDataset
from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.sampling.solvers import edm_sampler
from tests.support import ROOT, tiny
from tests.support.fakes import Gaussian, tiny_snapshot


def spread(net, gnet, weight, num_steps=256):
    noise = torch.tensor([-1.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    guided = guide(Choice("autoguidance", weight), Parts(net, gnet))
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


def test_the_recipe_runs_and_the_copy_learns_each_image_under_its_own_class(tmp_path):
    tiny_snapshot(tmp_path / "base.safetensors")
    commands = [
        (generate, "--net base.safetensors --seeds 995-1014 --balanced --outdir synthetic --subdirs --steps 2"),
        (dataset_tool, "convert --source synthetic --dest synthetic.zip"),
        (
            train,
            "--config tiny.yaml --init-from base.safetensors --data synthetic.zip --lr 0.002 --decay 0 --rampup 0 "
            "--duration 32 --samples 0 --outdir sims",
        ),
        (
            generate,
            "--net base.safetensors --gnet sims/network-snapshot-0000000-0.100.safetensors --guidance 2 --seeds 0 "
            "--outdir out --steps 2",
        ),
    ]
    tiny.write_config(tmp_path / "tiny.yaml", network={})
    with contextlib.chdir(tmp_path):
        for module, words in commands:
            words += "" if module is dataset_tool else " --device cpu"
            done = CliRunner().invoke(module.main, words.split())
            assert done.exit_code == 0, done.output
    synthetic = ImageDataset(tmp_path / "synthetic.zip")
    # seed s was drawn in class s % 4, whatever folder it lies in
    assert [int(synthetic[k][1].argmax()) for k in range(20)] == [seed % 4 for seed in range(995, 1015)]
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


def test_the_commands_in_the_document_exist():
    text = (ROOT / "docs" / "guidance.md").read_text()
    block = text.split("## SIMS")[1].split("```")[1].replace("\\\n", " ")
    commands = re.findall(r"[\w/]+\.py .+", block)
    assert len(commands) == 4
    tools = {"generate.py": generate.main, "train.py": train.main, "scripts/dataset_tool.py": dataset_tool.main}
    for command in commands:
        script, *words = command.split()
        tool = tools[script]
        if isinstance(tool, click.Group):
            tool = tool.commands[words[0]]
        known = [name for parameter in tool.params for name in parameter.opts]
        for option in re.findall(r"--[\w-]+", command):
            assert option in known, (script, option)
