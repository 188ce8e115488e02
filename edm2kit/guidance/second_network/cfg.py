"""Classifier-free guidance by one network that was also trained without labels."""

from edm2kit.denoiser import Denoiser
from edm2kit.guidance.attention_blocks import network_of
from edm2kit.guidance.base import Method, Parts
from edm2kit.guidance.network_call import Call, Perturbed


def without_label(call: Call) -> Call:
    """The call with empty labels: all zeros."""
    if call.labels is None:
        raise ValueError("classifier-free guidance leads away from having no label, and none was given to begin with")
    return call._replace(labels=call.labels.new_zeros(call.labels.shape))


def unconditional(net: Denoiser) -> Perturbed:
    """The conditional network `net` without its labels. Raises ValueError for one that has no classes."""
    if network_of(net).label_dim == 0:
        raise ValueError("classifier-free guidance by one network needs one with classes, and this one has none")
    return Perturbed(net, without_label)


def _negative(parts: Parts) -> Denoiser:
    return unconditional(parts.net)


METHOD = Method(
    "classifier-free guidance by the network itself, trained with train.py --label-dropout",
    "2 main",
    negative=_negative,
    needs_empty_labels=True,
    term="D(x; sigma, 0)",
    source="Ho & Salimans 2022 (arXiv 2207.12598)",
)
