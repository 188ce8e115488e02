"""Solvers on the toy's networks, here with Gaussians in their place: what is measured, and the table of it."""

import pytest
import torch

from edm2kit.experiments.solvers import toy_networks
from edm2kit.experiments.solvers.convergence import BY_NAME, MEASURED
from edm2kit.experiments.solvers.report import toy_parts
from edm2kit.experiments.toy import measures
from tests.support.fakes import Gaussian

STEPS = (4, 8, 16, 32)


@pytest.fixture(scope="module")
def record():
    with pytest.MonkeyPatch.context() as patch:
        nets = {"main": Gaussian(0.4, 0.10), "guide": Gaussian(0.4, 0.13)}
        patch.setattr(toy_networks, "load_denoiser", lambda outdir, role, seed: nets[role])
        patch.setattr(measures, "_LEVEL_SAMPLES", 2048)
        return {"command": "x", **toy_networks.measure_toy("nowhere", 0, 64, STEPS)}


def test_every_solver_is_measured_alone_and_autoguided(record):
    assert list(record["results"]) == ["alone", "autoguided"]
    for found in record["results"].values():
        assert list(found["solvers"]) == list(BY_NAME)
        for name, row in found["solvers"].items():
            assert row["evaluations"] == [MEASURED[name][1](count) for count in STEPS]
            errors = [point["error"] for point in row["points"]]
            assert errors[-1] < errors[1] < 0.1
        assert found["solution"]["error"] == 0
        assert found["solvers"]["heun"]["points"][-1]["error"] == pytest.approx(found["heun"]["error"])


def test_the_error_is_that_of_the_solver(record):
    # of N(m, v): x0 - m = (x - m) sqrt(v / (v + T^2)), which the solution of many steps comes close to
    noise = toy_networks.start(64, 0).flatten(1).double()
    T = toy_networks.SIGMA_MAX
    exact = 0.4 + (T * noise - 0.4) * (0.10 / (0.10 + T**2)) ** 0.5
    point = record["results"]["alone"]["solvers"]["euler"]["points"][0]
    x = toy_networks._solve(MEASURED["euler"][0], Gaussian(0.4, 0.10), toy_networks.start(64, 0), STEPS[0])
    assert point["error"] == pytest.approx((x - exact).square().mean().sqrt().item(), rel=1e-3)
    assert isinstance(x, torch.Tensor)


def test_the_table_has_the_fewest_evaluations_from_which_on_it_is_good(record):
    assert toy_networks.fewest([4, 8, 16], [True, False, True]) == 16
    assert toy_networks.fewest([4, 8, 16], [False, True, True]) == 8
    assert toy_networks.fewest([4, 8, 16], [True, True, False]) is None
    lines = toy_networks.table(record).splitlines()
    assert lines[0].startswith("| solver | outliers, alone | outliers, autoguided | error, alone | error, autoguided |")
    cells = {line.split("|")[1].strip(" `"): [c.strip() for c in line.split("|")[2:-1]] for line in lines[2:]}
    assert cells["heun"][2:] == ["63", "63"]
    assert cells["euler"][2:] == ["more than 32", "more than 32"]
    assert int(cells["unipc"][2]) <= 32
    assert "64 samples, training seed 0, autoguidance with weight 2" in toy_parts(record)["toy"]
