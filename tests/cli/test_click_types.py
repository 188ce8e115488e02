"""Options that researchers type, and errors that fit on one line."""

import importlib
import os
import shlex
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import edm2kit
from edm2kit.cli import click_types as cli
from edm2kit.cli.click_types import (
    Command,
    Group,
    IntRanges,
    Size,
    interrupt_on_sigterm,
)
from edm2kit.cli.phema import FloatSeries
from edm2kit.torch_utils import dist


def parsed(kind: click.ParamType, text: object) -> object:
    return kind.convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "count"),
    [("4096", 4096), ("128Ki", 131072), ("8Mi", 8 << 20), ("1Gi", 1 << 30), ("1.5Ki", 1536), ("0", 0), (7, 7)],
)
def test_sizes(text, count):
    assert parsed(Size(), text) == count
    assert type(parsed(Size(), text)) is int


@pytest.mark.parametrize("text", ["", "8M", "8 Mi B", "-1", "0.3", "1e3", "0.3Ki", "ten"])
def test_invalid_sizes(text):
    with pytest.raises(click.BadParameter):
        parsed(Size(), text)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("5", (5,)), ("0-3", (0, 1, 2, 3)), ("0,5,10-12", (0, 5, 10, 11, 12)), (" 3 , 1-1", (3, 1)), ((1, 2), (1, 2))],
)
def test_ranges_keep_the_order_written(text, numbers):
    assert parsed(IntRanges(), text) == numbers


@pytest.mark.parametrize("text", ["", "3-1", "a", "1-", "1,,2", "-5", "1.5"])
def test_invalid_ranges(text):
    with pytest.raises(click.BadParameter):
        parsed(IntRanges(), text)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.05,0.1", (0.05, 0.1)),
        ("0.01,0.02,...,0.05", (0.01, 0.02, 0.03, 0.04, 0.05)),
        ("1,0.5,...,-1", (1, 0.5, 0, -0.5, -1)),
        ("0.010,0.015,...,0.250", tuple(round(0.005 * k, 3) for k in range(2, 51))),
        ((0.1, 0.2), (0.1, 0.2)),
    ],
)
def test_series_are_filled_in(text, numbers):
    assert parsed(FloatSeries(), text) == numbers


@pytest.mark.parametrize("text", ["", "x", "0.1,...", "0.1,...,0.3", "...,1", "1,1,...,3", "1,2,...,4.5", "1,2,...,1"])
def test_series_that_cannot_be_filled_in(text):
    with pytest.raises(click.BadParameter):
        parsed(FloatSeries(), text)


@click.group(cls=Group)
def tool() -> None:
    pass


@tool.command()
@click.option("--how", default="value")
def fail(how: str) -> None:
    raise {
        "value": ValueError("expected a cat"),
        "os": FileNotFoundError(2, "No such file", "x"),
        "bug": KeyError("k"),
    }[how]


def test_expected_errors_become_one_line(monkeypatch):
    monkeypatch.delenv("EDM2_TRACEBACK", raising=False)
    for how, line in (("value", "Error: expected a cat\n"), ("os", "Error: [Errno 2] No such file: 'x'\n")):
        result = CliRunner().invoke(tool, ["fail", "--how", how])
        assert (result.exit_code, result.output) == (1, line)


def test_usage_errors_exit_with_2_and_bugs_keep_their_traceback():
    assert CliRunner().invoke(tool, ["fail", "--nonsense"]).exit_code == 2
    with pytest.raises(KeyError):
        CliRunner().invoke(tool, ["fail", "--how", "bug"], catch_exceptions=False)


def test_the_full_traceback_on_request(monkeypatch):
    monkeypatch.setenv("EDM2_TRACEBACK", "1")
    with pytest.raises(ValueError, match="expected a cat"):
        CliRunner().invoke(tool, ["fail"], catch_exceptions=False)


def test_a_single_command_reports_errors_the_same_way(monkeypatch):
    monkeypatch.delenv("EDM2_TRACEBACK", raising=False)
    alone = click.command(cls=Command)(lambda: (_ for _ in ()).throw(ValueError("one line")))
    result = CliRunner().invoke(alone, [])
    assert (result.exit_code, result.output) == (1, "Error: one line\n")


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_interrupts_and_later_sigterms_do_not(first):
    before, interrupted = handlers(), 0
    with interrupt_on_sigterm():
        for number in (first, signal.SIGTERM, signal.SIGTERM):
            try:
                send(number)
            except KeyboardInterrupt:
                interrupted += 1
    assert interrupted == 1
    assert handlers() == before


def test_a_second_ctrl_c_interrupts_again():
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with interrupt_on_sigterm():
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt):
                    send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, former)


def test_an_ignored_ctrl_c_stays_ignored():
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt_on_sigterm():
            send(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGTERM)
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, former)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--batch"], " To use less: a smaller --batch."),
        (
            ["--batch", "--batch-gpu", "--recompute"],
            " To use less: a smaller --batch-gpu (same results), --recompute true.",
        ),
        ([], ""),
    ],
)
def test_out_of_memory_is_one_line_with_the_options_that_help(options, advice):
    @click.command(cls=cli.Command)
    def main(**values):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore text")

    for option in options:
        main = click.option(option)(main)
    done = CliRunner().invoke(main, [])
    assert done.exit_code == 1
    assert done.output == f"Error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.).{advice}\n"


