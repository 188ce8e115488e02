import math
from dataclasses import dataclass, field, replace

import pytest
import torch

from edm2kit.denoiser import after_step, for_images, for_step
from edm2kit.guidance.base import Method, Parts
from edm2kit.guidance.combine import Combination, Guided, Negative
from edm2kit.guidance.interval import GuidanceInterval
from edm2kit.guidance.losses.score import LossGuided
from edm2kit.guidance.network_call import Perturbed
from edm2kit.guidance.own_network.dropout_and_noise import InputNoise
from edm2kit.guidance.own_network.sag import SelfAttentionBlur
from edm2kit.guidance.own_network.sliding_window import SlidingWindows
from edm2kit.guidance.registry import METHODS, Choice, guide
from edm2kit.guidance.second_network.cfg_plus_autoguidance import Interpolation
from edm2kit.guidance.weight_schedule import WeightSchedule
from edm2kit.sampling.solvers import edm_sampler
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import ByLabel, Constant, Counting, Following, Gaussian, Jittered, Mixture

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn([4, 2, 3, 3], generator=GENERATOR)
SIGMA = torch.tensor([0.1, 0.5, 2.0, 30.0])
MIXTURE = Mixture(torch.randn([3, 2, 3, 3], generator=GENERATOR), 0.2)
LABELS = torch.tensor([[0.7, 0.2, 0.1]] * 4)


def test_negatives_add_up():
    combined = Combination(Constant(5.0), (Negative(Constant(3.0), 2.0), Negative(Constant(1.0), 1.5)))
    assert combined(X, SIGMA).unique().tolist() == [5 + 1 * (5 - 3) + 0.5 * (5 - 1)]


def test_one_negative_is_the_plain_formula_bitwise():
    one = Combination(MIXTURE, (Negative(Gaussian(0.2, 0.3), 2.1),))
    assert torch.equal(one(X, SIGMA), Guided(MIXTURE, Gaussian(0.2, 0.3), 2.1)(X, SIGMA))


def test_what_has_weight_1_is_never_called():
    off, on = Counting(Constant(0.0)), Counting(Gaussian(0.2, 0.3))
    both = Combination(MIXTURE, (Negative(off, 1.0), Negative(on, 2.0)))
    assert torch.equal(both(X, SIGMA), Guided(MIXTURE, on, 2.0)(X, SIGMA))
    neither = Combination(MIXTURE, (Negative(off, 1.0), Negative(on, 1.0)))
    assert torch.equal(edm_sampler(neither, X, num_steps=3), edm_sampler(MIXTURE, X, num_steps=3))
    assert (len(off.calls), len(on.calls)) == (0, 2)


class Half:
    """A negative halfway between the answer and zero, and how far the map was from the answer."""

    reads = ("block",)

    def derive(self, D, maps, at):
        return (D + maps["block"]) / 2


def test_a_negative_may_be_made_from_the_positive_answer_and_its_attention():
    def net(x, sigma, labels=None, return_attention=()):
        assert return_attention in ((), ("block",))
        return (torch.full_like(x, 4.0), {"block": torch.full_like(x, 2.0)}) if return_attention else x

    assert Combination(net, (Negative(Half(), 2.0),))(X, SIGMA).unique().tolist() == [5.0]
    assert torch.equal(Combination(net, (Negative(Half(), 1.0),))(X, SIGMA), X)


def test_all_parts_that_are_on_follow_the_run():
    parts = [Following(MIXTURE), Following(Constant(0.0)), Following(Constant(1.0))]
    combined = Combination(parts[0], (Negative(parts[1], 2.0), Negative(parts[2], 1.0)))
    edm_sampler(combined.for_images(StackedGenerator("cpu", range(4))), X, num_steps=1)
    run = [("for_images", 4), ("for_step", 0), ("call", 0), ("after_step", 0)]
    assert [part.heard for part in parts] == [run, run, []]


# ---- parts that move x after a step


