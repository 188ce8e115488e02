"""Every fault that the doctor knows, planted into a healthy run, and what the doctor says then."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest

from edm2kit.experiments.runs.doctor import examine, report_lines
from edm2kit.experiments.runs.findings import Check
from edm2kit.experiments.runs.folder import RunFolder, open_run
from edm2kit.training.log import drop_later_lines
from edm2kit.training.loss import noise_bins
from tests.experiments.runs import healthy

BINS = [name for name, _, _ in noise_bins(-0.4, 1.0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return healthy.write_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def run(folder) -> RunFolder:
    return open_run(folder)


def findings(run: RunFolder, moments=None) -> list[str]:
    return [one.what for check in examine(run, moments or healthy.moments()) for one in check.findings]


def check(run: RunFolder, name: str) -> Check:
    [found] = [one for one in examine(run, healthy.moments()) if one.name == name]
    return found


def changed(run: RunFolder, change) -> RunFolder:
    """The run with change(k, line) applied to copies of its status lines; k counts from 0 to 1 through the log."""
    lines = [dict(line) for line in run.stats]
    for number, line in enumerate(lines):
        change(number / (len(lines) - 1), line)
    return dataclasses.replace(run, stats=lines)


def configured(run: RunFolder, **changes) -> RunFolder:
    return dataclasses.replace(run, config=dataclasses.replace(run.config, **changes))


def test_a_healthy_run_has_no_findings_and_everything_was_looked_at(run):
    checks = examine(run, healthy.moments())
    assert [one for check in checks for one in check.findings] == []
    assert [check.name for check in checks if check.not_looked] == []
    lines = report_lines(checks)
    assert lines[0] == "Nothing wrong found."
    assert "Not looked at:" not in lines
    for one in checks:
        assert any(line.startswith(f"  {one.name}: ") for line in lines)


def set_(**values):
    return lambda k, line: line.update(values)


def late(change):
    return lambda k, line: change(line) if k > 0.7 else None


def scale(name, factor, after=0.7):
    return lambda k, line: line.update({name: line[name] * factor}) if k > after else None


def raise_losses(names, amount, after=0.0):
    return lambda k, line: line.update({name: line[name] + amount for name in names}) if k > after else None


FAULTS = {
    "non-finite now and then": (
        lambda k, line: line.update(nonfinite_gradients=7 if round(k * 63) % 5 == 0 else 0),
        ["Gradients are often not finite and are set to 0."],
    ),
    "zero gradients": (scale("gradient_norm", 0.0), ["Gradients are zero: the network no longer learns."]),
    "spikes": (
        lambda k, line: line.update(gradient_norm=line["gradient_norm"] * (50 if round(k * 63) in (20, 35, 50) else 1)),
        ["Gradient norms have spikes."],
    ),
    "growth": (scale("gradient_norm", 20), ["Gradient norms grow."]),
    "divergence": (scale("loss", math.nan), ["The loss is not finite: the run has diverged."]),
    "rise": (raise_losses(["loss"], 0.3, after=0.8), ["The loss has risen."]),
    "stopped too early": (
        lambda k, line: line.update(loss=1.0 - k),
        ["The run ended while the loss was falling."],
    ),
    "slow": (scale("images_per_sec", 0.3), ["Training has become slower."]),
    "leak": (lambda k, line: line.update(cpu_peak_gb=1 + 9 * k), ["The memory of the training process grows."]),
    "low noise": (raise_losses(BINS[:2], 0.4), ["At some noise levels the network is worse than a linear filter."]),
    "high noise": (raise_losses(BINS[5:], 0.4), ["At some noise levels the network is worse than a linear filter."]),
    "no learning": (
        lambda k, line: line.update(dict.fromkeys(BINS, 1.3)),
        ["The network is worse than a linear filter at every noise level."],
    ),
    "not finite at one level": (
        lambda k, line: line.update({BINS[3]: math.nan}),
        ["At some noise levels the network is worse than a linear filter."],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_log_is_found_and_nothing_else(run, fault):
    change, expected = FAULTS[fault]
    assert findings(changed(run, change)) == expected


def test_findings_say_what_to_do_for_this_run(run):
    lossy = changed(run, FAULTS["non-finite now and then"][0])
    [finding] = check(configured(lossy, precision="fp16", loss_scaling=128.0), "non-finite gradients").findings
    assert "--ls (it is 128)" in finding.advice
    [finding] = check(lossy, "non-finite gradients").findings
    assert "dataset_tool.py check --source images" in finding.advice
    [finding] = check(changed(run, FAULTS["spikes"][0]), "gradient norms").findings
    assert "3 status lines above 10 times" in finding.evidence
    [finding] = check(changed(run, FAULTS["low noise"][0]), "loss by noise level").findings
    assert "2 of 6 ranges" in finding.evidence
    assert "lower --P_mean" in finding.advice
    [finding] = check(changed(run, FAULTS["high noise"][0]), "loss by noise level").findings
    assert "higher --P_mean" in finding.advice
    [finding] = check(changed(run, FAULTS["stopped too early"][0]), "loss over time").findings
    assert "--duration 512000" in finding.advice


def test_a_single_overflow_is_usual(run):
    once = changed(run, lambda k, line: line.update(nonfinite_gradients=1 if k == 1 else 0))
    assert findings(once) == []
    assert "1 set to 0, in 1 of 64" in check(once, "non-finite gradients").seen


def test_a_young_run_is_not_judged_by_noise_level(run):
    young = dataclasses.replace(changed(run, FAULTS["no learning"][0]), stats=[])
    young = dataclasses.replace(young, stats=changed(run, FAULTS["no learning"][0]).stats[:20])
    assert "Not judged before half of the run" in check(young, "loss by noise level").seen
    assert check(young, "loss by noise level").findings == ()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ref_batches": 5.0}, "The learning rate decays too early for a run of this length."),
        ({"rampup_nimg": 300_000}, "The learning rate never reaches --lr: its --rampup takes 300,000 of 256,000"),
        ({"duration_nimg": 6_000_000}, "1,200 epochs of 5,000 images: the network will memorise them."),
        ({"snapshot_every_nimg": 256_000}, "Snapshots come at one time only"),
        ({"snapshot_every_nimg": 0}, "There will be no snapshots"),
    ],
)  # fmt: skip
def test_a_fault_in_the_configuration_is_found(run, changes, expected):
    found = findings(configured(run, **changes))
    assert any(text.startswith(expected) for text in found), found


@pytest.mark.parametrize("std", [0.1, 1.5])
def test_sigma_data_that_does_not_fit(run, std):
    moments = dataclasses.replace(healthy.moments(), mean_square=std**2)
    assert "sigma_data does not fit the data." in findings(run, moments)


def test_overfitting_is_found_at_its_noise_level(run):
    records = [json.loads(json.dumps(record)) for record in run.heldout]
    records[-1]["heldout"][BINS[1]] += 0.1
    wide = dataclasses.replace(run, heldout=records)
    assert findings(wide) == ["The network knows its training images better than others: it overfits."]
    [finding] = check(wide, "training and held-out images").findings
    assert "0.105 \u00b1 0.010 above the loss on training images at sigma 0.186 to 0.343" in finding.evidence
    # the same gap is nothing if its error is as large
    records[-1]["gap_error"][BINS[1]] = 0.1
    assert findings(dataclasses.replace(run, heldout=records)) == []


def test_a_rising_held_out_loss_names_the_best_snapshots(run):
    records = [json.loads(json.dumps(record)) for record in run.heldout]
    for record in records[8:]:
        for side in ("heldout", "training"):
            record[side] = {name: value + 0.2 for name, value in record[side].items()}
    rising = dataclasses.replace(run, heldout=records)
    assert findings(rising) == ["The loss on held-out images rises."]
    [finding] = check(rising, "training and held-out images").findings
    assert f"Use the snapshots of {records[7]['nimg']:,} images" in finding.advice


def test_snapshots_that_are_damaged_foreign_or_too_few(folder, tmp_path):
    other = healthy.write_run(tmp_path / "run")
    files = sorted(other.glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:100])
    assert findings(open_run(other)) == ["A snapshot cannot be opened."]
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**record, "run_id": "another"}))
    assert "Snapshots of another run are in this folder." in findings(open_run(other))
    (other / "run.json").write_text(json.dumps(record))
    for file in files[1:-4]:
        file.unlink()
    files[0].unlink()
    assert findings(open_run(other)) == []
    for file in other.glob("*-0.100.safetensors"):
        file.unlink()
    assert "EMA 0.05" in check(open_run(other), "snapshots").seen
    for file in other.glob("*.safetensors"):
        file.unlink()
    assert findings(open_run(other)) == ["There are no snapshots."]


def test_snapshots_too_far_apart_to_rebuild(run):
    few = {(16_000, 0.05), (256_000, 0.1)}
    apart = {path: header for path, header in run.headers.items() if (header.nimg, header.ema_std) in few}
    far = dataclasses.replace(run, headers=apart)
    assert findings(far) == ["Other EMA lengths cannot be rebuilt accurately."]
    [finding] = check(far, "snapshots").findings
    assert "--snapshot 16000" in finding.advice


def test_what_is_missing_is_said(run):
    empty = dataclasses.replace(run, stats=[], heldout=[], record={}, headers={})
    checks = examine(empty, None, "the training set cannot be opened")
    assert [one for check in checks for one in check.findings] == []
    missing = {check.name: check.not_looked for check in checks if check.not_looked}
    assert missing.keys() == {
        "log", "non-finite gradients", "gradient norms", "loss over time", "images per second", "memory",
        "loss by noise level", "standard deviation of the data", "learning rate", "schedule",
        "training and held-out images",
    }  # fmt: skip
    assert "the training set cannot be opened" in missing["loss by noise level"]
    assert "--holdout 0.05" in missing["training and held-out images"]
    text = "\n".join(report_lines(checks))
    assert all(f"  {name}: {why}" in text for name, why in missing.items())
    without = changed(run, lambda k, line: line.pop("gradient_norm"))
    assert check(without, "gradient norms").not_looked == "the log has no gradient_norm"
    short = dataclasses.replace(run, stats=run.stats[:5])
    assert "5 status lines with gradient_norm are too few" in check(short, "gradient norms").not_looked


def test_damaged_lines_are_counted(tmp_path):
    folder = healthy.write_run(tmp_path / "run", snapshots=False)
    with (folder / "stats.jsonl").open("ab") as file:
        file.write(b'{"nimg": 5\nnull\n{"loss": 1}\n\xff\xfe\n{"nimg": "x"}\n')
    with (folder / "heldout.jsonl").open("a") as file:
        file.write('{"nimg": 5, "heldout": 3, "training": {"loss": 1}, "gap_error": {}, "images": 4}\n{"nimg": 7}\n')
    run = open_run(folder)
    assert (run.damaged_lines, run.nimg) == (7, healthy.DURATION)
    assert "Lines of the log cannot be read." in findings(run)


def test_a_damaged_record_is_as_good_as_none(tmp_path):
    folder = healthy.write_run(tmp_path / "run", snapshots=False)
    for text in ("[]", "{", '{"data_identity": 3}', '{"data_identity": {"holdout": 5, "num_images": 8}}'):
        (folder / "run.json").write_text(text)
        assert "does not say how many images" in check(open_run(folder), "schedule").not_looked


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run folder: it has no config\.yaml"):
        open_run(tmp_path)


def test_distillation_has_another_loss(run):
    distilled = dataclasses.replace(run, record={**run.record, "data_identity": {"num_images": 5000, "teacher": {}}})
    assert "distils" in check(distilled, "loss by noise level").not_looked


def test_noise_does_not_make_findings():
    """Ten healthy logs with much more noise."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        config = healthy.TrainConfig(**healthy.CONFIG)
        lines = healthy.stats(config)
        for line in lines:
            line["gradient_norm"] *= math.exp(0.5 * rng.normal())
            line["images_per_sec"] *= math.exp(0.2 * rng.normal())
            line["loss"] += 0.03 * rng.normal()
        run = RunFolder(None, config, {"data_identity": {"num_images": 5000}}, lines, [], 0, {}, {})
        names = [one.what for check in examine(run, healthy.moments()) for one in check.findings]
        assert names == ["There are no snapshots."], seed


