from edm2kit.guidance.registry import METHODS, RULES
from edm2kit.guidance.table import COLUMNS, method_lines, rows, table_markdown, table_text
from tests.support import ROOT


def test_every_method_and_rule_has_a_full_row_and_tests_of_its_own():
    named = [row[0] for row in rows()]
    assert named == [*METHODS, *(f"rule {name}" for name in RULES)]
    for row in rows():
        cells = dict(zip(COLUMNS, row, strict=True))
        assert cells["formula"]
        assert cells["cost"]
        assert (ROOT / cells["tests"]).is_file(), cells["tests"]
        assert cells["source"] or row[0] in ("none", "rule linear")


def test_texts_name_cost_and_summary():
    assert len(method_lines()) == len(METHODS)
    for name, method in METHODS.items():
        assert f"{name}: {method.summary}\n" in table_text()
        assert f"{name}: {method.summary} ({method.evaluations})" in method_lines()


def test_a_bar_in_a_formula_does_not_break_the_table():
    assert all(line.replace("\\|", "").count("|") == len(COLUMNS) + 1 for line in table_markdown().splitlines())
