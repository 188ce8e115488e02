"""Options made from dataclass fields, and --help in sections."""

import dataclasses

import click
import pytest
from click.testing import CliRunner

from edm2kit.cli.click_types import Command, Size, given_options, section
from edm2kit.cli.field_options import options_from, size_text


@dataclasses.dataclass(frozen=True)
class Kitchen:
    chefs: int = dataclasses.field(default=2, metadata={"option": "--chefs", "help": "People who cook", "min": 1})
    salt: float | None = dataclasses.field(
        default=None, metadata={"option": "--salt", "help": "Salt", "default_shown": "some"}
    )
    crumbs_nimg: int = dataclasses.field(
        default=8 << 20, metadata={"option": "--crumbs", "help": "Crumbs", "metavar": "NIMG"}
    )
    hot: bool = dataclasses.field(default=False, metadata={"option": "--hot", "help": "Heat it"})
    oven: bool = dataclasses.field(default=True, metadata={"option": "--oven", "help": "Use it", "metavar": "BOOL"})
    dish: str = dataclasses.field(
        default="soup", metadata={"option": "--dish", "help": "Dish", "choices": ("soup", "pie")}
    )
    secret: str = dataclasses.field(default="x", metadata={"help": "Not on the command line"})


@click.command(cls=Command)
@section("Cooking", *options_from(Kitchen, "dish", "hot"))
@section("Supplies", *options_from(Kitchen, "chefs", "salt", "crumbs_nimg", "oven"))
@click.option("--own", default=3, help="Another one")
def cook(own: int, **options: object) -> None:
    given = given_options(options, ["dish", "hot", "chefs", "salt", "crumbs_nimg", "oven"])
    click.echo(f"{own} {given} {Kitchen(**given).dish} {options}")


def test_options_come_from_the_fields_of_a_dataclass():
    assert CliRunner().invoke(cook, []).output == "3 {} soup {}\n"
    arguments = "--dish pie --hot --chefs 3 --salt 0.5 --crumbs 1Ki --oven false --own 4"
    given = {"dish": "pie", "hot": True, "chefs": 3, "salt": 0.5, "crumbs_nimg": 1024, "oven": False}
    assert CliRunner().invoke(cook, arguments.split()).output == f"4 {given} pie {{}}\n"
    assert len(options_from(Kitchen)) == 6


@pytest.mark.parametrize("arguments", ["--chefs 0", "--dish cake", "--crumbs -1", "--salt much", "--secret y"])
def test_values_of_fields_are_checked(arguments):
    assert CliRunner().invoke(cook, arguments.split()).exit_code == 2


def test_help_comes_in_sections_with_defaults():
    text = CliRunner().invoke(cook, ["--help"]).output
    titles = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Cooking:", "Supplies:", "Other:"]
    for words in (
        "Dish  [default: soup]",
        "Salt  [default: some]",
        "Crumbs  [default: 8Mi]",
        "Use it  [default: true]",
    ):
        assert words in text
    positions = [text.index(name) for name in ("--dish", "--hot", "--chefs", "--own", "--help")]
    assert positions == sorted(positions)


def test_counts_are_written_as_they_are_read():
    for count in (0, 16, 2048, 128 << 10, 8 << 20, 1 << 30, 10_000_000):
        assert Size().convert(size_text(count), None, None) == count
    assert (size_text(2048), size_text(8 << 20)) == ("2048", "8Mi")
