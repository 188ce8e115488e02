"""Methods whose negative sees the same x: combining D is combining noise predictions, as their authors do.

Methods that combine predictions at different inputs have such tests of their own: test_sag.py, test_self_guidance.py
and those of losses/. Input noise is combined in D by its authors, which is tested here too.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.attention_blocks import attend
from edm2kit.guidance.classifier.classifier_guidance import ClassifierGuided
from edm2kit.guidance.registry import METHODS, Choice, Parts, guide
from edm2kit.guidance.step_generators import StepGenerators
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support import authors, golden
from tests.support.fakes import CountingNetwork, Flat

W, N, CLASSES, WIDTH = 1.7, 3, 4, 6
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn([N, 3, 16, 16], generator=GENERATOR, dtype=torch.float64)
LABELS = torch.eye(CLASSES, dtype=torch.float64)[[0, 3, 1]]


@dataclass(frozen=True)
class Network64(Flat):
    """A network in float64 with an embedding, three blocks with attention, and dropout."""

    inner: torch.Generator
    label_dim: int = CLASSES

    def __post_init__(self):
        sizes = {
            "inwards": (3, WIDTH),
            "qkv": (3, 3, WIDTH, WIDTH),
            "labels": (CLASSES, WIDTH),
            "outwards": (WIDTH, 3),
        }
        weights = {name: torch.randn(shape, generator=self.inner, dtype=torch.float64) for name, shape in sizes.items()}
        object.__setattr__(self, "weights", weights)

    def __call__(self, x, sigma, labels=None, *, attention=None, embedding=None, dropout=None, return_attention=()):
        s = torch.as_tensor(sigma, dtype=torch.float64).expand(len(x)).reshape(-1, 1, 1, 1)
        emb = (s.log().reshape(-1, 1) * torch.arange(WIDTH) / 4).cos()
        if embedding is not None:
            emb = embedding(emb)
        emb = emb + (0 if labels is None else labels.double() @ self.weights["labels"])
        h = torch.nn.functional.avg_pool2d(x / (s**2 + 0.25).sqrt(), 2)
        tokens = h.flatten(2).transpose(1, 2) @ self.weights["inwards"]
        for k, name in enumerate(self.attention_roles):
            q, key, v = ((tokens @ weight)[:, None] for weight in self.weights["qkv"][k] / WIDTH)
            y = (attention or {}).get(name, attend)(q, key, v)[:, 0] * (1 + emb[:, None])
            tokens = tokens + (y if dropout is None else dropout(name, y))
        f = (tokens @ self.weights["outwards"]).transpose(1, 2).reshape(h.shape).tanh()
        f = torch.nn.functional.interpolate(f, x.shape[2:], mode="nearest")
        return 0.25 / (s**2 + 0.25) * x + 0.5 * s / (s**2 + 0.25).sqrt() * f


NET, GNET = Network64(GENERATOR), Network64(GENERATOR)


def levels(sigma):
    return torch.tensor([80.0, sigma, 0.002, 0.0], dtype=torch.float64)


def random_numbers(sigma):
    """The generators that a random method has in step 1 of a run, each time from the start."""
    return for_step(for_images(StepGenerators(), StackedGenerator("cpu", range(N))), 1, levels(sigma)).generators()


def noise_of(x_vp, sigma, labels=LABELS, net=NET, **edits):
    return authors.predicted_noise(net, x_vp, sigma, labels, **edits)


def windows(x_vp, sigma):
    size, total, coverage = 10, torch.zeros_like(x_vp), torch.zeros_like(x_vp)
    for top in (0, 6):
        for left in (0, 6):
            part = (slice(None), slice(None), slice(top, top + size), slice(left, left + size))
            total[part] += noise_of(x_vp[part], sigma)
            coverage[part] += 1
    return torch.where(coverage > 1, total / coverage, noise_of(x_vp, sigma))


def random_class(x_vp, sigma):
    drawn = random_numbers(sigma).randint(CLASSES, size=[N])
    return noise_of(x_vp, sigma, torch.eye(CLASSES)[drawn])


def noisy_time(x_vp, sigma):
    t, generators = math.log(sigma / 0.002) / math.log(80 / 0.002), random_numbers(sigma)
    return noise_of(x_vp, sigma, embedding=lambda emb: emb + 2.0 * t * generators.randn(emb.shape).to(emb))


def dropped(x_vp, sigma):
    generators = random_numbers(sigma)
    return noise_of(x_vp, sigma, dropout=lambda block, y: y * (generators.rand(y.shape) >= 0.1) / 0.9)


def without_labels(x_vp, sigma):
    return noise_of(x_vp, sigma, torch.zeros_like(LABELS))


def weaker(x_vp, sigma):
    return noise_of(x_vp, sigma, net=GNET)


def half_each(x_vp, sigma):
    return (without_labels(x_vp, sigma) + weaker(x_vp, sigma)) / 2


def identity_maps(x_vp, sigma):
    return noise_of(x_vp, sigma, attention=dict.fromkeys(("enc.8x8_block0", "dec.8x8_in0"), lambda q, k, v: v))


def mean_queries(x_vp, sigma):
    return noise_of(
        x_vp, sigma, attention={"dec.8x8_in0": lambda q, k, v: attend(q.mean(2, keepdim=True).expand_as(q), k, v)}
    )


def flatter_maps(x_vp, sigma):
    def flatter(q, k, v):
        return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3]) / 2.0).softmax(dim=3) @ v

    return noise_of(x_vp, sigma, attention=dict.fromkeys(("enc.8x8_block0", "dec.8x8_in0"), flatter))


# the noise that each method's negative predicts in a variance-preserving x, written without the method
SAME_INPUT = {
    "autoguidance": weaker,
    "cfg": without_labels,
    "cfg-plus-autoguidance": half_each,
    "truncation": lambda x_vp, sigma: torch.zeros_like(x_vp),
    "pag": identity_maps,
    "seg": mean_queries,
    "icg": random_class,
    "tsg": noisy_time,
    "sliding-window": windows,
    "erg": flatter_maps,
    "dropout": dropped,
}
ELSEWHERE = {"sag", "self-guidance", "sg-prev", "input-noise"}  # in tests of their own; the last one is below
CHANGED_INSIDE = {"slg", "s2", "tpg"}  # blocks skipped or shuffled, in networks that have such blocks


def guided_step(choice, sigma, sigma_next, x):
    parts = Parts(NET, GNET if METHODS[choice.method].needs_gnet else None)
    run = for_images(guide(choice, parts), StackedGenerator("cpu", range(N)))
    D = for_step(run, 1, levels(sigma))(x, torch.tensor(sigma, dtype=torch.float64), LABELS)
    return x + (sigma_next - sigma) / sigma * (x - D)


@pytest.mark.parametrize(("sigma", "sigma_next"), authors.STEPS)
@pytest.mark.parametrize("name", SAME_INPUT)
def test_a_step_is_that_of_combined_noise_predictions(name, sigma, sigma_next):
    x = sigma * X + 0.3
    x_vp = authors.to_vp(x, sigma)
    plain, negative = noise_of(x_vp, sigma), SAME_INPUT[name](x_vp, sigma)
    theirs = authors.ddim(x_vp, negative + W * (plain - negative), sigma, sigma_next)
    ours = guided_step(Choice(name, W), sigma, sigma_next, x)
    authors.assert_same_displacement(ours, theirs, x, sigma_next)
    unguided = authors.from_vp(authors.ddim(x_vp, plain, sigma, sigma_next), sigma_next)
    push, their_push = ours - unguided, authors.from_vp(theirs, sigma_next) - unguided
    assert their_push.norm() > 0
    torch.testing.assert_close(push / their_push.norm(), their_push / their_push.norm(), atol=1e-6, rtol=0)


def test_no_method_that_leads_away_from_something_is_left_out():
    tested = {*SAME_INPUT, *ELSEWHERE, *CHANGED_INSIDE}
    assert {name for name, method in METHODS.items() if method.negative is not None} == tested


@dataclass(frozen=True)
class Recording(CountingNetwork):
    """A network that also notes the x and noise levels of its evaluations."""

    inputs: list = field(default_factory=list)

    def __call__(self, x, sigma, labels=None, **edits):
        self.inputs.append((x, torch.as_tensor(sigma).expand(len(x))))
        return super().__call__(x, sigma, labels, **edits)


@pytest.mark.parametrize("name", sorted(CHANGED_INSIDE))
@pytest.mark.parametrize(("sigma", "sigma_next"), authors.STEPS)
def test_methods_that_change_the_network_inside_see_the_same_input(name, sigma, sigma_next):
    # so their noise predictions are affine in D with the same x and sigma, as in the steps above
    arrays = golden.load("network_cond.npz")
    net = Recording(golden.network("cond", golden.part(arrays, "state/")).requires_grad_(False))
    x = sigma * arrays["x"]
    run = for_images(guide(Choice(name, W), Parts(net)), StackedGenerator("cpu", range(N)))
    D = for_step(run, 1, levels(sigma))(x, torch.tensor(sigma), arrays["labels"])
    assert sum(net.images) == 2 * N
    for seen, level in net.inputs:
        assert torch.equal(seen, x.repeat(len(seen) // N, 1, 1, 1))
        assert (level == torch.tensor(sigma)).all()
    assert (D - net(x, torch.tensor(sigma), arrays["labels"])).abs().max() > 1e-6


@pytest.mark.parametrize(("sigma", "sigma_next"), authors.STEPS)
def test_input_noise_is_combined_in_the_denoised_image(sigma, sigma_next):
    # Karras et al. 2024, Eq. 3: D_0 + w (D_1 - D_0), both taken for denoisers of x at sigma, then dx/dsigma
    x, n = sigma * X + 0.3, random_numbers(sigma).randn_like(X)
    delta = 0.2
    level = torch.tensor(sigma, dtype=torch.float64)
    noisier = x + sigma * math.sqrt((1 + delta) ** 2 - 1) * n
    D_1, D_0 = NET(x, level, LABELS), NET(noisier, level * (1 + delta), LABELS)
    D = D_0 + W * (D_1 - D_0)
    theirs = x + (sigma_next - sigma) * (x - D) / sigma
    ours = guided_step(Choice("input-noise", W), sigma, sigma_next, x)
    authors.assert_same_displacement(ours, authors.to_vp(theirs, sigma_next), x, sigma_next)
    # combining the noise predictions at the two inputs would add the noise n itself to the image
    noise_1, noise_0 = (x - D_1) / sigma, (noisier - D_0) / (sigma * (1 + delta))
    other = x - sigma * (noise_0 + W * (noise_1 - noise_0))
    share = ((other - D) * n).sum() / (n * n).sum()
    added = sigma * (W - 1) * math.sqrt((1 + delta) ** 2 - 1) / (1 + delta)
    assert share.item() == pytest.approx(added, rel=0.25)


@pytest.mark.parametrize(("sigma", "sigma_next"), authors.STEPS)
def test_classifier_guidance_is_the_authors_ddim_step(sigma, sigma_next):
    # Dhariwal & Nichol 2021, Alg. 2: eps - scale sqrt(1 - a) (gradient by x of log p), all variance-preserving
    x, classes = sigma * X + 0.3, torch.tensor([0, 3, 1])
    pulls = torch.randn([CLASSES, *X.shape[1:]], generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def classifier(images, level):
        return torch.einsum("nchw,kchw->nk", images / (1 + sigma**2) ** 0.5, pulls)

    leaf = authors.to_vp(x, sigma).requires_grad_()
    log_p = classifier(authors.from_vp(leaf, sigma), sigma).log_softmax(dim=1)[range(N), classes]
    gradient = torch.autograd.grad(log_p.sum(), leaf)[0]
    x_vp = leaf.detach()
    noise = noise_of(x_vp, sigma) - 0.7 * (1 - authors.alpha_bar(sigma)).sqrt() * gradient
    theirs = authors.ddim(x_vp, noise, sigma, sigma_next)
    guided = ClassifierGuided(NET, classifier, 0.7)
    ours = x + (sigma_next - sigma) / sigma * (x - guided(x, torch.tensor(sigma, dtype=torch.float64), LABELS))
    authors.assert_same_displacement(ours, theirs, x, sigma_next)
    assert gradient.norm() > 0
