"""Detectors of the user's own in .pt2 files: used, identified, refused before any work."""

import json
import zipfile

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from edm2kit.metrics.detectors import registry
from edm2kit.metrics.detectors.exported import MAX_FEATURES, export_detector, exported_detector
from edm2kit.metrics.detectors.preprocess import Preprocessing
from edm2kit.metrics.detectors.registry import load_detector, register_detector
from edm2kit.metrics.scoring import measure_reference, score_images

PREPARED = Preprocessing(16, "bicubic", (0, 1), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Network(nn.Module):
    """Channel means of a convolution with batch normalisation: [N, 3, 16, 16] -> [N, 5]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 5, 3, stride=4), nn.BatchNorm2d(5)

    def forward(self, x):
        return self.norm(self.conv(x)).relu().mean(dim=(2, 3))


def images(seed=0, count=20):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, 12, 12), np.uint8))


def save(path, net, batch=None, entry=None):
    """A .pt2 as somebody writes it without this project; the batch is fixed if given."""
    shapes = None if batch else ({0: torch.export.Dim("batch")},)
    program = torch.export.export(net, (torch.zeros(batch or 3, 3, 16, 16),), dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={} if entry is None else {"preprocessing.json": entry})
    return path


def declare(path, **changes):
    content = {name: getattr(PREPARED, name) for name in Preprocessing.__dataclass_fields__}
    content = {name: list(value) if isinstance(value, tuple) else value for name, value in content.items()}
    path.with_suffix(".yaml").write_text(yaml.safe_dump({**content, **changes}))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "my.pt2"
    export_detector(Network(), path, PREPARED)
    return path


@pytest.fixture
def own(file):
    """The file as the detector "my", for one test."""
    register_detector("my", exported_detector(file))
    yield load_detector("my")
    del registry.DETECTORS["my"]


def test_features_are_those_of_the_network_after_its_preprocessing(own):
    expected = Network().eval()(PREPARED(images()))
    torch.testing.assert_close(own(images()), expected)
    assert own.num_features == 5
    assert own(images()[:1]).shape == (1, 5)  # a single image
    torch.testing.assert_close(own(images()[:, :1]), Network().eval()(PREPARED(images()[:, :1].expand(-1, 3, -1, -1))))


def test_scores_use_it_by_name(own):
    reference = measure_reference(images(0), ["my"])
    found = score_images(images(1), reference, ["my", "my.kid"], real=images(0))
    assert set(found) == {"my", "my.kid"}
    assert found["my"] > 0


def test_the_fingerprint_is_the_hash_of_the_file_and_the_preprocessing(file, tmp_path):
    spec = exported_detector(file)
    assert spec.sha256 == registry.sha256_of(file)
    assert str(PREPARED) in spec.fingerprint
    assert "not FID" in spec.caution
    other = declare(save(tmp_path / "other.pt2", Network().eval()))
    assert exported_detector(other).fingerprint != spec.fingerprint
    resized = exported_detector(declare(other, resize="bilinear"))
    assert resized.sha256 == exported_detector(declare(other)).sha256
    assert resized.fingerprint != exported_detector(declare(other)).fingerprint


def test_a_yaml_file_beside_it_declares_the_same(file, tmp_path):
    beside = exported_detector(declare(save(tmp_path / "a.pt2", Network().eval())))
    assert beside.preprocessing == exported_detector(file).preprocessing


def test_the_same_detector_may_be_registered_twice_but_no_other_under_its_name(own, file, tmp_path):
    register_detector("my", exported_detector(file))
    other = exported_detector(declare(save(tmp_path / "other.pt2", Network().eval()), size=16, mean=[0, 0, 0]))
    with pytest.raises(ValueError, match="'my' exists already"):
        register_detector("my", other)
    with pytest.raises(ValueError, match="'fid' exists already"):
        register_detector("fid", other)
    for name in ("a.b", "a@b", "a,b", "", "9x"):
        with pytest.raises(ValueError, match="cannot be the name"):
            register_detector(name, other)


def test_missing_and_wrong_preprocessing_is_refused(tmp_path):
    path = save(tmp_path / "a.pt2", Network().eval())
    with pytest.raises(ValueError, match=r"does not say how images are prepared\. Write .*a\.yaml with size, resize"):
        exported_detector(path)
    path.with_suffix(".yaml").write_text("size: [")
    with pytest.raises(ValueError, match=r"a\.yaml"):
        exported_detector(path)
    with pytest.raises(ValueError, match=r"a\.yaml: size is 'x'"):
        exported_detector(declare(path, size="x"))
    # a few lines of a thousand repetitions each stand for gigabytes
    path.with_suffix(".yaml").write_text("a: &a [1, 1]\nb: &b [*a, *a]\nsize: [*b, *b]\n")
    with pytest.raises(ValueError, match=r"a\.yaml: it repeats a part by its name \(\*name\); write the values out"):
        exported_detector(path)
    inside = save(tmp_path / "b.pt2", Network().eval(), entry=json.dumps({"size": 16}))
    with pytest.raises(ValueError, match=r"preprocessing\.json in .*b\.pt2: the preprocessing has size"):
        exported_detector(inside)
    with pytest.raises(ValueError, match="declares another; remove"):
        exported_detector(declare(inside))


class Wrong(nn.Module):
    """Returns what is asked for instead of features."""

    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, x):
        return self.result(x)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (lambda x: x * 1, r"float32 of shape \[3, 3, 16, 16\] for 3 images; expected floats of shape \[3, F\]"),
        (lambda x: x.flatten(1).T, r"shape \[768, 3\]"),
        (lambda x: x.mean(dim=(2, 3)).long(), "int64"),
        (lambda x: (x.mean(dim=(2, 3)), x * 1), "returns a tuple; expected one tensor"),
        (lambda x: x.mean(dim=(2, 3)) / 0 * 0, "not finite"),
        (lambda x: x.mean(dim=(2, 3)) - x.mean(dim=(0, 2, 3)), "rest of its batch changes; call .eval"),
        (lambda x: x.mean(dim=(2, 3)).repeat(1, MAX_FEATURES), f"expected 1 to {MAX_FEATURES}"),
    ],
    ids=["a map", "transposed", "integers", "two", "infinite", "dependent", "many"],
)
def test_wrong_outputs_are_refused_before_work(tmp_path, result, reason):
    with pytest.raises(ValueError, match=reason):
        exported_detector(declare(save(tmp_path / "a.pt2", Wrong(result))))


def test_a_network_in_training_mode_and_a_fixed_batch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rest of its batch changes"):
        exported_detector(declare(save(tmp_path / "a.pt2", Network().train())))
    with pytest.raises(ValueError, match=r"fails on 2 images of 16x16 pixels .*dynamic number"):
        exported_detector(declare(save(tmp_path / "b.pt2", Network().eval(), batch=3)))
    with pytest.raises(ValueError, match=r"fails on 3 images of 20x20 pixels"):
        exported_detector(declare(save(tmp_path / "c.pt2", Network().eval()), size=20))


def test_other_and_damaged_files_are_refused_in_one_line(tmp_path, file, capfd):
    (tmp_path / "text.pt2").write_text("no program")
    (tmp_path / "cut.pt2").write_bytes(file.read_bytes()[:3000])
    with zipfile.ZipFile(tmp_path / "zip.pt2", "w") as archive:
        archive.writestr("a.txt", "b")
    for name, reason in {
        "none.pt2": "no such file",
        "text.pt2": "is not a .pt2 file",
        "cut.pt2": "truncated",
        "zip.pt2": "cannot be loaded by torch",
    }.items():
        with pytest.raises(ValueError, match=reason) as caught:
            exported_detector(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
