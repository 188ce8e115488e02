"""Post-hoc EMA for anyone's training loop: averages of any parameters, snapshots of them, and putting them back."""

import contextlib
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edm2kit.ema.power_function import std_to_exp
from edm2kit.snapshots.file_format import Header, read_header, read_tensors, save_snapshot
from edm2kit.torch_utils import dist

KIND = "parameters"  # the network kind in the headers of these snapshots: named tensors, whatever they belong to


class PowerEMA:
    """Power-function averages of a training's parameters, for post-hoc EMA of any length. Karras et al. 2023, Eq. 127.

    - `parameters`: a module, of which those that require gradients are averaged (with a LoRA, the LoRA alone); or
      tensors by name, or a list of tensors. Sharded parameters of FSDP2 (`fully_shard`) stay sharded.
    - `stds`: relative standard deviations of the profiles, in (0, 0.2886]; two of them are enough to rebuild others.
    - `device`: where the averages are, by default beside each parameter. They are float32 at least.
    - `run_id`: the same for all snapshots of a training; made up unless given.

    `update(time)` may come after any number of steps: the profile spans the time since the last update. Raises
    ValueError if a length is out of range or there is nothing to average.

    Example, three lines in a loop of your own; `edm2kit-phema --indir ema --outstd 0.07` then makes other lengths:

        ema = PowerEMA(model)
        for step, batch in enumerate(batches, 1):
            train(model, batch)
            ema.update(step * batch_size)
            if step % 1000 == 0:
                ema.save("ema")
    """

    def __init__(
        self,
        parameters: nn.Module | Mapping[str, torch.Tensor] | Iterable[torch.Tensor],
        stds: Sequence[float] = (0.050, 0.100),
        *,
        device: torch.device | str | None = None,
        run_id: str | None = None,
    ):
        self.exponents = std_to_exp(stds).tolist()
        self.parameters = _named(parameters)
        if not self.parameters:
            raise ValueError("there is nothing to average: no parameter requires a gradient")
        self.stds, self.time = tuple(stds), 0
        self.run_id = uuid.uuid4().hex[:16] if run_id is None else run_id
        self.averages: list[dict[str, torch.Tensor]] = []
        for _ in self.stds:
            copies = {}
            for name, parameter in self.parameters.items():
                local = _local(parameter)
                copies[name] = local.to(device or local.device, _wide(local.dtype), copy=True)
            self.averages.append(copies)

    def __repr__(self) -> str:
        count = sum(tensor.numel() for tensor in self.averages[0].values())
        lengths = ", ".join(f"{std:g}" for std in self.stds)
        return f"PowerEMA: lengths {lengths}, {count:,} parameters, at time {self.time:,}, run {self.run_id}"

    @torch.no_grad()
    def update(self, time: int) -> None:
        """Add the current parameters; `time` is how much training there was so far: images, tokens or steps.

        Raises ValueError if it is not later than at the last update.
        """
        if time <= self.time:
            raise ValueError(f"update at time {time}, but the last one was at {self.time}; time must grow")
        for exponent, average in zip(self.exponents, self.averages, strict=True):
            beta = (self.time / time) ** (exponent + 1)  # Eq. 127
            for name, parameter in self.parameters.items():
                target = average[name]
                target.lerp_(_local(parameter).to(target.device, target.dtype), 1 - beta)
        self.time = time

    def state(self, number: int) -> dict[str, torch.Tensor]:
        """Average `number` as complete tensors by name; if it is sharded, every rank must call this."""
        found = {}
        for name, parameter in self.parameters.items():
            found[name] = _complete(self.averages[number][name], parameter)
        return found

    def save(self, folder: str | Path, dtype: str = "float32") -> list[Path]:
        """Write a snapshot of each average, `ema-TIME-STD.safetensors`; returns the paths.

        `dtype` is that of matrices: float32, float16 or bfloat16; vectors stay float32. Under torch.distributed every
        rank calls this, and rank 0 writes. Raises ValueError before the first update, and if values are not finite.
        """
        if self.time == 0:
            raise ValueError("averages exist only after the first update")
        paths = []
        for number, std in enumerate(self.stds):
            path = Path(folder) / f"ema-{self.time:010d}-{std:.3f}.safetensors"
            state = self.state(number)
            header = Header(
                architecture={name: list(tensor.shape) for name, tensor in state.items()},
                encoder={},
                nimg=self.time,
                ema_std=std,
                dtype=dtype,
                run_id=self.run_id,
                network=KIND,
                buffers=(),
            )
            if dist.rank() == 0:
                save_snapshot(path, state, header)
            paths.append(path)
        return paths

    @contextlib.contextmanager
    def swapped_in(self, number: int) -> Iterator[None]:
        """Inside, the parameters have the values of average `number`, to evaluate with; afterwards their own again."""
        own = {name: _local(parameter).detach().clone() for name, parameter in self.parameters.items()}
        self._set(self.averages[number])
        try:
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            _local(parameter).copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; sharded averages as this rank's part."""
        averages = {str(std): dict(average) for std, average in zip(self.stds, self.averages, strict=True)}
        return {"time": self.time, "run_id": self.run_id, "averages": averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned. Raises ValueError if lengths, names or shapes differ."""
        if list(state["averages"]) != [str(std) for std in self.stds]:
            raise ValueError(f"the checkpoint has the EMA lengths {list(state['averages'])}, not {list(self.stds)}")
        for std, average in zip(self.stds, self.averages, strict=True):
            stored = state["averages"][str(std)]
            for name in {**average, **stored}:
                if name not in average or name not in stored or stored[name].shape != average[name].shape:
                    raise ValueError(f"the checkpoint does not fit these parameters (first at {name!r:.100})")
        for std, average in zip(self.stds, self.averages, strict=True):
            for name, tensor in average.items():
                tensor.copy_(state["averages"][str(std)][name])
        self.time, self.run_id = state["time"], state["run_id"]


@torch.no_grad()
def load_parameters_(
    parameters: nn.Module | Mapping[str, torch.Tensor] | Iterable[torch.Tensor], path: str | Path
) -> None:
    """Set the parameters that `PowerEMA` averages to a snapshot: one of its own, or one that edm2kit-phema rebuilt.

    Raises ValueError if the file is not such a snapshot, or does not fit.

    Example: `load_parameters_(model, "ema/phema-0000640-0.070.safetensors")`.
    """
    header = read_header(path)
    if header.network != KIND:
        raise ValueError(f"{path} holds a network of kind {header.network!r}; load it with load_snapshot")
    named, found = _named(parameters), dict(read_tensors(path))
    for name in {**named, **found}:
        if name not in named or name not in found or named[name].shape != found[name].shape:
            raise ValueError(f"{path} does not fit these parameters (first at {name!r:.100})")
    for name, parameter in named.items():
        _local(parameter).copy_(_shard(found[name], parameter))


def _named(parameters: nn.Module | Mapping[str, torch.Tensor] | Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    if isinstance(parameters, nn.Module):
        return {name: value for name, value in parameters.named_parameters() if value.requires_grad}
    if isinstance(parameters, Mapping):
        return dict(parameters)
    return {str(number): tensor for number, tensor in enumerate(parameters)}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded parameter (a view), or the parameter itself."""
    found = parameter.detach()
    return found.to_local() if hasattr(found, "to_local") else found


def _complete(average: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The complete tensor of which `average` is this rank's part, sharded as `like` is."""
    if not hasattr(like, "to_local"):
        return average
    from torch.distributed.tensor import DTensor

    sharded: Any = like
    whole = DTensor.from_local(
        average.to(sharded.to_local().device),
        sharded.device_mesh,
        sharded.placements,
        shape=sharded.shape,
        stride=sharded.stride(),
    )
    return whole.full_tensor()


def _shard(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of `tensor`, sharded as `like` is."""
    if not hasattr(like, "to_local"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    moved = tensor.to(sharded.to_local().device)
    return distribute_tensor(moved, sharded.device_mesh, sharded.placements).to_local()
