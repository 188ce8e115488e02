"""Command-line options become a request."""

import math

import click
import pytest
from click.testing import CliRunner

from edm2kit.cli.generation import Request
from edm2kit.cli.generation_options import generation_options, parse_request
from edm2kit.guidance.combine import Guided
from edm2kit.guidance.registry import METHODS, NO_GUIDANCE, RULES, Choice, Method, Option
from edm2kit.guidance.reuse import Reuse
from edm2kit.sampling.noise_levels import LEVELS
from edm2kit.sampling.restart import Restart
from edm2kit.sampling.solvers import SOLVERS, Churn, Sampler, TimeTravel


def parse(*arguments):
    """(request, exit code, output) of a command that takes these options and one of its own."""
    seen = []

    @click.command()
    @generation_options
    @click.option("--own", default=3)
    def command(request, own):
        assert own == 3
        seen.append(request)

    result = CliRunner().invoke(command, ["--net", "a", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return (seen or [None])[0], result.exit_code, result.output


def test_defaults_are_the_published_ones():
    assert parse()[0] == Request("a", None, NO_GUIDANCE, Sampler(), None, "auto")


def test_sampler_options():
    arguments = "--steps 8 --sigma_min 0.01 --sigma_max 20 --rho 5 --S_churn 10 --S_min 0.05 --S_max 50 --S_noise 1.003"
    expected = Sampler(8, 0.01, 20, 5, Churn(10, 0.05, 50, 1.003), "euler")
    assert parse(*arguments.split(), "--solver", "euler")[0].sampler == expected


def test_time_travel_has_settings_of_its_own():
    assert parse("--solver", "time-travel")[0].sampler.settings == TimeTravel()
    given = parse("--solver", "time-travel", "--travel-times", "3", "--travel-interval", "1,5")
    assert given[0].sampler.settings == TimeTravel(3, 1.0, 5.0)
    _, code, output = parse("--travel-times", "3")
    assert (code, "belong to --solver time-travel, not heun" in output) == (2, True)


def test_restart_has_settings_of_its_own():
    assert parse("--solver", "restart")[0].sampler.settings == Restart()
    given = parse("--solver", "restart", "--restart-intervals", "3,2,0.5,2 4,1,1,9")
    assert given[0].sampler.settings == Restart(((3, 2, 0.5, 2.0), (4, 1, 1.0, 9.0)))
    _, code, output = parse("--restart-intervals", "3,2,0.5,2")
    assert (code, "belong to --solver restart, not heun" in output) == (2, True)


def test_noise_levels_by_name_and_as_a_list():
    assert parse("--levels", "ays-svd", "--steps", "10")[0].sampler == Sampler(10, levels="ays-svd")
    listed = parse("--levels", "9,3,1", "--solver", "dpmpp2m")[0].sampler
    assert listed == Sampler(3, 1.0, 9.0, solver="dpmpp2m", levels=(9.0, 3.0, 1.0))
    assert parse("--levels", "9,3,1", "--steps", "3")[0].sampler.num_steps == 3


def test_noise_levels_out_of_range_are_refused():
    with pytest.raises(ValueError, match="GITS take 2 to 60 steps"):
        parse_request(["--net", "a", "--levels", "gits", "--steps", "100"])


def test_cheaper_guidance():
    arguments = "--gnet b --guidance 2 --guidance-every 3 --guidance-stop 0.99 --guidance-once"
    assert parse(*arguments.split())[0].guidance.reuse == Reuse(3, 0.99, True)
    assert parse("--gnet", "b", "--guidance", "2", "--guidance-every", "1")[0].guidance == Choice("autoguidance", 2.0)


@pytest.mark.parametrize("name", SOLVERS)
def test_help_for_a_solver_shows_its_own_options(name):
    _, exit_code, output = parse("--help-solver", name)
    assert exit_code == 0
    assert output.startswith(f"{name}: ")
    assert ("--restart-intervals" in output) == (name == "restart")
    assert ("--travel-times" in output) == (name == "time-travel")


def test_help_lists_solvers_and_schedules():
    for word, names in (("list", SOLVERS), ("levels", LEVELS)):
        _, exit_code, output = parse("--help-solver", word)
        assert exit_code == 0
        assert [name for name in names if any(line.startswith(f"{name} ") for line in output.splitlines())] == [*names]
    assert "expected one of list, levels, heun" in " ".join(parse("--help-solver", "huen")[2].split())


def test_a_guide_network_means_autoguidance():
    assert parse("--gnet", "b", "--guidance", "2.1")[0].guidance == Choice("autoguidance", 2.1)
    interval = parse("--gnet", "b", "--guidance", "2", "--interval", "0.28,inf")[0].guidance.interval
    assert interval == (0.28, math.inf)
    assert parse("--guidance", "1")[0].guidance == NO_GUIDANCE


def test_classes():
    assert parse("--class", "3,cat")[0].classes == "3,cat"
    assert parse("--balanced")[0].classes == ""


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ("--guidance 2", "--guidance 2 needs a guide network; give --gnet"),
        ("--interval 1,2", "--interval needs a guide network"),
        ("--gnet b", "give --guidance W"),
        ("--gnet b --guidance nan", "--guidance nan is not a finite number"),
        ("--gnet b --guidance two", "'two' is not a valid float"),
        ("--gnet b --guidance 2 --interval 2,1", "2,1 runs backwards"),
        ("--gnet b --guidance 2 --interval 2", "'2' is not a pair of noise levels"),
        ("--gnet b --guidance 2 --interval nan,2", "runs backwards"),
        ("--guidance-method pair --guidance 2", "autoguidance needs --gnet"),
        ("--guidance-method none --gnet b", "none takes no --gnet"),
        ("--guidance-method pear", "there is no guidance method 'pear'; available: none, autoguidance"),
        ("--class 3 --balanced", "--balanced cycles through all classes"),
        ("--steps 0", "0 is not at least 1"),
        ("--solver unipc --S_churn 1", "the solver unipc combines evaluations of several steps"),
        ("--levels 1,2", "do not fall"),
        ("--levels karas", "'karas' is not a list of noise levels, nor one of karras"),
        ("--levels 9,3,1 --steps 4", "--levels lists 3 noise levels; leave out --steps"),
        ("--levels 9,3,1 --sigma_max 80", "leave out --sigma_max"),
        ("--solver restart --restart-intervals 1,2", "is not an interval LEVELS,TIMES,LO,HI"),
        ("--guidance-every 2", "guidance method none has none"),
        ("--gnet b --guidance 2 --guidance-every 0", "0 is not at least 1"),
        ("--gnet b --guidance 2 --guidance-stop 2", "cosine of 2; expected a number from -1 to 1"),
        ("--precision fp8", "'fp8' is not one of"),
    ],
)
def test_contradictions_are_usage_errors(arguments, wrong):
    request, exit_code, output = parse(*arguments.split())
    assert (request, exit_code) == (None, 2)
    assert wrong in " ".join(output.split())


