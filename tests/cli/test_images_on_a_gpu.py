"""Commands bring images to the host before they make pictures of them, or save them: a GPU's tensors are no arrays."""

import dataclasses

import pytest
import torch
from click.testing import CliRunner

from edm2kit.cli import compare, generate, metrics, tune
from edm2kit.sampling.engine import Engine
from tests.cli.test_compare import ROWS
from tests.support.pictures import some_files, write_folder
from tests.support.tuning import make_run


class OnGPU(torch.Tensor):
    """A tensor that stays where it is until it is brought to the CPU, as one on a GPU does."""

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __array__(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self, *args, **kwargs):
        return self.as_subclass(torch.Tensor)

    def to(self, *args, **kwargs):
        moved = super().to(*args, **kwargs)
        goes = [*args, kwargs.get("device")]
        return moved.as_subclass(torch.Tensor) if "cpu" in map(str, goes) else moved


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two runs, real images and a reference; what is generated afterwards is on a GPU."""
    make_run(tmp_path / "main", seed=0)
    make_run(tmp_path / "guide", seed=1, times=(1000,))
    write_folder(tmp_path / "real", some_files(12))
    (tmp_path / "rows.yaml").write_text(ROWS)
    run(metrics, "ref", "--data", tmp_path / "real", "--dest", tmp_path / "ref.npz", "--metrics", "fd_random")
    made = Engine.generate

    def on_gpu(engine, seeds):
        batch = made(engine, seeds)
        moved = {name: getattr(batch, name) for name in ("images", "latents", "classes")}
        moved = {name: value if value is None else value.as_subclass(OnGPU) for name, value in moved.items()}
        return dataclasses.replace(batch, **moved)

    monkeypatch.setattr(Engine, "generate", on_gpu)
    return tmp_path


def run(command, *words):
    done = CliRunner().invoke(command.main, [str(word) for word in words])
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"


def test_the_stand_in_is_no_array():
    moved = torch.ones(2).as_subclass(OnGPU)
    for convert in (OnGPU.numpy, OnGPU.__array__):
        with pytest.raises(TypeError, match="to numpy"):
            convert(moved * 2)
    assert (moved * 2).cpu().numpy().tolist() == moved.to("cpu").mul(2).numpy().tolist() == [2, 2]


@pytest.mark.parametrize("kind", ["folder", "npz", "grid"])
def test_generating(place, kind):
    where = {
        "folder": ["--outdir", place / "out"],
        "npz": ["--npz", place / "images.npz"],
        "grid": ["--grid", place / "sheet.png"],
    }[kind]
    run(generate, "--net", place / "main", "--steps", 2, "--seeds", "0-4", "--device", "cpu", *where)


def test_scoring_a_network(place):
    words = ["--net", place / "main", "--steps", 2, "--num", 6, "--ref", place / "ref.npz", "--bootstrap", 0]
    names = "fd_random,fd_random.kid,fd_random.precision,fd_random.vendi,fd_random.mind,fd_random.authpct"
    run(metrics, "gen", *words, "--metrics", names, "--real", place / "real", "--device", "cpu")


def test_comparing(place):
    common = ["--outdir", place / "out", "--rows-file", place / "rows.yaml", "--rows", "unguided,pair"]
    common += ["--network", f"main={place / 'main'}", "--network", f"guide={place / 'guide'}"]
    measured = ["--ref", place / "ref.npz", "--real", place / "real", "--device", "cpu"]
    run(compare, "tune", *common, *measured)
    run(compare, "report", *common, *measured)
    run(compare, "sheet", *common, "--images", 2, "--device", "cpu")


def test_searching(place):
    line = ["search", "--main", place / "main", "--guide", place / "guide", "--ref", place / "ref.npz"]
    line += ["--metric", "fd_random", "--budget", "120img", "--num", 12, "--halvings", 0, "--confirm", 4]
    run(tune, *line, "--outdir", place / "search", "--device", "cpu", "--", "--steps", 2)
