"""Every method, rule and schedule has a test in its authors' variables, or docs/guidance.md says why it has none."""

import ast
import re
from pathlib import Path

import pytest

from edm2kit.guidance.registry import METHODS, RULES
from edm2kit.guidance.weight_schedule import SCHEDULES
from tests.guidance.test_authors_coordinates import SAME_INPUT

ROOT = Path(__file__).parents[2]
HERE = "tests/guidance"
_COMMON = f"{HERE}/test_authors_coordinates.py::test_a_step_is_that_of_combined_noise_predictions"
_SCHEDULES = f"{HERE}/test_weight_schedule.py::test_the_authors_step_in_noise_predictions"

# where a step, or a run, is compared with the authors' formula in their variables
TESTS = {
    **dict.fromkeys(
        (
            "autoguidance", "cfg", "cfg-plus-autoguidance", "truncation", "pag", "seg", "icg", "tsg", "sliding-window",
            "erg", "dropout", "s2", "tpg",
        ),
        _COMMON,
    ),
    "slg": f"{HERE}/own_network/test_slg.py::test_the_authors_step_with_a_network_that_lacks_the_block",
    "reg": f"{HERE}/second_network/test_reg.py::test_the_authors_step",
    "sag": f"{HERE}/own_network/test_sag.py::test_a_step_is_the_authors_own",
    "self-guidance": f"{HERE}/own_network/test_self_guidance.py::test_the_authors_step_in_noise_predictions",
    "sg-prev": f"{HERE}/own_network/test_sg_prev.py::test_the_authors_step_leads_away_from_the_last_prediction",
    "input-noise": f"{HERE}/test_authors_coordinates.py::test_input_noise_is_combined_in_the_denoised_image",
    "classifier": f"{HERE}/test_authors_coordinates.py::test_classifier_guidance_is_the_authors_ddim_step",
    "loss": f"{HERE}/losses/test_dps.py::test_a_step_is_the_authors_own",
    "cads": f"{HERE}/own_network/test_cads.py::test_the_authors_embedding",
    "higs": f"{HERE}/own_network/test_higs.py::test_the_authors_step_in_a_flow_of_denoised_images",
    "rule apg": f"{HERE}/rules/test_apg.py::test_a_run_is_that_of_the_authors",
    "rule rescale": f"{HERE}/rules/test_rescale.py::test_a_step_is_the_authors_own",
    "rule power-law": f"{HERE}/rules/test_power_law.py::test_the_authors_step_in_scores",
    "rule cfg-zero-star": f"{HERE}/rules/test_cfg_zero_star.py::test_the_authors_step_in_velocities",
    "rule fdg": f"{HERE}/rules/test_fdg.py::test_the_authors_step_in_noise_predictions",
    "rule tcfg": f"{HERE}/rules/test_tcfg.py::test_the_authors_step_with_a_singular_value_decomposition",
    "rule mambo-g": f"{HERE}/rules/test_mambo_g.py::test_the_authors_step",
    "rule adg": f"{HERE}/rules/test_adg.py::test_the_authors_step_in_denoised_images",
    "rule renorm": f"{HERE}/rules/test_renorm.py::test_the_authors_step",
    "rule pmc": f"{HERE}/rules/test_pmc.py::test_the_authors_step_in_denoised_images",
    "rule fbg": f"{HERE}/rules/test_fbg.py::test_the_authors_sampler",
    "schedule c2fg": _SCHEDULES,
    "schedule triangle": _SCHEDULES,
    "schedule beta-density": _SCHEDULES,
    "schedule cfg-plus-plus": f"{HERE}/test_weight_schedule.py::test_cfg_plus_plus_is_the_authors_sampler",
}  # fmt: skip
# the rules of `loss` that move x
STEP_TESTS = [
    "losses/test_freedom.py::test_a_level_step_is_the_authors_own",
    "losses/test_polyak.py::test_a_step_is_the_authors_own",
    "losses/test_tfg.py::test_the_run_is_that_of_the_published_algorithm",
]


def registered():
    return {*METHODS, *(f"rule {name}" for name in RULES), *(f"schedule {name}" for name in SCHEDULES)}


def without_a_test():
    """What the document says of methods without such a test: name -> sentence."""
    text = (ROOT / "docs" / "guidance.md").read_text(encoding="utf-8")
    section = text.split("## Without a test in the authors' variables", 1)[1].split("\n## ", 1)[0]
    found = {}
    for names, sentence in re.findall(r"^- ((?:`[^`]+`(?:, | and )?)+): ((?:.|\n  )+)", section, flags=re.MULTILINE):
        found.update(dict.fromkeys(re.findall(r"`([^`]+)`", names), sentence))
    return found


def test_each_has_a_test_or_a_sentence_and_not_both():
    documented = without_a_test()
    assert set(TESTS) | set(documented) == registered()
    assert not set(TESTS) & set(documented)
    assert all(len(sentence.split()) >= 5 for sentence in documented.values())


@pytest.mark.parametrize("place", sorted({*TESTS.values(), *(f"{HERE}/{test}" for test in STEP_TESTS)}))
def test_the_test_exists_and_asserts_something(place):
    path, name = place.split("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    calls = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
    checks = {"check_authors_step", "authors.assert_same_displacement", "torch.testing.assert_close"}
    assert any(isinstance(node, ast.Assert) for node in ast.walk(function)) or calls & checks


def test_common_tests_cover_what_is_listed_for_them():
    assert {name for name, place in TESTS.items() if place == _COMMON} <= set(SAME_INPUT)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_when_to_pick_it_in_one_line(name):
    assert 10 < len(METHODS[name].pick_when) < 130
    assert "\n" not in METHODS[name].pick_when
    if name != "none":
        assert METHODS[name].source


@pytest.mark.parametrize("name", RULES)
def test_every_rule_says_when_to_pick_it_in_one_line(name):
    assert 10 < len(RULES[name].pick_when) < 130
    assert RULES[name].source or name == "linear"
