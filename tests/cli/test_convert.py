"""Pickles become snapshots of this project: one, or a folder of them, as often as it takes."""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from edm2kit.cli.convert import main
from edm2kit.models import Precond, full_architecture
from edm2kit.snapshots.file_format import read_header, read_tensors, save_snapshot
from edm2kit.snapshots.loading import load_snapshot
from edm2kit.training.config import config_from_dict, preset_path, read_yaml
from tests.support import fake_published, tiny
from tests.support.fake_published import ARCHITECTURE
from tests.support.fake_server import serve
from tests.support.golden import DATA


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three raw snapshots, and a file that is none."""
    raw = tmp_path / "raw"
    raw.mkdir()
    net = Precond(**ARCHITECTURE).half()
    for kimg in (134217, 268435, 402653):
        fake_published.write_snapshot(raw / f"edm2-img8-xxs-{kimg:07d}-0.050.pkl", net, ARCHITECTURE)
    (raw / "notes.txt").write_text("not a pickle")
    return raw


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_one_file(tmp_path):
    result = run("--source", DATA / "published_layout_rgb.pkl", "--dest", tmp_path / "a.safetensors")
    assert (result.exit_code, result.output) == (0, f"Converted 1 snapshots to {tmp_path}; 0 already existed\n")
    ours, published = load_snapshot(tmp_path / "a.safetensors"), load_snapshot(DATA / "published_layout_rgb.pkl")
    assert all(torch.equal(a, b) for a, b in zip(ours.net.parameters(), published.net.parameters(), strict=True))


def test_a_url_into_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    with serve({"/x/net-0000001-0.050.pkl": (DATA / "published_layout_vae.pkl").read_bytes()}) as server:
        assert run("--source", server.url("/x/net-0000001-0.050.pkl"), "--dest", tmp_path / "out").exit_code == 0
    header = read_header(tmp_path / "out" / "net-0000001-0.050.safetensors")
    assert (header.run_id, header.ema_std) == ("net", 0.05)


def test_a_folder_continues_where_it_stopped(folder, tmp_path):
    out = tmp_path / "out"
    assert f"Converted 3 snapshots to {out}; 0 already existed" in run("--source", folder, "--dest", out).output
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"edm2-img8-xxs-{kimg:07d}-0.050.safetensors" for kimg in (134217, 268435, 402653)]
    (out / names[1]).unlink()
    first = (out / names[0]).stat().st_mtime_ns
    again = run("--source", folder, "--dest", out, "--workers", 3)
    assert f"Converted 1 snapshots to {out}; 2 already existed" in again.output
    assert (out / names[0]).stat().st_mtime_ns == first
    left = out / f".{names[0]}.0123456789ab.tmp"  # by a killed process
    left.write_bytes(b"half of it")
    assert f"Converted 0 snapshots to {out}; 3 already existed" in run("--source", folder, "--dest", out).output
    assert not left.exists()
    assert "Converted 3" in run("--source", folder, "--dest", out, "--overwrite").output
    assert (out / names[0]).stat().st_mtime_ns != first


def test_a_broken_file_does_not_stop_the_others(folder, tmp_path):
    broken = folder / "edm2-img8-xxs-0268435-0.050.pkl"
    broken.write_bytes(broken.read_bytes()[:5000])
    result = run("--source", folder, "--dest", tmp_path / "out")
    assert result.exit_code == 1
    assert f"Error: {broken}: refused near byte" in result.output
    assert result.output.endswith("Error: 1 of 3 files were not converted, for the reasons above\n")
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_an_existing_file_of_another_origin_is_refused(folder, tmp_path):
    out = tmp_path / "a.safetensors"
    assert run("--source", DATA / "published_layout_rgb.pkl", "--dest", out).exit_code == 0
    result = run("--source", DATA / "published_layout_vae.pkl", "--dest", out)
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert "does not come from published_layout_vae.pkl; use --overwrite to replace it" in result.output
    assert run("--source", DATA / "published_layout_vae.pkl", "--dest", out, "--overwrite").exit_code == 0


def test_another_file_of_the_same_name_is_refused(folder, tmp_path):
    out = tmp_path / "out"
    assert run("--source", folder, "--dest", out).exit_code == 0
    path = folder / "edm2-img8-xxs-0134217-0.050.pkl"
    fake_published.write_snapshot(path, Precond(**ARCHITECTURE).half(), ARCHITECTURE)
    result = run("--source", folder, "--dest", out)
    assert result.exit_code == 1
    target = out / f"{path.stem}.safetensors"
    assert f"Error: {target} was made from another {path.name} than {path}; use --overwrite" in result.output
    assert run("--source", folder, "--dest", out, "--overwrite").exit_code == 0
    assert "3 already existed" in run("--source", folder, "--dest", out).output


def test_files_that_earlier_versions_converted_are_kept(folder, tmp_path):
    out = tmp_path / "out"
    assert run("--source", folder, "--dest", out).exit_code == 0
    for path in out.iterdir():
        header, tensors = read_header(path), dict(read_tensors(path))
        assert len(header.training_config.pop("published_content")) == 64
        save_snapshot(path, tensors, header)
    assert "3 already existed" in run("--source", folder, "--dest", out).output


STOPPED = """
import os, signal, sys
sys.argv[0] = {root!r} + "/scripts/convert_snapshot.py"
from edm2kit.snapshots import file_format as snapshot
write = snapshot.SnapshotWriter.write
def write_then_stop(self, name, tensor):
    write(self, name, tensor)
    if name == "unet.out_conv.weight":
        os.kill(os.getpid(), signal.SIGTERM)
