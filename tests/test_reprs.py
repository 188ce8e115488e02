"""What a notebook shows of an object is one to five lines that say what it is, never its weights."""

import re

import numpy as np
import pytest
import torch

import edm2kit
from edm2kit.guidance import METHODS, RULES
from edm2kit.metrics.scoring import Evaluator, make_scorer
from edm2kit.models.adapters import Adapted, Flow
from edm2kit.models.edm2 import freeze_
from edm2kit.models.networks import build_network, full_architecture
from tests.support.fakes import tiny_snapshot
from tests.support.tiny import make_dataset


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Everything that docs/python.md makes, by a word."""
    folder = tmp_path_factory.mktemp("reprs")
    main = edm2kit.load_snapshot(tiny_snapshot(folder / "main.safetensors", label_dim=4))
    guided = edm2kit.Guided(main.net, edm2kit.load_snapshot(tiny_snapshot(folder / "guide", label_dim=4)).net, 2.0)
    engine = edm2kit.Engine(
        guided, main.encoder.decode, edm2kit.Sampler(num_steps=2), (3, 8, 8), 4, torch.device("cpu")
    )
    batch = engine.generate(range(4))
    reference = edm2kit.measure_reference(batch.images, ["fd_random"])
    return {
        "snapshot": main,
        "net": main.net,
        "header": main.header,
        "encoder": main.encoder,
        "guided": guided,
        "parts": edm2kit.Parts(main.net, guided.neg),
        "choice": edm2kit.Choice("autoguidance", 2.0),
        "sampler": edm2kit.Sampler(num_steps=12, solver="dpmpp2m", sigma_min=0.08),
        "engine": engine,
        "batch": batch,
        "dataset": edm2kit.ImageDataset(make_dataset(folder / "data")),
        "reference": reference,
        "statistics": reference.statistics["fd_random"],
        "scorer": make_scorer(reference, torch.device("cpu")),
        "evaluator": Evaluator(make_scorer(reference, torch.device("cpu"))),
        "detector": edm2kit.load_detector("fd_random"),
        "ema": edm2kit.PowerFunctionEMA(main.net, stds=(0.05, 0.1)),
        "any ema": edm2kit.PowerEMA([torch.nn.Parameter(torch.zeros(3))]),
        "loss": edm2kit.EDM2Loss(),
        "generator": edm2kit.StackedGenerator("cpu", range(4)),
        "classes": edm2kit.ClassLabels.of([0, 1], 4),
        "vectors": edm2kit.FloatVectors(torch.zeros(2, 3)),
        "adapted": Adapted(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()), Flow(), "flow"),
        "another guided": edm2kit.Guided(torch.nn.Conv2d(3, 3, 1), lambda x, sigma, condition=None: x, 2.0),
        "solver": edm2kit.heun,
        "frozen": freeze_(edm2kit.load_snapshot(folder / "main.safetensors").net),
    }


WORDS = {
    "snapshot": ["8x8 with 3 channels", "4 classes", "EMA length"],
    "net": ["Precond: UNet", "8x8 with 3 channels", "label_dim 4", "parameters", "float32 on cpu"],
    "header": ["images", "4 classes"],
    "encoder": ["RGBEncoder"],
    "guided": ["Guided(weight=2)", "pos: Precond", "neg: Precond"],
    "parts": ["net: Precond", "gnet: Precond"],
    "choice": ["autoguidance"],
    "sampler": ["dpmpp2m, 12 steps, sigma 80 to 0.08"],
    "engine": ["Guided", "Sampler(heun, 2 steps", "RGBEncoder.decode"],
    "batch": ["4 images of 8x8 pixels", "seeds 0, 1, 2, 3", "classes "],
    "dataset": ["100 images", "uint8 [3, 8, 8]", "4 classes"],
    "reference": ["fd_random of 4 images"],
    "statistics": ["features"],
    "scorer": ["fd_random"],
    "evaluator": ["fd_random"],
    "detector": ["fd_random", "236 features"],
    "ema": ["0.05, 0.1", "Precond"],
    "any ema": ["3 parameters"],
    "loss": ["P_mean=-0.4"],
    "generator": ["4 images"],
    "classes": ["2 images, 4 classes"],
    "vectors": ["2 vectors of 3 numbers"],
    "adapted": ["network: Sequential: 72 parameters"],
    "another guided": ["pos: Conv2d: 12 parameters"],
    "solver": ["heun"],
    "frozen": ["Precond: UNet", "k parameters"],
}


@pytest.mark.parametrize("name", WORDS)
def test_it_says_what_it_is_in_five_lines(name, objects):
    assert set(objects) == set(WORDS)
    shown = repr(objects[name])
    assert len(shown.splitlines()) <= 5
    assert max(map(len, shown.splitlines())) <= 200
    assert not re.search(r"tensor\(|array\(|MPConv", shown), shown
    assert name == "solver" or " at 0x" not in shown
    assert [word for word in WORDS[name] if word not in shown] == [], shown


def test_the_module_tree_stays_available(objects):
    tree = str(objects["net"].unet)
    assert tree.startswith("UNet(\n  (emb_fourier)")
    assert len(tree.splitlines()) > 30


def test_other_kinds_of_networks_say_what_they_are():
    net = build_network(full_architecture(8, 4, 0, 0.5, {"kind": "dit", "num_layers": 2}), "dit")
    shown = repr(net)
    assert "DiT of 2 blocks" in shown
    assert "no labels" in shown


@pytest.mark.parametrize("entry", [*METHODS.values(), *RULES.values()], ids=[*METHODS, *RULES])
def test_entries_of_the_registries(entry):
    lines = repr(entry).splitlines()
    assert len(lines) <= 5
    assert entry.summary in lines[0]
    assert [option.name for option in entry.options[:4] if f"--{option.name}" not in repr(entry)] == []


def test_a_denoiser_of_ones_own_that_is_not_a_dataclass():
    class Mine(edm2kit.Wrapper):
        def __call__(self, x, sigma, condition=None):
            return x

    assert repr(Mine()) == "Mine"
    assert repr(edm2kit.Guided(Mine(), Mine(), 1.5)).splitlines() == [
        "Guided(weight=1.5)",
        "  pos: Mine",
        "  neg: Mine",
    ]


def test_numbers_of_parameters():
    net = torch.nn.Linear(1000, 1500, bias=False)
    assert "1.5 M parameters" in repr(edm2kit.Guided(net, np.sin, 2.0))
