import math
import re

import pytest
import torch

from edm2kit.guidance import registry
from edm2kit.guidance.combine import Guided
from edm2kit.guidance.interval import GuidanceInterval
from edm2kit.guidance.registry import METHODS, Choice, Parts, guide
from tests.support.fakes import Constant

NET, GNET = Constant(1.0), Constant(0.0)


def test_no_method_is_the_network_itself():
    assert guide(Choice(), Parts(NET)) is NET


def test_a_pair_is_guided():
    assert guide(Choice("autoguidance", 2.0), Parts(NET, GNET)) == Guided(NET, GNET, 2.0)


def test_an_interval_goes_around_any_method():
    choice = Choice("autoguidance", 2.0, interval=(0.28, 2.90))
    assert guide(choice, Parts(NET, GNET)) == GuidanceInterval(Guided(NET, GNET, 2.0), NET, 0.28, 2.90)
    assert guide(Choice(interval=(0.28, 2.90)), Parts(NET)) == GuidanceInterval(NET, NET, 0.28, 2.90)


@pytest.mark.parametrize(
    ("choice", "parts", "wrong"),
    [
        (Choice("autoguidance", 2.0), Parts(NET), "autoguidance needs a guide network"),
        (Choice("none", 1.0), Parts(NET, GNET), "none takes no guide network"),
        (Choice("none", 2.0), Parts(NET), "weight 2 without a guidance method"),
        (Choice("autoguidance", math.nan), Parts(NET, GNET), "weight is nan"),
        (Choice("autoguidance", 2.0, interval=(2.0, 1.0)), Parts(NET, GNET), "expected 0 <= lo <= hi"),
    ],
)
def test_what_cannot_be_built_is_refused(choice, parts, wrong):
    with pytest.raises(ValueError, match=wrong):
        guide(choice, parts)


def test_a_method_is_one_registry_line(monkeypatch):
    def truncate(parts, weight, *, truncation_bias):
        return Guided(parts.net, Constant(truncation_bias), weight)

    option = registry.Option("truncation-bias", float, 0.5, "where to go")
    method = registry.Method("naive truncation", "1 main", truncate, options=(option,))
    monkeypatch.setitem(METHODS, "truncation", method)
    denoiser = guide(Choice("truncation", 2.0, options={"truncation_bias": 0.25}), Parts(NET))
    assert denoiser(torch.zeros(1, 1, 1, 1), torch.tensor(1.0)).item() == 1.75
    with pytest.raises(TypeError, match="truncation_baas"):
        guide(Choice("truncation", 2.0, options={"truncation_baas": 0.25}), Parts(NET))


def test_names_read_well_on_the_command_line_and_belong_to_one_method():
    names = [option.name for method in METHODS.values() for option in method.options]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z][a-z0-9-]*", name) for name in [*METHODS, *names])
    for name, method in METHODS.items():
        assert method.summary
        assert method.evaluations
        assert all(option.name.startswith(f"{name}-") and option.help for option in method.options)
