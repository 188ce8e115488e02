"""The two-class tree of the 2-D toy example.

Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself", Figures 1 and 2. Each class is a
binary tree of 127 branches, each branch a row of 8 Gaussians. Lengths and turns of the branches are data,
edm2kit/configs/toy_tree.json; everything else follows from them.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

DEPTHS = 7
GAUSSIANS_PER_BRANCH = 8
NUM_BRANCHES = 2**DEPTHS - 1
CLASSES = ("A", "B", "AB")

_DATA = Path(__file__).resolve().parents[2] / "configs" / "toy_tree.json"
_ROW = np.linspace(0.07, 0.93, GAUSSIANS_PER_BRANCH)  # positions of the Gaussians along their branch
_ELONGATION = 0.06  # standard deviation along the branch, in branch lengths
_THINNING = 0.8  # thickness of a branch over that of its parent


@dataclass(frozen=True)
class Branch:
    """One branch, before the plane is stretched: from `start` along `span`, both [2]."""

    start: np.ndarray
    span: np.ndarray
    depth: int


@dataclass(frozen=True)
class Components:
    """Gaussians as float64 arrays: weights `phi` [K] with sum 1, means `mu` [K,2], covariances `Sigma` [K,2,2].

    `branch` int64 [K] is the index of the branch of each Gaussian.
    """

    phi: np.ndarray
    mu: np.ndarray
    Sigma: np.ndarray
    branch: np.ndarray

    @property
    def branch_mass(self) -> np.ndarray:
        """Share of the distribution in each branch, float64, with sum 1."""
        return np.bincount(self.branch, self.phi)


def grow(twigs: list[list[float]]) -> list[Branch]:
    """The branches of one tree from their (length, turn in degrees), depth first: a branch, then its two subtrees."""
    rest = iter(twigs)
    branches: list[Branch] = []

    def add(start: np.ndarray, heading: float, depth: int) -> None:
        length, turn = next(rest)
        heading += math.radians(turn)
        branch = Branch(start, length * np.array([math.cos(heading), math.sin(heading)]), depth)
        branches.append(branch)
        if depth + 1 < DEPTHS:
            for _ in range(2):
                add(branch.start + branch.span, heading, depth + 1)

    add(np.zeros(2), 0.0, 0)
    return branches


@cache
def components(name: str) -> Components:
    """The mixture of class "A", class "B", or both together ("AB", weighted by their size; A's branches first).

    Raises ValueError for another name.
    """
    if name not in CLASSES:
        raise ValueError(f"class {name!r} is unknown; available: {', '.join(CLASSES)}")
    data = json.loads(_DATA.read_text(encoding="utf-8"))
    branches = [branch for tree in name for branch in grow(data["branches"][tree])]
    stretch, origin = np.array(data["stretch"]), np.array(data["origin"])
    # each level of the tree has half the mass per length of the level before it
    mass = np.array([np.hypot(*b.span) * 0.5**b.depth for b in branches]).repeat(GAUSSIANS_PER_BRANCH)
    mu = [b.start + _ROW[:, None] * b.span for b in branches]
    Sigma = []
    for b in branches:
        along = _ELONGATION * b.span
        normal = np.array([-b.span[1], b.span[0]])
        across = data["thickness"] * _THINNING**b.depth * normal / np.hypot(*b.span)
        Sigma.append(np.outer(along, along) + np.outer(across, across))
    return Components(
        phi=mass / mass.sum(),
        mu=origin + stretch * np.concatenate(mu),
        Sigma=(np.stack(Sigma) * np.outer(stretch, stretch)).repeat(GAUSSIANS_PER_BRANCH, axis=0),
        branch=np.arange(len(branches)).repeat(GAUSSIANS_PER_BRANCH),
    )