@dataclass(frozen=True)
class Moving:
    """A network that adds `shift` to x at the end of every step."""

    inner: object
    shift: float
    attention_roles: dict = field(default_factory=dict)
    supported_edits: frozenset = frozenset({"return_attention"})

    def __call__(self, x, sigma, condition=None, /, **edits):
        return self.inner(x, sigma, condition, **edits)

    def for_step(self, i, sigmas):
        return replace(self)  # as real ones do: another object in each step

    def after_step(self, x, i, sigmas):
        return x + self.shift


def moved_by(denoiser):
    sigmas = torch.tensor([2.0, 1.0, 0.0])
    step = for_step(for_images(denoiser, StackedGenerator("cpu", range(4))), 0, sigmas)
    return after_step(step, torch.zeros(1, 1, 1, 1), 0, sigmas).item()


NESTED = {
    "perturbed": lambda moving: Perturbed(moving, InputNoise(0.2)),
    "sag": lambda moving: SelfAttentionBlur(moving, "dec.8x8_in0", 1.0),
    "windows": lambda moving: SlidingWindows(moving),
    "interpolation": lambda moving: Interpolation(moving, Constant(0.0), 0.5),
    "guided": lambda moving: Guided(moving, Constant(0.0), 2.0),
    "combination": lambda moving: Combination(Constant(0.0), (Negative(moving, 2.0),)),
    "loss": lambda moving: LossGuided(moving, lambda D: D.sum(dim=(1, 2, 3)), 0.0),
    "interval": lambda moving: GuidanceInterval(moving, Constant(0.0), 1.0, 3.0),
    "schedule": lambda moving: WeightSchedule(Guided(moving, Constant(0.0), 2.0), lambda u: 0.5),
}


@pytest.mark.parametrize("name", NESTED)
def test_an_inner_part_that_moves_x_after_a_step_is_asked(name):
    nested = NESTED[name](Moving(MIXTURE, 0.25))
    assert moved_by(nested) == 0.25
    assert moved_by(Combination(MIXTURE, (Negative(nested, 2.0),))) == 0.25
    assert moved_by(Combination(MIXTURE, (Negative(nested, 1.0),))) == 0.0  # off


@pytest.mark.parametrize("name", ["perturbed", "sag", "windows"])
def test_a_negative_built_on_the_positive_denoiser_moves_x_once(name):
    moving = Moving(MIXTURE, 0.25)
    assert moved_by(Combination(moving, (Negative(NESTED[name](moving), 2.0),))) == 0.25
    # another one is another matter
    assert moved_by(Combination(Moving(MIXTURE, 0.5), (Negative(NESTED[name](moving), 2.0),))) == 0.75


# ---- by name


def test_methods_add_up_by_name():
    choice = Choice("autoguidance", 2.0, also=(("truncation", 1.5),))
    combined = guide(choice, Parts(Constant(3.0), Constant(1.0)))
    assert torch.equal(combined(X, SIGMA), 3 + (3 - 1) + 0.5 * (3 - X))


def test_an_interval_and_a_schedule_go_around_them_all():
    choice = Choice("autoguidance", 2.0, (0.28, 2.90), also=(("truncation", 1.5),), schedule="increasing")
    gated = guide(choice, Parts(Constant(3.0), Constant(1.0)))
    assert isinstance(gated, GuidanceInterval)
    assert edm_sampler(gated, X[:, :, :1], num_steps=4).isfinite().all()


def outermost(parts, weight):
    return lambda x, sigma, labels=None: weight * parts.net(x, sigma, labels)


def test_a_method_that_takes_any_denoiser_goes_around_the_sum(monkeypatch):
    monkeypatch.setitem(METHODS, "outer", Method("ten times", "1 main", outermost, around=True))
    choice = Choice("outer", 10.0, also=(("autoguidance", 2.0),))
    assert guide(choice, Parts(Constant(3.0), Constant(1.0)))(X, SIGMA).unique().tolist() == [50.0]


