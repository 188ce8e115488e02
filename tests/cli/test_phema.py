"""The command line reconstruct_phema.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from edm2kit.cli import phema as reconstruct_phema
from edm2kit.snapshots.file_format import read_header, read_tensors, save_snapshot
from edm2kit.snapshots.loading import load_snapshot
from edm2kit.torch_utils import files
from tests.support import runs, tiny
from tests.support.runs import changed, with_tensors


@pytest.fixture(scope="module")
def walk() -> runs.Walk:
    return runs.walk(tracked=())


@pytest.fixture
def folder(walk, tmp_path: Path) -> Path:
    """The last four times of a run."""
    return runs.write(tmp_path / "in", walk.snapshots[-8:])


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and everything printed."""
    result = CliRunner().invoke(reconstruct_phema.main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_series_of_lengths_becomes_files(folder, tmp_path):
    code, output = run("--indir", folder, "--outdir", tmp_path / "out", "--outstd", "0.05,0.06,...,0.1")
    assert code == 0, output
    lengths = (0.05, 0.06, 0.07, 0.08, 0.09, 0.1)
    assert names(tmp_path / "out") == [f"phema-0000256-{std:.3f}.safetensors" for std in lengths]
    assert "8 snapshots of run walk: EMA 0.05, 0.1 at 4 times from 208000 to 256000 images" in output
    assert "Wrote 6 snapshots" in output
    for std in lengths:
        snapshot = load_snapshot(tmp_path / "out" / f"phema-0000256-{std:.3f}.safetensors")
        assert (snapshot.header.ema_std, snapshot.header.nimg, snapshot.header.dtype) == (std, 256_000, "float16")
    fit = snapshot.header.recipe["fit"]
    [row] = [line for line in output.splitlines() if line.endswith("phema-0000256-0.100.safetensors")]
    assert f"{fit['width']:.4f}" in row
    assert "Warning" not in output


def test_stored_precision_times_and_close_lengths(folder, tmp_path):
    arguments = ("--outstd", "0.0625,0.063,0.0625", "--outkimg", "224,256", "--outnimg", "240000", "--dtype", "fp32")
    code, output = run("--indir", folder, "--outdir", tmp_path / "out", "--outprefix", "x", *arguments)
    assert code == 0, output
    assert names(tmp_path / "out") == [f"x-0000{k}-0.06{d}.safetensors" for k in (224, 240, 256) for d in ("25", "3")]
    header = read_header(tmp_path / "out" / "x-0000240-0.0625.safetensors")
    assert (header.ema_std, header.nimg, header.dtype) == (0.0625, 240_000, "float32")


def test_a_prefix_is_not_a_folder(folder, tmp_path):
    code, output = run("--indir", folder, "--outdir", tmp_path / "out", "--outstd", "0.06", "--outprefix", "../x")
    assert code == 1
    assert "is not the start of a file name; use --outdir for folders" in output
    assert list(tmp_path.rglob("x-*")) == []


def test_batches_of_outputs_give_the_same_files(folder, tmp_path):
    for batch in (1, 128):
        assert (
            run("--indir", folder, "--outdir", tmp_path / str(batch), "--outstd", "0.06,0.07,0.08", "--batch", batch)[0]
            == 0
        )
    for name in names(tmp_path / "1"):
        one, many = (load_snapshot(tmp_path / size / name).net.state_dict() for size in ("1", "128"))
        assert all(torch.allclose(one[key], many[key], rtol=1e-3, atol=1e-6) for key in one)


def test_dry_run_writes_nothing_and_warns_of_poor_fits(folder, tmp_path):
    code, output = run("--indir", folder, "--outdir", tmp_path / "out", "--outstd", "0.01,0.07", "--dry-run")
    assert code == 0
    assert not (tmp_path / "out").exists()
    [row] = [line for line in output.splitlines() if " 0.01 " in line]
    assert row.split()[2] == "none"
    assert "Warning: fit error above 10% for 0.01:" in output


def test_magnified_rounding_is_warned_of(walk, tmp_path):
    runs.write(tmp_path / "in", [changed(w, dtype="bfloat16") for w in walk.snapshots], dtype="bfloat16")
    _, output = run("--indir", tmp_path / "in", "--outdir", tmp_path, "--outstd", "0.001,0.07", "-n")
    assert "Warning: rounding above 5% for 0.001:" in output


def test_inputs_are_chosen_by_prefix_and_length(walk, folder, tmp_path):
    other = changed(walk.snapshots[-1], "other-0.100.safetensors", run_id="b")
    runs.write(folder, [other])
    common = ("--indir", folder, "--outdir", tmp_path / "out", "--outstd", "0.07", "-n")
    assert run(*common) == (1, run(*common)[1])
    assert "differ in run_id" in run(*common)[1]
    assert "8 snapshots" in run(*common, "--inprefix", "network")[1]
    assert "4 snapshots of run walk: EMA 0.05 at" in run(*common, "--inprefix", "network", "--instd", "0.05")[1]
    (folder / walk.snapshots[-3].name).unlink()
    assert "EMA 0.1 has no snapshot at 1 of these times (the first is 240000)" in run(*common, "--inprefix", "net")[1]


def test_skip_keeps_complete_outputs_of_the_same_inputs(walk, folder, tmp_path):
    common = ("--indir", folder, "--outdir", tmp_path / "out", "--outstd", "0.06,0.07,0.08", "--skip")
    assert "Wrote 3" in run(*common)[1]
    paths = sorted((tmp_path / "out").iterdir())
    before = [path.stat().st_ino for path in paths]
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    output = run(*common)[1]
    assert "Wrote 1 snapshots" in output
    assert output.count("(exists)") == 2
    after = [path.stat().st_ino for path in paths]
    assert (after[0], after[2]) == (before[0], before[2])
    assert read_header(paths[1]).ema_std == 0.07
    runs.write(folder, walk.snapshots[-10:-8])  # an earlier time turns up: other inputs
    assert "Wrote 3" in run(*common)[1]
    assert "Wrote 0" in run(*common)[1]
    assert "Wrote 3" in run(*common, "--dtype", "bf16")[1]
    assert "Wrote 3" in run(*common[:-1])[1]


def test_what_a_killed_process_left_is_removed_even_if_all_outputs_are_complete(folder, tmp_path):
    common = ("--indir", folder, "--outdir", tmp_path / "out", "--outstd", "0.06", "--skip")
    assert "Wrote 1" in run(*common)[1]
    left = tmp_path / "out" / ".phema-0000256-0.060.safetensors.0123456789ab.tmp"
    left.write_bytes(b"half of it")
    run(*common, "--dry-run")
    assert left.exists()
    assert "Wrote 0" in run(*common)[1]
    assert not left.exists()


def test_skip_notices_one_other_tensor_in_a_large_snapshot(walk, folder, tmp_path, monkeypatch):
    # files are hashed in places; of those beyond 266 KB, a tensor may lie between them
    monkeypatch.setattr(files, "_PIECES", 1)
    monkeypatch.setattr(files, "_PIECE_BYTES", 8)
    common = ("--indir", folder, "--outdir", tmp_path / "out", "--outstd", "0.06", "--skip")
    assert "Wrote 1" in run(*common)[1]
    assert "Wrote 0" in run(*common)[1]
    last = walk.snapshots[-1]
    name = "unet.enc.8x8_block0.conv_res0.weight"
    other = with_tensors(last, **{name.replace(".", "__"): last.tensors[name] + 1})
    runs.write(folder, [other])
    output = run(*common)[1]
    assert f"phema-0000256-0.060.safetensors is made again: {last.name} has changed since" in output
    path = tmp_path / "out" / "phema-0000256-0.060.safetensors"
    header = read_header(path)
    for entry in header.recipe["inputs"]:
        assert entry.pop("checksum")  # which earlier versions did not record
    save_snapshot(path, dict(read_tensors(path)), header)
    assert "Wrote 0" in run(*common)[1]


def test_results_beside_their_inputs_are_no_inputs(folder):
    for _ in range(2):
        code, output = run("--indir", folder, "--outdir", folder, "--outstd", "0.06")
        assert (code, "8 snapshots" in output) == (0, True)


def test_nothing_but_an_earlier_result_is_replaced(walk, folder, tmp_path):
    common = ("--indir", folder, "--outstd", "0.05")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, output = run(*common, "--outdir", folder, "--outprefix", "network-snapshot")
    assert code == 1
    assert output.strip().endswith("is one of the inputs; choose another --outprefix or --outdir")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for other in (changed(walk.snapshots[-2], run_id="b", recipe={"inputs": []}), walk.snapshots[-2]):
        save_snapshot(tmp_path / "phema-0000256-0.050.safetensors", other.tensors, other.header)
        code, output = run(*common, "--outdir", tmp_path, "--skip")
        assert (code, "holds another network; choose another" in output) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--outstd", "0.3"], 1, "at most 0.2886"),
        (["--outstd", "0.05,x"], 2, "'x' is not a number"),
        (["--outstd", "0.07", "--outkimg", "100"], 1, "no snapshot at --outkimg 100; the nearest are at 208, 224, 240"),
        (["--outstd", "0.07", "--outnimg", "256001"], 1, "no snapshot at 256001 images"),
        (["--outstd", "0.07", "--instd", "0.2"], 1, "has the EMA length 0.2; available: 0.05, 0.1"),
        (["--outstd", "0.07", "--batch", "0"], 2, "'--batch'"),
        (["--outstd", "0.07", "--indir", "nowhere"], 1, "nowhere: no such file or folder"),
        ([], 2, "'--outstd'"),
    ],
)
def test_wrong_options_are_one_line(folder, tmp_path, arguments, code, reason):
    result, output = run("--indir", folder, "--outdir", tmp_path / "out", *arguments)
    assert (result, reason in output) == (code, True), output
    assert len([line for line in output.splitlines() if "Error" in line]) == 1
    assert not (tmp_path / "out").exists()


