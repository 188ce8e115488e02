import math

import pytest
import torch

from edm2kit.guidance.base import Method, Parts
from edm2kit.guidance.combine import Combined
from edm2kit.guidance.combine import Guided
from edm2kit.guidance.interval import GuidanceInterval
from edm2kit.guidance.registry import METHODS, Choice, guide
from edm2kit.sampling.solvers import edm_sampler
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import Constant, Counting, Following, Gaussian, Mixture

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn([4, 2, 3, 3], generator=GENERATOR)
SIGMA = torch.tensor([0.1, 0.5, 2.0, 30.0])
MIXTURE = Mixture(torch.randn([3, 2, 3, 3], generator=GENERATOR), 0.2)


def test_negatives_add_up():
    combined = Combined(Constant(5.0), (Constant(3.0), Constant(1.0)), (2.0, 1.5))
    assert combined(X, SIGMA).unique().tolist() == [5 + 1 * (5 - 3) + 0.5 * (5 - 1)]


def test_one_negative_is_the_plain_formula_bitwise():
    one = Combined(MIXTURE, (Gaussian(0.2, 0.3),), (2.1,))
    assert torch.equal(one(X, SIGMA), Guided(MIXTURE, Gaussian(0.2, 0.3), 2.1)(X, SIGMA))


def test_what_has_weight_1_is_never_called():
    off, on = Counting(Constant(0.0)), Counting(Gaussian(0.2, 0.3))
    both = Combined(MIXTURE, (off, on), (1.0, 2.0))
    assert torch.equal(both(X, SIGMA), Guided(MIXTURE, on, 2.0)(X, SIGMA))
    neither = Combined(MIXTURE, (off, on), (1.0, 1.0))
    assert torch.equal(edm_sampler(neither, X, num_steps=3), edm_sampler(MIXTURE, X, num_steps=3))
    assert (len(off.calls), len(on.calls)) == (0, 2)


class Half:
    """A negative halfway between the answer and zero, and how far the map was from the answer."""

    reads = ("block",)

    def beside(self, D, maps, x, sigma, labels):
        return (D + maps["block"]) / 2


def test_a_negative_may_be_made_from_the_positive_answer_and_its_attention():
    def net(x, sigma, labels=None, return_attention=()):
        assert return_attention in ((), ("block",))
        return (torch.full_like(x, 4.0), {"block": torch.full_like(x, 2.0)}) if return_attention else x

    assert Combined(net, (Half(),), (2.0,))(X, SIGMA).unique().tolist() == [5.0]
    assert torch.equal(Combined(net, (Half(),), (1.0,))(X, SIGMA), X)


def test_all_parts_that_are_on_follow_the_run():
    parts = [Following(MIXTURE), Following(Constant(0.0)), Following(Constant(1.0))]
    combined = Combined(parts[0], tuple(parts[1:]), (2.0, 1.0))
    edm_sampler(combined.for_images(StackedGenerator("cpu", range(4))), X, num_steps=1)
    run = [("for_images", 4), ("for_step", 0), ("call", 0), ("after_step", 0)]
    assert [part.heard for part in parts] == [run, run, []]


@pytest.mark.parametrize(("weights", "wrong"), [((2.0, math.nan), "weight is nan"), ((2.0,), "2 negatives with 1")])
def test_wrong_weights_are_refused(weights, wrong):
    with pytest.raises(ValueError, match=wrong):
        Combined(MIXTURE, (MIXTURE, MIXTURE), weights)


# ---- by name


def test_methods_add_up_by_name():
    choice = Choice("pair", 2.0, also=(("truncation", 1.5),))
    combined = guide(choice, Parts(Constant(3.0), Constant(1.0)))
    assert torch.equal(combined(X, SIGMA), 3 + (3 - 1) + 0.5 * (3 - X))


def test_an_interval_and_a_schedule_go_around_them_all():
    choice = Choice("pair", 2.0, (0.28, 2.90), also=(("truncation", 1.5),), schedule="increasing")
    gated = guide(choice, Parts(Constant(3.0), Constant(1.0)))
    assert isinstance(gated, GuidanceInterval)
    assert edm_sampler(gated, X[:, :, :1], num_steps=4).isfinite().all()


def outermost(parts, weight):
    return lambda x, sigma, labels=None: weight * parts.net(x, sigma, labels)


def test_a_method_that_takes_any_denoiser_goes_around_the_sum(monkeypatch):
    monkeypatch.setitem(METHODS, "outer", Method("ten times", "1 main", outermost, around=True))
    choice = Choice("outer", 10.0, also=(("pair", 2.0),))
    assert guide(choice, Parts(Constant(3.0), Constant(1.0)))(X, SIGMA).unique().tolist() == [50.0]


@pytest.mark.parametrize(
    ("choice", "parts", "wrong"),
    [
        (Choice("pair", 2.0, also=(("pair", 3.0),)), Parts(MIXTURE, MIXTURE), "pair is named twice"),
        (Choice("truncation", 2.0, also=(("none", 1.0),)), Parts(MIXTURE), "none does not combine"),
        (Choice("truncation", 2.0, also=(("pair", 3.0),)), Parts(MIXTURE), "needs a guide network"),
        (Choice("truncation", 2.0), Parts(MIXTURE, None, MIXTURE), "takes no unconditional network"),
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
