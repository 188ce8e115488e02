"""Whoever follows docs/extend.md letter by letter ends with things that work."""

import re
import tomllib

import numpy as np
import pytest
from PIL import Image

from tests.docs.support import code_blocks, page, run_commands, run_tests, sections

RECIPES = sections(page("docs/extend.md"))


def save_files(text, folder):
    """Write each block whose first line is `# NAME` to that file."""
    for block in code_blocks(text, r"\w+"):
        name = re.match(r"# (\S+)\n", block)[1]
        (folder / name).write_text(block)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A folder in which every file of the page was saved and every command was run."""
    folder = tmp_path_factory.mktemp("extend")
    save_files(page("docs/extend.md"), folder)
    commands = "".join(block for text in RECIPES.values() for block in code_blocks(text))
    (folder / "output.txt").write_text(run_commands(commands, folder))
    return folder


def images(folder):
    files = sorted(folder.glob("*.png"))
    return np.stack([np.asarray(Image.open(file)).astype(int) for file in files])


def test_there_are_five_recipes():
    assert [title[:2] for title in RECIPES] == ["Be", "1.", "2.", "3.", "4.", "5."]


def test_the_method_and_the_rule_change_the_images(followed):
    sharpened, clipped = images(followed / "runs" / "sharpened"), images(followed / "runs" / "clipped")
    assert sharpened.shape == clipped.shape == (4, 32, 32, 3)
    assert (sharpened != clipped).any()


def test_the_network_trains_and_generates(followed):
    assert images(followed / "runs" / "plain-images").shape == (4, 32, 32, 3)


def test_the_data_set_trains_with_its_labels(followed):
    assert list((followed / "runs" / "gradients").glob("network-snapshot-0000001-*.safetensors"))
    assert "2 classes" in (followed / "output.txt").read_text()


def test_the_detector_in_a_file_gives_numbers(followed):
    assert (followed / "my_detector.pt2").exists()
    text = (followed / "output.txt").read_text()
    assert re.search(r"seeds 0-19: mine [0-9.]+ \[.*\], mine\.vendi [0-9.]+", text)


def test_the_metric_gives_a_number(followed):
    last = (followed / "output.txt").read_text().rstrip().splitlines()[-1]
    assert re.search(r"fd_colours\D+[0-9.]+", last)


def test_the_tests_of_the_page_pass(followed):
    assert "2 passed" in run_tests(followed, "my_guidance", "my_rule")


def test_an_installed_package_offers_its_method_and_rule_without_further_ado(followed):
    """pip writes the entry points of pyproject.toml into the package's metadata; commands read them there."""
    project = tomllib.loads((followed / "pyproject.toml").read_text())["project"]
    (group, entries) = next(iter(project["entry-points"].items()))
    metadata = followed / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    output = run_commands("python generate.py --list-guidance\npython generate.py --help-guidance sharpen", followed)
    assert "--sharpen-radius" in output
    assert "rule clip" in output or "clip:" in output
