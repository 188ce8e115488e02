"""Independent-condition guidance (ICG): away from the answer to a random condition, unrelated to the image.

Both evaluations have the same x and noise level, so combining D is the same as combining scores or noise predictions.
"""

import math
from dataclasses import dataclass, field

import torch

from edm2kit.conditions import ClassLabels, ConditionLike, FloatVectors, condition_tensor, other_conditions
from edm2kit.denoiser import Denoiser, Wrapper
from edm2kit.guidance.base import Method, Option, Parts
from edm2kit.guidance.network_call import NetworkCall, Perturbed
from edm2kit.guidance.option_types import one_of
from edm2kit.guidance.step_generators import StepGenerators
from edm2kit.torch_utils.rng import StackedGenerator

KINDS = ("class", "gaussian")


@dataclass(frozen=True)
class RandomCondition(Wrapper):
    """The change to a random condition for each image and step: a class, all equally likely, or Gaussian numbers.

    The paper draws from all K classes, so that 1 / K of the evaluations are unguided. Without `include_own` the image's
    own class is left out, which makes the guidance K / (K - 1) times as strong on average. Gaussian labels have the
    magnitude of one-hot ones. Raises ValueError if there is a single class, as nothing would change.
    """

    kind: str = "class"
    include_own: bool = True
    random: StepGenerators = field(default_factory=StepGenerators)

    def __call__(self, call: NetworkCall) -> NetworkCall:
        if call.condition is None:
            raise ValueError("independent-condition guidance replaces the condition, and the images have none")
        labels = call.condition.one_hot if isinstance(call.condition, ClassLabels) else call.condition
        if self.kind == "class" and isinstance(labels, torch.Tensor) and labels.shape[1] == 1:
            raise ValueError(
                "independent-condition guidance needs at least two classes to choose from, and there is one. "
                "Use --icg-kind gaussian or another guidance method"
            )
        generators = self.random.generators()
        if self.kind == "gaussian":
            return call._replace(condition=gaussian_condition(call.condition, generators))
        return call._replace(condition=other_conditions(call.condition, generators, self.include_own))


def gaussian_condition(condition: ConditionLike, generators: StackedGenerator) -> ConditionLike:
    """Gaussian numbers with the RMS of a one-hot label, in a condition of the same kind and shape."""
    given = condition_tensor(condition)
    assert given is not None
    n, size = given.shape
    values = (generators.randn([n, size]) / math.sqrt(size)).to(given)
    if isinstance(condition, ClassLabels):
        return ClassLabels(values)
    if isinstance(condition, FloatVectors):
        return FloatVectors(values, condition.pool)
    return values


def _negative(parts: Parts, *, icg_kind: str, icg_own: str) -> Denoiser:
    if getattr(parts.net, "label_dim", None) == 0:
        raise ValueError(
            "independent-condition guidance needs a conditional network, and this one has no classes. "
            "Choose another guidance method"
        )
    if icg_kind == "gaussian" and getattr(parts.net, "takes_text", False):
        raise ValueError("--icg-kind gaussian replaces class labels, and this network takes text; use --icg-kind class")
    return Perturbed(parts.net, RandomCondition(icg_kind, icg_own == "yes"))


METHOD = Method(
    "independent-condition guidance (ICG): away from a random condition",
    "2 main",
    negative=_negative,
    weight=1.25,  # EDM2-XS; 1.05 for EDM, 1.4 for DiT-XL/2
    options=(
        Option("icg-kind", one_of(*KINDS), "class", "Random condition: class (any class) or gaussian (numbers)"),
        Option(
            "icg-own",
            one_of("yes", "no"),
            "yes",
            "Whether the random class may be the image's own, as published; no: K / (K - 1) times as strong",
        ),
    ),
    term="D(x; sigma, random c)",
    source="Sadat et al. 2024 (arXiv 2407.02687)",
    pick_when="you want classifier-free guidance from a network that was trained without label dropout",
)
