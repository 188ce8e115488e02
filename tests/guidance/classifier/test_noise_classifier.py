import json

import pytest
import torch
from safetensors.torch import save_file

from edm2kit.guidance.classifier.noise_classifier import (
    ClassifierHeader,
    NoiseClassifier,
    load_classifier,
    save_classifier,
)

ARCHITECTURE = {"img_resolution": 8, "img_channels": 3, "num_classes": 4, "width": 8, "levels": 3}
X = torch.randn([5, 3, 8, 8], generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NoiseClassifier(**ARCHITECTURE)


def test_logits_depend_on_the_image_and_on_the_noise_level_and_not_on_the_batch(net):
    logits = net(X, torch.tensor([0.1, 0.1, 1.0, 10.0, 80.0]))
    assert logits.shape == (5, 4)
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    assert (net(X[:1], 0.1) - net(X[:1], 10.0)).abs().max() > 1e-3
    torch.testing.assert_close(net(X[1:2], 0.1), logits[1:2])


def test_it_stays_finite_at_every_noise_level(net):
    for sigma in (0.002, 1.0, 80.0):
        assert net(sigma * X, sigma).isfinite().all()


def test_written_and_read_back_it_is_the_same(net, tmp_path):
    path = tmp_path / "c.safetensors"
    header = ClassifierHeader(ARCHITECTURE, 1000, ("a", "b", "c", "d"), {"lr": 0.1})
    save_classifier(path, net, header)
    loaded = load_classifier(path)
    assert loaded.header == header
    assert torch.equal(loaded.net(X, 0.5), net(X, 0.5))
    assert not any(parameter.requires_grad for parameter in loaded.net.parameters())


def test_other_files_are_refused_with_a_reason(net, tmp_path):
    path = tmp_path / "c.safetensors"
    save_classifier(path, net, ClassifierHeader(ARCHITECTURE, 0))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a complete classifier"):
        load_classifier(path)
    with pytest.raises(ValueError, match="not a complete classifier"):
        load_classifier(tmp_path / "missing")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="is damaged: its weights do not match their checksums"):
        load_classifier(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="but not a classifier"):
        load_classifier(path)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"format_version": 9}, "newer than 1; update this code"),
        ({"architecture": {**ARCHITECTURE, "width": 16}}, "does not fit"),
        ({"architecture": {**ARCHITECTURE, "depth": 16}}, "does not fit"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(net, tmp_path, change, wrong):
    path = tmp_path / "c.safetensors"
    values = {"architecture": ARCHITECTURE, "nimg": 0, "label_names": None, "format_version": 1, **change}
    save_file(net.state_dict(), path, {"edm2_classifier": json.dumps(values)})
    with pytest.raises(ValueError, match=wrong):
        load_classifier(path)


def test_sizes_that_do_not_fit_are_refused(net):
    with pytest.raises(ValueError, match="a multiple of 8"):
        NoiseClassifier(8, 3, 4, width=12)
    with pytest.raises(ValueError, match="the resolution a multiple of 16"):
        NoiseClassifier(8, 3, 4, width=8, levels=5)
    with pytest.raises(ValueError, match=r"takes images of shape \[3, 8, 8\], not \[1, 8, 8\]"):
        net(X[:, :1], 1.0)


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    net = NoiseClassifier(**ARCHITECTURE)
    with torch.no_grad():
        net.head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the weights head\.weight are not finite; try a smaller --lr"):
        save_classifier(tmp_path / "c.safetensors", net, ClassifierHeader(ARCHITECTURE, 0))
    assert list(tmp_path.iterdir()) == []


def test_levels_beyond_any_image_are_refused_before_numbers_of_a_billion_digits():
    with pytest.raises(ValueError, match="a classifier of 1000000000 levels; expected 1 to 16"):
        NoiseClassifier(**{**ARCHITECTURE, "levels": 1_000_000_000})
