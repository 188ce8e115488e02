"""What a run writes of itself."""

import io
import json
import math
import resource

import numpy as np
import pytest
import torch
from PIL import Image

from edm2kit.training.log import (
    HELDOUT_NAME,
    STATS_NAME,
    RunLog,
    RunningStats,
    append_line,
    drop_later_lines,
    memory_gb,
)

STATS = {"loss": (0.5, 32), "lr": (0.01, 2), "gradient_norm": (3.0, 2), "nonfinite_gradients": (1.5, 2)}


def test_resumed_log_reads_like_one_runs(tmp_path):
    path = tmp_path / STATS_NAME
    path.write_text('{"nimg": 16}\n{"nimg": 32}\n{"nimg": 48}\n{"nimg": 6')  # the last line was cut short
    log = RunLog(tmp_path, 100, torch.device("cpu"))
    log.begin(32, 10.0)
    log.status(64, 14.0, STATS)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["nimg"] for record in records] == [16, 32, 64]
    assert records[-1]["images_per_sec"] == 8
    assert records[-1]["nonfinite_gradients"] == 3  # of the whole period
    assert records[-1]["cpu_peak_gb"] > 0


def test_a_line_that_did_not_fit_on_the_disk_does_not_spoil_the_next_one(tmp_path, capsys):
    log, path = RunLog(tmp_path, 128, torch.device("cpu")), tmp_path / STATS_NAME
    log.status(16, 1.0, STATS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))  # the next line fits in part
    try:
        log.status(32, 2.0, STATS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the statistics at 32 images could not be written" in capsys.readouterr().err
    log.status(48, 3.0, STATS)
    assert [json.loads(line)["nimg"] for line in path.read_text().splitlines()] == [16, 48]


def test_half_a_minute_without_a_line_gives_one_with_speed_and_time_left(tmp_path, capsys):
    log = RunLog(tmp_path, 1000, torch.device("cpu"))
    log.begin(100, 60.0)
    log.progress(200, 80.0)
    assert len(capsys.readouterr().out.splitlines()) == 1  # "Resuming"
    log.progress(400, 90.0)
    assert capsys.readouterr().out == "400 images (40.0%)  10.0 img/s  0:01:30 elapsed, 0:01:00 left\n"
    log.status(500, 100.0, STATS)
    log.progress(600, 125.0)  # the status line was 25 seconds ago
    assert len(capsys.readouterr().out.splitlines()) == 1
    log.progress(650, 131.0)
    assert "650 images (65.0%)" in capsys.readouterr().out


def test_status_line_tells_what_matters(tmp_path, capsys):
    log = RunLog(tmp_path, 128, torch.device("cpu"))
    log.begin(0, 0.0)
    log.status(64, 4.0, STATS)
    line = capsys.readouterr().out.splitlines()[-1]
    for part in (
        "64 images (50.0%)",
        "loss 0.5000",
        "lr 0.01000",
        "16.0 img/s",
        "0:00:04 elapsed, 0:00:04 left",
        "3 non-",
    ):
        assert part in line


def test_tensorboard_events_are_written(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, 128, torch.device("cpu"), tensorboard=True)
    log.begin(0, 0.0)
    log.status(64, 4.0, STATS)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(64, 0.5)]


def test_tensorboard_shows_samples_and_held_out_losses(tmp_path, capsys):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sheet = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    log = RunLog(tmp_path, 128, torch.device("cpu"), tensorboard=True)
    log.begin(0, 0.0)
    log.picture(64, sheet)
    log.picture(128, sheet[:, :, 0])
    log.heldout(64, {"images": 5, "heldout": {"loss": 0.75}, "training": {"loss": 0.5}, "gap_error": {}})
    assert "0.7500 on 5 held-out images, 0.5000 on training images" in capsys.readouterr().out
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("heldout/loss")] == [(64, 0.75)]
    shown = [(e.step, np.asarray(Image.open(io.BytesIO(e.encoded_image_string)))) for e in events.Images("samples")]
    assert [step for step, _ in shown] == [64, 128]
    assert np.array_equal(shown[0][1], sheet)
    assert np.array_equal(shown[1][1][:, :, 0], sheet[:, :, 0])


def test_one_rank_alone_shows_samples(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr("edm2kit.torch_utils.dist.rank", lambda: 1)
    log = RunLog(tmp_path, 128, torch.device("cpu"), tensorboard=True)
    log.picture(64, np.zeros((4, 6), np.uint8))
    assert not (tmp_path / "tensorboard").exists()


def test_held_out_losses_are_dropped_from_where_a_run_resumes(tmp_path):
    (tmp_path / HELDOUT_NAME).write_text('{"nimg": 16}\n{"nimg": 32}\n')
    RunLog(tmp_path, 100, torch.device("cpu")).begin(16, 1.0)
    assert (tmp_path / HELDOUT_NAME).read_text() == '{"nimg": 16}\n'


def test_memory_is_of_this_process():
    assert 0.05 < memory_gb(torch.device("cpu"))["cpu_peak_gb"] < 100


def test_means_and_counts_since_the_last_look():
    stats = RunningStats()
    assert stats.collect() == {}
    stats.add("a", torch.tensor([1.0, 2.0]))
    stats.add("a", 6.0)
    values = torch.tensor([1.0, float("inf"), 3.0])
    x = torch.tensor([0.0, 2.0, 1.0])
    stats.add("b", values, between=(0.0, x, 2.0))
    stats.add("c", values, between=(3.0, x, math.inf))
    means = stats.collect()
    assert means["a"] == (3.0, 3)
    assert means["b"] == (2.0, 2)
    assert means["c"][1] == 0
    assert math.isnan(means["c"][0])
    assert stats.collect() == {}


def test_a_bad_byte_costs_one_line_of_statistics(tmp_path):
    path = tmp_path / "stats.jsonl"
    path.write_bytes(b'{"nimg": 1}\n{"ni\xffmg": 2}\nnull\n{"nimg": 3}\n')
    drop_later_lines(path, 3)
    assert path.read_bytes() == b'{"nimg": 1}\n{"nimg": 3}\n'


def test_lines_are_not_written_through_a_link(tmp_path):
    (tmp_path / "stats.jsonl").symlink_to("elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        append_line(tmp_path / "stats.jsonl", "{}")
    assert not (tmp_path / "elsewhere").exists()
