"""Autoguidance: away from a second network that is a weaker version of the first."""

from edm2kit.denoiser import Denoiser
from edm2kit.guidance.base import Method, Parts


def guide_network(parts: Parts) -> Denoiser:
    """The guide network. Raises ValueError if none was given."""
    if parts.gnet is None:
        raise ValueError("autoguidance needs a guide network: give --gnet, or Parts(net, gnet)")
    return parts.gnet


METHOD = Method(
    "away from a weaker second network",
    "1 main + 1 guide",
    negative=guide_network,
    needs_gnet=True,
    term="D_guide(x; sigma, c)",
    source="Karras et al. 2024 (autoguidance, arXiv 2406.02507)",
    pick_when="you have a smaller or less trained network of the same data; best image quality without less variety",
)