@pytest.mark.parametrize(
    ("choice", "parts", "wrong"),
    [
        (
            Choice("autoguidance", 2.0, also=(("autoguidance", 3.0),)),
            Parts(MIXTURE, MIXTURE),
            "autoguidance is named twice",
        ),
        (Choice("truncation", 2.0, also=(("none", 1.0),)), Parts(MIXTURE), "none cannot be combined"),
        (Choice("truncation", 2.0, also=(("autoguidance", 3.0),)), Parts(MIXTURE), "needs a guide network"),
        (Choice("truncation", 2.0), Parts(MIXTURE, None, MIXTURE), "takes no second guide network"),
        (Choice(schedule="cosine"), Parts(MIXTURE), "a schedule needs a weight to change; guidance method none"),
        (Choice(rule="apg"), Parts(MIXTURE), "a rule needs a weighted difference"),
    ],
)
def test_what_does_not_combine_is_refused(choice, parts, wrong):
    with pytest.raises(ValueError, match=wrong):
        guide(choice, parts)


def test_a_method_is_told_in_one_way():
    with pytest.raises(ValueError, match="one of build and negative"):
        Method("nothing", "1 main")


# ---- one negative: Guided


def test_weight_1_is_off_bitwise_and_calls_no_negative():
    negative = Counting(Constant(0.0))
    assert torch.equal(Guided(MIXTURE, negative, 1.0)(X, SIGMA, LABELS), MIXTURE(X, SIGMA, LABELS))
    sampled = edm_sampler(Guided(MIXTURE, negative, 1), X, LABELS, num_steps=4)
    assert torch.equal(sampled, edm_sampler(MIXTURE, X, LABELS, num_steps=4))
    assert negative.calls == []


@pytest.mark.parametrize("weight", [-1.0, 0.0, 0.5, 2.1, 40.0])
def test_equal_parts_make_the_weight_irrelevant(weight):
    assert torch.equal(Guided(MIXTURE, MIXTURE, weight)(X, SIGMA, LABELS), MIXTURE(X, SIGMA, LABELS))


def test_weight_0_is_the_negative():
    assert torch.equal(Guided(MIXTURE, Gaussian(0.2, 0.3), 0.0)(X, SIGMA), Gaussian(0.2, 0.3)(X, SIGMA))


def test_the_answer_is_affine_in_the_weight():
    D = [Guided(MIXTURE, Gaussian(0.2, 0.3), w)(X.double(), SIGMA.double()) for w in (0.5, 1.5, 2.5)]
    torch.testing.assert_close(D[0] - 2 * D[1] + D[2], torch.zeros_like(D[0]), atol=1e-12, rtol=0)
    assert (D[1] - D[0]).abs().max() > 0.1


def test_an_image_does_not_depend_on_its_batch():
    guided = Guided(MIXTURE, Jittered(Gaussian(0.2, 0.3)), 2.0)
    whole = edm_sampler(guided.for_images(StackedGenerator("cpu", range(4))), X, LABELS, num_steps=4)
    for k in range(4):
        alone = guided.for_images(StackedGenerator("cpu", [k]))
        x = edm_sampler(alone, X[k : k + 1], LABELS[k : k + 1], num_steps=4)
        torch.testing.assert_close(x, whole[k : k + 1], atol=1e-6, rtol=1e-5)


def test_an_evaluation_costs_one_call_of_each_part():
    positive, negative = Counting(MIXTURE), Counting(Constant(0.0))
    edm_sampler(Guided(positive, negative, 2.0), X, LABELS)
    assert (len(positive.calls), len(negative.calls)) == (63, 63)
    assert all(labels is LABELS for _, labels in positive.calls + negative.calls)


# ---- closed forms


