"""Text that users read is plain English (CONTRIBUTING.md, "How the text reads"): the slips that came up most."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT, house

# habit -> how to write it instead
HABITS = {
    r"\b\w*Error,?\s+where\b": '"Raises ValueError if ..."',
    r"\bthere\s+(?:is|are):": '"Available presets: a, b"',
    r"(?<!there\s)(?<!There\s)\bis\s+no\s+(?!(?:longer|more|less|other|better|worse|larger|guidance)\b)[a-z]": (
        '"is not a ..."'
    ),
    r"\banew\b": '"again"',
    r"\bfor\s+(?:[\w']+\s+){1,4}sake\b": '"to ...", "because ..."',
    r"\bbe\s+had\b": '"cannot be downloaded", "is not available"',
    r"\bgo(?:es)?\s+on\s+(?:where|from|when|with)\b": '"resumes", "continues"',
    r"\bstopped\s+as\s+asked\b|\bin\s+good\s+order\b": "say what happens",
}
MAX_WHERE_PER_1000_WORDS = 2.6  # "where" is fine for places and formulas; for conditions it is "if"


def texts(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every string in a Python file: docstrings, help texts, messages, comments left out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def slips(line: int, text: str) -> Iterator[tuple[int, str]]:
    """(line, what to write instead) of every habit in `text`, which starts at `line`."""
    for habit, instead in HABITS.items():
        for found in re.finditer(habit, text):
            quoted = " ".join(found.group().split())
            yield line + text.count("\n", 0, found.start()), f'"{quoted}": write {instead}'


def python_slips(file: Path) -> list[str]:
    """file:line and advice for each slip in the strings of a Python file."""
    found = [slip for line, text in texts(file.read_text(encoding="utf-8")) for slip in slips(line, text)]
    return [f"{file.relative_to(ROOT)}:{line} {advice}" for line, advice in sorted(set(found))]


def page_slips(file: Path) -> list[str]:
    """The same for a Markdown page. What stands in quotes is an example, and what stands between marks is generated."""
    text = file.read_text(encoding="utf-8")
    if file.name == "CONTRIBUTING.md":
        text = re.sub(r'"[^"\n]*"|^\|.*$', "", text, flags=re.MULTILINE)
    return [f"{file.relative_to(ROOT)}:{line} {advice}" for line, advice in sorted(set(slips(1, text)))]


ROOMS = {
    folder: sorted((ROOT / "edm2kit" / folder).rglob("*.py"))
    for folder in sorted(path.name for path in (ROOT / "edm2kit").iterdir() if path.is_dir() and path.name[0] != "_")
}
ROOMS["top"] = [*sorted((ROOT / "edm2kit").glob("*.py")), *house.command_lines(ROOT), ROOT / "scripts" / "_install.py"]
ROOMS["benchmarks"] = sorted((ROOT / "benchmarks").rglob("*.py"))
ROOMS["examples"] = sorted((ROOT / "examples").rglob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments").rglob("*.md")])


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_help_and_messages_are_plain_english(room):
    found = [slip for file in ROOMS[room] for slip in python_slips(file)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_plain_english(page):
    found = page_slips(page)
    assert not found, "\n" + "\n".join(found)


def docstrings(source: str) -> Iterator[str]:
    """Every docstring of a Python file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def test_where_is_not_used_for_if():
    text = " ".join(
        " ".join(docstrings(file.read_text(encoding="utf-8"))) for files in ROOMS.values() for file in files
    )
    words = re.findall(r"[\w'-]+", text)
    rate = 1000 * sum(word.lower() == "where" for word in words) / len(words)
    assert rate <= MAX_WHERE_PER_1000_WORDS, f"{rate:.1f} of 1,000 words of docstrings are 'where'"


@pytest.mark.parametrize(
    ("text", "slipped"),
    [
        ("Raises ValueError where the file is cut off.", True),
        ("Raises ValueError if the file is cut off.", False),
        ("unknown preset 'x'; there is: a, b", True),
        ("x.pkl is no\nsnapshot", True),
        ("x.pkl is not a snapshot; there is no header", False),
        ("it is no longer needed", False),
        ("made anew", True),
        ("for many images' sake", True),
        ("networks that cannot be had", True),
    ],
)
def test_the_habits_are_recognised(text, slipped):
    assert bool(list(slips(1, text))) == slipped


def test_a_slip_is_reported_with_its_line():
    ((line, advice),) = slips(10, "One sentence.\n\nIt is no\nsnapshot.")
    assert line == 12
    assert "is not a" in advice
