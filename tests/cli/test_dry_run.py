"""train.py -n: what a run will need, on machines that are not here, and what looks like a mistake."""

import dataclasses
import json

import pytest
from click.testing import CliRunner

from edm2kit.cli import train
from edm2kit.training import run as training_run
from edm2kit.training.config import TrainConfig, config_from_dict, preset_path, read_yaml
from edm2kit.training.log import schedule_warnings
from tests.support import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def plan(data, tmp_path):
    """Run -n with a tiny configuration and options; returns what it prints, on one line."""

    def run(*options: object, code: int = 0, **changes: object) -> str:
        config = tiny.write_config(
            tmp_path / "tiny.yaml", **{"snapshot_every_nimg": 1000, "duration_nimg": 4000, **changes}
        )
        words = ["--config", config, "--data", data, "--outdir", tmp_path / "run", "--device", "cpu", "-n", *options]
        done = CliRunner().invoke(train.main, [str(word) for word in words])
        assert done.exit_code == code, done.output
        assert not (tmp_path / "run").exists()
        return " ".join(done.output.split())

    return run


def test_a_sound_plan_has_epochs_and_no_warning(plan):
    said = plan()
    assert "epochs 40.0" in said
    assert "time unknown: add --measure 60s, or --throughput" in said
    assert "Warning" not in said


def test_the_time_follows_from_a_given_or_measured_speed(plan, monkeypatch):
    assert "time 0:00:40 at 100.0 images/s (as given)" in plan("--throughput", 100)
    monkeypatch.setattr("edm2kit.training.throughput.images_per_sec", lambda config, *_: config.batch_size * 1.0)
    assert "time 0:04:10 at 16.0 images/s (measured here)" in plan("--measure", "5s")
    said = plan("--measure", "5s", "--gpus", 4)
    assert "time 0:04:10 at 16.0 images/s (4 times what one process reached here" in said


def test_a_short_measurement_is_real(plan):
    said = plan("--measure", "0.01s")
    assert "images/s (measured here)" in said
    assert "time unknown" not in said


def test_a_plan_for_gpus_that_are_not_here(plan):
    said = plan("--gpus", 8, "--batch-gpu", 1)
    assert "batch 16 images: 8 processes, 1+1 images each" in said
    assert "a batch of 16 images cannot be divided among 5 processes" in plan("--gpus", 5, code=1)


def test_a_network_is_told_what_fits_the_memory_of_those_gpus(tmp_path):
    data = tiny.make_dataset(tmp_path / "data", num_images=4, size=64)
    words = ["--preset", "edm2-img64-s", "--data", data, "--outdir", tmp_path / "run", "--device", "cpu", "-n"]
    words += ["--gpus", 8, "--gpu-memory", 40]
    done = CliRunner().invoke(train.main, list(map(str, words)))
    assert done.exit_code == 0, done.output
    assert "8 processes, 256 images each" in done.output
    assert "GPU has 40.0 GB free; use --batch-gpu 128 or --recompute true" in done.output


def test_a_full_disk_is_noticed_before_the_run(plan, monkeypatch):
    monkeypatch.setattr(training_run, "free_bytes", lambda folder: 1000)
    assert "GB of disk, and 0.0 GB are free at" in plan()


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"rampup_nimg": 4000}, "the learning rate never reaches --lr: its --rampup takes 4,000 of 4,000 images"),
        ({"snapshot_every_nimg": 4000}, "snapshots come at one time only, the end"),
        ({"snapshot_every_nimg": 0}, "there will be no snapshots"),
        ({"duration_nimg": 100_016}, "1,000 epochs of 100 images: the network will memorise them"),
    ],
)
def test_what_looks_like_a_mistake_is_said(plan, changes, warning):
    assert warning in plan(**changes)


def test_the_limits_are_exact():
    config = TrainConfig(duration_nimg=3_000_000, rampup_nimg=2_999_999, snapshot_every_nimg=2_999_999)
    assert schedule_warnings(config, 3000) == []
    assert len(schedule_warnings(config, 2999)) == 1
    with_both = dataclasses.replace(config, augment=0.12, network={"dropout": 0.13})
    assert schedule_warnings(with_both, 250) == []
    (warning,) = schedule_warnings(with_both, 249)
    assert warning.endswith("Use --duration 2988000 or less, or more images")
    (warning,) = schedule_warnings(dataclasses.replace(with_both, network={}), 2999)
    assert warning.endswith("Use --duration 2999000 or less, or more images, or both --dropout and --augment")


@pytest.mark.parametrize("preset", ["edm2-img512-s", "edm2-img64-xs"])
def test_the_published_recipes_look_like_no_mistake_on_imagenet(preset):
    config = config_from_dict(read_yaml(preset_path(preset)), preset)
    assert schedule_warnings(config, 1_281_167) == []


def test_enlarged_sources_are_mentioned(plan, data):
    path = data / "dataset.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), "enlarged": 0.42}))
    try:
        assert "about 42% of the images were enlarged to 8 pixels" in plan()
    finally:
        path.write_text(before)


def test_planning_options_belong_to_a_plan(data, tmp_path):
    words = ["--data", str(data), "--outdir", str(tmp_path / "run"), "--gpus", "2"]
    done = CliRunner().invoke(train.main, words)
    assert done.exit_code == 1
    assert "are for planning: add -n" in done.output
