"""The guidance methods as a table: for --help, --list-guidance and the documents."""

from collections.abc import Sequence

from edm2kit.guidance.base import Method, Rule
from edm2kit.guidance.registry import METHODS, RULES

COLUMNS = ("name", "formula", "D_neg", "cost", "defaults", "source", "tests")


def method_lines() -> list[str]:
    """One line for each method: its name, what it does, what one guided evaluation costs."""
    return [f"{name}: {method.summary} ({method.evaluations})" for name, method in METHODS.items()]


def rows() -> list[tuple[str, ...]]:
    """The methods, then the rules, as texts in the order of COLUMNS."""
    table = []
    for name, method in METHODS.items():
        weight = "" if method.weight is None else f"w {method.weight:g}"
        defaults = ", ".join(filter(None, [weight, _defaults(method)]))
        tests = _tests(method.build or method.negative)
        table.append((name, method.formula, method.term, method.evaluations, defaults, method.source, tests))
    for name, rule in RULES.items():
        tests = _tests(rule.make) if rule.source else "tests/guidance/test_combine.py"
        table.append((f"rule {name}", rule.formula, "", "none", _defaults(rule), rule.source, tests))
    return table


def table_text() -> str:
    """Every method and rule as a paragraph of plain text."""
    paragraphs = []
    for row, summary in zip(rows(), [entry.summary for entry in (*METHODS.values(), *RULES.values())], strict=True):
        details = [f"  {column + ':':10}{text}" for column, text in zip(COLUMNS, row, strict=True) if text][1:]
        paragraphs.append("\n".join([f"{row[0]}: {summary}", *details]))
    return "\n\n".join(paragraphs)


def table_markdown() -> str:
    """The same as a table in Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *map(_cells, rows()))]
    return "\n".join(lines)


def _cells(row: Sequence[str]) -> list[str]:
    formatted = [f"`{text}`" if k in (0, 1, 2, 6) and text else text for k, text in enumerate(row)]
    return [text.replace("|", "\\|") for text in formatted]


def _defaults(entry: Method | Rule) -> str:
    return ", ".join(f"{option.name} {option.default}" for option in entry.options if option.default is not None)


def _tests(make: object) -> str:
    *folders, name = make.__module__.split(".")[1:]
    return "/".join(["tests", *folders, f"test_{name}.py"])