def without_snapshots(folder, path):
    for name in ("config.yaml", "run.json", "stats.jsonl", "heldout.jsonl"):
        shutil.copy(folder / name, path)
    return path


@pytest.mark.parametrize(
    "line",
    ["[" * 100_000, '{"nimg": 1e999}', '{"nimg": 5, "lr": 1' + "0" * 400 + "}", "[]", "5", '{"nimg": null}', "\xff"],
)
def test_lines_of_a_log_that_mean_nothing_are_counted_and_left_out(folder, tmp_path, line):
    other = without_snapshots(folder, tmp_path)
    for name in ("stats.jsonl", "heldout.jsonl"):
        with open(other / name, "a", encoding="latin-1") as file:
            file.write(line + "\n")
    found = open_run(other)
    assert found.damaged_lines == 2
    examine(found, None, "")
    drop_later_lines(other / "stats.jsonl", 1 << 40)
    assert open_run(other).damaged_lines <= 2


@pytest.mark.parametrize(
    "change",
    [
        {"data_identity": {"num_images": "many"}},
        {"data_identity": {"num_images": 5, "holdout": {"num_images": None}}},
        {"data_identity": 5},
        {"label_names": 5},
        {"label_names": ["a", 1]},
        {"run_id": ["a"]},
    ],
)
def test_a_record_of_the_wrong_types_counts_as_missing(folder, tmp_path, change):
    other = without_snapshots(folder, tmp_path)
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**record, **change}))
    assert open_run(other).record == {}
    examine(open_run(other), None, "")
