"""The published record of the solvers: complete, and in agreement with what their formulas promise."""

import json

import pytest

from edm2kit.experiments.documents import checkout
from edm2kit.experiments.solvers.convergence import DENOISERS, MEASURED
from edm2kit.experiments.solvers.report import FOLDER, PICTURE_NAME, RECORD_NAME, document_parts, plot


@pytest.fixture(scope="module")
def record():
    return json.loads((checkout() / FOLDER / RECORD_NAME).read_text())


def test_the_record_holds_every_solver_with_the_order_of_its_formula(record):
    assert (checkout() / FOLDER / PICTURE_NAME).is_file()
    assert list(record["results"]) == list(DENOISERS)
    for rows in record["results"].values():
        assert list(rows) == list(MEASURED)
        for row in rows.values():
            assert row["order"] == pytest.approx(row["expected_order"], abs=0.4)


def test_the_table_has_a_line_for_each_solver(record):
    lines = document_parts(record)["solvers"].splitlines()
    for name in MEASURED:
        assert any(line.startswith(f"| `{name}` |") for line in lines)


def test_the_picture_is_made_from_the_record(record, tmp_path):
    pytest.importorskip("matplotlib")
    plot(record, tmp_path / "orders.png")
    assert (tmp_path / "orders.png").read_bytes().startswith(b"\x89PNG")
