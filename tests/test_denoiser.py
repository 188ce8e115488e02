"""The base class of everything made of parts: what one part learns, all parts learn."""

from dataclasses import dataclass, field

import pytest
import torch

from edm2kit.denoiser import Denoiser, Wrapper, after_step, for_images, for_step
from edm2kit.torch_utils.rng import StackedGenerator


@dataclass(frozen=True)
class Part:
    """Notes what it hears in a list that its copies share; moves x by `move` after each step."""

    heard: list = field(default_factory=list)
    move: float = 0.0

    def __call__(self, x, sigma, condition=None):
        return x

    def for_images(self, rng):
        self.heard.append(("images", len(rng)))
        return Part(self.heard, self.move)

    def for_step(self, i, sigmas):
        self.heard.append(("step", i))
        return Part(self.heard, self.move)

    def after_step(self, x, i, sigmas):
        self.heard.append(("after", i))
        return x + self.move


@dataclass(frozen=True)
class Pair(Wrapper):
    first: Denoiser
    others: tuple[Denoiser, ...]
    weight: float = 1.0
    table: torch.Tensor = field(default_factory=lambda: torch.zeros(2))

    def idle_fields(self):
        return frozenset({"others"}) if self.weight == 1 else frozenset()

    def __call__(self, x, sigma, condition=None):
        return x


RNG, SIGMAS = StackedGenerator("cpu", [0, 1]), torch.tensor([2.0, 1.0, 0.0])


def test_all_parts_follow_and_other_fields_stay():
    first, second, third = Part(), Part(), Part()
    pair = Pair(first, (second, third), weight=2.0)
    followed = for_step(for_images(pair, RNG), 1, SIGMAS)
    assert first.heard == second.heard == third.heard == [("images", 2), ("step", 1)]
    assert isinstance(followed, Pair)
    assert followed.first is not first
    assert followed.weight == 2.0
    assert followed.table is pair.table


def test_what_moves_x_after_a_step_does_so_through_any_number_of_wrappers():
    pair = Pair(Part(move=1.0), (Part(move=10.0), lambda *call: None), weight=2.0)
    assert after_step(Pair(pair, (), weight=2.0), torch.zeros(1), 0, SIGMAS).item() == 11.0


def test_idle_parts_hear_nothing():
    idle = Part(move=5.0)
    pair = Pair(Part(), (idle,), weight=1.0)
    followed = for_step(for_images(pair, RNG), 0, SIGMAS)
    assert idle.heard == []
    assert after_step(followed, torch.zeros(1), 0, SIGMAS).item() == 0


@pytest.mark.parametrize("part", [3, None, torch.relu, "text"])
def test_things_without_the_methods_pass_through(part):
    assert for_images(part, RNG) is part
    assert for_step(part, 0, SIGMAS) is part
    assert after_step(part, SIGMAS, 0, SIGMAS) is SIGMAS
