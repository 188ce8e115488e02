"""Running power-function averages of any PyTorch module (Karras et al. 2023, Section 3)."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from edm2kit.ema.power_function import power_function_beta, std_to_exp


class PowerFunctionEMA:
    """Running power-function averages of a module's parameters, one per relative standard deviation. Eq. 127.

    `averages` holds a frozen copy of the module for each of `stds`. Buffers are copied, not averaged. Raises
    ValueError if a length is out of range.

    Example:

        ema = PowerFunctionEMA(net, stds=(0.05, 0.10))
        for nimg in range(batch_size, duration + 1, batch_size):
            train_step(net)
            ema.update(nimg, batch_size)
        net_for_sampling = ema.network(1)
    """

    def __init__(self, net: nn.Module, stds: Sequence[float] = (0.050, 0.100)):
        std_to_exp(stds)  # refuses impossible lengths now, not at the first update
        self.net, self.stds = net, tuple(stds)
        self.averages = [copy.deepcopy(net).eval().requires_grad_(False) for _ in self.stds]

    @torch.no_grad()
    def update(self, nimg: int, batch_size: int) -> None:
        """Add the current parameters: `nimg` images seen so far, `batch_size` of them since the last update."""
        parameters: list[torch.Tensor] = list(self.net.parameters())
        for std, average in zip(self.stds, self.averages, strict=True):
            beta = power_function_beta(std, t_next=nimg, t_delta=batch_size)
            averaged: list[torch.Tensor] = list(average.parameters())
            torch._foreach_lerp_(averaged, parameters, 1 - beta)
            for target, source in zip(average.buffers(), self.net.buffers(), strict=True):
                target.copy_(source)

    def weights(self, number: int) -> dict[str, torch.Tensor]:
        """The state dict of average `number`."""
        return self.averages[number].state_dict()

    def network(self, number: int) -> nn.Module:
        """Average `number` as a module to call."""
        return self.averages[number]

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """The state dict of every average, by its length in three decimals."""
        return {f"{std:.3f}": self.weights(number) for number, std in enumerate(self.stds)}

    def load_state_dict(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Restore the averages that `state_dict` returned; raises ValueError if the lengths differ."""
        names = [f"{std:.3f}" for std in self.stds]
        if sorted(state) != sorted(names):
            raise ValueError(f"the checkpoint holds EMA lengths {sorted(state)}; this run tracks {names}")
        for name, average in zip(names, self.averages, strict=True):
            average.load_state_dict(state[name])
