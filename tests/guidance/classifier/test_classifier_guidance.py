import math

import pytest
import torch

from edm2kit.conditions import FloatVectors
from edm2kit.guidance.classifier.classifier_guidance import ClassifierGuided
from edm2kit.guidance.classifier.noise_classifier import ClassifierHeader, NoiseClassifier, save_classifier
from edm2kit.guidance.option_types import existing_file
from edm2kit.guidance.registry import METHODS, Choice, Parts, guide
from edm2kit.sampling.solvers import edm_sampler
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import Constant, Counting, Following, Mixture, column

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn([4, 2, 3, 3], generator=GENERATOR, dtype=torch.float64)
SIGMA = torch.tensor([0.1, 0.5, 2.0, 30.0], dtype=torch.float64)
MEANS, VARIANCE = torch.randn([3, 2, 3, 3], generator=GENERATOR, dtype=torch.float64), 0.2
MIXTURE = Mixture(MEANS, VARIANCE)
LABELS = torch.eye(3)[[0, 2, 1, 1]]


def exact_logits(x, sigma):
    """Of the mixture's components, equally likely."""
    total = VARIANCE + column(sigma, x).flatten(1) ** 2
    return -((x[:, None] - MEANS.to(x)) ** 2).flatten(2).sum(2) / (2 * total)


def conditional(x, sigma, labels):
    """The exact denoiser of each image's own component."""
    s2 = column(sigma, x) ** 2
    return (VARIANCE * x + s2 * MEANS[labels.argmax(1)]) / (VARIANCE + s2)


def never(x, sigma):
    raise AssertionError("the classifier was called")


def test_scale_0_is_off_bitwise_and_calls_no_classifier():
    off = ClassifierGuided(MIXTURE, never, 0.0)
    assert torch.equal(edm_sampler(off, X, num_steps=4), edm_sampler(MIXTURE, X, num_steps=4))
    assert torch.equal(off(X, SIGMA), MIXTURE(X, SIGMA))


def test_c4_with_exact_networks_it_is_the_conditional_denoiser():
    def unconditional(x, sigma, labels):
        return MIXTURE(x, sigma)

    guided = ClassifierGuided(unconditional, exact_logits, 1.0)
    torch.testing.assert_close(guided(X, SIGMA, LABELS), conditional(X, SIGMA, LABELS), rtol=1e-12, atol=1e-12)


def test_the_answer_is_affine_in_the_scale():
    D = [ClassifierGuided(MIXTURE, exact_logits, scale, 1)(X, SIGMA) for scale in (-1.0, 0.5, 2.0)]
    torch.testing.assert_close(D[0] - 2 * D[1] + D[2], torch.zeros_like(X), atol=1e-11, rtol=0)
    assert (D[1] - D[0]).abs().max() > 0.1


def test_an_image_does_not_depend_on_its_batch():
    guided = ClassifierGuided(MIXTURE, exact_logits, 2.0, 1)
    torch.testing.assert_close(guided(X[1:2], SIGMA[1:2]), guided(X, SIGMA)[1:2])


def test_an_evaluation_is_one_call_of_each():
    denoiser, classified = Counting(MIXTURE), []

    def noted(x, sigma):
        classified.append(sigma)
        return exact_logits(x, sigma)

    edm_sampler(ClassifierGuided(denoiser, noted, 2.0, 1), X)
    assert (len(denoiser.calls), len(classified)) == (63, 63)


def test_all_images_can_be_led_to_one_class():
    x = edm_sampler(ClassifierGuided(MIXTURE, exact_logits, 1.0, 2), X, dtype=torch.float64)
    assert exact_logits(x, 0.1).argmax(1).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("labels", "target", "wrong"),
    [
        (None, None, "choose one to guide towards"),
        (torch.zeros(4, 0), None, "choose one to guide towards"),
        (FloatVectors(LABELS), None, "the labels are vectors; choose a class to guide towards"),
        (torch.eye(4), None, "the network has 4 classes, the classifier 3"),
        (LABELS, 3, "class 3 is out of range; the classifier has classes 0 to 2"),
    ],
)
def test_classes_that_do_not_fit_are_refused(labels, target, wrong):
    with pytest.raises(ValueError, match=wrong):
        ClassifierGuided(lambda x, s, l: x, exact_logits, 1.0, target)(X, SIGMA, labels)


def test_a_scale_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="expected a finite number"):
        ClassifierGuided(MIXTURE, exact_logits, math.nan)


def test_what_it_wraps_follows_the_run():
    inner = Following(Constant(0.0))
    guided = ClassifierGuided(inner, exact_logits, 2.0, 0).scaled(0.5)
    assert guided.scale == 1.0
    edm_sampler(guided.for_images(StackedGenerator("cpu", range(4))), X, num_steps=1)
    assert inner.heard == [("for_images", 4), ("for_step", 0), ("call", 0), ("after_step", 0)]


def test_from_the_registry_it_takes_a_file_and_goes_around_other_methods(tmp_path):
    with torch.random.fork_rng(devices=[]):
        net = NoiseClassifier(4, 2, 3, width=8, levels=2)
    architecture = {"img_resolution": 4, "img_channels": 2, "num_classes": 3, "width": 8, "levels": 2}
    save_classifier(tmp_path / "c.safetensors", net, ClassifierHeader(architecture, 0))
    options = {"classifier_file": existing_file(str(tmp_path / "c.safetensors")), "classifier_class": None}
    x, sigma = torch.randn([3, 2, 4, 4], generator=GENERATOR), torch.tensor(0.7)
    denoiser = guide(Choice("classifier", 3.0, options=options), Parts(Constant(0.5)))
    expected = ClassifierGuided(Constant(0.5), net, 2.0)(x, sigma, LABELS[:3])
    torch.testing.assert_close(denoiser(x, sigma, LABELS[:3]), expected)
    assert (expected - 0.5).abs().max() > 1e-3
    off = guide(Choice("classifier", 1.0, options=options), Parts(Constant(0.5)))
    assert torch.equal(off(x, sigma, LABELS[:3]), Constant(0.5)(x, sigma))
    assert METHODS["classifier"].around


def test_classes_of_other_names_are_refused_unless_one_of_the_classifiers_is_chosen(tmp_path):
    with torch.random.fork_rng(devices=[]):
        net = NoiseClassifier(4, 2, 3, width=8, levels=2)
    architecture = {"img_resolution": 4, "img_channels": 2, "num_classes": 3, "width": 8, "levels": 2}
    save_classifier(tmp_path / "c.safetensors", net, ClassifierHeader(architecture, 0, ("cat", "bee", "ape")))
    file = existing_file(str(tmp_path / "c.safetensors"))
    main = Constant(0.5)
    object.__setattr__(main, "label_names", ("ape", "bee", "cat"))  # as a network from a snapshot has them

    def build(of_classifier, also=()):
        options = {"classifier_file": file, "classifier_class": of_classifier}
        return guide(Choice("classifier", 2.0, options=options, also=also), Parts(main))

    for also in ((), (("truncation", 1.5),)):
        with pytest.raises(ValueError, match="other names or another order than the network's"):
            build(None, also)
        build(1, also)
    object.__setattr__(main, "label_names", ("cat", "bee", "ape"))
    build(None)


def test_without_a_file_it_is_refused():
    options = {"classifier_file": None, "classifier_class": None}
    with pytest.raises(ValueError, match=r"needs a classifier .*; train one"):
        guide(Choice("classifier", 2.0, options=options), Parts(Constant(0.5)))
