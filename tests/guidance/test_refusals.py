"""Settings that cannot work are refused by every method, rule and schedule before anything is evaluated."""

import dataclasses
import math

import pytest
import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.classifier.noise_classifier import ClassifierHeader, NoiseClassifier, save_classifier
from edm2kit.guidance.option_types import existing_file
from edm2kit.guidance.registry import METHODS, RULES, Choice, Parts, all_options, guide
from edm2kit.guidance.reuse import Reuse
from edm2kit.guidance.weight_schedule import SCHEDULES
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.network64 import CLASSES, EDITS, Network64

NET, GNET = (Network64(torch.Generator().manual_seed(seed)) for seed in (0, 1))
X = torch.randn([3, 3, 16, 16], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
LABELS = torch.eye(CLASSES, dtype=torch.float64)[:3]
SIGMAS = torch.tensor([5.0, 1.0, 0.2, 0.0], dtype=torch.float64)
REQUIRED = {"loss": {"loss_kind": "colour", "loss_colour": (0.4, 0.0, -0.3)}, "sg-prev": {"sg_prev_start": 0.0}}
INSIDE = ["pag", "seg", "sag", "tsg", "slg", "s2", "tpg", "erg", "dropout"]  # methods that change a network inside


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    architecture = {"img_resolution": 16, "img_channels": 3, "num_classes": CLASSES, "width": 8, "levels": 2}
    save_classifier(path, NoiseClassifier(**architecture), ClassifierHeader(architecture, 0))
    return existing_file(str(path))


def choice_of(name, classifier, weight=2.0, **settings):
    options = {"classifier_file": classifier} if name == "classifier" else REQUIRED.get(name, {})
    return Choice(name, weight, options={**options, **settings.pop("options", {})}, **settings)


def parts_of(name, net=NET, gnet=GNET):
    return Parts(net, gnet if METHODS[name].needs_gnet else None)


def refused(choice, parts, reason):
    """`guide` raises ValueError of one line with `reason`, and no network was evaluated."""
    before = [len(net.images) for net in (parts.net, parts.gnet or GNET)]
    with pytest.raises(ValueError, match=reason) as caught:
        guide(choice, parts)
    assert len(str(caught.value).splitlines()) == 1
    assert [len(net.images) for net in (parts.net, parts.gnet or GNET)] == before


def test_each_method_accepts_what_the_others_here_change(classifier):
    for name in METHODS:
        guide(choice_of(name, classifier, 1.0 if name == "none" else 2.0), parts_of(name))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite(name, weight, classifier):
    refused(choice_of(name, classifier, weight), parts_of(name), f"weight is {weight}")


@pytest.mark.parametrize("name", [name for name in METHODS if name != "none"])
def test_a_second_weight_that_is_not_finite(name, classifier):
    choice = choice_of("truncation" if name == "autoguidance" else "autoguidance", classifier)
    refused(
        dataclasses.replace(choice, also=((name, math.nan),)), Parts(NET, GNET), r"weight is nan|cannot be combined"
    )


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs_gnet])
def test_a_guide_network_that_is_missing(name, classifier):
    refused(choice_of(name, classifier), Parts(NET), f"{name} needs a guide network, and none was given")


@pytest.mark.parametrize("name", [n for n, method in METHODS.items() if not (method.needs_gnet or method.takes_gnet)])
def test_a_guide_network_that_would_not_be_used(name, classifier):
    refused(choice_of(name, classifier), Parts(NET, GNET), f"{name} takes no guide network, and one was given")


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.takes_uncond])
def test_a_second_guide_network_that_would_not_be_used(name, classifier):
    refused(choice_of(name, classifier), Parts(NET, parts_of(name).gnet, GNET), "takes no second guide network")


# ---- options


@pytest.mark.parametrize(("owner", "option"), all_options(), ids=lambda value: getattr(value, "name", ""))
def test_every_option_reads_its_default_and_refuses_what_is_none_of_its_values(owner, option):
    if isinstance(option.default, str | int | float):
        assert option.parse(str(option.default)) == option.default
        assert option.checked(option.default) == option.default
    for text in ("nan", "-inf", "certainly not a value", ""):
        with pytest.raises(ValueError) as caught:
            option.parse(text)
        assert len(str(caught.value).splitlines()) == 1
        with pytest.raises(ValueError, match=f"--{option.name}: "):
            option.checked(text)


NUMBERS = [(owner, option) for owner, option in all_options() if type(option.default) in (int, float)]


@pytest.mark.parametrize(("owner", "option"), NUMBERS, ids=lambda value: getattr(value, "name", ""))
def test_a_number_out_of_range_is_refused_from_python_too(owner, option, classifier):
    options = {option.keyword: math.nan}
    if owner in RULES:
        choice = Choice("autoguidance", 2.0, options=options, rule=owner)
        refused(choice, Parts(NET, GNET), f"--{option.name}: 'nan' is not a")
    else:
        refused(choice_of(owner, classifier, options=options), parts_of(owner), f"--{option.name}: 'nan' is not a")


def test_texts_from_python_mean_what_they_mean_on_the_command_line():
    by_text = guide(Choice("pag", 2.0, options={"pag_blocks": "dec.8x8_in0,enc.8x8_block0"}), Parts(NET))
    assert by_text.negatives[0].source.change.blocks == ("dec.8x8_in0", "enc.8x8_block0")


