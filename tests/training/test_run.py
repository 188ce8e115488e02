"""The life of a run: stopping it by signal or time limit, and what its folder accepts."""

import dataclasses
import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from edm2kit.cli import train
from edm2kit.data import dataset
from edm2kit.data.batches import STOP_SIGNALS
from edm2kit.training.checkpoint import list_checkpoints
from edm2kit.training.config import config_from_dict
from edm2kit.training.run import StopRequest, prepare_run
from tests.support.pictures import encoded, picture, some_files, write_folder, write_zip
from tests.support.tiny import TINY, make_dataset, write_config


def test_stop_is_asked_by_signal_or_by_time_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert StopRequest(max_sec=-1)()
    assert not StopRequest(max_sec=3600)()


def test_processes_of_torchrun_do_not_outlive_it(monkeypatch, capsys):
    parents = [7, 7, 1]
    monkeypatch.setattr(os, "getppid", lambda: parents.pop(0))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    stop = StopRequest()
    assert [stop(), stop(), stop()] == [False, True, True]
    assert capsys.readouterr().err == "Warning: torchrun (process 7) has ended; saving and stopping\n"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert not StopRequest()()  # a shell may well end before


@pytest.fixture
def hangup():
    """SIGHUP as it is without nohup, which may have started these tests."""
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, former)


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("number", [s for s in STOP_SIGNALS if s != signal.SIGINT])
def test_every_signal_that_announces_the_end_asks_to_stop(number):
    with StopRequest() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("number", [s for s in STOP_SIGNALS if s != signal.SIGINT])
def test_during_set_up_a_signal_ends_the_process(number):
    with pytest.raises(SystemExit) as ended, StopRequest():
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number


def test_nohup_is_respected():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_run_on_other_pictures_of_the_same_names_is_refused_and_an_old_folder_resumes(tmp_path):
    config = config_from_dict({**TINY, "data": str(make_dataset(tmp_path / "a", num_images=8))}, "test")
    run = prepare_run(config, tmp_path / "run")
    run.write_records({})
    other = make_dataset(tmp_path / "b", num_images=8)
    for path in sorted(other.rglob("*.png")):
        Image.new("RGB", Image.open(path).size, (1, 2, 3)).save(path)
    with pytest.raises(ValueError, match=r"on other images than .*differs in content"):
        prepare_run(dataclasses.replace(config, data=str(other)), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["data_identity"]["content"]  # as runs recorded it before
    record["run_id"] = "old"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert prepare_run(config, tmp_path / "run").header.run_id == "old"


def test_a_run_does_not_resume_with_other_names_of_its_classes(tmp_path):
    data = make_dataset(tmp_path / "a", num_images=8)
    config = config_from_dict({**TINY, "data": str(data)}, "test")
    labels = json.loads((data / "dataset.json").read_text())
    for names, refused in ((["a", "b", "c", "d"], False), (["b", "a", "c", "d"], True), (None, True)):
        (data / "dataset.json").write_text(json.dumps({**labels, **({"label_names": names} if names else {})}))
        if refused:
            with pytest.raises(ValueError, match=r"on other images than .*differs in label_names"):
                prepare_run(config, tmp_path / "run")
        else:
            prepare_run(config, tmp_path / "run").write_records({})
            prepare_run(config, tmp_path / "run")


def test_a_checkpoint_of_another_run_is_refused_without_its_configuration(tmp_path):
    config = config_from_dict({**TINY, "data": str(make_dataset(tmp_path / "a", num_images=8))}, "test")
    own = prepare_run(config, tmp_path / "run").header.run_id
    (tmp_path / "run").mkdir()
    for name, refused in (("other", True), (own, False)):
        torch.save({"progress": {"run_id": name}}, tmp_path / "run" / "training-state-0000000008.pt")
        if refused:
            with pytest.raises(ValueError, match="belongs to another run"):
                prepare_run(config, tmp_path / "run")
        else:
            prepare_run(config, tmp_path / "run")


def test_a_file_under_the_name_of_the_record_is_not_replaced(tmp_path):
    config = config_from_dict({**TINY, "data": str(make_dataset(tmp_path / "a", num_images=8))}, "test")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"lap": 1}')
    with pytest.raises(ValueError, match=r"run\.json is not the record of a training run; use another --outdir"):
        prepare_run(config, tmp_path / "run")


def test_another_image_that_is_not_among_those_compared_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dataset, "_HASHED_BYTES", 0)  # 256 images, as of very large ones
    files = some_files(300)
    unseen = list(files)[min(set(range(300)).difference(dataset.spread_evenly(300, 256)))]
    config = config_from_dict({**TINY, "cond": False, "data": str(write_zip(tmp_path / "d.zip", files))}, "test")
    prepare_run(config, tmp_path / "run").write_records({})
    assert prepare_run(config, tmp_path / "run")
    assert capsys.readouterr().err == ""
    write_zip(tmp_path / "d.zip", files | {unseen: encoded(picture(1000))})
    prepare_run(config, tmp_path / "run")
    assert f"{tmp_path / 'd.zip'} is another file than the run began with" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["size", "time", "array"])
