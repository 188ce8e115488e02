"""What the README shows works as it stands: its commands run, in the small; its links and names exist."""

import os
import shlex

import pytest
import torch
from PIL import Image

import edm2kit
from edm2kit.cli import generate
from edm2kit.cli.presets import boxed_presets, load_presets
from edm2kit.experiments.demo import pictures
from edm2kit.snapshots.file_format import snapshot_name
from tests.docs.support import broken_links, code_blocks, page, run_commands, sections
from tests.support import ROOT
from tests.support.fakes import tiny_snapshot
from tests.support.tiny import write_config

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
# what makes the README's commands small: sizes, and with the number of images the names of snapshots
SMALL = {
    "--resolution 64": "--resolution 8",
    "--preset edm2-img64-xs": "--config tiny.yaml --samples 0 --device cpu",
    "16Mi": "1Ki",
    "4Mi": "1Ki",
    snapshot_name(16 << 20, 0.050): snapshot_name(1 << 10, 0.050),
    snapshot_name(4 << 20, 0.100): snapshot_name(1 << 10, 0.100),
    "--channels 64": "--channels 8",
    "--seeds 0-9999": "--seeds 0-9 --steps 2 --device cpu",
    "--num 10000": "--num 10 --device cpu",
    "--metrics fd_random": "--metrics fd_random --device cpu",
}


def test_it_is_short_and_begins_with_a_sentence_and_two_pictures():
    lines = page("README.md").splitlines()
    assert len(lines) <= 130
    assert "autoguidance" in " ".join(lines[2:4])
    pictures = [line for line in lines if line.startswith("![")]
    assert [picture.rpartition("/")[2] for picture in pictures] == ["first.png)", "figure1.png)"]


def test_the_first_command_makes_a_sheet_from_networks_of_the_package(tmp_path):
    install, first = code_blocks(page("README.md"))[0].strip().splitlines()
    assert install.startswith("pip install .")
    words = shlex.split(first)
    assert words[0] == "edm2kit-generate"
    assert words[words.index("--preset") + 1] in boxed_presets()
    words[words.index("--seeds") + 1] = "0-3"
    words[words.index("--grid") + 1] = str(tmp_path / "sheet.png")
    generate.main([*words[1:], "--device", "cpu"], standalone_mode=False)
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width == 2 * 32 * 4 + 3 * 4  # two images in a row, enlarged four times, with margins
    assert height > width  # a title above


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    assert broken_links(file) == []


def test_the_index_has_every_document():
    index = page("docs/index.md")
    names = [file.name for file in (ROOT / "docs").glob("*.md") if file.name != "index.md"]
    assert [name for name in names if f"({name})" not in index] == []


def test_settings_for_a_folder_of_photos_are_chosen(tmp_path):
    (block,) = code_blocks(sections(page("README.md"))["Train and score your own pair"])
    *commands, last = block.strip().splitlines()
    (tmp_path / "photos").mkdir()
    for k, image in enumerate(pictures.draw(0, range(12))[0]):
        Image.fromarray(image).resize((40, 36)).save(tmp_path / "photos" / f"{k}.jpg")
    assert "--resolution 64" in block
    block = "\n".join(commands).replace("--resolution 64", "--resolution 8")
    output = run_commands(f"{block} --channels 16 --throughput 100 --device cpu", tmp_path)
    script = (tmp_path / last.removeprefix("bash ")).read_text()
    assert all(line in output for line in script.splitlines() if line.startswith("edm2kit-"))
    assert script.count("edm2kit-") + script.count(" train.py") >= 2


def test_the_six_commands_take_a_folder_of_photos_to_a_score(tmp_path):
    (block,) = code_blocks(sections(page("docs/own-images.md"))["Step by step"])
    commands = block.strip().splitlines()
    assert len(commands) == 6
    assert "..." not in block
    folder = tmp_path / "photos"
    folder.mkdir()
    for k, image in enumerate(pictures.draw(0, range(12))[0]):
        Image.fromarray(image).resize((40, 36)).save(folder / f"{k}.jpg")
    write_config(tmp_path / "tiny.yaml")
    assert {large for large in SMALL if large not in block} == set(), "these stand for nothing on the page"
    for large, small in SMALL.items():
        block = block.replace(large, small)
    output = run_commands(block, tmp_path)
    assert len(list((tmp_path / "out").glob("*.png"))) == 10
    assert "fd_random" in output.splitlines()[-1]


def test_the_preset_of_the_first_command_exists():
    (command,) = code_blocks(sections(page("README.md"))["Images from published weights"])
    words = shlex.split(command)
    assert words[:2] == ["python", "generate.py"]
    assert words[words.index("--preset") + 1] in load_presets()


def test_the_python_example_makes_eight_images(tmp_path, monkeypatch):
    (code,) = code_blocks(sections(page("README.md"))["Images from published weights"], "python")
    small = tiny_snapshot(tmp_path / "net", label_dim=4)
    load = edm2kit.load_snapshot
    monkeypatch.setattr(edm2kit, "load_snapshot", lambda url, device: load(small))
    names = {}
    code = code.replace('"cuda"', '"cpu"').replace("1000", "4").replace("(3, 64, 64)", "(3, 8, 8)")
    exec(code, names)
    assert names["images"].shape == (8, 3, 8, 8)
    assert names["images"].dtype == torch.uint8


def test_the_published_files_of_the_example_are_those_of_a_preset():
    preset = load_presets()["edm2-img64-s-autog-fid"]
    code = page("README.md")
    assert all(os.path.basename(url) in code for url in (preset.net, preset.gnet))
    assert f"weight={preset.guidance:g}" in code
