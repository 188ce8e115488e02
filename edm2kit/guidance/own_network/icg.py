"""Independent-condition guidance: away from the answer to a label that has nothing to do with the image."""

import math
from dataclasses import dataclass, field, replace

import torch

from edm2kit.denoiser import Denoiser
from edm2kit.guidance.attention_blocks import network_of
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.network_call import Call, Perturbed
from edm2kit.guidance.option_types import one_of
from edm2kit.guidance.random_draws import Draws
from edm2kit.torch_utils.rng import StackedGenerator

KINDS = ("class", "gaussian")


@dataclass(frozen=True)
class RandomLabel:
    """The change to a label drawn for each image and step: another class, all equally likely, or Gaussian numbers.

    Gaussian labels have the magnitude of one-hot ones. With a single class there is no other, and no change.
    """

    kind: str = "class"
    draws: Draws = field(default_factory=Draws)

    def __call__(self, call: Call) -> Call:
        if call.labels is None:
            raise ValueError("independent-condition guidance replaces labels, and there are none")
        source, (n, classes) = self.draws.source(), call.labels.shape
        if self.kind == "gaussian":
            # entries of variance 1 / K: the RMS of a one-hot label
            return call._replace(labels=(source.randn([n, classes]) / math.sqrt(classes)).to(call.labels))
        given = call.labels.argmax(dim=1)
        if classes == 1:
            return call
        # uniform over the other classes; the class itself would leave an image unguided
        drawn = source.randint(classes - 1, size=[n]).to(given)
        other = torch.nn.functional.one_hot(drawn + (drawn >= given), classes)
        return call._replace(labels=other.to(call.labels.dtype))

    def for_images(self, rng: StackedGenerator) -> "RandomLabel":
        return replace(self, draws=self.draws.for_images(rng))

    def for_step(self, i: int, sigmas: torch.Tensor) -> "RandomLabel":
        return replace(self, draws=self.draws.for_step(i, sigmas))


def _negative(parts: Parts, *, icg_kind: str) -> Denoiser:
    if network_of(parts.net).label_dim == 0:
        raise ValueError("independent-condition guidance needs a network with classes, and this one has none")
    return Perturbed(parts.net, RandomLabel(icg_kind))


METHOD = Method(
    "independent-condition guidance: the label is drawn at random",
    "2 main",
    negative=_negative,
    options=(Option("icg-kind", one_of(*KINDS), "class", "label drawn: class (another one) or gaussian"),),
    term="D(x; sigma, random c)",
    source="Sadat et al. 2024 (arXiv 2407.02687)",
)
