"""Training from the command line: ranks, kills, stops, refusals."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from edm2kit.cli import train
from edm2kit.cli.field_options import settings_table
from edm2kit.experiments import documents
from edm2kit.snapshots.file_format import read_header
from edm2kit.snapshots.loading import load_snapshot
from edm2kit.training import run as training_run
from edm2kit.training.checkpoint import list_checkpoints
from edm2kit.training.config import TrainConfig, config_from_dict
from edm2kit.training.run import prepare_run
from tests.support import ROOT, tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.make_dataset(tmp_path_factory.mktemp("data"))


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(train.main, [str(a) for a in arguments])


def options(tmp_path: Path, data: Path, **changes: object) -> list[object]:
    config = tiny.write_config(tmp_path / "tiny.yaml", **changes)
    return ["--config", config, "--data", data, "--device", "cpu", "--samples", 4]


def final_state(run_dir: Path) -> dict:
    return torch.load(list_checkpoints(run_dir)[-1], weights_only=True)


def flatten(tree: object, prefix: str = "") -> dict[str, object]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        return {prefix: tree}
    return {key: leaf for name, value in items for key, leaf in flatten(value, f"{prefix}/{name}").items()}


def assert_same_bits(a: dict, b: dict) -> None:
    a, b = ({k: v for k, v in flatten(x).items() if "elapsed" not in k} for x in (a, b))
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data) -> Path:
    """A run of ten steps with dropout, left alone."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    network = {**tiny.TINY["network"], "dropout": 0.1}
    done = invoke(*options(folder, data, network=network), "--outdir", folder / "run")
    assert done.exit_code == 0, done.output
    return folder / "run"


def test_run_leaves_snapshots_records_and_samples(uninterrupted, data):
    names = sorted(path.name for path in uninterrupted.iterdir())
    assert names == [
        "config.yaml",
        "network-snapshot-0000000-0.050.safetensors",
        "network-snapshot-0000000-0.100.safetensors",
        "run.json",
        "samples-0000000.png",
        "stats.jsonl",
        "training-state-0000000128.pt",
        "training-state-0000000160.pt",
    ]
    header = read_header(uninterrupted / names[1])
    assert (header.nimg, header.ema_std) == (160, 0.05)
    assert header.architecture["num_blocks"] == 1
    assert header.architecture["res_balance"] == 0.3  # defaults are written out
    assert header.buffers == tuple(
        name for name in load_snapshot(uninterrupted / names[1]).net.state_dict() if "fourier" in name
    )
    lines = [json.loads(line) for line in (uninterrupted / "stats.jsonl").read_text().splitlines()]
    assert [line["nimg"] for line in lines] == [80, 160]
    assert lines[0]["loss"] > 0
    assert lines[0]["lr"] == pytest.approx(0.01 * (0 + 16 + 32 + 40 + 40) / 40 / 5)
    assert lines[1]["nonfinite_gradients"] == 0
    snapshot = load_snapshot(uninterrupted / names[2])
    ema = final_state(uninterrupted)["ema"]["0.100"]
    for name, value in snapshot.net.state_dict().items():
        assert torch.equal(value, ema[name].half().float() if value.ndim > 1 else ema[name])


SIGNALLED = """
import os, signal, sys
from edm2kit.cli import train
from edm2kit.cli.field_options import settings_table
from edm2kit.experiments import documents
from edm2kit.training.loop import Trainer
step = Trainer.step
def step_then_signal(self, *arguments):
    step(self, *arguments)
    if self.nimg == {nimg}:
        os.kill(os.getpid(), signal.{name})
Trainer.step = step_then_signal
train.main(sys.argv[1:])
"""


