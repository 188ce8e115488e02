"""What the autoguidance paper's Figure 1 shows, in numbers: the published record, and networks trained here."""

from collections.abc import Callable

import pytest
import torch

from edm2kit.data.workers import num_cpus
from edm2kit.experiments.toy import evaluation
from edm2kit.experiments.toy.measures import Yardstick
from edm2kit.experiments.toy.methods import TOY_METHODS, load_nets, sample, start
from edm2kit.experiments.toy.mixture import Mixture
from edm2kit.experiments.toy.training import RECIPES, network_path, save_network, train
from edm2kit.experiments.toy.tree import components
from edm2kit.models.compilation import can_compile
from tests.support import ROOT

RECORD = ROOT / "experiments" / "toy"
SAMPLES = 8192
_AUTO = (("autoguidance", 2.0), ("autoguidance", 3.0))

Measured = Callable[[str, float], dict[str, float]]  # (method, weight) -> MEASURES


def assert_findings(found: Measured) -> None:
    """Of one training seed. Margins lie two to three standard deviations between seeds from the record's mean."""
    truth, plain = found("truth", 1.0), found("unguided", 1.0)
    auto, strong_auto = found("autoguidance", 2.0), found("autoguidance", 3.0)
    low_noise = found("auto-interval", 3.0)
    cfg, strong_cfg = found("cfg", 2.0), found("cfg", 4.0)
    cut = found("truncation", 1.4)

    # a small network's samples are often off the tree, yet on all its branches
    assert truth["outside"] < 0.015
    assert 0.08 < plain["outside"] < 0.14
    assert plain["lost_mass"] < 0.04

    # autoguidance takes outliers away and raises the density, most of all at low noise
    assert auto["outside"] < 0.95 * plain["outside"]
    assert auto["mean_log_density"] > plain["mean_log_density"]
    assert low_noise["outside"] < 0.9 * plain["outside"]
    assert low_noise["mean_log_density"] > plain["mean_log_density"] + 0.3

    # CFG and truncation lose several times as much of the tree at comparable strength
    assert cfg["lost_mass"] > 2 * auto["lost_mass"]
    assert strong_cfg["lost_mass"] > 1.8 * strong_auto["lost_mass"]
    assert cut["lost_mass"] > 1.3 * strong_auto["lost_mass"]
    assert cut["lost_mass"] > 3 * low_noise["lost_mass"]
    assert cfg["sliced_wasserstein"] > 3 * auto["sliced_wasserstein"]
    assert min(strong_cfg["sliced_wasserstein"], cut["sliced_wasserstein"]) > 3 * strong_auto["sliced_wasserstein"]

    # truncation leaves nothing outside
    assert cut["outside"] < 0.01


def test_the_published_record_shows_the_findings_in_every_seed():
    record = evaluation.load_record(RECORD)
    assert len(record["training_seeds"]) == 5
    assert record["num_samples"] == SAMPLES
    rows = {(row["seed"], row["method"], row["weight"]): row for row in record["rows"]}
    for seed in record["training_seeds"]:
        assert_findings(lambda method, weight, seed=seed: rows[seed, method, weight])
    # what the page says of strong autoguidance: fewer samples outside, some of them very far
    plain, auto, strong = (evaluation.summary(record, *of) for of in (("unguided", 1.0), *_AUTO))
    assert strong["outside"].mean < plain["outside"].mean
    assert strong["mean_log_density"].mean < auto["mean_log_density"].mean


@pytest.fixture
def all_cores():
    threads = torch.get_num_threads()
    torch.set_num_threads(num_cpus())
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
def test_newly_trained_networks_show_the_findings(tmp_path):
    seed = 5  # none of the record's
    for role, recipe in RECIPES.items():
        save_network(network_path(tmp_path, role, seed), train(recipe, seed, can_compile()), recipe, seed)
    nets, noise, truth = load_nets(tmp_path, seed, can_compile()), start(SAMPLES, seed), Mixture(components("A"))
    yardstick = Yardstick.of(truth, SAMPLES, seed)

    def found(method: str, weight: float) -> dict[str, float]:
        if method == "truth":
            return yardstick.measure(truth.sample(SAMPLES, torch.Generator().manual_seed(seed)))
        denoiser = nets.main if method == "unguided" else TOY_METHODS[method].denoiser(nets, weight)
        return yardstick.measure(sample(denoiser, noise))

    assert_findings(found)
