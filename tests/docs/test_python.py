"""The snippets of docs/python.md run one after the other, and its table has every public name."""

import re

import pytest
from PIL import Image

import edm2kit
from edm2kit.experiments.demo import pictures
from tests.docs.support import code_blocks, page, sections
from tests.support.fakes import tiny_snapshot


def test_the_snippets_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    tiny_snapshot(tmp_path / "main.safetensors")
    tiny_snapshot(tmp_path / "guide.safetensors", seed=1)
    (tmp_path / "photos").mkdir()
    for k, image in enumerate(pictures.draw(0, range(4))[0]):
        Image.fromarray(image).resize((8, 8)).save(tmp_path / "photos" / f"{k}.png")
    names = {}
    for block in code_blocks(page("docs/python.md"), "python"):
        exec(block.replace("photos.zip", "photos"), names)
    assert names["batch"].images.shape == (8, 3, 8, 8)
    assert names["samples"].std().item() == pytest.approx(0.5, rel=0.03)
    assert isinstance(names["picture"], Image.Image)
    assert names["averaged"] is not names["net"]


def test_the_table_has_the_public_names():
    table = sections(page("docs/python.md"))["Public names"].split("\n\n")[1]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(edm2kit.__all__)
