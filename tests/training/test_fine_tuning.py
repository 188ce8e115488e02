"""Fine-tuning: what is taken over from a snapshot, what may differ, and what is refused by name."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from edm2kit.cli import train
from edm2kit.snapshots.file_format import read_header
from edm2kit.snapshots.loading import load_snapshot
from edm2kit.training.checkpoint import list_checkpoints
from tests.support import DATA, tiny
from tests.support.fakes import tiny_snapshot

PICKLE = DATA / "published_layout_rgb.pkl"
LABELS = "unet.emb_label.weight"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny_snapshot(tmp_path_factory.mktemp("source") / "source.safetensors", label_names=tuple("abcd"))


def invoke(data: Path, outdir: Path, *more: object, **changes: object) -> Result:
    """A run of one step at learning rate 0 (the first step of a warm-up), without network arguments of its own."""
    config = tiny.write_config(outdir.with_suffix(".yaml"), network={}, duration_nimg=16, **changes)
    arguments = ["--config", config, "--data", data, "--outdir", outdir, "--device", "cpu", "--samples", 0, *more]
    return CliRunner().invoke(train.main, [str(a) for a in arguments])


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(list_checkpoints(run_dir)[-1], weights_only=True)["net"]


def assert_same_directions(ours: dict, theirs: dict, but: tuple[str, ...] = (), tolerance: float = 1e-4) -> None:
    """Equal up to the length of filters, which training normalises (unit length, but for an eps of 1e-4)."""
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - set(but):
        if name.endswith(".weight"):
            a, b = (torch.nn.functional.normalize(t[name].flatten(1), dim=1) for t in (ours, theirs))
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, msg=name)
        else:
            assert torch.equal(ours[name], theirs[name]), name


def test_a_run_starts_from_the_weights_and_the_network_of_a_snapshot(data, source, tmp_path):
    done = invoke(data, tmp_path / "run", "--init-from", source)
    assert done.exit_code == 0, done.output
    assert "Note: starting from source.safetensors: 1048576 images" in done.output
    snapshot = load_snapshot(source)
    assert_same_directions(weights(tmp_path / "run"), snapshot.net.state_dict())
    header = read_header(tmp_path / "run" / "network-snapshot-0000000-0.050.safetensors")
    assert header.nimg == 16
    assert header.architecture == {**snapshot.header.architecture, **header.architecture}
    average = load_snapshot(tmp_path / "run" / "network-snapshot-0000000-0.100.safetensors").net.state_dict()
    assert_same_directions(average, snapshot.net.state_dict(), tolerance=1e-3)  # stored as float16


@pytest.mark.parametrize("classes", [0, 7])
def test_other_classes_start_with_an_embedding_of_their_own(source, tmp_path, classes):
    other = tiny.make_dataset(tmp_path / "data", 20, num_classes=classes)
    cond = ["--cond", "true" if classes else "false"]
    done = invoke(other, tmp_path / "run", "--init-from", source, *cond)
    assert done.exit_code == 0, done.output
    assert f"it has 4 classes, this run {classes}" in done.output
    theirs = load_snapshot(source).net.state_dict()
    ours = weights(tmp_path / "run")
    if classes:
        assert ours[LABELS].shape == (theirs[LABELS].shape[0], 7)
    else:
        assert theirs.pop(LABELS) is not None
    assert_same_directions(ours, theirs, but=(LABELS,) if classes else ())


def test_an_unconditional_snapshot_may_learn_classes(data, tmp_path):
    source = tiny_snapshot(tmp_path / "source.safetensors", label_dim=0)
    done = invoke(data, tmp_path / "run", "--init-from", source)
    assert done.exit_code == 0, done.output
    assert weights(tmp_path / "run")[LABELS].shape[1] == 4


def test_classes_of_other_names_are_told(source, tmp_path):
    other = tiny.make_dataset(tmp_path / "data", 20)
    content = json.loads((other / "dataset.json").read_text())
    for names, told in (("abcd", False), ("wxyz", True)):
        (other / "dataset.json").write_text(json.dumps({**content, "label_names": list(names)}))
        done = invoke(other, tmp_path / "run", "--init-from", source, "--dry-run")
        assert done.exit_code == 0, done.output
        assert ("other names" in done.output) == told


def test_a_published_pickle_is_a_source_too(tmp_path):
    reference = load_snapshot(PICKLE)
    architecture = reference.header.architecture
    size, classes = architecture["img_resolution"], architecture["label_dim"]
    data = tiny.make_dataset(tmp_path / "data", 20, num_classes=classes, size=size)
    done = invoke(data, tmp_path / "run", "--init-from", PICKLE)
    assert done.exit_code == 0, done.output
    assert_same_directions(weights(tmp_path / "run"), reference.net.state_dict())


@pytest.mark.parametrize(
    ("architecture", "more", "named"),
    [
        ({"img_resolution": 16}, [], "its resolution is 16, this run's 8"),
        ({"img_channels": 1}, [], "its number of channels is 1, this run's 3"),
        ({"sigma_data": 1.0}, [], "its sigma_data is 1.0, this run's 0.5"),
        ({}, ["--channels", 8], r"its unet.emb_fourier.freqs is (4,), this run's (8,)"),
        ({"encoder": {"kind": "vae"}}, [], "its encoder is"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(data, tmp_path, architecture, more, named):
    source = tiny_snapshot(tmp_path / "source.safetensors", **architecture)
    refused = invoke(data, tmp_path / "run", "--init-from", source, *more)
    assert refused.exit_code == 1
    assert named in refused.output
    assert len(refused.output.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_source_belongs_to_the_run(data, source, tmp_path):
    assert invoke(data, tmp_path / "run", "--init-from", source).exit_code == 0
    first = read_header(tmp_path / "run" / "network-snapshot-0000000-0.050.safetensors")
    other = tiny_snapshot(tmp_path / "other.safetensors", seed=1)
    refused = invoke(data, tmp_path / "run", "--init-from", other, "--duration", 32)
    assert refused.exit_code == 1
    assert "--init-from was" in refused.output
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(source.read_bytes())
    again = invoke(data, tmp_path / "run", "--init-from", moved, "--duration", 32)
    assert again.exit_code == 0, again.output
    assert "Resuming at 16 images" in again.output
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["init_from"] == str(moved)
    longer = read_header(tmp_path / "run" / "network-snapshot-0000000-0.100.safetensors")
    assert longer.run_id == first.run_id
    assert invoke(data, tmp_path / "second", "--init-from", other).exit_code == 0
    second = read_header(tmp_path / "second" / "network-snapshot-0000000-0.050.safetensors")
    assert second.run_id != first.run_id


def test_a_source_that_is_not_there_is_told(data, tmp_path):
    refused = invoke(data, tmp_path / "run", "--init-from", tmp_path / "nothing.safetensors")
    assert refused.exit_code == 1
    assert "no such file" in refused.output
