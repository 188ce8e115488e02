"""Independent-condition guidance (ICG): away from the answer to a random condition, unrelated to the image."""

import math
from dataclasses import dataclass, field

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
    """The change to a random condition for each image and step: another class, all equally likely, or Gaussian numbers.

    Gaussian labels have the magnitude of one-hot ones. If there is a single class, nothing changes.
    """

    kind: str = "class"
    random: StepGenerators = field(default_factory=StepGenerators)

    def __call__(self, call: NetworkCall) -> NetworkCall:
        if call.condition is None:
            raise ValueError("independent-condition guidance replaces the condition, and the images have none")
        generators = self.random.generators()
        if self.kind == "gaussian":
            return call._replace(condition=gaussian_condition(call.condition, generators))
        # the image's own class would leave it unguided
        return call._replace(condition=other_conditions(call.condition, generators, include_own=False))


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


def _negative(parts: Parts, *, icg_kind: str) -> Denoiser:
    if getattr(parts.net, "label_dim", None) == 0:
        raise ValueError(
            "independent-condition guidance needs a conditional network, and this one has no classes. "
            "Choose another guidance method"
        )
    return Perturbed(parts.net, RandomCondition(icg_kind))


METHOD = Method(
    "independent-condition guidance (ICG): away from a random condition",
    "2 main",
    negative=_negative,
    options=(
        Option("icg-kind", one_of(*KINDS), "class", "Random condition: class (another class) or gaussian (numbers)"),
    ),
    term="D(x; sigma, random c)",
    source="Sadat et al. 2024 (arXiv 2407.02687)",
    pick_when="you want classifier-free guidance from a network that was trained without label dropout",
)
