"""Classifier-free guidance (CFG): away from the unconditional answer, of a second network or of the same one.

If a guide network is given, it is the unconditional one. Otherwise the main network is evaluated without its
condition, which only a network trained with label dropout can answer.
"""

from edm2kit.conditions import null_condition
from edm2kit.denoiser import Denoiser
from edm2kit.guidance.base import Method, Parts
from edm2kit.guidance.network_call import NetworkCall, Perturbed


def without_condition(call: NetworkCall) -> NetworkCall:
    """The call with the null condition (zeros for class labels). Raises ValueError if it has no condition."""
    if call.condition is None:
        raise ValueError("classifier-free guidance needs a condition to leave out, and the images have none")
    return call._replace(condition=null_condition(call.condition))


def unconditional(net: Denoiser) -> Perturbed:
    """`net` without its condition. Raises ValueError if the network has no classes."""
    if getattr(net, "label_dim", None) == 0:
        raise ValueError(
            "classifier-free guidance by one network needs a conditional network, and this one has no classes. "
            "Use another method, or give an unconditional guide network for a conditional one"
        )
    return Perturbed(net, without_condition)


def _negative(parts: Parts) -> Denoiser:
    if parts.gnet is None:
        return unconditional(parts.net)
    if getattr(parts.gnet, "label_dim", 0) != 0:
        raise ValueError(
            "classifier-free guidance needs an unconditional guide network, and this one has classes. "
            "Use autoguidance for a weaker conditional network, or leave out the guide network"
        )
    return parts.gnet


METHOD = Method(
    "classifier-free guidance: away from an unconditional network, or from the network itself without its condition",
    "2 main, or 1 main + 1 guide",
    negative=_negative,
    takes_gnet=True,
    drops_condition=lambda parts: parts.gnet is None,
    term="D_guide(x; sigma), or D(x; sigma, 0)",
    source="Ho & Salimans 2022 (arXiv 2207.12598)",
    pick_when="images should match their condition better, at the price of variety; the most widely used method",
)