def test_times_that_share_a_name_are_distinguished_or_refused(walk, tmp_path):
    shifted = [
        changed(w, name=f"{w.header.nimg}-{w.header.ema_std}.safetensors", nimg=1_000_000 + w.header.nimg // 1000)
        for w in walk.snapshots[-4:]
    ]
    runs.write(tmp_path / "in", shifted)
    common = ("--indir", tmp_path / "in", "--outdir", tmp_path / "out", "--outstd", "0.07")
    assert "may mean 1000240 or 1000256 images; say which with --outnimg" in run(*common, "--outkimg", "1000")[1]
    both = run(*common, "--outnimg", "1000240", "--outnimg", "1000256")
    assert (both[0], "two outputs would be called phema-0001000-0.070.safetensors" in both[1]) == (1, True)
    assert run(*common, "--outnimg", "1000240")[0] == 0
    assert "holds another network" in run(*common, "--outnimg", "1000256")[1]


def test_damaged_inputs_are_named(walk, folder, tmp_path):
    common = ("--indir", folder, "--outdir", tmp_path / "out", "--outstd", "0.07")
    name = walk.snapshots[-1].name
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1])
    code, output = run(*common)
    assert (code, output.count("\n"), f"{name} is not a complete snapshot" in output) == (1, 1, True)
    (folder / name).write_bytes(whole[:-4] + b"\x00\x00\xc0\x7f")  # not a number
    code, output = run(*common)
    assert (code, f"{name} is damaged: the weights " in output) == (1, True)
    unchecked = whole.replace(b"edm2_weights_crc32", b"edm2_weights_other")  # as earlier versions wrote it
    (folder / name).write_bytes(unchecked[:-4] + b"\x00\x00\xc0\x7f")
    code, output = run(*common)
    assert (code, f"Error: {name}: " in output) == (1, True)
    assert list((tmp_path / "out").iterdir()) == []


