"""The detector registry: where weights come from, and what is refused."""

import dataclasses
import hashlib

import pytest
import torch
from torch import nn

from edm2kit.metrics.detectors import registry
from edm2kit.metrics.detectors.registry import DETECTORS, Detector, DetectorSpec, WeightFile, check_names, load_detector
from edm2kit.torch_utils.cache import pinned


class Tiny(nn.Module):
    """Two features: a factor times the mean and the largest pixel."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(2))

    def forward(self, images):
        pixels = images.flatten(1).double()
        return self.factor * torch.stack([pixels.mean(1), pixels.amax(1)], dim=1)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("EDM2_OFFLINE", "1")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))


def spec_of(content: bytes) -> DetectorSpec:
    digest = hashlib.sha256(content).hexdigest()
    return DetectorSpec(Tiny, 2, digest, "none", WeightFile("https://example.org/a/tiny.pth", digest))


def saved(folder, value) -> bytes:
    folder.mkdir(exist_ok=True)
    torch.save(value, folder / "tiny.pth")
    return (folder / "tiny.pth").read_bytes()


def test_weights_are_taken_from_the_folder_given(tmp_path):
    spec = spec_of(saved(tmp_path / "weights", {"factor": torch.tensor([2.0, 3.0])}))
    detector = load_detector("tiny", weights_dir=tmp_path / "weights", spec=spec)
    features = detector(torch.full((4, 3, 2, 2), 5, dtype=torch.uint8))
    assert features.dtype == torch.float32
    assert features.tolist() == [[10, 15]] * 4
    assert not features.requires_grad
    assert detector.num_features == 2
    assert spec.sha256 in detector.fingerprint


def test_weights_are_taken_from_the_cache_where_there_is_no_folder(tmp_path):
    content = saved(tmp_path / "elsewhere", {"factor": torch.tensor([2.0, 3.0])})
    place = tmp_path / "cache" / "example.org" / "a" / "tiny.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    assert load_detector("tiny", spec=spec_of(content)).net.factor.tolist() == [2, 3]


def test_missing_weights_are_named_with_their_address_and_place(tmp_path):
    with pytest.raises(ValueError) as caught:
        load_detector("tiny", spec=spec_of(b"x"))
    message = str(caught.value)
    assert "\n" not in message
    for part in ("tiny needs tiny.pth", "https://example.org/a/tiny.pth", str(tmp_path / "cache"), "--weights-dir"):
        assert part in message


def test_published_weights_are_named_too():
    for metric in ("fid", "fd_dinov2"):
        with pytest.raises(ValueError) as caught:
            load_detector(metric)
        assert DETECTORS[metric].weights.url in str(caught.value)


def test_other_bytes_than_the_pinned_are_refused(tmp_path):
    spec = spec_of(saved(tmp_path, {"factor": torch.ones(2)}))
    saved(tmp_path, {"factor": torch.zeros(2)})
    with pytest.raises(ValueError, match="sha256"):
        load_detector("tiny", weights_dir=tmp_path, spec=spec)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({}, "factor is missing"),
        ({"factor": torch.ones(2), "more": torch.ones(1)}, "more is unexpected"),
        ({"factor": torch.ones(3)}, r"factor has shape \[3\], expected \[2\]"),
        ([1, 2], "not a state dict"),
        ({"factor": 1.0}, "not a state dict"),
        (pytest, "not a PyTorch state dict"),
    ],
    ids=["missing", "unexpected", "shape", "list", "number", "object"],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, state, reason):
    if state is pytest:  # anything but tensors and plain containers
        state = {"factor": WeightFile("a", "b")}
    spec = spec_of(saved(tmp_path, state))
    with pytest.raises(ValueError, match=reason) as caught:
        load_detector("tiny", weights_dir=tmp_path, spec=spec)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_detector("fid", weights_dir=tmp_path / "nowhere")


def test_an_unknown_metric_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean fd_dinov2"):
        load_detector("fd_dino2")
    with pytest.raises(ValueError, match="available metrics: fid, fd_dinov2, fd_random"):
        check_names(["fid", "xyz"])


def test_the_manifest_of_downloads_pins_the_same_hashes():
    for spec in DETECTORS.values():
        if isinstance(spec.weights, WeightFile):
            assert pinned(spec.weights.url).sha256 == spec.sha256 == spec.weights.sha256


def test_fingerprints_tell_weights_and_preprocessing_apart():
    spec = spec_of(b"x")
    others = [dataclasses.replace(spec, sha256="0"), dataclasses.replace(spec, preprocessing="some")]
    assert len({one.fingerprint for one in [spec, *others, *DETECTORS.values()]}) == 3 + len(DETECTORS)


def test_registered_sizes_are_those_of_the_networks():
    assert isinstance(load_detector("fd_random"), Detector)
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for metric in ("fid", "fd_random"):
        assert DETECTORS[metric].build()(images).shape == (1, DETECTORS[metric].num_features)
    with torch.device("meta"):
        assert DETECTORS["fd_dinov2"].build().norm.weight.shape == (DETECTORS["fd_dinov2"].num_features,)


def test_a_registered_detector_is_loaded_by_name_and_its_name_not_given_twice(monkeypatch):
    monkeypatch.setattr(registry, "DETECTORS", dict(registry.DETECTORS))
    spec = DetectorSpec(Tiny, num_features=2, sha256="0" * 64, preprocessing="none")
    registry.register_detector("fd_tiny", spec)
    registry.register_detector("fd_tiny", spec)
    assert load_detector("fd_tiny")(torch.full([1, 3, 2, 2], 7, dtype=torch.uint8)).tolist() == [[7, 7]]
    with pytest.raises(ValueError, match="'fid' exists already"):
        registry.register_detector("fid", spec)
