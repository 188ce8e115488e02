"""Solvers on networks of images: errors against the solution of the network's own ODE, and the table of them."""

import pytest

from edm2kit.experiments.solvers import image_networks
from edm2kit.experiments.solvers.convergence import MEASURED
from edm2kit.experiments.solvers.report import image_parts
from tests.support.fakes import tiny_snapshot

STEPS = (4, 12)
SOLVERS = ("euler", "heun", "dpmpp2m")


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    main, guide = tiny_snapshot(folder / "main"), tiny_snapshot(folder / "guide", seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_networks, "FINE_STEPS", 24)
        patch.setattr(image_networks, "HEUN_STEPS", 8)
        patch.setattr(image_networks, "BY_NAME", SOLVERS)
        return {"command": "x", **image_networks.measure_images(main, guide, 1.5, 2, STEPS)}


def test_every_solver_approaches_the_solution_alone_and_autoguided(record):
    assert list(record["results"]) == ["alone", "autoguided"]
    for found in record["results"].values():
        assert list(found["solvers"]) == list(SOLVERS)
        assert 0 < found["solvers"]["heun"]["errors"][-1] < found["heun"]  # 12 steps are better than 8
        for name, row in found["solvers"].items():
            assert row["evaluations"] == [MEASURED[name][1](count) for count in STEPS]
            assert row["errors"][-1] < row["errors"][0]
    alone, guided = (found["solvers"]["euler"]["errors"] for found in record["results"].values())
    assert alone != guided


def test_the_table_has_a_line_for_each_solver(record):
    lines = image_networks.table(record).splitlines()
    assert lines[0].startswith("| solver | error of 32 Heun steps, alone | error of 32 Heun steps, autoguided | a grey")
    assert [line.split("|")[1].strip(" `") for line in lines[2:]] == list(SOLVERS)
    coarse = {**record, "results": {"alone": {"heun": 1e-9, "solvers": record["results"]["alone"]["solvers"]}}}
    cells = image_networks.table(coarse).splitlines()[2].split("|")
    assert cells[2].strip() == "more than 12"  # Euler is never as good as that
    for error, cell in ((1.009, "12"), (1.011, "more than 12")):  # within 1 %
        row = {"evaluations": [4, 12], "errors": [3.0, error * 1e-3]}
        near = {**record, "results": {"alone": {"heun": 1e-3, "solvers": {"deis": row}}}}
        assert image_networks.table(near).splitlines()[2].split("|")[2].strip() == cell
    assert "2 images of `main` led away from `guide` with weight 1.5" in image_parts(record)["images"]
