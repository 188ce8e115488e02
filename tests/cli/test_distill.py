"""Distillation from the command line: a guided pair becomes one network like any other."""

import json
import re

import pytest
import torch
from click.testing import CliRunner

from edm2kit.cli import distill, generate
from edm2kit.snapshots.file_format import read_header
from edm2kit.snapshots.loading import load_snapshot
from edm2kit.torch_utils.rng import StackedGenerator
from edm2kit.training import run as training_run
from edm2kit.training.checkpoint import list_checkpoints
from tests.support import tiny
from tests.support.fakes import tiny_snapshot

W = 2.5


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    tiny.make_dataset(folder / "data", 64)
    tiny.make_dataset(folder / "other", 8, num_classes=3)
    tiny_snapshot(folder / "main.safetensors")
    tiny_snapshot(folder / "guide.safetensors", seed=1)
    return folder


def run(place, outdir, *more, code=0, guidance=("--guidance", W)):
    words = ["--net", place / "main.safetensors", "--gnet", place / "guide.safetensors", *guidance, "--steps", 8]
    words += ["--data", place / "data", "--outdir", outdir, "--batch", 16, "--duration", 160, "--checkpoint", 96]
    words += ["--status", 80, "--workers", 0, "--device", "cpu", *more]
    done = CliRunner().invoke(distill.main, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.output


def final(outdir):
    return torch.load(list_checkpoints(outdir)[-1], weights_only=True)


@pytest.fixture(scope="module")
def whole(place):
    run(place, place / "whole")
    return place / "whole"


def errors(place, student):
    """Mean squared distance of the student, and of the main network, from the guided answer, on fresh noise."""
    main, guide = (load_snapshot(place / f"{name}.safetensors").net for name in ("main", "guide"))
    rng = StackedGenerator("cpu", range(1000, 1064))
    sigma, labels = (rng.randn([64]) - 0.4).exp(), torch.eye(4).repeat(16, 1)
    x = 0.5 * rng.randn([64, 3, 8, 8]) + sigma[:, None, None, None] * rng.randn([64, 3, 8, 8])
    with torch.no_grad():
        pos, neg, own = (net(x, sigma, labels) for net in (main, guide, student))
    guided = neg + W * (pos - neg)
    return (own - guided).square().mean().item(), (pos - guided).square().mean().item()


def test_a_student_starts_as_the_network_itself_and_ends_near_the_guided_pair(place, tmp_path):
    main = load_snapshot(place / "main.safetensors").net
    apart, there = errors(place, main)
    assert apart == there > 0.01
    run(place, tmp_path / "run", "--duration", 512, "--lr", 0.05)
    student = load_snapshot(tmp_path / "run" / "network-snapshot-0000000-0.100.safetensors").net
    learnt, there = errors(place, student)
    assert learnt < 0.5 * there  # 0.39 of it was measured, 0.26 after 1008 images


def test_the_network_s_weights_are_where_it_starts_bit_for_bit(place, whole, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(training_run, "training_loop", lambda trainer, *rest, **more: started.append(trainer))
    run(place, tmp_path / "run")
    main, (trainer,) = load_snapshot(place / "main.safetensors").net, started
    for name, value in trainer.net.state_dict().items():
        assert torch.equal(value, main.state_dict()[name]), name
    x, labels = torch.ones(2, 3, 8, 8), torch.eye(4)[:2]
    main = main.to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(trainer.net.eval()(x, torch.tensor(1.0), labels), main(x, torch.tensor(1.0), labels))


def test_snapshots_name_their_teacher_and_generate_without_a_guide(place, whole, tmp_path):
    path = whole / "network-snapshot-0000000-0.100.safetensors"
    header = read_header(path)
    teacher = header.training_config["teacher"]
    assert teacher["guidance"]["weight"] == W
    assert teacher["gnet"]["sha256"] != teacher["net"]["sha256"] == header.training_config["init_sha256"]
    assert (header.nimg, header.recipe) == (160, None)  # no recipe: any EMA length can be rebuilt from them
    words = ["--net", path, "--steps", 2, "--seeds", "0-1", "--outdir", tmp_path, "--device", "cpu"]
    done = CliRunner().invoke(generate.main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_a_stopped_run_resumes_to_the_same_bits(place, whole, tmp_path):
    run(place, tmp_path / "run", "--duration", 96)
    run(place, tmp_path / "run")
    ours, theirs = final(tmp_path / "run"), final(whole)
    assert ours["progress"]["nimg"] == 160
    for name, value in theirs["net"].items():
        assert torch.equal(ours["net"][name], value), name
    for std, average in theirs["ema"].items():
        assert all(torch.equal(ours["ema"][std][name], value) for name, value in average.items())


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(place, whole, tmp_path):
    words = ["--net", place / "main.safetensors", "--gnet", place / "guide.safetensors", "--guidance", W, "--steps", 8]
    words += ["--data", place / "data", "--outdir", tmp_path / "run", "--batch", 16, "--duration", 160]
    done = tiny.run("scripts/distill.py", *words, "--checkpoint", 96, "--workers", 0, "--device", "cpu", ranks=2)
    assert done.returncode == 0, done.stderr
    for name, value in final(whole)["net"].items():
        torch.testing.assert_close(final(tmp_path / "run")["net"][name], value, atol=2e-3, rtol=2e-3, msg=name)


def test_an_interval_and_random_guidance_can_be_learned(place, tmp_path):
    run(place, tmp_path / "interval", "--interval", "0.3,5")
    words = ["--net", place / "main.safetensors", "--guidance-method", "tsg", "--guidance", 2, "--data", place / "data"]
    words += ["--outdir", tmp_path / "tsg", "--batch", 16, "--duration", 32, "--workers", 0, "--device", "cpu"]
    done = CliRunner().invoke(distill.main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    steps = json.loads((tmp_path / "interval" / "run.json").read_text())["data_identity"]["teacher"]["guidance"][
        "steps"
    ]
    assert 0 < len(steps) < 8


PUSH = "--guidance-method loss --loss-kind colour --loss-colour 9,9,9 --loss-rule dps"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "there is no guidance to distil"),
        (["--guidance-method", "pag", "--guidance", "2", "--balanced"], "leave out --class, --balanced"),
        (["--guidance-method", "pag", "--guidance", "2", "--guidance-rule", "apg"], "add --apg-momentum 0"),
        (["--guidance-method", "pag", "--guidance", "2", "--guidance-rule", "fbg"], "choose another rule"),
        (["--guidance-method", "sg-prev", "--guidance", "3"], "cannot learn sg-prev, which leads away from earlier"),
        (["--guidance-method", "pag", "--guidance", "2", "--guidance-also", "higs=2"], "cannot learn higs"),
        ([*PUSH.split(), "--interval", "0.1,2"], "moves images after steps"),
        (PUSH.split(), "moves images after steps"),
        (["--guidance-method", "pag", "--guidance", "2", "--data", "other"], "has 3 classes, the network 4"),
    ],
)
def test_what_no_network_can_learn_is_refused(place, tmp_path, words, reason):
    words = [str(place / word) if word == "other" else word for word in words]
    common = ["--net", place / "main.safetensors", "--data", place / "data", "--outdir", tmp_path / "run"]
    done = CliRunner().invoke(distill.main, [str(word) for word in [*common, "--device", "cpu", *words]])
    assert done.exit_code == 1
    assert reason in done.output
    assert not (tmp_path / "run").exists()


def test_another_teacher_cannot_resume_the_run(place, whole):
    told = run(place, whole, guidance=("--guidance", 3), code=1)
    assert "holds a run with another teacher (teacher.guidance.weight 2.5, now 3.0)" in told


@pytest.mark.parametrize("text", ["", "{", "[]", '{"data_identity": 5}', '{"data_identity": null}', "[" * 10000])
def test_a_damaged_record_is_left_to_the_check_of_the_run_which_names_it(tmp_path, place, text):
    (tmp_path / "run.json").write_text(text)
    assert distill.as_recorded({"weight": 2}, tmp_path) == {"weight": 2}
    (tmp_path / "config.yaml").write_text("seed: 0")
    common = ["--net", place / "main.safetensors", "--data", place / "data", "--outdir", tmp_path, "--device", "cpu"]
    words = [*common, "--guidance-method", "pag", "--guidance", 2]
    done = CliRunner().invoke(distill.main, [str(word) for word in words])
    assert done.exit_code == 1
    assert re.search(r"run\.json is damaged .*use another --outdir", done.output)
