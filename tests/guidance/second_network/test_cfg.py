import pytest
import torch

from edm2kit.guidance.registry import Choice, Parts, guide
from edm2kit.sampling.solvers import edm_sampler
from tests.support import golden
from tests.support.fakes import Constant, Flat, Mixture

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def golden_net():
    arrays = golden.load("network_cond.npz")
    return golden.network("cond", golden.part(arrays, "state/")).requires_grad_(False), arrays


def test_the_negative_is_the_network_without_labels(golden_net):
    net, arrays = golden_net
    D_neg = guide(Choice("cfg", 0.0), Parts(net))(arrays["x"], arrays["sigma"], arrays["labels"])
    golden.assert_close(D_neg, arrays["D_no_label"], 1e-5)


def joint(means, variance):
    """The exact denoiser of a mixture: of a component with its label, of the whole without."""

    def denoise(x, sigma, labels):
        empty = labels.sum(dim=1, keepdim=True) == 0
        return Mixture(means, variance)(x, sigma, torch.where(empty, torch.ones_like(labels), labels))

    return Flat(denoise, label_dim=len(means))


def test_c4_what_guides_is_the_gradient_of_the_label_s_likelihood():
    means = torch.randn([3, 1, 2, 2], generator=GENERATOR, dtype=torch.float64)
    x = torch.randn([3, 1, 2, 2], generator=GENERATOR, dtype=torch.float64, requires_grad=True)
    sigma, v, labels = torch.tensor(0.8, dtype=torch.float64), 0.2, torch.eye(3, dtype=torch.float64)
    log_p = -((x[:, None] - means) ** 2).flatten(2).sum(2) / (2 * (v + sigma**2))
    (gradient,) = torch.autograd.grad(log_p.log_softmax(dim=1).diagonal().sum(), x)
    net = joint(means, v)
    with torch.no_grad():
        D = [guide(Choice("cfg", w), Parts(net))(x, sigma, labels) for w in (1.0, 3.0)]
    torch.testing.assert_close(D[1] - D[0], 2 * sigma**2 * gradient, atol=1e-12, rtol=1e-10)


def test_weight_1_is_off_bitwise(golden_net):
    net, arrays = golden_net
    off = guide(Choice("cfg", 1.0), Parts(net))
    sampled = edm_sampler(off, arrays["x"], arrays["labels"], num_steps=2)
    assert torch.equal(sampled, edm_sampler(net, arrays["x"], arrays["labels"], num_steps=2))


def test_without_labels_to_drop_it_is_refused(golden_net):
    net, arrays = golden_net
    with pytest.raises(ValueError, match="the images have none"):
        guide(Choice("cfg", 2.0), Parts(net))(arrays["x"], arrays["sigma"], None)
    with pytest.raises(ValueError, match="this one has no classes"):
        guide(Choice("cfg", 2.0), Parts(Flat(Constant(0.0))))
