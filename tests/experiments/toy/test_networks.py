"""The toy's networks: the model, its training, its files, and sampling with every method."""

import pytest
import torch

from edm2kit.experiments.toy import model, training
from edm2kit.experiments.toy.figures import PathRecorder
from edm2kit.experiments.toy.methods import SIGMA_MAX, TOY_METHODS, Nets, sample, start
from edm2kit.experiments.toy.mixture import Mixture
from edm2kit.experiments.toy.model import Blockwise, ScoreDenoiser, ToyNet, fast_score
from edm2kit.experiments.toy.training import Recipe, load_network, network_path, save_network, train
from edm2kit.experiments.toy.tree import components
from edm2kit.guidance.combine import Guided
from edm2kit.guidance.interval import GuidanceInterval
from edm2kit.guidance.second_network.cfg_plus_autoguidance import Interpolation
from tests.support import golden
from tests.support.fakes import Counting, Gaussian

GOLDEN = golden.load("toy.npz")
NETS = Nets(Gaussian(0.4, 0.10), Gaussian(0.4, 0.13), Gaussian(0.1, 0.2))


def golden_net() -> ToyNet:
    net = ToyNet(32)
    weights = golden.part(GOLDEN, "toynet/")
    state = {f"layers.{i}.weight": weights[f"layers.{2 * i}.weight"] for i in range(5)}
    net.load_state_dict({**state, "gain": weights["gain"]})
    return net


def test_the_network_is_golden():
    net, x, sigma = golden_net(), GOLDEN["points"], GOLDEN["sigma"]
    golden.assert_close(net(x, sigma).detach(), GOLDEN["toynet_logp"], 1e-4)
    golden.assert_close(net.score(x, sigma).detach(), GOLDEN["toynet_score"], 1e-4)


def test_the_score_of_many_points_is_that_of_each(monkeypatch):
    monkeypatch.setattr(model, "_BLOCK", 4)
    net, x, sigma = golden_net(), GOLDEN["points"][:11], GOLDEN["sigma"][:11]
    torch.testing.assert_close(fast_score(net, compiled=False)(x, sigma), net.score(x, sigma))
    sizes = []

    def whole(p, s):
        sizes.append(len(p))
        return net.score(p, s) + 100

    mixed = Blockwise(net.score, whole)(x, sigma)
    assert sizes == [4, 4]  # a rest of another size would have to be compiled anew
    torch.testing.assert_close(mixed[8:], net.score(x[8:], sigma[8:]))
    torch.testing.assert_close(mixed[:8], net.score(x[:8], sigma[:8]) + 100)


def test_the_score_stays_differentiable_and_works_inside_a_solver():
    net, x, sigma = golden_net(), GOLDEN["points"], GOLDEN["sigma"]
    net.score(x, sigma).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in net.parameters())
    with torch.no_grad():
        golden.assert_close(net.score(x, sigma), GOLDEN["toynet_score"], 1e-4)


def test_an_untrained_network_is_the_gaussian_of_sigma_data():
    x, sigma = GOLDEN["points"], GOLDEN["sigma"]
    variance = (sigma**2 + 0.25)[:, None]
    torch.testing.assert_close(ToyNet(8).score(x, sigma).detach(), -x / variance)


def test_a_score_becomes_the_denoiser_of_points_as_images():
    truth = Mixture(components("A"))
    x = torch.randn([6, 2, 1, 1])
    D = ScoreDenoiser(truth.score)(x, torch.tensor(0.5))
    assert D.shape == x.shape
    torch.testing.assert_close(D.flatten(1), x.flatten(1) + 0.25 * truth.score(x.flatten(1), 0.5))
    each = ScoreDenoiser(truth.score)(x, torch.full([6], 0.5))
    torch.testing.assert_close(each, D)


# ---- training


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(training, "BATCH_SIZE", 256)
    return Recipe(classes="A", width=32, iterations=100)


def test_training_lowers_the_loss_and_normalises_what_it_trains(quick):
    losses = []
    net = train(quick, 0, compiled=False, on_iteration=lambda i, loss: losses.append(loss))
    assert len(losses) == 100
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert net.gain.abs() > 0
    rows = net.layers[2].weight.norm(dim=1) / 32**0.5
    # an average of normalised weights, so a little shorter
    assert ((rows > 0.9) & (rows < 1.1)).all()


def test_training_depends_on_its_seed_and_recipe_alone(quick, monkeypatch):
    short = Recipe("A", 16, 3)
    first = train(short, 0, compiled=False).state_dict()
    torch.rand(7)
    again, other = train(short, 0, compiled=False).state_dict(), train(short, 1, compiled=False).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])


