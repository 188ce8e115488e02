"""Reproduction: the whole path at toy scale, killed and continued."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from edm2kit.cli import reproduce
from edm2kit.cli.generation import Request, prepare
from edm2kit.experiments.paper_tables import run
from edm2kit.experiments.paper_tables.networks import PublishedNetwork
from edm2kit.experiments.paper_tables.plan import measure_flops
from edm2kit.experiments.paper_tables.tables import load_table
from edm2kit.metrics.detectors.registry import load_detector
from edm2kit.metrics.moments import FeatureStatistics
from edm2kit.metrics.reference import Reference, save_reference
from edm2kit.metrics.scoring import image_statistics, make_scorer
from edm2kit.models.edm2 import Precond
from edm2kit.sampling.solvers import Sampler
from edm2kit.snapshots.file_format import read_header, save_snapshot
from edm2kit.snapshots.loading import load_snapshot
from edm2kit.torch_utils.cache import fetch
from tests.support import tiny
from tests.support.fake_server import FakeServer, serve
from tests.support.golden import DATA

MAIN, GUIDE = "edm2-img512-xs-2147483-0.135", "toy-0067108-0.070"
NUM, SAVE_EVERY = 24, 8


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(reproduce.main, [str(a) for a in arguments])


# the whole path, at toy scale


def toy_snapshots(path: Path) -> dict[str, bytes]:
    """Raw snapshots of a toy run at 32Mi and 64Mi images, as its server would hold them."""
    reference = load_snapshot(DATA / "published_layout_rgb.pkl")
    architecture = {**reference.header.architecture, "model_channels": 4, "channels_per_head": 4}
    files = {}
    for k in (1, 2):
        for std in (0.05, 0.1):
            torch.manual_seed(k)
            state = Precond(**architecture).state_dict()
            gains = {name: torch.ones([]) for name, value in state.items() if name.endswith("gain")}
            fourier = {
                name: torch.arange(len(v)) / 3 for name, v in state.items() if name.endswith(("freqs", "phases"))
            }
            header = dataclasses.replace(
                reference.header, architecture=architecture, nimg=k << 25, ema_std=std, run_id="toy", dtype="float32"
            )
            save_snapshot(path, {**state, **gains, **fourier}, header)
            files[f"/edm2/raw-snapshots/toy/toy-{(k << 25) // 1000:07d}-{std:.3f}.pkl"] = path.read_bytes()
    return files


def toy_reference(path: Path) -> bytes:
    images = torch.randint(256, (200, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    count, statistics = image_statistics([images], [load_detector("fd_random")], torch.device("cpu"))
    save_reference(path, Reference(count, statistics))
    return path.read_bytes()


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """A server that has the toy's files in the places of the published ones."""
    folder = tmp_path_factory.mktemp("files")
    with torch.random.fork_rng(devices=[]):
        files = {
            f"/edm2/posthoc-reconstructions/{MAIN}.pkl": (DATA / "published_layout_rgb.pkl").read_bytes(),
            "/refs/toy.npz": toy_reference(folder / "toy.npz"),
            **toy_snapshots(folder / "toy"),
        }
    with serve(files) as server:
        yield server


@pytest.fixture
def table(tmp_path, mirror: FakeServer, monkeypatch) -> Path:
    """A table of two rows; downloads go to a cache of the test's own, from the mirror."""
    monkeypatch.setenv("EDM2_MIRROR", mirror.url(""))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("EDM2_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    cells = [
        {"net": MAIN, "value": 3.0},
        {"net": MAIN, "gnet": GUIDE, "guidance": 2.0, "interval": [0.1, 100.0], "value": 2.5},
    ]
    rows = [
        {"name": name, "group": "toys", "setting": name, "dataset": "toy", "fd_random": cell}
        for name, cell in zip(("plain", "guided"), cells, strict=True)
    ]
    shape = {"img_resolution": 16, "img_channels": 3, "label_dim": 4}
    dataset = {"reference": "https://toys.example/refs/toy.npz", **shape}
    content = {
        "title": "Toys",
        "source": "nobody",
        "datasets": {"toy": dataset},
        "sampler": {"num_steps": 2},
        "rows": rows,
    }
    path = tmp_path / "toys.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def options(table: Path, outdir: Path, *more: object) -> list[object]:
    given = ["--table", table, "--outdir", outdir, "--num-images", NUM, "--seeds", 2, "--save-every", SAVE_EVERY]
    return ["run", *given, "--batch", 4, "--device", "cpu", *more]


def values(outdir: Path, name: str) -> dict[str, float]:
    record = json.loads((outdir / f"{name}-fd_random.json").read_text())
    return {first: run["value"] for first, run in record["runs"].items()}


KILLED = """
import os, signal, sys
from edm2kit.cli import reproduce
from edm2kit.experiments.paper_tables import run
save = run.PartialStatistics.save
def save_then_die(self, path):
    save(self, path)
    if "guided" in path.name and self.done == 16:
        os.kill(os.getpid(), signal.SIGKILL)
run.PartialStatistics.save = save_then_die
reproduce.main()
"""


