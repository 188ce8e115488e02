"""--help and usage errors without torch: the same words as from the commands themselves."""

import copy
import importlib
import importlib.metadata
import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from edm2kit.cli import doctor, help_pages
from tests.support import ROOT, house
from tests.support.tiny import environment

STORED = json.loads(help_pages.FILE.read_text(encoding="utf-8"))
PAGES = STORED["pages"]
MODULES = {module.rpartition(".")[2]: module for module in sorted(house.commands(ROOT))}
NAMES = [*MODULES, "train doctor"]  # the latter is a command of its own
UNKNOWN = "--no-such-thing"


def live(name):
    """The command of the name itself."""
    return doctor.doctor if name == "train doctor" else importlib.import_module(MODULES[name]).main


def help_texts(name, command):
    """What --help prints, by page (CliRunner would set the width)."""
    context = click.Context(command, info_name=name, **command.context_settings)
    texts = {name: command.get_help(context)}
    for sub, found in getattr(command, "commands", {}).items():
        inner = click.Context(found, info_name=sub, parent=context, **found.context_settings)
        texts[f"{name} {sub}"] = found.get_help(inner)
    return texts


@pytest.mark.parametrize("columns", ["60", "200"])
def test_the_stored_help_is_that_of_the_commands(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert set(PAGES) == {page for name in NAMES for page in help_texts(name, live(name))}
    for name in NAMES:
        stored = help_texts(name, help_pages.stored_command(name, PAGES))
        for page, expected in help_texts(name, live(name)).items():
            if importlib.metadata.version("click") == STORED["click"]:
                assert stored[page] == expected, f"{page}: run python scripts/write_documents.py"
            else:  # another click words defaults in another way
                options = [
                    [word.split()[0] for word in text.splitlines() if " --" in word]
                    for text in (stored[page], expected)
                ]
                assert options[0] == options[1]


def wrong_words(command):
    """Command lines whose words are wrong, whatever their values."""
    options = [one for one in command.params if isinstance(one, click.Option)]
    yield [UNKNOWN]
    yield [f"{UNKNOWN}=3"]
    if isinstance(command, click.Group):
        yield ["no-such-command"]
        yield []
        for sub, found in command.commands.items():
            yield from ([sub, *words] for words in wrong_words(found))
        return
    if any(one.required for one in command.params):
        yield []
    elif not any(isinstance(one, click.Argument) for one in command.params):
        yield ["stray"]
    for option in options:
        if option.is_flag:
            yield [f"{option.opts[-1]}=3"]
        elif not isinstance(option.flag_value, str):  # one that may stand without a value
            yield [option.opts[0]]


@pytest.mark.parametrize("name", NAMES)
def test_usage_errors_are_those_of_the_command(name):
    command, stored = live(name), help_pages.stored_command(name, PAGES)
    wrong = list(wrong_words(command))
    assert len(wrong) > 2
    for words in wrong:
        expected, found = (CliRunner().invoke(one, words, prog_name="program") for one in (command, stored))
        assert isinstance(found.exception, SystemExit), words
        assert (found.exit_code, found.output) == (expected.exit_code, expected.output), words


@pytest.mark.parametrize(
    "line",
    [
        "generate --seeds 3 --outdir out",
        "generate --compile --seeds 3",  # an option with and without a value
        "generate --list-presets",
        "metrics gen --help-guidance list",  # answered before --ref is missed
        "metrics calc --detector own=x.pt2 --images a --ref b",
        "toy train --no-compile",
        "tune search --main a --ref b --metric fid --budget 2h --outdir c --guide d -- --steps 20",
        "train doctor runs/main",
        "flops edm2-img512-s edm2-img512-m",
    ],
)
def test_words_that_may_be_right_are_left_to_the_command(line, monkeypatch):
    monkeypatch.setattr(sys, "argv", line.split())
    assert help_pages.answer(line.split()[0]) is None


def test_an_option_that_is_newer_than_the_file_is_left_to_the_command(monkeypatch):
    pages = copy.deepcopy(PAGES)
    for option in ("--seeds", "--autoguidance-x"):
        pages["generate"]["parameters"] = [
            one for one in pages["generate"]["parameters"] if one.get("option", [""])[0] != option
        ]
    runner = CliRunner()
    stored = help_pages.stored_command("generate", pages)
    assert isinstance(runner.invoke(stored, ["--seeds", "3"]).exception, help_pages._CommandIsNeeded)
    assert runner.invoke(stored, [UNKNOWN]).exit_code == 2


def test_any_terminal_can_show_what_is_stored():
    assert help_pages.FILE.read_text(encoding="utf-8").isascii()
    assert json.dumps(STORED, ensure_ascii=False).isascii()


def test_closed_streams_are_left_to_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate.py", UNKNOWN])
    monkeypatch.setattr(sys, "stderr", None)
    assert help_pages.answer("generate") is None


def test_completions_of_a_shell_are_left_to_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--help"])
    monkeypatch.setenv("_GENERATE_PY_COMPLETE", "bash_source")
    assert help_pages.answer("generate") is None


# every console command, as it is installed and as a module, in one process, in which torch must not be imported
_RUN = """
import contextlib, io, json, os, runpy, sys
from edm2kit.cli import console
answers = []
for name, *words in json.loads(sys.argv[1]):
    texts = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(texts[0]), contextlib.redirect_stderr(texts[1]):
        try:
            if name.startswith("edm2kit."):
                sys.argv = [name, *words]
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                sys.argv = [f"bin/edm2kit-{name}", *words]
                getattr(console, name)()
            code = None
        except SystemExit as ending:
            code = ending.code
    answers.append([code, texts[0].getvalue(), texts[1].getvalue(), "torch" in sys.modules])
print(json.dumps(answers))
"""


def test_help_and_usage_errors_of_every_console_command_import_no_torch():
    helped = [
        [start, *page.split()[1:], "--help"] for page in PAGES for start in (page.split()[0], MODULES[page.split()[0]])
    ]
    wrong = [[*page.split(), UNKNOWN] for page in PAGES]
    line = [sys.executable, "-c", _RUN, json.dumps([*helped, *wrong])]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    for words, (code, output, _, has_torch) in zip(helped, answers, strict=False):
        first, *others = output.splitlines()
        program = "python -m " + words[0] if words[0] in MODULES.values() else f"edm2kit-{words[0]}"
        program = "train.py" if words == ["edm2kit.cli.train", "doctor", "--help"] else program
        assert first.startswith(" ".join(["Usage:", program, *words[1:-1]]))
        assert len(others) > 4, words
        assert (code, has_torch) == (0, False), words
    for words, (code, _, errors, has_torch) in zip(wrong, answers[len(helped) :], strict=True):
        assert errors.startswith(" ".join([f"Usage: edm2kit-{words[0]}", *words[1:-1]])), words
        assert f"No such option {UNKNOWN!r}" in errors.replace(": --no-such-thing", f" {UNKNOWN!r}"), words
        assert (code, has_torch) == (2, False), words


def test_a_current_folder_that_was_deleted_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit) as ended:
        help_pages.answer("train")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "Error: the current folder does not exist any more; change to another one\n"