def test_options_of_methods_come_from_the_registry(monkeypatch):
    def positive(text):
        if not float(text) > 0:
            raise ValueError(f"{text} is not above 0")
        return float(text)

    option = Option("blur-radius", positive, 1.5, "how wide")
    monkeypatch.setitem(METHODS, "blur", Method("away from a blurred image", "2 main", Guided, options=(option,)))
    chosen = ("--guidance-method", "blur", "--guidance", "3")
    assert parse(*chosen)[0].guidance == Choice("blur", 3.0, options={"blur_radius": 1.5})
    assert parse(*chosen, "--blur-radius", "2")[0].guidance == Choice("blur", 3.0, options={"blur_radius": 2.0})
    assert "-1 is not above 0" in parse(*chosen, "--blur-radius", "-1")[2]
    assert "belongs to --guidance-method blur, not none" in " ".join(parse("--blur-radius", "2")[2].split())
    assert "blur: away from a blurred image (2 main)" in parse("--help-guidance", "list")[2]
    text = parse("--help-guidance", "blur")[2]
    assert "away from a blurred image" in text
    assert "--blur-radius  how wide  [default: 1.5]" in text


def test_methods_add_up_under_a_rule_and_a_schedule():
    arguments = "--gnet b --guidance 2 --guidance-also pag=3 --guidance-also icg=1.5 --pag-blocks dec.8x8_in0"
    choice = parse(*arguments.split(), "--guidance-rule", "apg", "--guidance-schedule", "cosine")[0].guidance
    assert (choice.method, choice.weight, choice.also) == ("autoguidance", 2.0, (("pag", 3.0), ("icg", 1.5)))
    assert (choice.rule, choice.schedule) == ("apg", "cosine")
    assert choice.options == {
        "pag_blocks": ("dec.8x8_in0",),
        "pag_match": "no",
        "icg_kind": "class",
        "icg_own": "yes",
        "apg_parallel": 0.0,
        "apg_norm": 2.5,
        "apg_momentum": -0.75,
        "apg_update": "evaluation",
    }


