"""Generation presets against the published tables."""

import re

import click
import pytest
from click.testing import CliRunner

from edm2kit.cli.generation_options import generation_options
from edm2kit.cli.presets import load_presets
from edm2kit.guidance.registry import Choice
from edm2kit.sampling.solvers import PUBLISHED
from tests.support import DATA

URL = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/"


def rows_of(file: str) -> list[list[str]]:
    lines = [line for line in (DATA / file).read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def asked_for(*arguments: str):
    """The request that a command line makes of its options."""
    requests = []

    @click.command()
    @generation_options
    def command(request):
        requests.append(request)

    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    return requests[0]


def refusal(*arguments: str) -> str:
    @click.command()
    @generation_options
    def command(request):
        raise AssertionError("accepted")

    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2, result.output
    return result.output


@pytest.mark.parametrize("row", rows_of("published_presets.md"), ids=lambda row: row[0])
def test_a_preset_is_its_row_of_the_published_table(row):
    name, net, gnet, weight, metric, value = row
    request = asked_for("--preset", name)
    assert request.net == URL + net
    assert request.gnet == (None if gnet == "-" else URL + gnet)
    assert request.guidance == (Choice() if gnet == "-" else Choice("autoguidance", float(weight)))
    assert request.sampler == PUBLISHED
    assert request.classes is None
    assert (load_presets()[name].metric, load_presets()[name].value) == (metric, float(value))


def test_the_published_table_is_complete():
    names = [row[0] for row in rows_of("published_presets.md")]
    assert len(set(names)) == 36
    assert [name for name in load_presets() if "interval" not in name] == names


@pytest.mark.parametrize(("size", "row_number"), [("s", 2), ("xxl", 9)])
@pytest.mark.parametrize(("metric", "column"), [("fid", 1), ("dino", 2)])
def test_an_interval_preset_is_its_cell_of_table_1(size, row_number, metric, column):
    row = rows_of("published_table1.md")[row_number]
    assert "guidance interval" in row[0]
    pattern = r"([\d.]+) \(([\d.]+); ([.\d]+)/([.\d]+); (?:sigma in )?\(([\d.]+), ([\d.]+)\]\)"
    value, weight, main, guide, lo, hi = re.fullmatch(pattern, row[column]).groups()
    name = f"edm2-img512-{size}-guid-interval-{metric}"
    request = asked_for("--preset", name)
    kimg = {"s": 2147483, "xxl": 939524}[size]
    assert request.net == f"{URL}edm2-img512-{size}-{kimg:07d}-0{main}.pkl"
    assert request.gnet == f"{URL}edm2-img512-xs-uncond-2147483-0{guide}.pkl"
    assert request.guidance == Choice("autoguidance", float(weight), (float(lo), float(hi)))
    assert load_presets()[name].value == float(value)


def test_options_override_a_preset():
    preset = ("--preset", "edm2-img512-s-guid-interval-fid")
    published = asked_for(*preset)
    changed = asked_for(*preset, "--guidance", "1.5", "--gnet", "mine", "--steps", "8")
    assert (changed.net, changed.gnet) == (published.net, "mine")
    assert changed.guidance == Choice("autoguidance", 1.5, (0.28, 2.90))
    assert changed.sampler.num_steps == 8
    assert asked_for(*preset, "--net", "mine").net == "mine"
    assert asked_for(*preset, "--interval", "0.1,1").guidance.interval == (0.1, 1.0)


def test_another_method_takes_only_the_main_network_of_a_preset():
    request = asked_for("--preset", "edm2-img512-s-guid-interval-fid", "--guidance-method", "none")
    assert (request.gnet, request.guidance) == (None, Choice())


def test_a_misspelt_preset_suggests_the_nearest():
    assert "did you mean 'edm2-img512-s-autog-fid'" in refusal("--preset", "edm2-img512-s-auto-fid")


def test_a_network_is_needed():
    assert "--preset" in refusal("--guidance", "1")