def test_two_ranks_killed_and_continued_reach_what_one_alone_does(table, tmp_path, mirror):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(root=str(tiny.ROOT)))
    line = [str(a) for a in options(table, tmp_path / "two")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    killed = subprocess.run([*torchrun, str(script), *line], capture_output=True, text=True, env=tiny.environment())
    assert killed.returncode != 0
    assert f"Signal {signal.SIGKILL:d}" in killed.stderr
    assert not (tmp_path / "two" / "guided-fd_random.json").exists()
    asked_for = len(mirror.seen)

    again = tiny.run("scripts/reproduce.py", *line, ranks=2)
    assert again.returncode == 0, again.stderr
    assert "plain-fd_random: complete, skipped" in again.stdout
    assert f"Resuming after 16 of {NUM} images" in again.stdout
    assert len(mirror.seen) == asked_for  # every file was in the cache
    assert not list((tmp_path / "two").glob("*.partial.npz"))
    rebuilt = read_header(tmp_path / "two" / "networks" / f"{GUIDE}.safetensors")
    assert (rebuilt.nimg, rebuilt.ema_std, len(rebuilt.recipe["inputs"])) == (64 << 20, 0.070, 4)
    assert rebuilt.recipe["fit"]["error"] == pytest.approx(PublishedNetwork.named(GUIDE).fit.error, rel=1e-6)

    alone = invoke(*options(table, tmp_path / "one"))
    assert alone.exit_code == 0, alone.output
    for name in ("plain", "guided"):
        one, two = values(tmp_path / "one", name), values(tmp_path / "two", name)
        assert list(one) == ["0", str(NUM)]
        # other batches may round a pixel otherwise
        assert one == pytest.approx(two, rel=1e-3)
    assert values(tmp_path / "one", "plain") != values(tmp_path / "one", "guided")

    report = invoke("report", "--table", table, "--outdir", tmp_path / "two")
    assert report.exit_code == 0, report.output
    check_report((tmp_path / "two" / "report.md").read_text(), values(tmp_path / "two", "guided"))
    page = (tmp_path / "two" / "report.html").read_text()
    assert page.count("<tr>") == 3
    assert GUIDE in page


def check_report(text: str, found: dict[str, float]) -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    guided = dict(zip(rows[0], rows[3], strict=True))
    assert "method" not in guided  # no row uses a method other than pairs
    assert (guided["network"], guided["guide"]) == (MAIN, GUIDE)
    assert (guided["weight"], guided["interval"], guided["published"]) == ("2", "(0.1, 100]", "2.5")
    assert float(guided["minimum"]) == pytest.approx(min(found.values()), rel=1e-3)
    assert float(guided["difference"]) == pytest.approx(min(found.values()) - 2.5, rel=1e-2)
    assert guided["seeds"] == f"0-{NUM - 1}, {NUM}-{2 * NUM - 1}"
    assert guided["hardware"].startswith("2 x ")
    assert len(guided["commit"]) >= 7
    for note in ("50,000 images", "minimum of three", "CUDA random numbers"):
        assert note in text


def test_downloaded_files_work_without_a_connection(table, tmp_path, mirror, monkeypatch):
    got = invoke("download", "--table", table, "--outdir", tmp_path / "out")
    assert got.exit_code == 0, got.output
    shown = [Path(path) for path in re.findall(rf"{tmp_path}\S+(?=\n)", got.output)]
    assert [path.name for path in shown] == ["toy.npz", f"{MAIN}.pkl", f"{GUIDE}.safetensors"]
    assert all(path.is_file() for path in shown)
    asked_for = len(mirror.seen)
    monkeypatch.setenv("EDM2_OFFLINE", "1")
    assert invoke("download", "--table", table, "--outdir", tmp_path / "out").exit_code == 0
    done = invoke(*options(table, tmp_path / "out", "--rows", "guided", "--seeds", 1))
    assert done.exit_code == 0, done.output
    assert "rebuilding" not in done.output
    assert len(mirror.seen) == asked_for


def test_a_failed_download_does_not_stop_the_others(table, tmp_path, mirror):
    missing = mirror.files.pop("/refs/toy.npz")
    try:
        got = invoke("download", "--table", table, "--outdir", tmp_path / "out")
    finally:
        mirror.files["/refs/toy.npz"] = missing
    assert got.exit_code == 1
    assert "refs/toy.npz: the server answered 404" in got.output
    assert "Error: 1 of 3 downloads failed" in got.output
    assert (tmp_path / "out" / "networks" / f"{GUIDE}.safetensors").is_file()


def test_a_missing_network_skips_only_its_own_cells(table, tmp_path, mirror):
    raw = f"/edm2/raw-snapshots/toy/toy-{(2 << 25) // 1000:07d}-0.100.pkl"
    missing, line = mirror.files.pop(raw), options(table, tmp_path / "out", "--rows", "guided,plain", "--seeds", 1)
    try:
        got = invoke(*line)
    finally:
        mirror.files[raw] = missing
    assert got.exit_code == 1
    assert re.search(
        r"Warning: guided-fd_random is skipped: .*toy-0067108-0\.100\.pkl: the server answered 404", got.output
    )
    assert got.output.endswith("Error: 1 of 2 cells were skipped, see above. Run the same command to try again\n")
    assert len(values(tmp_path / "out", "plain")) == 1
    again = invoke(*line)
    assert again.exit_code == 0, again.output
    assert "plain-fd_random: complete, skipped" in again.output


def test_throughput_is_measured(table):
    [cell] = load_table(table).cells(["guided"])
    small = dataclasses.replace(cell, net=cell.gnet)
    assert measure_flops(small, torch.device("cpu"), "fp32", batch=2, min_sec=0.01) > 1e6


def test_a_value_is_the_distance_of_its_seeds(table, tmp_path):
    assert invoke(*options(table, tmp_path / "out", "--rows", "plain")).exit_code == 0
    cpu = torch.device("cpu")
    scorer = make_scorer(fetch("https://toys.example/refs/toy.npz"), cpu)
    generation = prepare(Request(str(DATA / "published_layout_rgb.pkl"), sampler=Sampler(num_steps=2)), cpu)
    for first in (0, NUM):
        images = (batch.images for batch in generation.batches(range(first, first + NUM), 4))
        expected = scorer.score(images)["fd_random"]
        assert values(tmp_path / "out", "plain")[str(first)] == pytest.approx(expected, rel=1e-6)


def test_a_stopped_cell_resumes_to_the_same_bits(table, tmp_path, monkeypatch):
    assert invoke(*options(table, tmp_path / "whole", "--rows", "plain")).exit_code == 0
    save, saves = run.PartialStatistics.save, []

    def save_then_stop(self, path):
        save(self, path)
        saves.append(self.done)
        if len(saves) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.PartialStatistics, "save", save_then_stop)
    assert invoke(*options(table, tmp_path / "parts", "--rows", "plain")).exit_code != 0
    monkeypatch.setattr(run.PartialStatistics, "save", save)
    assert saves == [8, 16, 24, 8]
    # --save-every is the unfinished range's own
    again = invoke(*options(table, tmp_path / "parts", "--rows", "plain"), "--save-every", 3)
    assert again.exit_code == 0, again.output
    assert f"Resuming after 8 of {NUM} images" in again.output
    assert values(tmp_path / "parts", "plain") == values(tmp_path / "whole", "plain")
    runs = json.loads((tmp_path / "parts" / "plain-fd_random.json").read_text())["runs"]
    assert {run["num_images"] for run in runs.values()} == {NUM}


