"""Classifier guidance: towards images that a classifier of noisy images assigns to the class."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from edm2kit.conditions import ConditionLike, FloatVectors, condition_tensor
from edm2kit.denoiser import Denoiser, Wrapper
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.classifier.noise_classifier import load_classifier
from edm2kit.guidance.losses.gradient import column
from edm2kit.guidance.losses.score import check_scale
from edm2kit.guidance.option_types import File, count, existing_file

Classifier = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x, sigma) -> logits [N, K]


@dataclass(frozen=True)
class ClassifierGuided(Wrapper):
    """The denoiser D + scale * sigma^2 * (gradient by x of log p(class | x; sigma)).

    `classifier(x, sigma)` returns logits [N, K] of noisy images; the class is that of the labels, or `target` for all.
    With an unconditional denoiser, exact networks and scale 1 this is the conditional denoiser. Dhariwal & Nichol 2021
    (arXiv 2105.05233), Alg. 2. At scale 0 guidance is off, bit for bit, and the classifier is never called. Raises
    ValueError if the scale is not finite, if labels have another number of classes, and if there are neither labels nor
    a `target`.
    """

    denoiser: Denoiser
    classifier: Classifier
    scale: float
    target: int | None = None

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: ConditionLike = None) -> torch.Tensor:
        D = self.denoiser(x, sigma, condition)
        if self.scale == 0:
            return D
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            log_p = self.classifier(leaf, sigma).log_softmax(dim=1)
            chosen = log_p.gather(1, self._classes(log_p, condition)[:, None])
            gradient = torch.autograd.grad(chosen.sum(), leaf)[0]
        return D + self.scale * column(sigma, x) ** 2 * gradient

    def _classes(self, log_p: torch.Tensor, condition: ConditionLike) -> torch.Tensor:
        """The class of each image, int64 [N]."""
        num_images, num_classes = log_p.shape
        if self.target is not None:
            if not 0 <= self.target < num_classes:
                raise ValueError(
                    f"class {self.target} is out of range; the classifier has classes 0 to {num_classes - 1}"
                )
            return torch.full([num_images], self.target, device=log_p.device)
        if isinstance(condition, FloatVectors):
            raise ValueError("the labels are vectors; choose a class to guide towards (--classifier-class)")
        labels = condition_tensor(condition)
        if labels is None or labels.shape[1] == 0:
            raise ValueError("the network has no classes; choose one to guide towards (--classifier-class)")
        if labels.shape[1] != num_classes:
            raise ValueError(f"the network has {labels.shape[1]} classes, the classifier {num_classes}")
        return labels.argmax(dim=1)

    def scaled(self, share: float) -> "ClassifierGuided":
        """The same with `share` of the strength: 0 is off, 1 as it is."""
        return replace(self, scale=self.scale * share)


def _build(
    parts: Parts, weight: float, *, classifier_file: File | None, classifier_class: int | None
) -> ClassifierGuided:
    if classifier_file is None:
        raise ValueError(
            "classifier guidance needs a classifier (--classifier-file); train one with scripts/train_classifier.py"
        )
    loaded = load_classifier(classifier_file.path)
    net, names = loaded.net, (loaded.header.label_names, getattr(_main_network(parts.net), "label_names", None))
    if classifier_class is None and None not in names and names[0] != names[1]:
        raise ValueError(
            f"the classes of the classifier {classifier_file.path} have other names or another order than the "
            "network's; train it on the same classes, or choose one of its classes (--classifier-class)"
        )
    return ClassifierGuided(
        parts.net, lambda x, sigma: net.to(x.device)(x, sigma), scale=weight - 1, target=classifier_class
    )


def _main_network(denoiser: Any) -> Any:
    """The network that other methods of a combination are built on."""
    while hasattr(denoiser, "pos") or hasattr(denoiser, "guided"):
        denoiser = denoiser.pos if hasattr(denoiser, "pos") else denoiser.guided
    return denoiser


METHOD = Method(
    "classifier guidance: towards the class, by the gradient of a classifier of noisy images",
    "1 main + 1 classifier and its backward pass",
    _build,
    around=True,
    options=(
        Option("classifier-file", existing_file, None, "A classifier file from scripts/train_classifier.py; required"),
        Option(
            "classifier-class",
            count(0),
            None,
            "Index of the class to guide all images towards, from 0  [default: each image's own class]",
        ),
    ),
    formula="D + (w - 1) sigma^2 grad log p(c | x; sigma)",
    source="Dhariwal & Nichol 2021, arXiv 2105.05233",
    pick_when="the network is unconditional, or you want a class that it was not trained for",
)
