"""Away from a second network: a weaker one, or one that knows no classes."""

from edm2kit.denoiser import Denoiser
from edm2kit.guidance.base import Method, Parts


def _negative(parts: Parts) -> Denoiser:
    assert parts.gnet is not None
    return parts.gnet


METHOD = Method(
    "away from a second network: a weaker one is autoguidance, an unconditional one classifier-free guidance",
    "1 main + 1 guide",
    negative=_negative,
    needs_gnet=True,
    term="D_guide(x; sigma, c)",
    source="Karras et al. 2024 (autoguidance, arXiv 2406.02507); Ho & Salimans 2022 (arXiv 2207.12598)",
)