def test_a_method_has_its_published_weight():
    assert parse("--guidance-method", "seg")[0].guidance.weight == 4.0
    options = {"pag_blocks": None, "pag_match": "no"}
    assert parse("--guidance-method", "pag")[0].guidance == Choice("pag", 4.0, options=options)
    assert parse("--guidance-method", "pag", "--guidance", "2")[0].guidance.weight == 2


def test_an_unconditional_network_in_addition_to_the_guide():
    request = parse("--gnet", "b", "--uncond", "c", "--guidance-method", "cfg-plus-autoguidance", "--guidance", "2")[0]
    assert (request.gnet, request.uncond, request.guidance.options) == ("b", "c", {"cfg_plus_autoguidance_share": 0.5})


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ("--gnet b --guidance 1.6 --guidance-schedule cfg-plus-plus", "is CFG++ with --solver euler only, not heun"),
        ("--guidance-method pag --guidance-also pag=2", "pag is named twice"),
        ("--guidance-method pag --guidance-also pair=2", "autoguidance needs --gnet"),
        ("--guidance-method pag --guidance-also pug=2", "there is no guidance method 'pug'"),
        ("--guidance-method pag --guidance-also seg", "'seg' is not a method with its weight"),
        ("--guidance-method pag --guidance-also seg=inf", "--guidance inf is not a finite number"),
        ("--guidance-method pag --guidance-also none=1", "none cannot be combined"),
        ("--gnet b --guidance 2 --uncond c", "autoguidance takes no --uncond"),
        ("--gnet b --guidance 2 --apg-norm 3", "--apg-norm belongs to --guidance-rule apg, not autoguidance, linear"),
        ("--guidance-method pag --pag-blocks middle", "'middle' is not a list of blocks"),
        ("--guidance-method icg --guidance 2 --icg-kind word", "'word' is not one of class, gaussian"),
        ("--guidance-method tsg --guidance 2 --tsg-scale -1", "'-1' is not a number from 0 to inf"),
    ],
)
def test_guidance_that_does_not_combine_is_a_usage_error(arguments, wrong):
    request, exit_code, output = parse(*arguments.split())
    assert (request, exit_code) == (None, 2)
    assert wrong in " ".join(output.split())


def test_the_list_has_a_line_for_each_method_with_its_cost():
    request, exit_code, output = parse("--help-guidance", "list")
    assert (request, exit_code) == (None, 0)
    lines = output.splitlines()
    for name, method in METHODS.items():
        assert f"{name}: {method.summary} ({method.evaluations})" in lines


@pytest.mark.parametrize("name", [*METHODS, *RULES])
def test_help_for_a_method_shows_its_own_options_which_the_general_help_leaves_out(name):
    owner = {**METHODS, **RULES}[name]
    _, exit_code, output = parse("--help-guidance", name)
    words, general = " ".join(output.split()), parse("--help")[2]
    assert exit_code == 0
    assert words.startswith(f"{name}: {owner.summary}")
    for option in owner.options:
        assert f"--{option.name} " in words
        assert " ".join(option.help.split()) in words
        assert f"--{option.name} " not in general


def test_help_for_an_unknown_method_names_the_known_ones():
    _, exit_code, output = parse("--help-guidance", "pear")
    assert exit_code == 2
    assert "expected one of list, none, " in " ".join(output.split())


def test_the_table_needs_no_network():
    request, exit_code, output = parse("--list-guidance")
    assert (request, exit_code) == (None, 0)
    for name, method in METHODS.items():
        assert f"{name}: {method.summary}\n" in output
        assert method.evaluations in output


def test_words_make_a_request_without_a_command():
    words = ["--net", "a", "--gnet", "b", "--guidance", "2", "--interval", "0.2,5", "--steps", "8"]
    request = parse_request(words)
    assert (request.net, request.gnet, request.sampler.num_steps) == ("a", "b", 8)
    assert request.guidance == Choice("autoguidance", 2.0, (0.2, 5.0))
    with pytest.raises(ValueError, match=r"'--net a --guidance 2' asks for no images: --guidance 2 needs a guide"):
        parse_request(["--net", "a", "--guidance", "2"])


def test_help_for_an_old_name_is_that_of_the_new_name(capsys):
    result = CliRunner().invoke(click.command()(generation_options(lambda request: None)), ["--help-guidance", "pair"])
    assert result.exit_code == 0
    assert result.stdout.startswith("autoguidance: away from a weaker second network")
    assert "'pair' is now called 'autoguidance'" in result.stderr
