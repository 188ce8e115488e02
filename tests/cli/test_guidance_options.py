"""Guidance methods from the command line: images that depend on their seed alone, and records of what was asked."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edm2kit.cli import generate
from tests.support import tiny
from tests.support.fakes import tiny_snapshot


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nets")
    tiny_snapshot(folder / "main")
    tiny_snapshot(folder / "weak", seed=1)
    tiny_snapshot(folder / "uncond", seed=2, label_dim=0)
    return folder


def draw(outdir, nets, *arguments, seeds="0-4"):
    words = ["--net", nets / "main", "--steps", 3, "--device", "cpu", "--seeds", seeds, "--outdir", outdir, *arguments]
    done = CliRunner().invoke(generate.main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return images(outdir), done.output


def images(outdir):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(outdir.glob("*.png"))}


METHODS = {
    "icg": "--guidance-method icg --guidance 2",
    "tsg": "--guidance-method tsg --guidance 3",
    "dropout": "--guidance-method dropout",
    "input-noise": "--guidance-method input-noise",
    "sum": "--guidance-method cfg --guidance 1.5 --guidance-also pag=3 --guidance-also icg=1.5 --interval 0,20",
    "apg": "--guidance-method seg --guidance-rule apg --guidance-schedule cosine",
    "loss": "--guidance-method loss --loss-kind colour --loss-colour 200,30,30 --loss-augment 2 --loss-average 3",
    "erk": "--guidance-method sag --solver erk",
    "fbg": "--guidance-method cfg --guidance 2 --guidance-rule fbg --S_churn 2",
    "cfg-plus-plus": "--guidance-method cfg --guidance 1.6 --guidance-schedule cfg-plus-plus --solver euler",
    "reg": "--guidance-method reg --guidance 2 --guidance-schedule c2fg",
    "random": "--guidance-method s2 --guidance 2 --guidance-also icg=2 --guidance-also cads=2",
}


@pytest.fixture(scope="module")
def plain(nets, tmp_path_factory):
    return draw(tmp_path_factory.mktemp("plain") / "out", nets)[0]


@pytest.mark.parametrize("name", METHODS)
def test_an_image_depends_on_its_seed_alone(name, nets, plain, tmp_path):
    arguments = METHODS[name].split()
    whole, _ = draw(tmp_path / "whole", nets, *arguments)
    parts, _ = draw(tmp_path / "parts", nets, *arguments, "--batch", 2, seeds="3,1,4")
    assert list(parts) == ["000001.png", "000003.png", "000004.png"]
    for file, pixels in parts.items():
        assert np.abs(pixels - whole[file]).max() <= 1
    assert any((pixels != plain[file]).any() for file, pixels in whole.items())


def test_two_ranks_generate_the_same_images_with_a_random_method(nets, tmp_path):
    arguments = ["--guidance-method", "tsg", "--guidance", "3", "--tsg-scale", "1"]
    one, _ = draw(tmp_path / "one", nets, *arguments)
    words = ["--net", nets / "main", "--steps", 3, "--device", "cpu", "--seeds", "0-4", "--outdir", tmp_path / "two"]
    done = tiny.run("generate.py", *words, *arguments, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    two = images(tmp_path / "two")
    assert list(two) == list(one)
    assert all(np.abs(two[file] - one[file]).max() <= 1 for file in one)


def test_both_guides_are_loaded_checked_and_recorded(nets, tmp_path):
    both = [
        "--gnet",
        nets / "weak",
        "--uncond",
        nets / "uncond",
        "--guidance-method",
        "cfg-plus-autoguidance",
        "--guidance",
        2,
    ]
    _, output = draw(tmp_path / "both", nets, *both)
    assert "Guidance: cfg-plus-autoguidance, weight 2" in output
    assert "was not trained without labels" not in output
    record = json.loads(next((tmp_path / "both").glob("*.json")).read_text())
    assert record["settings"]["uncond"]["sha256"] != record["settings"]["gnet"]["sha256"]
    assert record["settings"]["guidance"]["options"] == {"cfg_plus_autoguidance_share": 0.5}


def test_settings_are_recorded_and_older_records_stay_valid(nets, tmp_path):
    draw(tmp_path / "sum", nets, *METHODS["sum"].split(), "--guidance-rule", "rescale")
    asked = json.loads(next((tmp_path / "sum").glob("*.json")).read_text())["settings"]["guidance"]
    assert asked["also"] == [["pag", 3.0], ["icg", 1.5]]
    assert asked["rule"] == "rescale"
    draw(tmp_path / "pair", nets, "--gnet", nets / "weak", "--guidance", 2)
    asked = json.loads(next((tmp_path / "pair").glob("*.json")).read_text())["settings"]["guidance"]
    assert set(asked) == {"method", "weight", "interval", "options", "steps"}


def test_cfg_with_a_network_trained_only_with_labels_warns(nets, tmp_path):
    assert (
        "was not trained without labels" in draw(tmp_path / "out", nets, "--guidance-method", "cfg", "--guidance", 2)[1]
    )


def test_a_folder_recorded_under_an_old_name_continues(nets, tmp_path):
    arguments = ["--gnet", nets / "weak", "--guidance", 2]
    draw(tmp_path, nets, *arguments, seeds="0-1")
    (record_file,) = tmp_path.glob("*.json")
    record = json.loads(record_file.read_text())
    assert record["settings"]["guidance"]["method"] == "autoguidance"
    record["settings"]["guidance"]["method"] = "pair"
    record_file.write_text(json.dumps(record))
    assert len(draw(tmp_path, nets, *arguments, seeds="0-2")[0]) == 3


def test_old_names_work_on_the_command_line_with_a_note(nets, tmp_path):
    new = ["--guidance-method", "cfg-plus-autoguidance", "--cfg-plus-autoguidance-share", 0.25]
    old = ["--guidance-method", "mixed", "--mixed-share", 0.25]
    networks = ["--gnet", nets / "weak", "--uncond", nets / "uncond", "--guidance", 2]
    draw(tmp_path, nets, *networks, *new, seeds="0-1")
    found, output = draw(tmp_path, nets, *networks, *old, seeds="0-2")  # the same settings, so the folder continues
    assert len(found) == 3
    assert output.count("guidance method 'mixed' is now called 'cfg-plus-autoguidance'") == 1


def test_an_unconditional_guide_network_is_recorded_as_cfg(nets, tmp_path):
    _, output = draw(tmp_path, nets, "--gnet", nets / "uncond", "--guidance", 2)
    assert "Guidance: cfg, weight 2" in output
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert record["settings"]["guidance"]["method"] == "cfg"
    draw(tmp_path, nets, "--gnet", nets / "uncond", "--guidance", 2, "--guidance-method", "cfg", seeds="0-5")
