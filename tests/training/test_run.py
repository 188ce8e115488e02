"""The life of a run: stopping it by signal or time limit, and what its folder accepts."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from PIL import Image

from edm2kit.data.batches import STOP_SIGNALS
from edm2kit.training.config import config_from_dict
from edm2kit.training.run import StopRequest, prepare_run
from tests.support.tiny import TINY, make_dataset


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


@pytest.mark.parametrize("kind", [["rgb"], {"a": 1}, 5, None, "jpeg"])
def test_an_encoder_of_no_known_kind_is_one_line(tmp_path, kind):
    data = str(make_dataset(tmp_path / "a", num_images=8))
    with pytest.raises(ValueError, match="unknown encoder"):
        prepare_run(config_from_dict({**TINY, "data": data, "encoder": {"kind": kind}}, "test"), tmp_path / "run")
