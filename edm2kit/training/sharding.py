"""Adam's moments and the EMAs sharded over the ranks (ZeRO stage 1, Rajbhandari et al. 2019)."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from edm2kit.ema.power_function import PowerFunctionEMA
from edm2kit.torch_utils import dist


class ShardedAdam(ZeroRedundancyOptimizer):
    """Adam with its state sharded: each rank updates its own parameters, then all ranks exchange the new weights.

    Results are those of Adam, bit by bit. So is the state dict, so that a run can be resumed with or without sharding
    and on any number of ranks.
    """

    def __init__(self, parameters: Iterator[nn.Parameter], **arguments: Any):
        self.parameters = list(parameters)
        super().__init__(self.parameters, torch.optim.Adam, **arguments)
        ranks = dist.gather_objects(self.numbers())
        self.owners = {number: rank for rank, numbers in enumerate(ranks) for number in numbers}

    def numbers(self) -> list[int]:
        """Indices of the parameters that this rank owns, in the order of its local optimizer."""
        place = {id(parameter): number for number, parameter in enumerate(self.parameters)}
        return [place[id(parameter)] for parameter in self.optim.param_groups[0]["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Adam's complete state on rank 0, in host memory; no moments on other ranks. Every rank must call it."""
        own_scalars = {}
        for number in sorted(self.numbers()):
            own_scalars[number] = {key: value.cpu() for key, value in self._own(number).items() if value.ndim == 0}
        scalars: dict[int, dict[str, torch.Tensor]] = {}
        for part in dist.gather_on_rank0(own_scalars):
            scalars.update(part)
        state: dict[int, dict[str, Any]] = {}
        for number, parameter in enumerate(self.parameters):
            state[number] = dict(scalars.get(number, {}))
            for key in ("exp_avg", "exp_avg_sq"):
                state[number][key] = dist.send_to_rank0(self._own(number).get(key), self.owners[number], parameter)
        groups = torch.optim.Optimizer.state_dict(self)["param_groups"]
        return {"state": state if dist.rank() == 0 else {}, "param_groups": groups}

    def _own(self, number: int) -> dict[str, torch.Tensor]:
        return self.optim.state.get(self.parameters[number], {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's part of Adam's complete state."""
        numbers, (group,) = self.numbers(), state_dict["param_groups"]
        state = {local: state_dict["state"][number] for local, number in enumerate(numbers)}
        self.optim.load_state_dict({"state": state, "param_groups": [{**group, "params": list(range(len(numbers)))}]})
        self.param_groups[0].update({key: value for key, value in group.items() if key != "params"})


class OwnedParameters(nn.Module):
    """A view of some parameters of a network (not copies), under their names with / in place of dots."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]):
        super().__init__()
        for name, parameter in named:
            self.register_parameter(name.replace(".", "/"), parameter)


class ShardedEMA(PowerFunctionEMA):
    """EMAs sharded like the optimizer: each rank averages the parameters that its optimizer owns."""

    def __init__(self, net: nn.Module, optimizer: ShardedAdam, stds: Sequence[float]):
        self.whole, self.owners = net, optimizer.owners
        named = list(net.named_parameters())
        super().__init__(OwnedParameters([named[number] for number in sorted(optimizer.numbers())]), stds)

    def weights(self, number: int) -> dict[str, torch.Tensor]:
        """The state dict of an average on rank 0, in host memory; {} on other ranks. Every rank must call it."""
        own = dict(self.averages[number].named_parameters())
        state = self.whole.state_dict()  # for the buffers and the order of names
        for k, (name, parameter) in enumerate(self.whole.named_parameters()):
            state[name] = dist.send_to_rank0(own.get(name.replace(".", "/")), self.owners[k], parameter)
        return state if dist.rank() == 0 else {}

    @torch.no_grad()
    def network(self, number: int) -> nn.Module:
        """The complete average as a network, on every rank. Every rank must call it."""
        own, net = dict(self.averages[number].named_parameters()), copy.deepcopy(self.whole)
        for k, (name, parameter) in enumerate(net.named_parameters()):
            if self.owners[k] == dist.rank():
                parameter.copy_(own[name.replace(".", "/")])
            dist.broadcast_(parameter, self.owners[k])
        return net.eval().requires_grad_(False)

    def load_state_dict(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Take this rank's part of complete averages."""
        mine = [name for name, _ in self.averages[0].named_parameters()]
        super().load_state_dict(
            {std: {name: whole[name.replace("/", ".")] for name in mine} for std, whole in state.items()}
        )


def own_state(net: nn.Module, optimizer: ShardedAdam, ema: ShardedEMA, progress: Mapping[str, Any]) -> dict[str, Any]:
    """What this rank holds of the contents of a checkpoint, without communication: see `join_parts`."""
    moments = {number: dict(optimizer._own(number)) for number in optimizer.numbers()}
    groups = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]
    averages = {
        f"{std:.3f}": {name.replace("/", "."): tensor.detach() for name, tensor in average.named_parameters()}
        for std, average in zip(ema.stds, ema.averages, strict=True)
    }
    return {
        "net": net.state_dict(),
        "optimizer": {"state": moments, "param_groups": groups},
        "ema": averages,
        "progress": dict(progress),
    }
