"""Reference statistics: written, read back, read in published forms, damaged, mistaken."""

import pickle

import numpy as np
import pytest

from edm2kit.metrics.detectors.registry import DETECTORS
from edm2kit.metrics.moments import FeatureStatistics
from edm2kit.metrics.reference import Reference, load_reference, save_published_reference, save_reference

SIZE = DETECTORS["fd_random"].num_features


def statistics(metric="fd_random", seed=0, fingerprint=""):
    size = DETECTORS[metric].num_features
    rows = np.random.default_rng(seed).normal(size=(20, size))
    covariance = np.cov(rows, rowvar=False)
    return FeatureStatistics(rows.mean(axis=0), covariance, fingerprint or DETECTORS[metric].fingerprint)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "ref.npz"
    save_reference(path, Reference(20, {"fd_random": statistics()}, {"data": "x.zip"}))
    return path


def test_is_read_back_as_written(file):
    reference, expected = load_reference(file), statistics()
    assert reference.num_images == 20
    assert reference.source == {"data": "x.zip"}
    found = reference.of("fd_random")
    assert found.fingerprint == expected.fingerprint
    assert np.array_equal(found.mean, expected.mean)
    assert np.array_equal(found.covariance, expected.covariance)


def test_published_pickle(tmp_path):
    fid, dino = statistics("fid"), statistics("fd_dinov2")
    content = {
        "num_images": 1281167,
        "fid": {"mu": fid.mean, "sigma": fid.covariance},
        "fd_dinov2": {"mu": dino.mean, "sigma": dino.covariance},
    }
    (tmp_path / "img64.pkl").write_bytes(pickle.dumps(content))
    reference = load_reference(tmp_path / "img64.pkl")
    assert reference.num_images == 1281167
    assert list(reference.statistics) == ["fid", "fd_dinov2"]
    assert np.array_equal(reference.of("fd_dinov2").covariance, dino.covariance)


def test_written_as_a_published_pickle(tmp_path):
    fid, dino = statistics("fid"), statistics("fd_dinov2")
    path = tmp_path / "ref.pkl"
    save_published_reference(path, Reference(1000, {"fid": fid, "fd_dinov2": dino}, {"data": "x.zip"}))
    content = pickle.loads(path.read_bytes())  # as NVIDIA's program does
    assert list(content) == ["num_images", "fid", "fd_dinov2"]
    assert content["num_images"] == 1000
    for metric, expected in (("fid", fid), ("fd_dinov2", dino)):
        assert list(content[metric]) == ["mu", "sigma"]
        assert type(content[metric]["mu"]) is np.ndarray
        assert content[metric]["mu"].dtype == content[metric]["sigma"].dtype == np.float64
        assert np.array_equal(content[metric]["mu"], expected.mean)
        assert np.array_equal(content[metric]["sigma"], expected.covariance)
    ours = load_reference(path)
    assert ours.num_images == 1000
    assert np.array_equal(ours.of("fd_dinov2").covariance, dino.covariance)
    with pytest.raises(ValueError, match="holds fid and fd_dinov2, not fd_random"):
        save_published_reference(path, Reference(20, {"fd_random": statistics()}))


def test_older_published_npz_means_fid(tmp_path):
    fid = statistics("fid")
    np.savez(tmp_path / "old.npz", mu=fid.mean, sigma=fid.covariance)
    reference = load_reference(tmp_path / "old.npz")
    assert reference.num_images is None
    assert np.array_equal(reference.of("fid").mean, fid.mean)
    with pytest.raises(ValueError, match="no fd_dinov2, only fid"):
        reference.of("fd_dinov2")


def test_another_detector_is_refused(tmp_path):
    old = "weights sha256 0; something else"
    save_reference(tmp_path / "ref.npz", Reference(20, {"fd_random": statistics(fingerprint=old)}))
    with pytest.raises(ValueError, match="another detector") as caught:
        load_reference(tmp_path / "ref.npz").of("fd_random")
    assert old in str(caught.value)
    assert DETECTORS["fd_random"].fingerprint in str(caught.value)


def with_entries(file, **changes):
    with np.load(file) as arrays:
        entries = dict(arrays)
    entries.update({key.replace("__", "."): value for key, value in changes.items()})
    entries = {key: value for key, value in entries.items() if value is not None}
    np.savez(file, **entries)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fd_random__mu": None}, "no entry 'fd_random.mu"),
        ({"fd_random__mu": np.zeros(3)}, "shapes"),
        ({"fd_random__sigma": np.zeros((3, 3))}, "shapes"),
        ({"fd_random__mu": np.full(SIZE, np.nan)}, "not finite"),
        ({"fd_random__mu": np.full(SIZE, None)}, "allow_pickle"),
        ({"fd_random__mu": np.array("text")}, "damaged"),
        ({"header": np.array("{")}, "damaged"),
        ({"header": np.array("[]")}, "damaged"),
        ({"header": np.array("[" * 100_000)}, "damaged"),
        ({"header": np.array('{"format_version": 1, "fingerprints": [1]}')}, "damaged"),
        ({"header": np.array('{"format_version": 9}')}, "version 9; this program reads 1"),
        ({"header": np.array('{"format_version": 1}')}, "no entry 'fingerprints'"),
        ({"header": None}, "no entry"),
        (
            {
                "header": np.array(
                    '{"format_version": 1, "num_images": 1, "source": {}, "fingerprints": {"fd_x": ""}}'
                ),
                "fd_x__mu": np.zeros(2),
                "fd_x__sigma": np.zeros((2, 2)),
            },
            "'fd_x'",
        ),
    ],
)
def test_damage_is_refused_in_one_line(file, change, reason):
    with_entries(file, **change)
    with pytest.raises(ValueError, match=reason) as caught:
        load_reference(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncation_is_refused_anywhere(file):
    whole = file.read_bytes()
    for count in (0, 1, 2, 10, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:count])
        with pytest.raises(ValueError, match="damaged or does not contain reference") as caught:
            load_reference(file)
        assert "\n" not in str(caught.value)


def test_a_flipped_byte_is_refused(file):
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="damaged"):
        load_reference(file)


class Attack:
    def __reduce__(self):
        return (open, ("hacked", "w"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (Attack(), "refused"),
        ({"fid": Attack()}, "refused"),
        ([1, 2], "expected a dictionary"),
        ({}, "no statistics of fid"),
        ({"fid": 3}, "damaged"),
        ({"fid": {"mu": np.zeros(3)}}, "no entry 'sigma'"),
        ({"num_images": float("inf"), "fid": {"mu": np.zeros(3), "sigma": np.zeros((3, 3))}}, "damaged"),
        ({"fid": {"mu": [1 << 2000], "sigma": np.zeros((3, 3))}}, "damaged"),
        ({"fid": {"mu": np.zeros(3), "sigma": np.zeros((3, 3))}}, "shapes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_pickles_are_refused_and_never_executed(tmp_path, monkeypatch, content, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=reason) as caught:
        load_reference("ref.pkl")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(("content", "said"), [(b"", "it is empty"), (b"<!doctype html>", "it is a web page")])
def test_what_is_neither_an_npz_nor_a_pickle_is_not_called_either(tmp_path, content, said):
    (tmp_path / "ref.npz").write_bytes(content)
    with pytest.raises(ValueError, match=rf"ref\.npz is damaged or does not contain reference statistics: {said}"):
        load_reference(tmp_path / "ref.npz")


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        load_reference(tmp_path / "none.npz")
