"""The snippets of docs/python.md run one after the other, and its table has every public name."""

import re

import pytest
import torch
from PIL import Image

import edm2kit
from edm2kit.experiments.demo import pictures
from edm2kit.metrics.reference import save_reference
from tests.docs.support import code_blocks, page, sections
from tests.support.tuning import make_run

SMALL = {
    '"cifar10.zip"': '"cifar10"',
    "num_steps=16": "num_steps=2",
    "num=200": "num=3",
    "intervals=[None, (0.5, 80)],  #": "intervals=[(0.5, 80)], options='--steps 2',  #",
    "[0.05, 0.1, 0.15]": "[0.05, 0.07, 0.1]",
    '"--steps 16"': '"--steps 2", num=4',
    '"fd_lite0", "fd_lite0.vendi"': '"fd_random", "fd_random.vendi"',
    'table.figure("fd_lite0"': 'table.figure("fd_random"',
}


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the snippets of the page define, run one after the other in a folder with the files that they name."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "cifar10").mkdir()
    for k, image in enumerate(pictures.draw(0, range(8))[0]):
        Image.fromarray(image).save(folder / "cifar10" / f"{k}.png")
    for seed, name in enumerate(("main", "small", "early")):
        make_run(folder / "runs" / name, seed)
    pixels = torch.randint(0, 256, [16, 3, 8, 8], dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_reference(folder / "real.npz", edm2kit.measure_reference(pixels, ["fd_random"]))
    code = "\n".join(code_blocks(page("docs/python.md"), "python"))
    assert [large for large in SMALL if large not in code] == []
    for large, small in SMALL.items():
        code = code.replace(large, small)
    found = {}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.chdir(folder)
        patch.setattr("torch.cuda.is_available", lambda: False)
        exec(code, found)
    return {**found, "folder": folder}


def test_the_snippets_run_in_order(names):
    assert names["batch"].images.shape == (8, 3, 32, 32)
    assert names["samples"].std().item() == pytest.approx(0.5, rel=0.03)
    assert isinstance(names["picture"], Image.Image)
    assert names["averaged"] is not names["net"]


def test_the_sweeps_of_the_page_have_all_combinations_and_files(names):
    assert (names["folder"] / "sweep.csv").read_text().count("\n") == 1 + 1 + 3
    assert (names["folder"] / "sweep.svg").read_text().startswith("<svg")
    assert names["best"]["weight"] in (1, 1.5, 2, 2.5)
    assert len(names["table"]) == 2 * (2 * 3) * 3
    assert names["table"].metrics == ("fd_random", "fd_random.vendi")


def test_the_table_has_the_public_names():
    table = sections(page("docs/python.md"))["Public names"].split("\n\n")[1]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(edm2kit.__all__)