@pytest.mark.parametrize(("num_steps", "off", "within"), [(32, 1.0175, 1e-4), (256, 1.0002, 1e-4)])
def test_c1_equal_means(num_steps, off, within):
    m, v1, v0, w, T = 0.3, 0.25, 0.36, 2.1, 80.0
    noise = X.double()
    guided = Guided(Gaussian(m, v1), Gaussian(m, v0), w)
    x = edm_sampler(guided, noise, num_steps=num_steps, dtype=torch.float64)
    exact = (T * noise - m) * (v1 / (v1 + T**2)) ** (w / 2) * (v0 / (v0 + T**2)) ** (-(w - 1) / 2)
    # the solver's own error, as specified: 1.7% high with 32 steps, 0.02% with 256
    assert ((x - m) / exact).mean().item() == pytest.approx(off, abs=within)
    # the standard deviation as T grows is the guided one, not that of p1^w / p0^(w-1), which is .4326
    spread = ((x - m) / (noise - m / T)).mean().item() * math.sqrt(T**2 + v1) / T
    assert spread / off == pytest.approx(math.sqrt(v1) * (v1 / v0) ** ((w - 1) / 2), rel=2e-4)


@pytest.mark.parametrize(("num_steps", "within"), [(32, 0.0013), (256, 0.00002)])
def test_c2_equal_variances(num_steps, within):
    v, m1, m0, w, T = 0.25, 0.2, -0.3, 2.1, 80.0
    noise = torch.tensor([m1 - 1, m1, m1 + 1], dtype=torch.float64).reshape(3, 1, 1, 1) / T
    guided = Guided(Gaussian(m1, v), Gaussian(m0, v), w)
    low, mean, high = edm_sampler(guided, noise, num_steps=num_steps, dtype=torch.float64).flatten().tolist()
    assert mean == pytest.approx(m1 + (w - 1) * (m1 - m0) * (1 - math.sqrt(v / (v + T**2))), rel=within)
    # the spread is that of the unguided run
    plain = edm_sampler(Gaussian(m1, v), noise, num_steps=num_steps, dtype=torch.float64).flatten()
    assert high - low == pytest.approx((plain[2] - plain[0]).item(), rel=1e-12)


# ---- the contract


def test_both_parts_see_the_labels():
    guided = Guided(Constant(0.0), ByLabel((1.0, 2.0)), 0.0)
    assert guided(X, SIGMA, torch.tensor([[0.0, 1.0]] * 4)).unique().tolist() == [2.0]


def test_the_parts_are_combined_in_float32():
    def half(value):
        return lambda x, sigma, labels=None: torch.full_like(x, value, dtype=torch.float16)

    D = Guided(half(1.001), half(1.0), 3.0)(X, SIGMA)
    assert D.dtype == torch.float32
    expected = 1 + 3 * (torch.tensor(1.001).half().float() - 1)
    assert torch.equal(D, torch.full_like(D, expected.item()))


def test_float64_stays_float64():
    assert Guided(MIXTURE, Constant(0.0), 2.0)(X.double(), SIGMA.double()).dtype == torch.float64


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused(weight):
    with pytest.raises(ValueError, match="guidance weight is"):
        Guided(MIXTURE, MIXTURE, weight)
    with pytest.raises(ValueError, match="guidance weight is"):
        Negative(MIXTURE, weight)


def test_wrappers_nest():
    inner = Guided(Constant(3.0), Constant(1.0), 2.0)  # 5
    assert Guided(inner, Constant(1.0), 3.0)(X, SIGMA).unique().tolist() == [13.0]
    assert Guided(Constant(3.0), inner, 0.5)(X, SIGMA).unique().tolist() == [4.0]


@pytest.mark.parametrize(("weight", "parts_told"), [(2.0, 2), (1.0, 1)])
def test_the_parts_follow_the_run(weight, parts_told):
    parts = [Following(MIXTURE), Following(Constant(0.0))]
    guided = Guided(Guided(*parts, weight), Constant(0.0), 2.0)
    edm_sampler(guided.for_images(StackedGenerator("cpu", range(4))), X, num_steps=2)
    run = [("for_images", 4)]
    run += [("for_step", 0), ("call", 0), ("call", 0), ("after_step", 0)]
    run += [("for_step", 1), ("call", 1), ("after_step", 1)]
    assert [part.heard for part in parts] == [run] * parts_told + [[]] * (2 - parts_told)