def test_work_of_other_settings_is_refused(table, tmp_path):
    line = options(table, tmp_path / "out", "--rows", "plain", "--seeds", 1)
    assert invoke(*line).exit_code == 0
    assert "num_images 24, now 12" in invoke(*line, "--num", 12).output
    assert "precision" in invoke(*line, "--seeds", 2, "--precision", "bf16").output
    content = yaml.safe_load(table.read_text())
    content["rows"][0]["fd_random"] |= {"gnet": GUIDE, "guidance": 1.5}
    table.write_text(yaml.safe_dump(content))
    assert "was measured with other settings (gnet null" in invoke(*line).output
    (tmp_path / "out" / "plain-fd_random.json").write_text("{")
    assert "is damaged" in invoke(*line).output


def test_progress_is_complete_or_damage_is_reported(tmp_path):
    statistics = FeatureStatistics(np.ones(2), np.eye(2), "x")
    progress = run.PartialStatistics({"first_seed": 0}, 8).plus(5, statistics, 1.5, {"commit": "c"})
    progress.save(tmp_path / "p.npz")
    again = run.load_partial(tmp_path / "p.npz", {"first_seed": 0}, 4)
    assert (again.done, again.save_every, again.elapsed_sec, again.made_by) == (5, 8, 1.5, [{"commit": "c"}])
    assert np.array_equal(again.statistics.covariance, np.eye(2))
    assert run.load_partial(tmp_path / "p.npz", {"first_seed": 24}, 4).done == 0
    (tmp_path / "p.npz").write_bytes(b"PK" + b"0" * 100)
    with pytest.raises(ValueError, match="is damaged"):
        run.load_partial(tmp_path / "p.npz", {"first_seed": 0}, 4)


@pytest.mark.parametrize(("num", "save_every"), [(24, 8), (25, 8), (3, 2), (2, 1), (50_000, 2000), (5, 100)])
def test_every_stretch_is_long_enough_for_a_covariance(num, save_every):
    stops = run.save_points(num, save_every)
    assert stops[-1] == num
    assert min(np.diff([0, *stops])) >= 2
