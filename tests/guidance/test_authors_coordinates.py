"""Methods whose negative sees the same x: combining D is combining noise predictions, as their authors do.

Methods that combine predictions at different inputs have such tests of their own: test_sag.py, test_self_guidance.py
and those of losses/. Input noise is combined in D by its authors, which is tested here too.
"""

import math

import pytest
import torch

from edm2kit.denoiser import for_images, for_step
from edm2kit.guidance.attention_blocks import attend
from edm2kit.guidance.classifier.classifier_guidance import ClassifierGuided
from edm2kit.guidance.registry import METHODS, Choice, Parts, guide
from edm2kit.guidance.step_generators import StepGenerators
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support import authors
from tests.support.network64 import CLASSES, Network64

W, N = 1.7, 3
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn([N, 3, 16, 16], generator=GENERATOR, dtype=torch.float64)
LABELS = torch.eye(CLASSES, dtype=torch.float64)[[0, 3, 1]]
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


def without_blocks(x_vp, sigma, skipped):
    """`skipped` maps names of blocks to the images for which the block adds nothing; written with dropout."""
    return noise_of(x_vp, sigma, dropout=lambda block, y: y * ~skipped.get(block, torch.zeros(N, 1, 1).bool()))


def without_the_middle(x_vp, sigma):
    return without_blocks(x_vp, sigma, {"dec.8x8_in0": torch.ones(N, 1, 1).bool()})  # a third of the way through


def without_a_random_block(x_vp, sigma):
    # a tenth of three blocks is at least one: the one whose random number is the smallest
    lowest = random_numbers(sigma).rand([N, 3]).argmin(dim=1)
    return without_blocks(
        x_vp, sigma, {name: (lowest == k).reshape(-1, 1, 1) for k, name in enumerate(NET.attention_roles)}
    )


def shuffled_tokens(x_vp, sigma):
    orders = random_numbers(sigma).rand([N, 64]).argsort(dim=1)

    def shuffled(q, k, v):
        return attend(*(torch.stack([one[:, order] for one, order in zip(t, orders, strict=True)]) for t in (q, k, v)))

    return noise_of(x_vp, sigma, attention={"dec.8x8_block0": shuffled})


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
    "slg": without_the_middle,
    "s2": without_a_random_block,
    "tpg": shuffled_tokens,
}
ELSEWHERE = {"sag", "self-guidance", "sg-prev", "input-noise"}  # in tests of their own; the last one is below


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
    tested = {*SAME_INPUT, *ELSEWHERE}
    assert {name for name, method in METHODS.items() if method.negative is not None} == tested


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
