import math
import re

import pytest
import torch

from edm2kit.cli.generation_options import parse_request
from edm2kit.guidance import Method, Option, Rule, register_method, register_rule, registry
from edm2kit.guidance.combine import Guided
from edm2kit.guidance.interval import GuidanceInterval
from edm2kit.guidance.registry import (
    ALIASES,
    METHODS,
    RULES,
    Choice,
    Parts,
    all_methods,
    all_options,
    drops_condition,
    guide,
    name_by_networks,
    with_current_names,
)
from edm2kit.guidance.table import method_lines
from tests.support.fakes import Constant, Flat

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


# ---- names


def test_old_names_still_work_and_say_what_they_are_called_now(capsys):
    assert guide(Choice("pair", 2.0), Parts(NET, GNET)) == Guided(NET, GNET, 2.0)
    assert "guidance method 'pair' is now called 'autoguidance'" in capsys.readouterr().err
    old = Choice("mixed", 2.0, options={"mixed_share": 0.25}, also=(("joint", 1.5),))
    new = Choice("cfg-plus-autoguidance", 2.0, options={"cfg_plus_autoguidance_share": 0.25}, also=(("cfg", 1.5),))
    assert with_current_names(old) == new
    assert set(ALIASES.values()) <= set(METHODS)
    assert not set(ALIASES) & set(METHODS)


@pytest.mark.parametrize(
    ("choice", "wrong"),
    [
        (Choice("pear"), "there is no guidance method 'pear'; available: none, autoguidance, cfg"),
        (Choice(also=(("pear", 2.0),)), "there is no guidance method 'pear'"),
        (Choice(rule="pear"), "unknown guidance rule 'pear'; available: linear"),
        (Choice(schedule="pear"), "there is no guidance schedule 'pear'; available: constant"),
    ],
)
def test_unknown_names_are_refused_with_those_that_exist(choice, wrong):
    with pytest.raises(ValueError, match=wrong):
        guide(choice, Parts(NET))


def test_cfg_takes_the_guide_network_unless_another_method_needs_it():
    net, uncond, weak = Flat(Constant(1.0), label_dim=3), Flat(Constant(0.0)), Flat(Constant(0.5), label_dim=3)
    assert guide(Choice("cfg", 2.0), Parts(net, uncond)) == Guided(net, uncond, 2.0)
    own = guide(Choice("cfg", 2.0), Parts(net)).negatives[0].source
    both = guide(Choice("cfg", 2.0, also=(("autoguidance", 3.0),)), Parts(net, weak))
    assert [negative.source for negative in both.negatives] == [own, weak]
    with pytest.raises(ValueError, match="needs an unconditional guide network, and this one has classes"):
        guide(Choice("cfg", 2.0), Parts(net, weak))


def test_guidance_by_an_unconditional_network_is_called_cfg():
    net, uncond, weak = Flat(NET, label_dim=3), Flat(GNET), Flat(GNET, label_dim=3)
    choice = Choice("autoguidance", 2.0)
    assert name_by_networks(choice, Parts(net, uncond)) == Choice("cfg", 2.0)
    assert name_by_networks(Choice("pair", 2.0), Parts(net, uncond)) == Choice("cfg", 2.0)
    for parts in (Parts(net, weak), Parts(Flat(NET), uncond), Parts(NET, GNET), Parts(net)):
        assert name_by_networks(choice, parts) == choice
    with_joint = Choice("autoguidance", 2.0, also=(("cfg", 1.5),))
    assert name_by_networks(with_joint, Parts(net, uncond)) == with_joint


def test_whether_the_main_network_goes_without_its_condition():
    net, uncond = Flat(NET, label_dim=3), Flat(GNET)
    assert drops_condition(Choice("cfg", 2.0), Parts(net))
    assert not drops_condition(Choice("cfg", 2.0), Parts(net, uncond))
    assert drops_condition(Choice("cfg", 2.0, also=(("autoguidance", 2.0),)), Parts(net, uncond))
    mixed = Choice("cfg-plus-autoguidance", 2.0)
    assert drops_condition(mixed, Parts(net, uncond))
    assert not drops_condition(mixed, Parts(net, uncond, uncond))
    assert not drops_condition(Choice("pag", 2.0), Parts(net))


# ---- methods from outside


@pytest.fixture
def registries():
    """The registries, restored afterwards."""
    before = dict(METHODS), dict(RULES)
    yield
    for registry_, entries in zip((METHODS, RULES), before, strict=True):
        registry_.clear()
        registry_.update(entries)


def shrink(**changes) -> Method:
    option = Option("shrink-to", float, 0.25, "Value of the constant image")
    negative = changes.pop("negative", lambda parts, *, shrink_to: Constant(shrink_to))
    return Method("away from a constant", "1 main", negative=negative, options=(option,), **changes)


