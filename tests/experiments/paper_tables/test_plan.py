"""Plans: what a reproduction will need, told before anything is downloaded."""

import dataclasses

import pytest
from click.testing import CliRunner, Result

from edm2kit.cli import reproduce
from edm2kit.experiments.paper_tables import plan
from edm2kit.experiments.paper_tables.plan import cell_cost, count_evaluations
from edm2kit.experiments.paper_tables.tables import load_table, table_names
from edm2kit.guidance.registry import METHODS, Choice
from edm2kit.sampling.solvers import Sampler


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(reproduce.main, [str(a) for a in arguments])


def test_unknown_names_are_answered_with_the_nearest():
    assert "did you mean 'autoguidance-1'" in invoke("plan", "--table", "autoguidance1").output
    refused = invoke("plan", "--table", "autoguidance-1", "--rows", "img512-s-autogg")
    assert refused.exit_code == 1
    assert "did you mean 'img512-s-autog'" in refused.output


def test_list_names_every_row():
    output = invoke("list").output
    for name in table_names():
        for row in load_table(name).rows:
            assert f"  {row.name} " in output


def cell_of(row: str, metric: str = "fid"):
    [cell] = load_table("autoguidance-1").cells([row], [metric])
    return cell


@pytest.mark.parametrize(
    ("row", "evaluations"), [("img512-s", (63, 0)), ("img512-s-autog", (63, 63)), ("img512-s-interval", (63, 14))]
)
def test_evaluations_are_counted(row, evaluations):
    # (0.28, 2.90] holds the steps 15 to 21 of 32
    assert count_evaluations(cell_of(row), Sampler()) == evaluations


@pytest.mark.parametrize(
    ("method", "evaluations"),
    [
        ("pag", 126),
        ("sag", 126),
        ("icg", 126),
        ("tsg", 126),
        ("dropout", 126),
        ("cfg", 126),
        ("sliding-window", 63 * 3.25),
    ],
)
def test_evaluations_of_one_network_are_counted_by_area(method, evaluations):
    """Several calls in one batch count each, and crops as much as their area: four of 48x48 in 64x64 are 2.25."""
    options = {option.keyword: option.default for option in METHODS[method].options}
    cell = dataclasses.replace(cell_of("img512-s"), guidance=Choice(method, 2.0, None, options))
    if method == "sliding-window":
        cell = dataclasses.replace(cell, guidance=Choice(method, 2.0, None, {"sliding_window_size": 48}))
    assert count_evaluations(cell, Sampler()) == (evaluations, 0)


def test_a_plan_downloads_nothing_and_adds_up(monkeypatch, tmp_path):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("EDM2_OFFLINE", "1")
    need = cell_cost(cell_of("img512-s-autog"), Sampler())
    assert need.multiply_adds / 1e9 == pytest.approx(63 * (100.8 + 45.0), rel=0.005)
    sizes = {download.url.rsplit("/", 1)[1]: download for download in need.files}
    assert sizes["edm2-img512-s-2147483-0.070.pkl"].num_bytes == pytest.approx(560565890, rel=0.005)
    assert sizes["diffusion_pytorch_model.safetensors"].num_bytes == 334643276
    assert not any(download.is_here for download in need.files)
    here = tmp_path / "nvlabs-fi-cdn.nvidia.com/edm2/dataset-refs/img512.pkl"
    here.parent.mkdir(parents=True)
    here.write_bytes(b"12345")
    found = {d.url.rsplit("/", 1)[1]: d for d in cell_cost(cell_of("img512-s-autog"), Sampler()).files}
    assert (found["img512.pkl"].num_bytes, found["img512.pkl"].is_here) == (5, True)


def test_plan_reports_hours_for_a_given_throughput():
    result = invoke("plan", "--table", "autoguidance-1", "--rows", "img512-s", "--metrics", "fid", "--tflops", 100)
    assert result.exit_code == 0, result.output
    # 150,000 images of 63 evaluations of 100.8e9 multiply-adds, two operations each, at 100e12 a second
    hours = 150_000 * 63 * 100.8e9 * 2 / 100e12 / 3600
    [line] = [line for line in result.output.splitlines() if line.startswith("img512-s-fid")]
    assert float(line.split()[-1]) == pytest.approx(hours, rel=0.01)
    assert "edm2-img512-s-2147483-0.130.pkl" in result.output


def test_a_network_is_counted_once(monkeypatch):
    counted = []
    monkeypatch.setattr(plan, "evaluation_cost", lambda architecture: counted.append(architecture) or Free())
    plan._cost.cache_clear()
    for cell in load_table("autoguidance-1").cells(["img512-s", "img512-s-autog", "img512-s-cfg"]):
        cell_cost(cell, Sampler())
    plan._cost.cache_clear()
    assert len(counted) == 3  # S, XS, and XS without classes


class Free:
    parameters = multiply_adds = 0


def test_a_disk_too_small_for_the_files_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache" / "deep"))
    monkeypatch.setattr(plan, "evaluation_cost", lambda architecture: Free())
    line = ["plan", "--table", "edm2", "--rows", "img64-s", "--metrics", "fid"]
    plan._cost.cache_clear()
    fits = invoke(*line).output
    monkeypatch.setattr(reproduce, "free_bytes", lambda folder: 10_000_000)
    small = invoke(*line).output
    plan._cost.cache_clear()
    # network (of size 0 here), Inception weights, and statistics
    assert f"3 files, 3 of them to download, about 0.14 GB, to {tmp_path / 'cache' / 'deep'} (" in fits
    assert "not enough" not in fits
    assert "(0.01 GB free: not enough):" in small
