"""A run folder stands for its newest snapshot; files that hold no network name the one to give instead."""

import shutil
from pathlib import Path

import pytest

from edm2kit.models.edm2 import Precond
from edm2kit.snapshots.file_format import Header, save_snapshot, snapshot_name
from edm2kit.snapshots.loading import load_snapshot, local_file, open_sources
from edm2kit.snapshots.run_folder import newest_of_folders, newest_snapshot
from tests.support.fake_published import ARCHITECTURE

NET = Precond(**ARCHITECTURE).state_dict()


def add(folder: Path, nimg: int, std: float, *, run: str = "a", recipe: dict | None = None, name: str = "") -> Path:
    """Write a snapshot into `folder`."""
    folder.mkdir(exist_ok=True)
    header = Header(ARCHITECTURE, {"kind": "rgb"}, nimg, std, None, "float32", run, recipe=recipe)
    path = folder / (name or snapshot_name(nimg, std))
    save_snapshot(path, NET, header)
    return path


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with snapshots at two times, a rebuilt EMA, and a state to resume from."""
    folder = tmp_path / "run"
    for nimg in (2000, 4000):
        for std in (0.05, 0.1):
            add(folder, nimg, std)
    add(folder, 4000, 0.2, recipe={"method": "post-hoc EMA"}, name="phema-0000004-0.200.safetensors")
    (folder / "training-state-0000004000.pt").write_bytes(b"PK")
    return folder


def test_the_newest_snapshot_with_the_longest_ema_is_taken(run):
    expected = run / "network-snapshot-0000004-0.100.safetensors"
    assert newest_snapshot(run) == local_file(run) == local_file(str(run)) == expected
    assert load_snapshot(run).header.nimg == 4000


def test_the_number_of_images_counts_not_the_name(run):
    newer = add(run, 4500, 0.1, name="a.safetensors")
    assert newest_snapshot(run) == newer


def test_a_damaged_newest_file_is_passed_over_with_a_warning(run, capsys):
    for std in ("0.050", "0.100"):
        path = run / f"network-snapshot-0000004-{std}.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
    assert newest_snapshot(run).name == "network-snapshot-0000002-0.100.safetensors"
    assert "Warning: passed over: " in capsys.readouterr().err


def test_roles_are_named_and_a_guide_like_the_network_is_refused(run, tmp_path, capsys):
    guide = add(tmp_path / "guide", 1000, 0.1, run="b")
    url = "https://example.org/x.pkl"
    found = newest_of_folders({"net": str(run), "gnet": str(guide.parent), "uncond": url})
    assert found == {"net": str(run / "network-snapshot-0000004-0.100.safetensors"), "gnet": str(guide)}
    assert f"{run}: using its newest snapshot, network-snapshot-0000004-0.100.safetensors" in capsys.readouterr().out
    for net in (str(run), found["net"]):
        with pytest.raises(ValueError, match=r"the guide network is the main one, .*0.100.safetensors; give"):
            newest_of_folders({"net": net, "gnet": str(run)})


def test_rebuilt_emas_are_taken_if_there_is_no_doubt(tmp_path):
    one = add(tmp_path / "ema", 4000, 0.07, recipe={"method": "x"})
    assert newest_snapshot(tmp_path / "ema") == one
    add(tmp_path / "ema", 4000, 0.12, recipe={"method": "x"})
    with pytest.raises(ValueError, match=r"rebuilt EMAs of several lengths; give one of its files: .*0\.070.*0\.120"):
        newest_snapshot(tmp_path / "ema")


def test_two_runs_in_one_folder_are_refused(run):
    add(run, 100, 0.1, run="b", name="guide.safetensors")
    with pytest.raises(ValueError, match=r"holds networks of several runs; give one of its files: guide.safetensors, "):
        newest_snapshot(run)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "run is empty; give a snapshot, or the folder of a run"),
        (("config.yaml", "training-state-0000000064.pt"), "only the state to resume from. Repeat .* --max-time 1s"),
        (("config.yaml", "run.json"), "neither snapshots nor a state to resume from. Repeat its training command"),
        (("model_index.json",), "is a pipeline of diffusers; write diffusers:.*run"),
        (("a.png",), "run has no snapshots; give one, or the folder of a training run"),
    ],
)
def test_a_folder_without_snapshots_says_what_to_do(tmp_path, files, message):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    with pytest.raises(ValueError, match=message):
        local_file(folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("empty", "empty is empty; give"), ("ema", "ema has only rebuilt EMAs, or files of other kinds; give the folder")],
)
def test_a_search_for_all_snapshots_says_what_to_do_too(tmp_path, name, reason):
    (tmp_path / "empty").mkdir()
    add(tmp_path / "ema", 4000, 0.07, recipe={"method": "x"})
    with pytest.raises(ValueError, match=f"found no training snapshots in .*: .*{reason}"):
        open_sources([tmp_path / name])


def test_a_folder_of_runs_names_them(run):
    with pytest.raises(ValueError, match="has no snapshots, but its folders run have; give one of them"):
        local_file(run.parent)


def test_a_training_state_names_the_snapshot_to_give(run):
    state = run / "training-state-0000004000.pt"
    with pytest.raises(ValueError, match=r"resumes from, not a network; give .*/network-snapshot-0000004-0.100"):
        local_file(state)
    older = shutil.copy(state, run / "training-state-0000003000.pt")
    with pytest.raises(ValueError, match=r"the newest snapshot beside it is .*/network-snapshot-0000004-0.100"):
        load_snapshot(older)
    alone = run.parent / "alone"
    alone.mkdir()
    with pytest.raises(ValueError, match=r"not a network, and .*alone has no snapshots yet.* Repeat its training"):
        local_file(shutil.copy(state, alone))


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "stats.jsonl", "net.pt"])
def test_other_files_of_a_run_are_no_networks(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name} is .*, not a network; give a snapshot"):
        local_file(tmp_path / name)
