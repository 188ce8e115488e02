"""The tests that every guidance method and every rule must pass, and a pinned value of each method."""

import dataclasses

import pytest
import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance import METHODS, RULES, Choice, Method, Option, Parts, Rule, guide
from edm2kit.guidance.classifier.noise_classifier import ClassifierHeader, NoiseClassifier, save_classifier
from edm2kit.guidance.combine import DerivedNegative, Evaluation
from edm2kit.guidance.option_types import existing_file
from edm2kit.models.edm2 import Precond
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support import golden, guidance_checks
from tests.support.fakes import Constant, Flat
from tests.support.guidance_checks import SIGMAS, Case, Nets

# what the tests of negatives set, so that a method acts in step 1 of 3
EVALUATED = {"sg-prev": {"sg_prev_start": 0.0}}

# methods that lead away from something; the others have closed forms in tests of their own
NEGATIVES = [name for name, method in METHODS.items() if method.negative is not None]

# options of methods that cannot do without; the classifier's file is made by a fixture
COLOUR = {"loss_kind": "colour", "loss_colour": (0.4, 0.0, -0.3)}
EXAMPLES = {
    "classifier": [{"classifier_file": "file"}],
    "loss": [
        COLOUR,
        {**COLOUR, "loss_average": "2", "loss_augment": 0},
        {**COLOUR, "loss_rule": "dps"},
        {**COLOUR, "loss_rule": "freedom", "loss_augment": 2},
        {**COLOUR, "loss_rule": "tfg"},
        {**COLOUR, "loss_backprop": "no"},
    ],
    "sg-prev": [{"sg_prev_start": 0.0}, {"sg_prev_start": 0.0, "sg_prev_space": "velocity"}],
    "higs": [{}, {"higs_t_low": 0.0, "higs_t_high": 1.0}],
}
CASES = guidance_checks.cases(EXAMPLES)


