"""Classifier guidance: towards images that a classifier of noisy images takes for the class asked for."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from edm2kit.denoiser import Denoiser, after_step, for_images, for_step
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.classifier.noise_classifier import NoiseClassifier, load_classifier
from edm2kit.guidance.losses.loss_gradient import check_scale, column
from edm2kit.guidance.option_files import File, existing_file
from edm2kit.guidance.option_types import count
from edm2kit.torch_utils.rng import StackedGenerator

Classifier = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x, sigma) -> logits [N,K]


@dataclass(frozen=True)
class ClassifierGuided:
    """The denoiser D + scale * sigma^2 * (gradient by x of log p(class | x; sigma)).

    `classifier(x, sigma)` returns logits [N,K] of noisy images; the class is that of the labels, or `target` for all.
    With an unconditional denoiser, exact networks and scale 1 this is the conditional denoiser. Dhariwal & Nichol 2021
    (arXiv 2105.05233), Alg. 2. At scale 0 guidance is off, bit for bit, and the classifier is never called. Raises
    ValueError on a scale that is not finite, on labels of another number of classes, and without labels and `target`.
    """

    denoiser: Denoiser
    classifier: Classifier
    scale: float
    target: int | None = None

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        D = self.denoiser(x, sigma, labels)
        if self.scale == 0:
            return D
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            log_p = self.classifier(leaf, sigma).log_softmax(dim=1)
            chosen = log_p.gather(1, self._classes(log_p, labels)[:, None])
            gradient = torch.autograd.grad(chosen.sum(), leaf)[0]
        return D + self.scale * column(sigma, x) ** 2 * gradient

    def _classes(self, log_p: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        num_images, num_classes = log_p.shape
        if self.target is not None:
            if not 0 <= self.target < num_classes:
                raise ValueError(f"class {self.target} is out of range; the classifier knows 0 to {num_classes - 1}")
            return torch.full([num_images], self.target, device=log_p.device)
        if labels is None or labels.shape[1] == 0:
            raise ValueError("the network has no classes, so say which one to guide towards (--classifier-class)")
        if labels.shape[1] != num_classes:
            raise ValueError(f"the network has {labels.shape[1]} classes, the classifier {num_classes}")
        return labels.argmax(dim=1)

    def scaled(self, share: float) -> "ClassifierGuided":
        """The same, guided by `share` of the strength: 0 is off, 1 as it is."""
        return replace(self, scale=self.scale * share)

    def for_images(self, rng: StackedGenerator) -> "ClassifierGuided":
        return replace(self, denoiser=for_images(self.denoiser, rng))

    def for_step(self, i: int, sigmas: torch.Tensor) -> "ClassifierGuided":
        return replace(self, denoiser=for_step(self.denoiser, i, sigmas))

    def after_step(self, x: torch.Tensor, i: int, sigmas: torch.Tensor) -> torch.Tensor:
        return after_step(self.denoiser, x, i, sigmas)


@dataclass(frozen=True)
class _Loaded:
    """A classifier on whatever device the images are."""

    net: NoiseClassifier

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.net.to(x.device)(x, sigma)


def _build(
    parts: Parts, weight: float, *, classifier_file: File | None, classifier_class: int | None
) -> ClassifierGuided:
    if classifier_file is None:
        raise ValueError("classifier guidance needs a classifier; train one with scripts/train_classifier.py")
    net = load_classifier(classifier_file.path).net
    return ClassifierGuided(parts.net, _Loaded(net), weight - 1, classifier_class)


METHOD = Method(
    "towards the class by the gradient of a classifier of noisy images",
    "1 main + 1 classifier, back and forth",
    _build,
    around=True,
    options=(
        Option("classifier-file", existing_file, None, "a classifier made by scripts/train_classifier.py"),
        Option("classifier-class", count(0), None, "guide towards this class, not the one that is drawn"),
    ),
    formula="D + (w - 1) sigma^2 grad log p(c | x; sigma)",
    source="Dhariwal & Nichol 2021, arXiv 2105.05233",
)
