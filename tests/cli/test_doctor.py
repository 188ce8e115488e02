"""edm2kit-train doctor RUN, from the command line."""

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edm2kit.cli import metrics, train
from edm2kit.data.dataset import open_source
from tests.experiments.runs import healthy
from tests.support import tiny


def doctor(*arguments: object) -> Result:
    return CliRunner().invoke(train.main, ["doctor", *map(str, arguments)])


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return tiny.make_dataset(tmp_path_factory.mktemp("images"), num_images=80)


@pytest.fixture
def run(tmp_path, images) -> Path:
    """A healthy log on real images."""
    folder = healthy.write_run(
        tmp_path / "run",
        data=str(images),
        duration_nimg=64_000,
        rampup_nimg=2_000,
        ref_batches=200,
        snapshots=False,
        snapshot_every_nimg=60_000,
    )
    write_identity(folder, open_source(images).identity())
    return folder


def write_identity(folder: Path, identity: dict) -> None:
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "data_identity": identity}))


def test_exit_codes_and_the_summary(run):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    found = doctor(run)
    assert found.exit_code == 0, found.output
    assert "Nothing wrong found." in found.output
    assert "64,000 of 64,000 images\n" in found.output
    assert "EMA length: this evaluates networks; add --ema" in found.output
    assert "copies of training images: this generates images; add --copies 1000" in found.output
    assert re.search(r"sigma below 0\.186: -?\d\.\d{3} \u00b1 0\.\d{3}, filter -?\d\.\d{3}", found.output)
    assert before == {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    lines = [json.loads(line) for line in (run / "stats.jsonl").open()]
    healthy.write_lines(run / "stats.jsonl", [{**line, "nonfinite_gradients": 9} for line in lines])
    found = doctor(run)
    assert found.exit_code == 3
    assert "1. Gradients are often not finite and are set to 0." in found.output
    assert "   To do: Check the data" in found.output
    (run / "stopped.txt").write_text("Stopped at 64000 images")
    assert "64,000 of 64,000 images; stopped, run its command again to resume" in doctor(run).output


def test_errors_are_told_from_findings(run, tmp_path):
    assert doctor(tmp_path).exit_code == 1
    assert "is not a run folder" in doctor(tmp_path).output
    assert doctor().exit_code == 2
    assert "doctor" in train.main.get_help(train.main.make_context("train.py", [], resilient_parsing=True))


def test_a_data_set_that_has_moved_or_changed(run, images, tmp_path):
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(images), str(tmp_path / "gone")))
    found = doctor(run)
    assert "the training set cannot be opened" in found.output
    assert "give --data" in found.output
    assert "sigma below 0.186: " in doctor(run, "--data", images).output
    other = tiny.make_dataset(tmp_path / "other", num_images=30)
    refused = doctor(run, "--data", other)
    assert refused.exit_code == 1
    assert "is not the data set that the run was trained on (differs in num_images" in refused.output
    (run / "config.yaml").write_text(config.replace(str(images), str(other)))
    assert "loss by noise level: the expected curve needs the data: " in doctor(run).output


@pytest.fixture(scope="module")
def trained(tmp_path_factory, images) -> Path:
    """A real run, as short as snapshots at two times allow."""
    folder = tmp_path_factory.mktemp("trained")
    network = {**tiny.TINY["network"], "channel_mult": [1], "attn_resolutions": []}
    changes = {"duration_nimg": 2048, "snapshot_every_nimg": 1024, "batch_size": 256, "status_every_nimg": 256}
    config = tiny.write_config(folder / "tiny.yaml", network=network, **changes)
    words = ["--config", config, "--data", images, "--device", "cpu", "--samples", 0, "--holdout", 20]
    done = CliRunner().invoke(train.main, [str(word) for word in (*words, "--outdir", folder / "run")])
    assert done.exit_code == 0, done.output
    return folder / "run"


def test_a_run_with_holdout_is_compared_on_the_same_split(trained):
    found = doctor(trained, "--device", "cpu")
    assert "on 20 images of each" in found.output
    assert "epochs of 60 images" in found.output
    assert "differs in" not in found.output


def test_images_that_the_run_did_not_see(trained, images, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    (copy / "heldout.jsonl").unlink()
    assert f"doctor {copy} --heldout PATH` does so" in doctor(copy, "--device", "cpu").output
    found = doctor(copy, "--device", "cpu", "--heldout", images, "--num", 30)
    assert "at 2,048 images, on 30 images of each" in found.output
    other = tiny.make_dataset(tmp_path / "large", num_images=10, size=16)
    refused = doctor(copy, "--device", "cpu", "--heldout", other)
    assert refused.exit_code == 1
    assert "prepare both alike" in refused.output


def test_ema_lengths_and_copies_on_request(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("edm2kit.experiments.runs.copies.DETECTOR", "fd_random")
    sheet = tmp_path / "pairs.png"
    words = ("--device", "cpu", "--ema", "--num", 20, "--copies", 8, "--sheet", sheet)
    found = doctor(trained, *words)
    assert "EMA length: loss at the latest snapshot on 20 held-out images" in found.output
    rows = dict(re.findall(r"    EMA (0\.\d+): (-?[\d.]+),", found.output))
    assert {"0.050", "0.100"} < rows.keys()
    last = [json.loads(line) for line in (trained / "heldout.jsonl").open()][-1]
    # the snapshot is stored in float16
    assert float(rows["0.100"]) == pytest.approx(last["heldout"]["loss"], abs=2e-3)
    assert "of 8 generated images, by fd_random features, against 60 training images" in found.output
    assert "of 8 held-out images" in found.output
    assert "add --" not in found.output
    assert sheet.exists()


@pytest.mark.slow
def test_scores_of_ema_lengths(trained, images, tmp_path):
    reference = tmp_path / "reference.npz"
    arguments = ["ref", "--data", images, "--dest", reference, "--metrics", "fd_random", "--device", "cpu"]
    assert CliRunner().invoke(metrics.main, [str(word) for word in arguments]).exit_code == 0
    found = doctor(trained, "--device", "cpu", "--ema", "--num", 6, "--ref", reference)
    assert "EMA length by score: fd_random of 6 images each" in found.output
    assert len(re.findall(r"    EMA 0\.\d+: [\d.]+(?:, best)?$", found.output, re.M)) >= 2


@pytest.mark.parametrize(("words", "message"), [(("--sheet", "a.png"), "--sheet goes with --copies")])
def test_options_that_go_together(run, words, message):
    refused = doctor(run, *words)
    assert refused.exit_code == 2
    assert message in refused.output
