"""The notebooks of examples/ run from top to bottom on a CPU, without a download."""

import time

import nbclient
import nbformat
import pytest
import torch

import edm2kit
from edm2kit.metrics.reference import save_reference
from tests.support import ROOT

FILE = ROOT / "examples" / "quick_start.ipynb"
MINUTES = 2
SMALL = {
    "range(1000))": "range(50))",
    "steps=400": "steps=4",
    "steps=100": "steps=2",
    "num_steps=12": "num_steps=2",
    "range(1000, 1100)": "range(1000, 1004)",
}


@pytest.fixture
def notebook():
    return nbformat.read(FILE, as_version=4)


def test_every_code_cell_compiles(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(cell.source, f"{FILE.name}:{cell.id}", "exec")


@pytest.mark.parametrize("page", [FILE, ROOT / "docs" / "python.md"], ids=lambda page: page.name)
def test_loops_normalise_weights_before_a_step_and_average_them_as_it_leaves_them(page):
    """As train.py does (Karras et al. 2023, Eq. 66 and 127)."""
    text = page.read_text(encoding="utf-8")
    steps = ("normalize_weights_(net)", "loss_function(net", "optimizer.step()", "ema.update(nimg + batch_size")
    places = [text.index(step) for step in steps]
    assert places == sorted(places)


@pytest.mark.slow
def test_it_runs_in_two_minutes_and_guidance_helps(notebook, monkeypatch):
    monkeypatch.setenv("EDM2_OFFLINE", "1")
    started = time.monotonic()
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3")
    client.execute()
    elapsed_sec = time.monotonic() - started
    (scores,) = [cell for cell in notebook.cells if "score_images" in cell.source]
    lines = [line for output in scores.outputs for line in output.text.splitlines() if "{" in line]
    alone, guided = (float(line.rpartition(":")[2].strip(" }")) for line in lines)
    assert guided < alone
    assert elapsed_sec < MINUTES * 60


def test_it_runs_in_the_small(notebook, monkeypatch):
    monkeypatch.setenv("EDM2_OFFLINE", "1")
    for cell in notebook.cells:
        for large, small in SMALL.items():
            cell.source = cell.source.replace(large, small)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()


SWEEP = ROOT / "examples" / "guidance_sweep.ipynb"
SWEEP_SMALL = {
    "NUM = 500": "NUM = 3",
    "num_steps=12": "num_steps=2",
    "seeds=range(10)": "seeds=range(3)",
    "range(k, k + 10)) for k in range(0, 100, 10)": "range(3))",
    "weights=[1, 1.5, 2, 2.5, 3, 4],": "weights=[1, 2], options='--steps 2',",
}


def test_the_sweep_of_the_second_notebook(tmp_path, monkeypatch):
    """Its code cells run in their order in one namespace, as a notebook does, without Jupyter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDM2_OFFLINE", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    content = nbformat.read(SWEEP, as_version=4)
    nbformat.validate(content)
    code = "\n".join(cell.source for cell in content.cells if cell.cell_type == "code")
    assert [large for large in SWEEP_SMALL if large not in code] == []
    for large, small in SWEEP_SMALL.items():
        code = code.replace(large, small)
    real = torch.randint(0, 256, [8, 3, 32, 32], dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_reference("cifar10.npz", edm2kit.measure_reference(real, ["fd_random"]))
    names: dict = {}
    exec(compile(code, SWEEP.name, "exec"), names)
    assert len(names["table"]) == 1 + 2
    assert len(names["fresh"]) == 3
    assert names["table"].figure()._repr_svg_().startswith("<svg")
    assert SWEEP.stat().st_size < 20_000
