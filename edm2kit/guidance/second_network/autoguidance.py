"""Autoguidance: away from a second network that is a weaker version of the first."""

from operator import attrgetter

from edm2kit.guidance.base import Method

METHOD = Method(
    "away from a weaker second network",
    "1 main + 1 guide",
    negative=attrgetter("gnet"),  # `guide` has checked that there is one
    needs_gnet=True,
    term="D_guide(x; sigma, c)",
    source="Karras et al. 2024 (autoguidance, arXiv 2406.02507)",
    pick_when="you have a smaller or less trained network of the same data; best image quality without less variety",
)
