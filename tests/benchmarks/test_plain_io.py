"""What users get and the plain way of the benchmarks answer the same."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import plain_io
from benchmarks.plain_detectors import PlainDINOv2, PlainInception
from edm2kit.ema.rebuild import plan_outputs, write_outputs
from edm2kit.experiments.toy.mixture import Mixture
from edm2kit.experiments.toy.tree import components
from edm2kit.metrics.detectors.dinov2 import DINOv2ViT
from edm2kit.metrics.detectors.inception import InceptionV3
from edm2kit.metrics.frechet import frechet_distance
from edm2kit.metrics.moments import Moments
from edm2kit.snapshots.file_format import Header, read_header, save_snapshot
from edm2kit.snapshots.loading import load_snapshot, open_sources
from tests.support import inception_recipe
from tests.support.fakes import tiny_snapshot


def test_averages_in_one_pass_are_those_made_one_after_another(tmp_path):
    nets = [load_snapshot(tiny_snapshot(tmp_path / f"source{k}", seed=k)).net for k in range(5)]
    header, buffers = read_header(tmp_path / "source0"), dict(nets[0].named_buffers())
    for k in range(1, 5):
        for std in (0.05, 0.1):
            written = Header(header.architecture, header.encoder, k << 20, std, dtype="float16")
            state = {**nets[k].state_dict(), **buffers}
            save_snapshot(tmp_path / f"network-{k}-{std}.safetensors", state, written)
    inputs = open_sources([tmp_path], "network")
    outputs = plan_outputs(inputs, [0.06, 0.08], dtype="float32")
    write_outputs(inputs, outputs, [tmp_path / f"ours{k}" for k in range(2)])
    for k, output in enumerate(outputs):
        plain_io.posthoc_ema([w.path for w in inputs], output.coefficients, tmp_path / f"plain{k}")
        ours, plain = load_file(tmp_path / f"ours{k}"), load_file(tmp_path / f"plain{k}")
        assert ours.keys() == plain.keys()
        for name in plain:
            if ours[name].ndim > 1:  # the plain way stores numbers too small for half precision in it, too
                torch.testing.assert_close(ours[name], plain[name].float(), atol=2e-3, rtol=2e-3)


def test_a_network_is_the_same_after_saving_and_loading(tmp_path):
    snapshot = load_snapshot(tiny_snapshot(tmp_path / "ours"))
    plain_io.save_network(tmp_path / "plain", snapshot.net)
    found = plain_io.load_network(tmp_path / "plain", **snapshot.header.architecture).state_dict()
    for name, value in snapshot.net.state_dict().items():
        torch.testing.assert_close(found[name], value, atol=2e-2, rtol=1e-3)


def test_moments_and_distance():
    rng = np.random.default_rng(0)
    found = []
    for make in (Moments, plain_io.PlainMoments):
        moments = make(20)
        for rows in np.split(rng.standard_normal((100, 20)), 5):
            moments.add(torch.from_numpy(rows + 0.5).float())
        found.append(moments.mean_and_covariance()[-2:])
        rng = np.random.default_rng(0)
    for ours, plain in zip(*found, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-12, atol=1e-12)
    other = rng.standard_normal((50, 20)) * 2
    arguments = (*found[0], other.mean(0), np.cov(other, rowvar=False))
    assert frechet_distance(*arguments) == pytest.approx(plain_io.frechet_distance(*arguments), rel=1e-9)


def test_the_toys_score():
    parts = components("A")
    exact, plain = Mixture(parts), plain_io.EigenMixture(parts.phi, parts.mu, parts.Sigma)
    generator = torch.Generator().manual_seed(0)
    x, sigma = exact.sample(64, generator, 0.1), torch.rand(64, generator=generator) + 0.05
    torch.testing.assert_close(exact.score(x, sigma), plain.score(x, sigma), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("ours", "plain"),
    [(InceptionV3, PlainInception), (lambda: DINOv2ViT(16, 2, 2), lambda: PlainDINOv2(16, 2, 2))],
    ids=["inception", "dinov2"],
)
@torch.no_grad()
def test_detectors(ours, plain):
    torch.manual_seed(0)
    ours, plain = ours(), plain()
    if isinstance(ours, InceptionV3):
        ours.load_state_dict(inception_recipe.weights())  # with PyTorch's own the features vanish
    plain.load_state_dict(ours.state_dict())
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    features = ours(images)
    assert features.std() > 1e-3
    torch.testing.assert_close(plain(images), features, rtol=1e-5, atol=1e-5)
