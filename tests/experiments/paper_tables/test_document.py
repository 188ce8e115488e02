"""The record of plans, from which docs/reproduction.md is generated, holds today's tables."""

import json

import numpy as np
import pytest

from edm2kit.ema.power_function import profile_inner_product, std_to_exp
from edm2kit.experiments.paper_tables import document
from edm2kit.experiments.paper_tables.networks import PublishedNetwork
from edm2kit.experiments.paper_tables.plan import count_evaluations
from edm2kit.experiments.paper_tables.tables import load_table, table_names
from tests.support import ROOT

AGAIN = "run: python scripts/reproduction_record.py && python scripts/write_documents.py"


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((ROOT / document.RECORD).read_text())


def test_the_record_holds_today_s_tables(record):
    assert list(record["tables"]) == table_names(), AGAIN
    for name, found in record["tables"].items():
        table = load_table(name)
        for cell, kept in zip(table.cells(), found["cells"], strict=True):
            urls = {url for network in cell.networks for url in network.urls}
            expected = {
                "name": cell.name,
                "published": cell.value,
                "networks": [network.name for network in cell.networks],
                "network_files": len(urls),
                "evaluations": list(count_evaluations(cell, table.sampler)),
            }
            assert {key: kept[key] for key in expected} == expected, AGAIN


def test_the_record_s_fits_are_today_s(record):
    for name, kept in record["rebuilt"].items():
        # an error is the root of what is left of numbers near 1: those near 1e-5 are exact to some 1e-10
        assert kept == pytest.approx(document.fit_record(PublishedNetwork.named(name)), rel=1e-6, abs=1e-9), AGAIN
    # what docs/reproduction.md says of the worst: guides of 128Mi images, and all of training's snapshots would do
    worst = {name: kept for name, kept in record["rebuilt"].items() if kept["error"] > 0.02}
    names = ("s-0134217-0.130", "s-0134217-0.170", "xs-0134217-0.115")
    assert sorted(worst) == [f"edm2-img512-{name}" for name in names]
    assert all(kept["error_of_dense"] < 0.1 * kept["error"] for kept in worst.values())


@pytest.mark.parametrize("std", [0.115, 0.130, 0.170])
def test_no_later_snapshot_would_improve_a_fit(std):
    """As docs/reproduction.md says: least squares over later ones as well leaves them unused."""
    t, exp = np.repeat(np.arange(1.0, 9.0), 2), std_to_exp(np.tile((0.05, 0.1), 8))
    squares = profile_inner_product(t[:, None], exp[:, None], t, exp)
    best = np.linalg.solve(squares, profile_inner_product(t, exp, 4.0, std_to_exp(std)))
    assert np.abs(best[:8]).max() > 1
    assert np.abs(best[8:]).max() < 1e-12


@pytest.mark.slow
def test_the_record_s_costs_are_today_s(record):
    """A minute: every network of every table is counted."""
    made = json.loads(json.dumps(document.make_record("")))
    assert made["tables"] == record["tables"], AGAIN
