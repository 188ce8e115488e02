"""docs/own-images.md explains every rule of --auto; docs/imagenet.md states the memory that train.py forecasts."""

import re

import pytest
import torch

from edm2kit.models.networks import build_network, full_architecture
from edm2kit.training.config import config_from_dict, preset_path, read_yaml
from edm2kit.training.log import activation_bytes, make_forecast
from edm2kit.training.recipe import Facts, Speed, settings
from tests.docs.support import code_blocks, page


def test_every_rule_has_a_paragraph_with_its_source():
    facts = Facts(3000, 32, False, 3, 1000.0)
    rules = {setting.rule for setting in settings(facts, Speed(32, 1, 1), 10_000, guide=True, more={"batch_gpu": 8})}
    paragraphs = {
        name: text
        for text in page("docs/own-images.md").split("\n\n")
        for name in re.findall(r"\*\*([\w -]+)\*\*", text)
    }
    assert rules <= set(paragraphs)
    for rule in rules - {"mirror images", "machine"}:
        assert re.search(r"paper|preset|unmeasured", paragraphs[rule]), rule


@pytest.mark.parametrize("name", ["docs/own-images.md", "docs/imagenet.md"])
def test_commands_have_no_gaps(name):
    commands = "\n".join(code_blocks(page(name), ""))
    assert "python " in commands
    assert "..." not in commands


def test_the_memory_of_imagenet_runs_is_what_the_forecast_says():
    table = re.findall(
        r"`--batch-gpu (\d+)` \(([\d.]+) GB\) \| `--batch-gpu (\d+)` \(([\d.]+) GB\)", page("docs/imagenet.md")
    )
    assert len(table) == 2
    for column, preset in ((0, "edm2-img512-s"), (2, "edm2-img512-xs")):
        config = config_from_dict(read_yaml(preset_path(preset)), preset)
        architecture = full_architecture(64, 4, 1000, 0.5, config.network)
        state = make_forecast(config, architecture, 1, 8).memory.state
        with torch.device("meta"):
            net = build_network(architecture).train()
        net.compute_dtype = torch.float16
        one, two = activation_bytes(net, 1), activation_bytes(net, 2)
        for row in table:
            # each further image needs as much as the second one
            needed = state + one + (int(row[column]) - 1) * (two - one)
            assert needed / 1e9 == pytest.approx(float(row[column + 1]), abs=0.15)