def test_two_ranks_share_the_outputs(folder, tmp_path):
    arguments = ("--indir", folder, "--outstd", "0.06,0.07,0.08")
    assert run(*arguments, "--outdir", tmp_path / "one")[0] == 0
    done = tiny.run("reconstruct_phema.py", *arguments, "--outdir", tmp_path / "two", ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote 3 snapshots") == 1
    assert names(tmp_path / "two") == names(tmp_path / "one")
    for name in names(tmp_path / "one"):
        one, two = (load_snapshot(tmp_path / ranks / name).net.state_dict() for ranks in ("one", "two"))
        assert all(torch.allclose(one[key], two[key], rtol=1e-3, atol=1e-6) for key in one)


INTERRUPTED = """
import os, runpy, signal, sys
from edm2kit.ema import rebuild as reconstruction
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
write = reconstruction.write_outputs
reconstruction.write_outputs = lambda *arguments, on_progress: write(
    *arguments, on_progress=lambda count: os.kill(os.getpid(), int(os.environ["SIGNAL"]))
)
runpy.run_path("reconstruct_phema.py", run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_end_in_the_middle_leaves_nothing_half_written(folder, tmp_path, number):
    out = tmp_path / "out"
    command = [sys.executable, "-c", INTERRUPTED, "--indir", folder, "--outdir", out, "--outstd", "0.05,0.07,0.08"]
    environment = {**tiny.environment(), "SIGNAL": str(int(number))}
    done = subprocess.run(list(map(str, command)), cwd=tiny.ROOT, env=environment, capture_output=True)
    assert done.returncode == (-number if number == signal.SIGKILL else 1)
    if number == signal.SIGKILL:
        assert all(name.startswith(".phema-") and name.endswith(".tmp") for name in names(out))
    else:
        assert names(out) == []
    assert run("--indir", folder, "--outdir", out, "--outstd", "0.05,0.07,0.08", "--skip")[0] == 0
    assert len([name for name in names(out) if name.endswith(".safetensors")]) == 3
    assert os.access(out / "phema-0000256-0.070.safetensors", os.R_OK)