def test_the_learned_density_falls_off_far_away_whatever_the_seed(quick):
    far = torch.tensor([[1e3, 0.0], [-1e3, 1e3]])
    for seed in range(6):
        net = train(Recipe("A", 16, 15), seed, compiled=False)
        assert net.gain < -0.005
        assert (net(far, torch.tensor(0.05)) < net(far / 2, torch.tensor(0.05))).all()


def test_networks_are_kept_with_what_they_were_made_from(tmp_path, monkeypatch):
    net = golden_net()
    monkeypatch.setitem(training.RECIPES, "guide", Recipe("A", 32, 5))
    save_network(network_path(tmp_path, "guide", 3), net, training.RECIPES["guide"], 3)
    loaded = load_network(tmp_path, "guide", 3)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in net.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(ValueError, match=r"does not exist\. Run `toy_example\.py train"):
        load_network(tmp_path, "guide", 4)
    monkeypatch.setitem(training.RECIPES, "guide", Recipe("A", 32, 6))
    with pytest.raises(ValueError, match=r"was trained as .*'iterations': '5'.*; expected .*'iterations': '6'"):
        load_network(tmp_path, "guide", 3)


def test_a_file_that_is_damaged_renamed_or_of_another_width_is_refused(tmp_path):
    path = network_path(tmp_path, "guide", 3)
    save_network(path, golden_net(), training.RECIPES["guide"], 3)
    path.rename(network_path(tmp_path, "guide", 4))
    with pytest.raises(ValueError, match=r"was trained as .*'seed': '3'.*; expected .*'seed': '4'.* Delete it"):
        load_network(tmp_path, "guide", 4)
    save_network(path, ToyNet(16), training.RECIPES["guide"], 3)
    with pytest.raises(ValueError, match="does not hold the weights of a network of width 32"):
        load_network(tmp_path, "guide", 3)
    for damaged in (path.read_bytes()[:-10], b"", b"no network"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a complete network file"):
            load_network(tmp_path, "guide", 3)


# ---- methods and sampling


def test_methods_are_the_projects_own_guidance():
    assert TOY_METHODS["autoguidance"].denoiser(NETS, 3.0) == Guided(NETS.main, NETS.guide, 3.0)
    assert TOY_METHODS["cfg"].denoiser(NETS, 4.0) == Guided(NETS.main, NETS.both, 4.0)
    assert TOY_METHODS["mixed"].denoiser(NETS, 2.0) == Guided(NETS.main, Interpolation(NETS.both, NETS.guide, 0.5), 2.0)
    assert isinstance(TOY_METHODS["cfg-interval"].denoiser(NETS, 2.0), GuidanceInterval)


@pytest.mark.parametrize("name", TOY_METHODS)
def test_weight_one_is_no_guidance_and_others_are_not(name):
    noise = start(64, seed=0)
    plain = sample(NETS.main, noise)
    assert torch.equal(sample(TOY_METHODS[name].denoiser(NETS, 1.0), noise), plain)
    guided = sample(TOY_METHODS[name].denoiser(NETS, TOY_METHODS[name].weights[-1]), noise)
    assert guided.shape == (64, 2)
    assert (guided - plain).abs().max() > 0.01


def test_sampling_starts_from_the_smoothed_truth_and_takes_32_heun_steps():
    noise = start(20_000, seed=0)
    assert noise.shape == (20_000, 2, 1, 1)
    assert torch.equal(noise, start(20_000, seed=0))
    x = noise.flatten(1) * SIGMA_MAX
    torch.testing.assert_close(x.var(0), torch.tensor([25.11, 25.12]), atol=0.9, rtol=0)
    counting = Counting(NETS.main)
    sample(counting, noise[:2])
    assert len(counting.calls) == 63
    assert counting.calls[0][0] == pytest.approx(5.0)


def test_the_exact_score_samples_the_exact_distribution():
    truth = Mixture(components("A"))
    x = sample(ScoreDenoiser(truth.score), start(256, seed=0))
    level = truth.logp(truth.sample(20_000, torch.Generator().manual_seed(0))).quantile(0.01)
    assert (truth.logp(x) < level).float().mean() < 0.04


def test_a_recorder_takes_every_step_down_and_changes_nothing():
    noise = start(8, seed=0)
    recorder = PathRecorder(TOY_METHODS["cfg-interval"].denoiser(NETS, 2.0))
    assert torch.equal(sample(recorder, noise), sample(recorder.denoiser, noise))
    assert len(recorder.path) == 32
    assert torch.equal(recorder.path[-1].flatten(1), sample(recorder.denoiser, noise))