@pytest.fixture(scope="module")
def nets() -> Nets:
    arrays = golden.load("network_cond.npz")
    net = golden.network("cond", golden.part(arrays, "state/"))
    gnet = golden.network("cond", golden.part(golden.load("sampler.npz"), "gstate/"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        uncond = Precond(**{**golden.architecture("cond"), "label_dim": 0}).eval()
    next(parameter for name, parameter in uncond.named_parameters() if name.endswith("out_gain")).data.fill_(1)
    return Nets(
        net.requires_grad_(False),
        gnet.requires_grad_(False),
        uncond.requires_grad_(False),
        arrays["x"],
        arrays["labels"],
    )


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    architecture = {"img_resolution": 16, "img_channels": 3, "num_classes": 4, "width": 8, "levels": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_classifier(path, NoiseClassifier(**architecture), ClassifierHeader(architecture, 0))
    return existing_file(str(path))


@pytest.mark.parametrize("check", guidance_checks.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_method_and_rule(case, check, nets, classifier):
    if case.options.get("classifier_file") == "file":
        case = dataclasses.replace(case, options={"classifier_file": classifier, "classifier_class": None})
    if case.method == "none" and check is not guidance_checks.check_off_at_weight_1:
        with pytest.raises(ValueError, match="without a guidance method"):
            guide(case.choice(2.0), case.parts(nets))
        return
    check(case, nets)


def test_no_method_and_no_rule_is_left_out():
    assert {case.method for case in CASES} == set(METHODS)
    assert {case.rule for case in CASES} == set(RULES)


# ---- the checks find what is wrong


def always_brighter(parts, weight):
    return lambda x, sigma, condition=None: parts.net(x, sigma, condition) * 1.001


def batch_mean(parts):
    return lambda x, sigma, condition=None: parts.net(x, sigma, condition).mean(dim=0, keepdim=True).expand_as(x)


def global_noise(parts):
    return lambda x, sigma, condition=None: torch.randn_like(x)


def twice(parts):
    return lambda x, sigma, condition=None: parts.net(x, sigma, condition) + parts.net(x, sigma, condition)


def itself(parts):
    return parts.net


class RaisesLate:
    """Refuses in the middle of the work."""

    def __init__(self, parts):
        self.net = parts.net
        self.net(torch.zeros(1, 3, 16, 16), torch.tensor(1.0), torch.zeros(1, 4))
        if not hasattr(self.net, "img_resolution"):
            raise ValueError("not this network")


def batch_mean_rule(D, negatives, weights, at):
    return D - D.mean(dim=0, keepdim=True)


@pytest.mark.parametrize(
    ("check", "method"),
    [
        ("off_at_weight_1", Method("changes images at weight 1", "1 main", always_brighter)),
        ("images_do_not_depend_on_their_batch", Method("mixes images", "2 main", negative=batch_mean)),
        ("it_is_deterministic", Method("global random numbers", "1 main", negative=global_noise)),
        ("it_costs_what_is_stated", Method("says 2, takes 3", "2 main", negative=twice)),
        ("it_guides_inside_its_interval_only", Method("guides nothing", "2 main", negative=itself)),
        ("it_acts_on_any_denoiser_or_refuses", Method("a silent no-op", "2 main", negative=itself)),
        ("it_acts_on_any_denoiser_or_refuses", Method("refuses late", "2 main", negative=RaisesLate)),
    ],
    ids=lambda value: getattr(value, "summary", value),
)
def test_a_wrong_method_fails(monkeypatch, nets, check, method):
    monkeypatch.setitem(METHODS, "wrong", method)
    with pytest.raises(AssertionError):
        getattr(guidance_checks, f"check_{check}")(Case("wrong"), nets)


def test_a_wrong_rule_fails(monkeypatch, nets):
    monkeypatch.setitem(RULES, "wrong", Rule("mixes images", lambda: batch_mean_rule))
    with pytest.raises(AssertionError):
        guidance_checks.check_images_do_not_depend_on_their_batch(Case(rule="wrong", gnet="weak"), nets)


def test_a_registered_method_is_enrolled(monkeypatch):
    option = Option("shrink-to", float, 0.0, "Value of the constant image")
    shrink = Method("away from a constant", "1 main", negative=lambda parts, *, shrink_to: Constant(shrink_to))
    monkeypatch.setitem(METHODS, "shrink", dataclasses.replace(shrink, options=(option,)))
    monkeypatch.setitem(RULES, "mine", Rule("mine", lambda: batch_mean_rule))
    names = [str(case) for case in guidance_checks.cases(EXAMPLES)]
    assert "shrink" in names
    assert "rule-mine" in names


# ---- methods that lead away from something


def parts_of(name, nets, net=None) -> Parts:
    method = METHODS[name]
    return Parts(
        net or nets.net, nets.gnet if method.needs_gnet else None, nets.uncond if method.takes_uncond else None
    )


def in_step(denoiser, seeds=(0, 1, 2), first_step=None):
    """`denoiser` in the middle of a run over images with these seeds; `first_step` is what it does in the step before.

    Most methods do not care, so that without it, none is taken.
    """
    run = for_images(denoiser, StackedGenerator("cpu", seeds))
    if first_step is not None:
        first_step(for_step(run, 0, SIGMAS))
    return for_step(run, 1, SIGMAS)


def evaluate(name, weight, nets, parts=None, labels=None, **options):
    labels = nets.labels if labels is None else labels
    guided = guide(Choice(name, weight, options={**EVALUATED.get(name, {}), **options}), parts or parts_of(name, nets))
    first_step = None
    if METHODS[name].remembers:
        first_step = lambda step: step(5 * nets.x, SIGMAS[0], labels)  # noqa: E731
    return in_step(guided, first_step=first_step)(nets.x, torch.tensor(1.0), labels)


# what makes the negative equal to the positive
@dataclasses.dataclass(frozen=True)
class Neutral:
    options: dict = dataclasses.field(default_factory=dict)
    net: object = None
    no_labels: bool = False


NEUTRAL = {
    "autoguidance": Neutral(),
    "cfg": Neutral(no_labels=True),
    "cfg-plus-autoguidance": Neutral({"cfg_plus_autoguidance_share": 1.0}),
    "truncation": Neutral(net=lambda x, sigma, labels=None: x),
    "pag": Neutral({"pag_blocks": ()}),
    "seg": Neutral({"seg_sigma": 0.1}),
    "sag": Neutral(net=Flat(Constant(0.3))),
    "icg": Neutral({"icg_kind": "class"}, net=Flat(Constant(0.3), label_dim=4)),
    "tsg": Neutral({"tsg_scale": 0.0}),
    "sliding-window": Neutral({"sliding_window_size": 16}),
    "dropout": Neutral({"dropout_rate": 0.0}),
    "input-noise": Neutral({"input_noise_delta": 0.0}),
    "slg": Neutral({"slg_blocks": ()}),
    "s2": Neutral({"s2_share": 0.0}),
    "tpg": Neutral({"tpg_blocks": ()}),
    "erg": Neutral({"erg_blocks": ()}),
    "self-guidance": Neutral({"self_guidance_shift": 0.0}),
    "sg-prev": Neutral({"sg_prev_space": "denoised"}, net=Flat(Constant(0.3))),
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_an_equal_negative_makes_the_weight_irrelevant(name, nets):
    neutral = NEUTRAL[name]
    net = neutral.net or nets.net
    parts = Parts(net, net if METHODS[name].needs_gnet else None)
    labels = torch.zeros_like(nets.labels) if neutral.no_labels else nets.labels
    plain = net(nets.x, torch.tensor(1.0), labels)
    for weight in (-1.0, 0.0, 3.0):
        D = evaluate(name, weight, nets, parts, labels, **neutral.options)
        torch.testing.assert_close(D, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NEGATIVES)
def test_weight_0_is_the_negative(name, nets):
    method, parts = METHODS[name], parts_of(name, nets)
    options = {option.keyword: option.default for option in method.options} | EVALUATED.get(name, {})
    negative, sigma = method.negative(parts, **options), torch.tensor(1.0)
    first_step = None
    if method.remembers:
        x, D = 5 * nets.x, nets.net(5 * nets.x, SIGMAS[0], nets.labels)
        first_step = lambda step: step.derive(D, {}, Evaluation(x, SIGMAS[0], nets.labels, 0, SIGMAS))  # noqa: E731
    negative = in_step(negative, first_step=first_step)
    if isinstance(negative, DerivedNegative):
        reads = negative.reads
        D, maps = (
            nets.net(nets.x, sigma, nets.labels, return_attention=reads)
            if reads
            else (nets.net(nets.x, sigma, nets.labels), {})
        )
        D_neg = negative.derive(D, maps, Evaluation(nets.x, sigma, nets.labels, 1, SIGMAS))
    else:
        D_neg = negative(nets.x, sigma, nets.labels)
    torch.testing.assert_close(evaluate(name, 0.0, nets), D_neg, atol=1e-5, rtol=1e-5)  # in one batch, or in two


@pytest.mark.parametrize("name", NEGATIVES)
def test_the_answer_is_affine_in_the_weight(name, nets):
    D = [evaluate(name, weight, nets) for weight in (0.5, 2.0, 3.5)]
    torch.testing.assert_close(D[0] - 2 * D[1] + D[2], torch.zeros_like(D[0]), atol=2e-5, rtol=0)
    assert (D[1] - D[0]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["pag", "seg"])
def test_no_blocks_is_unperturbed_bitwise(name, nets):
    keyword = f"{name}_blocks"
    options = {option.keyword: option.default for option in METHODS[name].options} | {keyword: ()}
    negative = METHODS[name].negative(Parts(nets.net), **options)
    plain = nets.net(nets.x, torch.tensor(1.0), nets.labels)
    assert torch.equal(negative(nets.x, torch.tensor(1.0), nets.labels), plain)
    with pytest.raises(ValueError, match=r"'dec\.8x8_in1' is not .*; available: enc\.8x8_block0, dec\.8x8_in0"):
        evaluate(name, 0.0, nets, **{keyword: ("dec.8x8_in1",)})


# made by this code; what any of these methods answers must not change unnoticed
PINNED = {
    "autoguidance": [-0.0518171, 0.8180327, 0.1527351],
    "cfg": [-0.005511739, 0.5396271, 0.8399166],
    "cfg-plus-autoguidance": [-0.04362627, 0.8003178, 0.412371],
    "truncation": [-0.09322222, 1.352241, -2.224031],
    "pag": [-0.004006665, 0.5151248, 0.6322109],
    "seg": [-0.008510504, 0.5161609, 0.6701782],
    "sag": [-0.006040624, 0.4202520, 0.6104354],
    "icg": [-0.0136283, 0.5382223, 0.667915],
    "tsg": [-0.004440649, 0.5164438, 0.7146304],
    "sliding-window": [-0.008547747, 0.5383838, 0.6685704],
    "dropout": [-0.009078891, 0.5238252, 0.6123187],
    "input-noise": [-0.002641278, 0.6394369, 0.7536359],
    "slg": [-0.006761364, 0.515669, 0.6481912],
    "s2": [-0.003169913, 0.5161374, 0.6481912],
    "tpg": [-0.009171311, 0.5169609, 0.6172436],
    "erg": [-0.008296233, 0.5162215, 0.6707335],
    "self-guidance": [-0.009833564, 0.5201491, 0.6532518],
    "sg-prev": [-0.01096541, 0.9694957, 1.330303],
}


# the settings they were made with, if other than the defaults
PINNED_OPTIONS = {"icg": {"icg_own": "no"}, "tsg": {"tsg_scale": 0.3, "tsg_power": 0.0}}


@pytest.mark.parametrize("name", NEGATIVES)
def test_pinned_values(name, nets):
    D = evaluate(name, 2.0, nets, **PINNED_OPTIONS.get(name, {}))
    measured = [D.mean().item(), D.std().item(), D[1, 2, 3, 4].item()]
    assert measured == pytest.approx(PINNED[name], rel=1e-4, abs=1e-5)
