"""Preset files: any options of generate.py in a YAML file, which the command line overrides."""

import json

import pytest
import yaml
from click.testing import CliRunner

from edm2kit.cli import generate, presets
from edm2kit.cli.generation_options import parse_request
from edm2kit.cli.presets import write_preset_file
from edm2kit.guidance.option_types import existing_file
from edm2kit.guidance.registry import all_options
from edm2kit.training.config import read_yaml
from tests.support.fakes import tiny_snapshot

OPTIONS = {
    "net": "main.safetensors",
    "gnet": "nets/guide.safetensors",
    "guidance-method": "autoguidance",
    "guidance": 2.5,
    "interval": [0.2, 20],
    "guidance-rule": "rescale",
    "steps": 3,
    "balanced": True,
    "compile": False,
}


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "preset.yaml"
    write_preset_file(path, OPTIONS, {"metric": "fd_lite0", "value": 12.5})
    return path


def test_a_file_sets_every_option_it_names_and_finds_networks_beside_it(preset):
    request = parse_request(["--preset", str(preset)])
    assert request.net == str(preset.parent / "main.safetensors")
    assert request.gnet == str(preset.parent / "nets" / "guide.safetensors")
    guidance = request.guidance
    assert (guidance.method, guidance.weight, guidance.interval) == ("autoguidance", 2.5, (0.2, 20.0))
    assert guidance.rule == "rescale"
    assert request.sampler.num_steps == 3
    assert (request.classes, request.compile) == ("", "off")  # YAML takes off for false
    assert read_yaml(preset)["value"] == 12.5


def test_the_command_line_overrides_a_file(preset):
    request = parse_request(
        ["--preset", str(preset), "--guidance", "1.5", "--guidance-rule", "linear", "--net", "other", "--steps", "5"]
    )
    assert (request.net, request.guidance.weight, request.guidance.rule) == ("other", 1.5, "linear")
    assert (request.sampler.num_steps, request.guidance.interval) == (5, (0.2, 20.0))


def test_another_method_leaves_out_the_guidance_of_the_file(preset):
    request = parse_request(["--preset", str(preset), "--guidance-method", "icg"])
    assert (request.gnet, request.guidance.method, request.guidance.interval) == (None, "icg", None)
    assert (request.guidance.rule, request.sampler.num_steps) == ("linear", 3)


def test_absolute_paths_and_urls_stay_as_they_are(tmp_path):
    write_preset_file(tmp_path / "p.yaml", {"net": "/a/b.safetensors", "gnet": "https://x.org/g.pkl"}, {})
    request = parse_request(["--preset", str(tmp_path / "p.yaml"), "--guidance", "2"])
    assert (request.net, request.gnet) == ("/a/b.safetensors", "https://x.org/g.pkl")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "does not exist"),
        ("options: [1, 2]", "needs a mapping `options`"),
        ("net: a", "needs a mapping `options`"),
        ("options: {net: a, weigth: 2}", "No such option.*--weigth"),
        ("options: {net: a, steps: many}", "many"),
        ("options: {preset: edm2-img512-s-fid}", "names another preset"),
        ("options: {net: [", "is not valid YAML"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path, content, reason):
    path = tmp_path / "p.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=reason) as caught:
        parse_request(["--preset", str(path)])
    assert "p.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_generate_takes_a_file_from_anywhere(preset, tmp_path, monkeypatch):
    tiny_snapshot(preset.parent / "main.safetensors")
    tiny_snapshot(preset.parent / "nets" / "guide.safetensors", seed=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    words = ["--preset", str(preset), "--seeds", "0-1", "--outdir", "out", "--device", "cpu"]
    done = CliRunner().invoke(generate.main, words)
    assert done.exit_code == 0, done.output
    guidance = json.loads((tmp_path / "elsewhere" / "out" / "generation.json").read_text())["settings"]["guidance"]
    assert (guidance["weight"], guidance["rule"]) == (2.5, "rescale")


def test_switches_and_files_mean_what_they_mean_on_the_command_line(tmp_path):
    for name in ("nets/guide.safetensors", "prompts.txt", "model/model_index.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    options = {"net": "diffusers:model", "prompts": "prompts.txt", "gnet-lora": "nets", "compile": True}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"options": options}))
    request = parse_request(["--preset", str(tmp_path / "p.yaml"), "--guidance", "2"])
    assert (request.net, request.compile) == (f"diffusers:{tmp_path / 'model'}", "on")
    assert (request.prompts, request.gnet_lora) == (str(tmp_path / "prompts.txt"), str(tmp_path / "nets"))
    for net in ("diffusers:org/name", "hf://org/name/file.safetensors"):
        (tmp_path / "p.yaml").write_text(yaml.safe_dump({"options": {"net": net}}))
        assert parse_request(["--preset", str(tmp_path / "p.yaml")]).net == net


def test_files_in_the_home_folder_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "p.yaml").write_text("options: {net: ~/net.safetensors}")
    assert parse_request(["--preset", str(tmp_path / "p.yaml")]).net == "/home/me/net.safetensors"


def test_every_option_that_names_a_file_is_relative_to_the_preset():
    files = {option.name for _, option in all_options() if option.parse is existing_file}
    files |= {name for name in ("net", "gnet", "uncond", "labels", "prompts", "gnet-lora")}
    assert files == set(presets._PATHS)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("{net: a, class: no}", "class is False; write text that YAML takes for something else"),
        ("{net: a, class: [on, off]}", "class is True"),
        ("{net: a, guidance: off}", "guidance is False"),
        ("{net: a, steps: yes}", "steps is True"),
        ("{net: {a: b}}", "net is dict"),
        ("{net: a, class: 2024-01-31}", "in quotes"),
        ("{net: a, guidance-also: [null]}", "guidance-also is None"),
        ("{net: a, help: true}", "--help prints something"),
        ("{net: a, list-presets: true}", "--list-presets prints something"),
        ("{net: a, help-guidance: list}", "--help-guidance prints something"),
    ],
)
def test_values_that_yaml_takes_for_something_else_are_refused(tmp_path, options, reason):
    (tmp_path / "p.yaml").write_text(f"options: {options}")
    with pytest.raises(ValueError, match=reason) as caught:
        parse_request(["--preset", str(tmp_path / "p.yaml")])
    assert "p.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