def signalled_at(nimg: int, name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run train.py in a process that gets the signal `name` right after the step that ends at `nimg` images."""
    code = SIGNALLED.format(root=str(tiny.ROOT), nimg=nimg, name=name)
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=tiny.environment(), timeout=240)


def test_a_killed_run_resumes_to_the_same_bits(uninterrupted, data, tmp_path):
    network = {**tiny.TINY["network"], "dropout": 0.1}
    arguments = [*options(tmp_path, data, network=network), "--outdir", tmp_path / "run"]
    killed = signalled_at(96, "SIGKILL", *arguments, "--workers", 1)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "network-snapshot-0000000-0.050.safetensors").exists()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["training-state-0000000064.pt"]
    again = invoke(*arguments)
    assert again.exit_code == 0, again.output
    assert "Resuming at 64 images" in again.output
    assert_same_bits(final_state(uninterrupted), final_state(tmp_path / "run"))
    for name in ("network-snapshot-0000000-0.050.safetensors", "network-snapshot-0000000-0.100.safetensors"):
        a, b = (load_snapshot(folder / name).net.state_dict() for folder in (uninterrupted, tmp_path / "run"))
        assert_same_bits(a, b)
    nimgs = [json.loads(line)["nimg"] for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    assert nimgs == sorted(set(nimgs))


def test_two_ranks_reach_the_weights_of_one(data, tmp_path):
    single = invoke(*options(tmp_path, data), "--outdir", tmp_path / "one")
    assert single.exit_code == 0, single.output
    double = tiny.run("train.py", *options(tmp_path, data), "--outdir", tmp_path / "two", "--batch-gpu", 3, ranks=2)
    assert double.returncode == 0, double.stderr
    one, two = (torch.cat([v.flatten() for v in final_state(tmp_path / n)["net"].values()]) for n in ("one", "two"))
    start = load_snapshot(tmp_path / "one" / "network-snapshot-0000000-0.050.safetensors")
    assert len(one) == sum(v.numel() for v in start.net.state_dict().values())
    assert ((one - two).norm() / one.norm()).item() <= 1e-6
    assert (one - two).abs().max().item() <= 2e-4
    # the sample sheet is drawn by both together
    sheets = [(tmp_path / n / "samples-0000000.png").read_bytes() for n in ("one", "two")]
    assert len(sheets[0]) == pytest.approx(len(sheets[1]), rel=0.05)


def test_sigterm_saves_and_the_run_resumes_to_the_same_bits(uninterrupted, data, tmp_path):
    network = {**tiny.TINY["network"], "dropout": 0.1}
    arguments = [*options(tmp_path, data, network=network), "--outdir", tmp_path / "run"]
    stopped = signalled_at(48, "SIGTERM", *arguments)
    assert stopped.returncode == 75, stopped.stderr
    assert "Stopped at 48 images; state saved" in stopped.stdout
    assert invoke(*arguments).exit_code == 0
    assert_same_bits(final_state(uninterrupted), final_state(tmp_path / "run"))


def test_time_limit_stops_all_ranks_with_exit_code_0_under_torchrun(data, tmp_path):
    done = tiny.run("train.py", *options(tmp_path, data), "--outdir", tmp_path / "run", "--max-time", "0.001s", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "Stopped at 16 images; state saved" in done.stdout
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["training-state-0000000016.pt"]


def test_extending_a_finished_run_equals_one_that_was_longer(uninterrupted, data, tmp_path):
    network = {**tiny.TINY["network"], "dropout": 0.1}
    arguments = [*options(tmp_path, data, network=network), "--outdir", tmp_path / "run"]
    assert invoke(*arguments, "--duration", 80).exit_code == 0
    assert invoke(*arguments, "--batch-gpu", 16).exit_code == 0
    assert_same_bits(final_state(uninterrupted), final_state(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--lr", "0.02"], "--lr was 0.01, is now 0.02"),
        (["--seed", "1"], "--seed was 0"),
        (["--batch", "32"], "--batch was 16"),
        (["--dropout", "0.2"], r"network.* was .*0\.1.*0\.2"),
        (["--cond", "false"], "--cond was True"),
    ],
)
def test_resuming_with_a_change_that_matters_is_refused(uninterrupted, data, tmp_path, changed, named):
    network = {**tiny.TINY["network"], "dropout": 0.1}
    before = {path.name: path.stat().st_mtime_ns for path in uninterrupted.iterdir()}
    refused = invoke(*options(tmp_path, data, network=network), "--outdir", uninterrupted, *changed)
    assert refused.exit_code == 1
    assert len(refused.output.strip().splitlines()) == 1
    assert re.search(named, refused.output), refused.output
    assert before == {path.name: path.stat().st_mtime_ns for path in uninterrupted.iterdir()}


def test_resuming_on_other_images_is_refused(uninterrupted, data, tmp_path):
    other = tiny.make_dataset(tmp_path / "other", num_images=90)
    network = {**tiny.TINY["network"], "dropout": 0.1}
    refused = invoke(*options(tmp_path, other, network=network), "--outdir", uninterrupted)
    assert refused.exit_code == 1
    assert "differs in num_images, sha256" in refused.output


def test_a_precision_that_is_slow_on_this_machine_warns(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training_run, "slow_precision", lambda dtype, device: dtype == torch.bfloat16 and "slow")
    arguments = [*options(tmp_path, data), "--outdir", tmp_path / "run", "--dry-run"]
    assert "slow" not in invoke(*arguments).output
    assert "--precision bf16: slow" in invoke(*arguments, "--precision", "bf16").output


def test_dry_run_writes_nothing(data, tmp_path):
    done = invoke(*options(tmp_path, data), "--outdir", tmp_path / "run", "--dry-run")
    assert done.exit_code == 0
    assert "optimizer steps    10" in done.output
    assert not (tmp_path / "run").exists()


def test_written_configuration_trains_the_same_run(uninterrupted, data, tmp_path):
    done = invoke(
        "--config", uninterrupted / "config.yaml", "--data", data, "--outdir", tmp_path / "run", "--samples", 0
    )
    assert done.exit_code == 0, done.output
    assert_same_bits(final_state(uninterrupted), final_state(tmp_path / "run"))


@pytest.mark.parametrize(("channels", "classes"), [(1, 4), (3, 0), (3, 1000)])
def test_grey_label_free_and_many_classes(tmp_path, channels, classes):
    data = tiny.make_dataset(
        tmp_path / "data", num_images=1000 if classes == 1000 else 20, num_classes=classes, channels=channels
    )
    arguments = [*options(tmp_path, data, duration_nimg=32), "--outdir", tmp_path / "run"]
    if not classes:
        refused = invoke(*arguments)
        assert refused.exit_code == 1
        assert "--cond false" in refused.output
        arguments += ["--cond", "false"]
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    snapshot = load_snapshot(tmp_path / "run" / "network-snapshot-0000000-0.050.safetensors")
    assert (snapshot.net.img_channels, snapshot.net.label_dim) == (channels, classes)


def test_nonfinite_gradients_become_zero_and_are_counted(data, tmp_path):
    # the largest gradients, times the loss scale, are beyond float32
    done = invoke(*options(tmp_path, data, loss_scaling=1e37, duration_nimg=16), "--outdir", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "non-finite gradients set to 0" in done.output
    record = json.loads((tmp_path / "run" / "stats.jsonl").read_text())
    assert 100 < record["nonfinite_gradients"] < 10_000


def test_a_short_run_without_any_finite_gradient_fails(data, tmp_path):
    done = invoke(*options(tmp_path, data, loss_scaling=1e39, duration_nimg=16), "--outdir", tmp_path / "run")
    assert done.exit_code == 1, done.output
    assert "the run diverged before 16 images: in 1 step, most gradients were not finite" in done.output


def test_damaged_checkpoint_is_named(data, tmp_path):
    arguments = [*options(tmp_path, data, duration_nimg=32), "--outdir", tmp_path / "run"]
    assert invoke(*arguments).exit_code == 0
    checkpoint = list_checkpoints(tmp_path / "run")[-1]
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    refused = invoke(*arguments, "--duration", 64)
    assert refused.exit_code == 1
    assert f"{checkpoint} cannot be read" in refused.output


def wrong(tmp_path: Path, kind: str) -> list[object]:
    broken = tmp_path / "broken.yaml"
    contents = {
        "yaml": "a: [",
        "list": "- 1",
        "key": "batch_sise: 3",
        "type": "batch_size: many",
        "net": "network: {model_chanels: 3}",
    }
    broken.write_text(contents.get(kind, ""))
    return ["--config", broken if kind != "missing" else tmp_path / "nowhere.yaml"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("yaml", "not valid YAML"),
        ("list", "must hold a mapping"),
        ("key", "did you mean 'batch_size'"),
        ("type", "--batch must be int; got 'many'"),
        ("net", "did you mean 'model_channels'"),
        ("missing", "cannot read the configuration"),
    ],
)
def test_wrong_configuration_is_one_clear_line(data, tmp_path, kind, message):
    refused = invoke(*wrong(tmp_path, kind), "--data", data, "--outdir", tmp_path / "run")
    assert refused.exit_code == 1
    assert message in refused.output
    assert len(refused.output.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere/run")
    for folder, reason in (("file/run", "file is a file"), ("link", "is a link to nowhere; remove that link")):
        refused = invoke("--data", tmp_path / "absent", "--outdir", tmp_path / folder)
        assert reason in refused.output
        assert len(refused.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "edm2-img64-z"], "did you mean 'edm2-img64-"),
        (["--data", "/nonexistent"], "nonexistent"),
        (["--batch", "-3"], "is not a count"),
        (["--device", "tpu"], "not available here"),
        (["--max-time", "soon"], "not a time limit"),
        (["--fp16", "true", "--precision", "bf16"], "both set the precision"),
        (["--snapshot", "500"], "at least 1000 images"),
        (["--P_std", "0"], "--P_std must be above 0"),
        (["--channels", "6"], "channels_per_head"),
    ],
)
def test_wrong_options_are_one_clear_line(data, tmp_path, arguments, message):
    base = [] if "--preset" in arguments else options(tmp_path, data)
    refused = invoke(*base, *([] if base else ["--data", data]), "--outdir", tmp_path / "run", *arguments)
    assert refused.exit_code in (1, 2)
    assert message in refused.output
    assert not (tmp_path / "run").exists()


def test_every_preset_is_a_valid_configuration():
    published = [name for name in train.preset_names() if name.startswith("edm2-")]
    assert len(published) == 12
    for name in train.preset_names():
        config = train.compose_config(name, None, {"data": "x"})
        assert yaml.safe_load(train.preset_path(name).read_text())["ref_lr"] == config.ref_lr
    xxl = train.compose_config("edm2-img512-xxl", None, {})
    assert (xxl.duration_nimg, xxl.network["model_channels"], xxl.ref_lr) == (896 << 20, 448, 0.0065)


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
def test_a_setting_is_described_once_for_help_and_documents(field):
    text = field.metadata["help"]
    assert text
    shown = " ".join(invoke("--help").output.split())
    if "option" in field.metadata:
        assert f"{field.metadata['option']} " in shown
        assert text in shown
    row = next(line for line in settings_table(TrainConfig).splitlines() if line.startswith(f"| `{field.name}` |"))
    assert row.endswith(f"| {text} |")


def test_the_page_of_settings_is_current():
    assert documents.is_current(ROOT / "docs" / "train-config.md", {"settings": settings_table(TrainConfig)})


def test_help_lists_presets_in_order_of_size():
    assert "edm2-img512-{xxs,xs,s,m,l,xl,xxl}" in invoke("--help").output


@pytest.mark.parametrize("place", ["data", "data/run", "sub/../data/run", "link", "link/run"])
def test_a_run_folder_among_the_images_is_refused_before_its_samples_become_images(tmp_path, place):
    data = tiny.make_dataset(tmp_path / "data", num_images=20)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to("data")
    config = config_from_dict({**tiny.TINY, "data": str(data)}, "test")
    with pytest.raises(ValueError, match=r"is inside --data .*; choose a folder outside"):
        train.check_place(prepare_run(config, tmp_path / place))
    held_out = config_from_dict({**tiny.TINY, "data": str(data), "holdout": 4}, "test")
    with pytest.raises(ValueError, match=r"is inside --data .*; choose a folder outside"):
        train.check_place(prepare_run(held_out, tmp_path / place))
    train.check_place(prepare_run(config, tmp_path / "data-run"))


def test_a_sheet_of_very_many_classes_takes_no_square_of_their_number(tmp_path, monkeypatch):
    config = config_from_dict({**tiny.TINY, "data": str(tiny.make_dataset(tmp_path / "d", num_images=8))}, "test")
    run = prepare_run(config, tmp_path / "run")
    many = 1 << 20  # a square of float32 would take 4 TB
    header = dataclasses.replace(run.header, architecture={**run.header.architecture, "label_dim": many})
    seen = []

    def net(x, sigma, labels):
        seen.append(labels)
        return torch.zeros_like(x)

    class OneStep:
        num_steps = 1

        def __call__(self, net, noise, labels, randn_like):
            return net(noise, 1.0, labels)

    monkeypatch.setattr(train, "Sampler", OneStep)
    run = dataclasses.replace(run, header=header)
    assert train.write_samples(run, 3, torch.device("cpu"), net, 0).size
    assert seen[0].shape == (3, many)
    assert seen[0].argmax(1).tolist() == [0, 1, 2]
