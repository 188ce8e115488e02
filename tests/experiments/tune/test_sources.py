"""Networks of a search: rebuilt in memory as reconstruct_phema.py would, within bounded memory."""

import numpy as np
import pytest
import torch

from edm2kit.cli.generation import load_for_sampling
from edm2kit.ema.rebuild import reconstruct
from edm2kit.experiments.tune.sources import NetworkCache, Version, contents, open_source_of_networks
from edm2kit.snapshots.loading import load_snapshot, open_weights
from tests.support.pictures import encoded, picture, some_files, write_folder
from tests.support.tuning import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), seed=0)


@pytest.fixture
def source(run):
    return open_source_of_networks("main", str(run))


def answers(snapshot) -> torch.Tensor:
    x = torch.randn([2, 3, 8, 8], generator=torch.Generator().manual_seed(0))
    return snapshot.net(x, torch.ones(2), torch.eye(4)[:2])


def test_a_run_offers_its_times_and_lengths_that_rebuild_well(source):
    assert source.is_run
    assert source.times == [1000, 2000, 3000]
    assert source.usual == Version("main", 3000, 0.1)
    lengths = source.lengths(3000)
    assert {0.05, 0.0707, 0.1} <= set(lengths)
    assert all(source.fit_error(3000, length) <= 0.1 for length in lengths)
    assert source.lengths(3000, [0.07, 0.2801]) == [0.07]  # longer than the snapshots allow
    assert source.fit_error(1500, 0.1) == float("inf")


def test_a_single_snapshot_is_fixed(run):
    path = next(run.glob("*3-0.050*"))
    source = open_source_of_networks("main", str(path))
    assert (source.is_run, source.lengths(3000), source.usual.ema_std) == (False, [], 0.05)


def test_networks_are_those_of_the_files_or_of_a_rebuild(source, run, tmp_path):
    cache = NetworkCache([source], torch.device("cpu"), "fp32", 1 << 30)
    stored = load_for_sampling(open_weights(next(run.glob("*2-0.100*"))), torch.device("cpu"), "fp32")
    assert torch.equal(answers(cache.get(Version("main", 2000, 0.1))), answers(stored))
    version = Version("main", 3000, 0.07)
    state, _ = reconstruct(sorted(run.glob("*.safetensors")), 0.07)
    rebuilt = cache.get(version)
    source.write(version, tmp_path / "out.safetensors")
    for name, value in load_snapshot(tmp_path / "out.safetensors").net.state_dict().items():
        assert torch.equal(value, state[name]), name
    written = load_for_sampling(open_weights(tmp_path / "out.safetensors"), torch.device("cpu"), "fp32")
    assert torch.equal(answers(rebuilt), answers(written))
    assert not torch.equal(answers(rebuilt), answers(stored))
    assert rebuilt.header.recipe is not None


def test_memory_is_bounded_and_the_latest_are_found_again(source):
    one = NetworkCache([source], torch.device("cpu"), "fp32", 1 << 30)
    one.get(source.usual)
    size = one.num_bytes
    assert size > 1000
    cache = NetworkCache([source], torch.device("cpu"), "fp32", 3 * size)
    versions = [Version("main", 3000, length) for length in (0.05, 0.06, 0.07, 0.08, 0.1)]
    for version in versions:
        cache.get(version)
        assert cache.num_bytes <= 3 * size
    assert cache.rebuilt == 5
    for version in versions[2:]:
        cache.get(version)
    assert cache.rebuilt == 5
    cache.get(versions[0])
    assert cache.rebuilt == 6
    none = NetworkCache([source], torch.device("cpu"), "fp32", 0)
    none.get(versions[0]), none.get(versions[4])
    none.get(versions[0])
    assert none.rebuilt == 2  # a pair always stays


def test_what_is_not_a_run_is_refused(tmp_path, run):
    with pytest.raises(ValueError, match="no training snapshots"):
        open_source_of_networks("main", str(tmp_path))
    for path in make_run(tmp_path / "other", seed=1).iterdir():
        path.rename(tmp_path / f"other-{path.name}")
    for path in run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="differ in run_id"):
        open_source_of_networks("main", str(tmp_path))


def test_everything_behind_a_name_is_hashed(tmp_path):
    folder = make_run(tmp_path / "guide", seed=1)
    np.save(tmp_path / "labels.npy", np.zeros([1, 4]))
    images = write_folder(tmp_path / "real", some_files(3))
    words = ["--steps", "8", "--labels", str(tmp_path / "labels.npy"), f"--loss-image={images}/00000/img00000000.png"]

    def found():
        return contents([open_source_of_networks("guide", str(folder))], words, str(images))

    before = found()
    assert set(before) == {"guide", words[3], words[4].partition("=")[2], "--real"}
    assert found() == before
    np.save(tmp_path / "labels.npy", np.ones([1, 4]))
    assert differing(before, found()) == {words[3]}
    make_run(folder, seed=2)
    assert differing(before, found()) == {words[3], "guide"}
    write_folder(images, {"00000/img00000002.png": encoded(picture(7))})
    assert differing(before, found()) == {words[3], "guide", "--real"}


def differing(before, after):
    return {name for name in before if before[name] != after[name]}