# ---- rules


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.negative is None])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "linear"])
def test_a_rule_without_a_difference_to_combine(rule, name, classifier):
    weight = 1.0 if name == "none" else 2.0
    refused(choice_of(name, classifier, weight, rule=rule), parts_of(name), f"method {name} has none")


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.negative is None])
def test_reuse_without_a_difference_to_reuse(name, classifier):
    weight = 1.0 if name == "none" else 2.0
    refused(choice_of(name, classifier, weight, reuse=Reuse(every=2)), parts_of(name), f"method {name} has none")


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.remembers and method.negative])
def test_reuse_of_what_costs_nothing(name, classifier):
    refused(
        choice_of(name, classifier, reuse=Reuse(once=True)), parts_of(name), "evaluates nothing that could be saved"
    )


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_cannot_be_combined(name, classifier):
    if METHODS[name].negative is not None or METHODS[name].around:
        return
    choice = choice_of(name, classifier, also=(("truncation", 1.4),))
    refused(choice, parts_of(name), f"method {name} cannot be combined with other methods")


# ---- schedules and intervals


def is_led_away_from_one(name):
    return METHODS[name].negative is not None


@pytest.mark.parametrize("name", METHODS)
def test_cfg_plus_plus_needs_exactly_one_negative_and_a_weight_in_its_range(name, classifier):
    schedule = "cfg-plus-plus"
    if not is_led_away_from_one(name):
        reason = "without a guidance method" if name == "none" else "puts the noise of one negative back"
        refused(choice_of(name, classifier, schedule=schedule), parts_of(name), reason)
        return
    for weight in (0.5, 2.5):
        reason = rf"takes weights 1 \+ lambda from 1 \(off\) to 2, and the weight is {weight}"
        refused(choice_of(name, classifier, weight, schedule=schedule), parts_of(name), reason)
    other = "truncation" if name != "truncation" else "input-noise"
    choice = choice_of(name, classifier, 1.6, schedule=schedule, also=((other, 1.2),))
    refused(choice, parts_of(name), "has 2")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name not in ("constant", "cfg-plus-plus")])
def test_a_schedule_without_a_weight_to_change(name, schedule, classifier):
    choice = choice_of(name, classifier, 1.0 if name == "none" else 2.0, schedule=schedule)
    if is_led_away_from_one(name) or name in ("reg", "classifier", "loss", "higs"):
        guide(choice, parts_of(name))
    elif name != "none":
        refused(choice, parts_of(name), "a schedule needs a weight to change")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("interval", [(2.0, 1.0), (-1.0, 1.0), (math.nan, 1.0)])
def test_an_interval_that_runs_backwards(name, interval, classifier):
    choice = choice_of(name, classifier, 1.0 if name == "none" else 2.0, interval=interval)
    refused(choice, parts_of(name), "expected 0 <= lo <= hi")


# ---- the interior of networks


def network(**limits):
    return dataclasses.replace(NET, generator=torch.Generator().manual_seed(0), images=[], **limits)


def refusal(name, net):
    """The reason why the method refuses this network, before it is evaluated; None if it changes what it answers."""
    try:
        guided = guide(choice_of(name, None), parts_of(name, net))
    except ValueError as error:
        reason = str(error)
    else:
        run = for_images(guided, StackedGenerator("cpu", range(3)))
        changes = []
        for i, sigma in enumerate(SIGMAS[:-1]):
            x = sigma * X
            changes.append((for_step(run, i, SIGMAS)(x, sigma, LABELS) - net(x, sigma, LABELS)).abs().max())
        assert max(changes) > 1e-6, "does nothing on this network, and does not say so"
        return None
    assert net.images == []
    return reason


# a network whose only attention is there: methods that have no block of their own to act on
REFUSED_SIDES = {
    (): {"pag", "seg", "sag", "slg", "s2", "tpg", "erg"},
    ("encoder",): {"seg", "tpg"},
    ("middle",): {"tpg"},
    ("decoder",): {"pag", "seg", "erg"},
    ("encoder", "middle"): {"tpg"},
    ("encoder", "middle", "decoder"): set(),
}


@pytest.mark.parametrize("sides", REFUSED_SIDES, ids=lambda sides: "-".join(sides) or "none")
def test_a_network_without_the_attention_that_a_method_acts_on(sides):
    reasons = {name: refusal(name, network(sides=sides)) for name in INSIDE}
    assert {name for name, reason in reasons.items() if reason} == REFUSED_SIDES[sides]
    assert all("attention" in reason for reason in reasons.values() if reason)


NEEDS = {
    "attention": {"pag", "seg", "tpg", "erg"},
    "return_attention": {"sag"},
    "embedding": {"tsg"},
    "dropout": {"dropout"},
    "skip": {"slg", "s2"},
}


@pytest.mark.parametrize("missing", NEEDS)
def test_a_network_that_lacks_an_edit(missing):
    reasons = {name: refusal(name, network(supported_edits=EDITS - {missing})) for name in INSIDE}
    assert {name for name, reason in reasons.items() if reason} == NEEDS[missing]
    assert all(f"supports the edit {missing}" in reason for reason in reasons.values() if reason)


def test_no_method_that_changes_a_network_inside_is_left_out():
    assert set(NEEDS) == EDITS
    names = [name for name in METHODS if name not in ("none", "classifier")]
    found = {name for name in names if refusal(name, network(supported_edits=frozenset()))}
    assert found == set(INSIDE) == set().union(*NEEDS.values())