def test_float32_means_float32_in_a_session_unless_tf32_is_asked_for():
    def flags():
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    @click.command(cls=cli.Command)
    @cli.tf32_option()
    def main():
        with dist.session("cpu"):
            seen.append(flags())

    seen, before = [], flags()
    for arguments in ([], ["--tf32"], []):
        assert CliRunner().invoke(main, arguments).exit_code == 0
    assert seen == [(False, False), (True, True), (False, False)]
    assert flags() == before


def test_deterministic_algorithms_for_one_command(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    seen = []
    append = lambda: seen.append(torch.are_deterministic_algorithms_enabled())  # noqa: E731
    command = click.command(cls=cli.Command)(cli.deterministic_option()(append))
    for arguments in ([], ["--deterministic"], []):
        assert CliRunner().invoke(command, arguments).exit_code == 0
    assert seen == [False, True, False]


@pytest.mark.parametrize("command", ["train", "generate", "metrics calc", "metrics gen", "metrics ref"])
def test_commands_that_compute_offer_tf32_and_deterministic(command):
    module, *names = command.split()
    found = importlib.import_module(f"edm2kit.cli.{module}").main
    for name in names:
        found = found.commands[name]
    options = {option for parameter in found.params for option in parameter.opts}
    assert options >= {"--tf32", "--deterministic"}


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("45m", 2700), (" 1.5h ", 5400), ("2d", 172800)])
def test_time_limits(text, seconds):
    assert cli.parse_duration_sec(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "5w", "-1h", "0s", "h"])
def test_wrong_time_limits(text):
    with pytest.raises(ValueError, match="write for example"):
        cli.parse_duration_sec(text)


@pytest.mark.parametrize(
    ("argument", "read"),
    [
        ("~/a", "/home/me/a"),
        ("--data=~/a b", "--data=/home/me/a b"),
        ("main=~/net", "main=/home/me/net"),
        ("hf:~/photos?split=train", "hf:/home/me/photos?split=train"),
        ("--net=diffusers:~/model", "--net=diffusers:/home/me/model"),
        ("a:~/b", "a:~/b"),
        ("a~/b", "a~/b"),
        ("--x=1", "--x=1"),
        ("~nobody-of-that-name/a", "~nobody-of-that-name/a"),
        ("-n", "-n"),
    ],
)
def test_home_folders_that_the_shell_leaves_alone_are_found(monkeypatch, argument, read):
    monkeypatch.setenv("HOME", "/home/me")

    @click.command(cls=Command, context_settings={"ignore_unknown_options": True})
    @click.argument("words", nargs=-1)
    def show(words):
        click.echo("|".join(words))

    assert CliRunner().invoke(show, ["--", argument]).output == f"{read}\n"


def test_a_record_replaces_neither_notes_nor_itself(tmp_path):
    kind = cli.OutputFile("record of scores", also={".md": "score card"})
    assert parsed(kind, str(tmp_path / "a.json")) == tmp_path / "a.json"
    (tmp_path / "a.md").write_text("# Score card\n")
    assert parsed(kind, str(tmp_path / "a.json")) == tmp_path / "a.json"
    (tmp_path / "a.md").write_text("# My notes\n")
    with pytest.raises(click.BadParameter, match=r"a\.md exists and is not a score card"):
        parsed(kind, str(tmp_path / "a.json"))
    with pytest.raises(click.BadParameter, match=r"b\.md is the name of the score card that is written beside it"):
        parsed(kind, str(tmp_path / "b.md"))


def test_names_that_a_terminal_cannot_show_are_escaped(tmp_path):
    for name in ("३", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "white").save(tmp_path / "set" / name / "0.png")
    words = [sys.executable, "-m", "edm2kit.cli.dataset", "convert", "--source", "set", "--dest", "set.zip"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(Path(edm2kit.__file__).parents[1])}
    made = subprocess.run([*words, "--workers", "1"], cwd=tmp_path, capture_output=True, env=environment)
    assert made.returncode == 0, made.stderr
    assert rb"2 classes: b, \u0969" in made.stdout


@pytest.mark.parametrize("closed", ["2>&-", "0<&- >&- 2>&-"])
def test_closed_streams_do_not_end_a_command(tmp_path, closed):
    (tmp_path / "set").mkdir()
    Image.new("RGB", (8, 8), "white").save(tmp_path / "set" / "0.png")
    words = [sys.executable, "-m", "edm2kit.cli.dataset", "convert", "--source", "set", "--dest", "set.zip"]
    environment = {**os.environ, "PYTHONPATH": str(Path(edm2kit.__file__).parents[1])}
    line = f"{shlex.join(words)} --workers 1 {closed}"
    assert subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment).returncode == 0
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        assert archive.testzip() is None