snapshot.SnapshotWriter.write = write_then_stop
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_stopped_command_leaves_complete_files_only(folder, tmp_path):
    line = ["--source", str(folder), "--dest", str(tmp_path / "out"), "--workers", "1"]
    code = STOPPED.format(root=str(tiny.ROOT))
    stopped = subprocess.run([sys.executable, "-c", code, *line], env=tiny.environment(), capture_output=True)
    assert stopped.returncode != 0
    left = list((tmp_path / "out").iterdir())
    assert len(left) < 3
    assert all(path.suffix == ".safetensors" and read_header(path) for path in left)
    assert f"Converted {3 - len(left)}" in run(*line).output


def test_wrong_sources_are_reported(folder, tmp_path):
    shutil.copy(DATA / "published_layout_rgb.pkl", tmp_path / "in.pkl")
    assert run("--source", tmp_path / "in.pkl", "--dest", tmp_path / "a.safetensors").exit_code == 0
    for arguments, said in (
        ((tmp_path / "a.safetensors", tmp_path / "b"), "is not a pickle"),
        ((tmp_path / "nowhere.pkl", tmp_path / "b"), "no such file or folder"),
        ((folder, tmp_path / "a.safetensors"), "is a folder, so --dest must be a folder too"),
        ((DATA.parent, tmp_path / "b"), "no .pkl file in this folder"),
    ):
        result = run("--source", arguments[0], "--dest", arguments[1])
        assert result.exit_code == 1
        assert said in result.output


_MEASURE = """
import re, sys
from pathlib import Path
from edm2kit.snapshots.published import convert_published
# ru_maxrss would still know of the process that started this one
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
convert_published(Path("tests/data/published_layout_rgb.pkl"), Path(sys.argv[2]))  # torch loads more at first use
before = peak()
convert_published(Path(sys.argv[1]), Path(sys.argv[2]))
print(before, peak())
"""


def write_zeros(path: Path, architecture: Mapping[str, object]) -> int:
    """A published snapshot of a network of zeros; returns its size in bytes."""
    with torch.device("meta"):
        net = Precond(**architecture).half()
    state = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    return fake_published.write_snapshot(path, net, architecture).stat().st_size


def peak_bytes(path: Path, out: Path) -> tuple[int, int]:
    """Memory of a process before and at the peak of converting `path`."""
    command = [sys.executable, "-c", _MEASURE, str(path), str(out)]
    done = subprocess.run(command, cwd=tiny.ROOT, env=tiny.environment(), capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.split())
    return before, peak


on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")


@on_linux
def test_memory_does_not_grow_with_the_file(tmp_path):
    size = write_zeros(tmp_path / "a.pkl", {**ARCHITECTURE, "model_channels": 128, "num_blocks": 6})
    before, peak = peak_bytes(tmp_path / "a.pkl", tmp_path / "out.safetensors")
    assert size > 50 << 20
    assert peak - before < 0.15 * size


@pytest.mark.slow
@on_linux
def test_the_largest_network_is_converted_in_less_memory_than_its_file(tmp_path):
    """XXL, 1.5 billion parameters: writes 6 GB below pytest's --basetemp."""
    network = config_from_dict(read_yaml(preset_path("edm2-img512-xxl")), "xxl").network
    size = write_zeros(tmp_path / "a.pkl", full_architecture(64, 4, 1000, 0.5, network))
    _, peak = peak_bytes(tmp_path / "a.pkl", tmp_path / "out.safetensors")
    print(f"{size} bytes, at the peak {peak}: {peak / size:.3f} of the file")
    assert size > 3_000_000_000
    assert (tmp_path / "out.safetensors").stat().st_size == pytest.approx(size, rel=0.01)
    for file in tmp_path.iterdir():
        file.unlink()
    assert peak < 1.3 * size
