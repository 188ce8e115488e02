"""The guidance methods and rules as a table: for --list-guidance, --help-guidance list and the documents."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from edm2kit.guidance.base import Method, Option, Rule
from edm2kit.guidance.registry import METHODS, RULES, all_methods, all_rules

COLUMNS = ("name", "formula", "D_neg", "cost", "defaults", "pick when", "source", "tests")
_CODE_COLUMNS = (0, 1, 2, 7)


def method_lines() -> list[str]:
    """One line for each method: its name, what it does, and what one guided evaluation costs."""
    return [f"{name}: {method.summary} ({method.evaluations})" for name, method in all_methods().items()]


def rows() -> list[tuple[str, ...]]:
    """The built-in and registered methods, then the rules, as texts in the order of COLUMNS."""
    table: list[tuple[str, ...]] = []
    for name, method in METHODS.items():
        tests = _tests(method, method.build or method.negative)
        defaults = _defaults(method.options, method.weight)
        table.append(
            (name, method.formula, method.term, method.evaluations, defaults, method.pick_when, method.source, tests)
        )
    for name, rule in RULES.items():
        tests = _tests(rule, rule.make) if rule.source else "tests/guidance/test_combine.py"
        defaults = _defaults(rule.options)
        table.append((f"rule {name}", rule.formula, "", "none", defaults, rule.pick_when, rule.source, tests))
    return table


def table_text() -> str:
    """Every method and rule as a paragraph of plain text."""
    entries: list[Method | Rule] = [*all_methods().values(), *all_rules().values()]
    paragraphs = []
    for row, entry in zip(rows(), entries, strict=True):
        lines = [f"{row[0]}: {entry.summary}"]
        for column, text in zip(COLUMNS[1:], row[1:], strict=True):
            if text:
                lines.append(f"  {column + ':':10}{text}")
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def table_markdown() -> str:
    """The table in Markdown."""
    header, separator = _markdown_line(COLUMNS), _markdown_line(["---"] * len(COLUMNS))
    lines = []
    for row in rows():
        cells = [text.replace("|", "\\|") for text in row]
        for k in _CODE_COLUMNS:
            if cells[k]:
                cells[k] = f"`{cells[k]}`"
        lines.append(_markdown_line(cells))
    return "\n".join([header, separator, *lines])


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _defaults(options: Sequence[Option], weight: float | None = None) -> str:
    defaults = [f"{option.name} {option.default}" for option in options if option.default is not None]
    if weight is not None:
        defaults.insert(0, f"w {weight:g}")
    return ", ".join(defaults)


def _tests(entry: Method | Rule, make: Callable[..., Any] | None) -> str:
    """The tests of the module that defines a method or rule; empty outside this package."""
    home = getattr(make, "__module__", "")
    for name, module in sorted(sys.modules.items()):
        if name.startswith("edm2kit.guidance.") and any(value is entry for value in vars(module).values()):
            home = name
    package, *parts = home.split(".")
    if package != "edm2kit":
        return ""
    *folders, name = parts
    return "/".join(["tests", *folders, f"test_{name}.py"])
