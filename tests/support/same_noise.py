"""Random numbers that are the same on a CPU and on a GPU."""

from collections.abc import Sequence

import torch

from edm2kit.torch_utils.rng import StackedGenerator


class FromCPU(StackedGenerator):
    """Takes the place of a StackedGenerator on `device`; the numbers are drawn on the CPU, then copied to it."""

    def __init__(self, device: torch.device | str, seeds: Sequence[int]):
        super().__init__("cpu", seeds)
        self.target = torch.device(device)

    def randn(self, *arguments, **settings):
        return super().randn(*arguments, **settings).to(self.target)

    def rand(self, *arguments, **settings):
        return super().rand(*arguments, **settings).to(self.target)

    def randint(self, *arguments, **settings):
        return super().randint(*arguments, **settings).to(self.target)