def test_another_file_of_a_folder_is_told_once(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr(dataset, "_HASHED_BYTES", 0)
    if kind == "array":
        path = tmp_path / "d" / "images.npy"
        path.parent.mkdir()
        np.save(path, np.zeros([300, 3, 16, 16], np.uint8))
    else:
        files = some_files(300)
        unseen = list(files)[min(set(range(300)).difference(dataset.spread_evenly(300, 256)))]
        path = write_folder(tmp_path / "d", files) / unseen
    config = config_from_dict({**TINY, "cond": False, "data": str(tmp_path / "d")}, "test")
    prepare_run(config, tmp_path / "run").write_records({})
    prepare_run(config, tmp_path / "run")
    assert capsys.readouterr().err == ""
    before = path.stat()
    if kind == "size":
        path.write_bytes(encoded(Image.new("RGB", picture(0).size)))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size != before.st_size
    else:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    prepare_run(config, tmp_path / "run").write_records({})
    assert f"files in {tmp_path / 'd'} have changed since the run last began" in capsys.readouterr().err
    prepare_run(config, tmp_path / "run")
    assert capsys.readouterr().err == ""


def test_a_record_without_times_of_its_files_is_no_reason_to_warn(tmp_path, capsys):
    config = config_from_dict({**TINY, "cond": False, "data": str(write_folder(tmp_path / "d", some_files(4)))}, "test")
    prepare_run(config, tmp_path / "run").write_records({})
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["data_files"]["stamp"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    prepare_run(config, tmp_path / "run")
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of 32 images, and the words that resume it."""
    place = tmp_path_factory.mktemp("begun")
    words = ["--config", write_config(place / "tiny.yaml"), "--data", make_dataset(place / "data", num_images=8)]
    words += ["--device", "cpu", "--samples", 0]
    assert trained([*words, "--duration", 32, "--outdir", place / "run"]).exit_code == 0
    return place / "run", words


def trained(words):
    return CliRunner().invoke(train.main, [str(word) for word in words])


def test_a_checkpoint_of_another_run_is_not_continued(begun, tmp_path):
    run_dir, words = begun
    shutil.copytree(run_dir, tmp_path / "run")
    assert trained([*words, "--seed", 5, "--duration", 64, "--outdir", tmp_path / "other"]).exit_code == 0
    newer = tmp_path / "other" / "training-state-0000000064.pt"
    shutil.copy(newer, tmp_path / "run")
    done = trained([*words, "--duration", 96, "--outdir", tmp_path / "run"])
    assert done.exit_code == 1
    assert re.search(r"training-state-0000000064\.pt belongs to another run \(\w+\), not to the one", done.output)
    (tmp_path / "run" / newer.name).unlink()
    assert trained([*words, "--duration", 96, "--outdir", tmp_path / "run"]).exit_code == 0


@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
@pytest.mark.parametrize("content", [b"\xf2", b'{"data_identity": 1', None])
def test_a_damaged_record_does_not_keep_the_run_from_resuming(begun, tmp_path, name, content):
    run_dir, words = begun
    shutil.copytree(run_dir, tmp_path / "run")
    record = tmp_path / "run" / name
    known = record.read_bytes()
    record.unlink()
    if content is not None:
        record.write_bytes(content)
    done = trained([*words, "--duration", 48, "--outdir", tmp_path / "run"])
    assert done.exit_code == 0, done.output
    assert "Resuming at 32 images" in done.output
    assert (name == "config.yaml" and content is None) or f"{name} is damaged" in done.output
    assert record.read_bytes()[:20] == known[:20]


@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
def test_without_a_checkpoint_of_the_run_a_damaged_record_is_named(begun, tmp_path, name):
    run_dir, words = begun
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(b"\xf2")
    done = trained([*words, "--seed", 1, "--duration", 48, "--outdir", tmp_path / "run"])
    assert done.exit_code == 1
    assert name in done.output
    assert list_checkpoints(tmp_path / "run") == [tmp_path / "run" / "training-state-0000000032.pt"]


@pytest.mark.parametrize("kind", [["rgb"], {"a": 1}, 5, None, "jpeg"])
def test_an_encoder_of_no_known_kind_is_one_line(tmp_path, kind):
    data = str(make_dataset(tmp_path / "a", num_images=8))
    with pytest.raises(ValueError, match="unknown encoder"):
        prepare_run(config_from_dict({**TINY, "data": data, "encoder": {"kind": kind}}, "test"), tmp_path / "run")