def double(D, negatives, weights, at):
    return 2 * D


@pytest.mark.usefixtures("registries")
def test_a_registered_method_and_rule_work_like_built_in_ones():
    method, rule = shrink(), Rule("twice D", lambda: double)
    register_method("shrink", method)
    register_method("shrink", method)  # again: nothing
    register_rule("double", rule)
    x = torch.zeros(1, 1, 1, 1)
    assert guide(Choice("shrink", 2.0), Parts(NET))(x, torch.tensor(1.0)).item() == 1.75
    assert guide(Choice("shrink", 2.0, options={"shrink_to": 0.5}), Parts(NET))(x, torch.tensor(1.0)).item() == 1.5
    assert guide(Choice("shrink", 3.0, rule="double"), Parts(NET))(x, torch.tensor(1.0)).item() == 2.0
    assert ("shrink", method.options[0]) in all_options()
    assert "shrink: away from a constant (1 main)" in method_lines()
    assert parse_request(["--net", "a", "--guidance-method", "shrink", "--guidance", "2"]).guidance == Choice(
        "shrink", 2.0, options={"shrink_to": 0.25}
    )


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("pag", "'pag' is taken"),
        ("apg", "'apg' is taken"),
        ("pair", "'pair' is taken"),
        ("My Method", "cannot be a name"),
        ("grow", "option 'shrink-to' of grow must start with its owner's name: grow-"),
    ],
)
def test_names_that_cannot_be_registered(name, wrong):
    with pytest.raises(ValueError, match=wrong):
        register_method(name, shrink())


class FakeEntryPoint:
    """One entry point of an installed package."""

    def __init__(self, name, entry, package="somebodys-methods"):
        self.name, self.value, self._entry = name, f"{package}:{name}", entry
        self.dist = type("Distribution", (), {"name": package})

    def load(self):
        if isinstance(self._entry, Exception):
            raise self._entry
        return self._entry


@pytest.mark.usefixtures("registries")
def test_installed_packages_offer_methods_and_a_broken_one_breaks_nothing(monkeypatch, capsys):
    found = [
        FakeEntryPoint("broken", ModuleNotFoundError("No module named 'gone'"), "broken-package"),
        FakeEntryPoint("wrong", 7, "wrong-package"),
        FakeEntryPoint("pag", shrink(), "rude-package"),
        FakeEntryPoint("shrink", shrink()),
        FakeEntryPoint("double", Rule("twice D", lambda: double)),
    ]
    asked = []
    monkeypatch.setattr(registry, "_plugins_loaded", False)
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: asked.append(group) or found)
    guide(Choice("autoguidance", 2.0), Parts(NET, GNET))
    assert asked == []  # built-in names need no packages
    assert guide(Choice("shrink", 2.0, rule="double"), Parts(NET))(torch.zeros(1), torch.tensor(1.0)).item() == 2.0
    assert {"shrink", "pag"} <= set(all_methods())
    assert asked == ["edm2kit.guidance"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "package broken-package offers guidance 'broken', which cannot be loaded and is skipped" in lines[0]
    assert "ModuleNotFoundError: No module named 'gone'" in lines[0]
    assert "package wrong-package" in lines[1]
    assert "rude-package" in lines[2]
    assert METHODS["pag"].source.startswith("Ahn")


@pytest.mark.usefixtures("registries")
def test_an_installed_package_is_found_by_its_entry_points(tmp_path, monkeypatch, capsys):
    (tmp_path / "shrinking.py").write_text(
        "from edm2kit.guidance import Method\n"
        "SHRINK = Method('away from zero', '1 main', negative=lambda parts: lambda x, sigma, condition=None: 0 * x)\n"
    )
    info = tmp_path / "shrinking_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shrinking-methods\nVersion: 1.0\n")
    entries = "[edm2kit.guidance]\nshrink-to-zero = shrinking:SHRINK\nbroken = shrinking:GONE\n"
    (info / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_plugins_loaded", False)
    guided = guide(Choice("shrink-to-zero", 3.0), Parts(NET))
    assert guided(torch.zeros(1), torch.tensor(1.0)).item() == 3.0
    assert "package shrinking-methods offers guidance 'broken'" in capsys.readouterr().err


def test_the_public_names_of_the_room():
    from edm2kit import guidance

    for name in ("guide", "Choice", "Parts", "Guided", "METHODS", "RULES", "register_method", "register_rule"):
        assert hasattr(guidance, name)
    assert {"Method", "Rule", "Option"} <= set(guidance.__all__)


def test_every_text_is_a_full_phrase():
    for name, entry in {**METHODS, **RULES}.items():
        assert entry.summary, name
        assert len(entry.pick_when) > 10, name
        for option in entry.options:
            assert len(option.help.split()) >= 4, option.name
