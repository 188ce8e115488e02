"""A stand-in for a GPU: tensors on torch's meta device play the tensors on a GPU, and every operation is checked.

with FakeGPU() as gpu:
    net(x.to(DEVICE), ...)
assert gpu.mixed == [] and gpu.waits == []

It needs no GPU, works with autograd and optimizers, and allocates no memory. Values do not exist: whatever the host
asks for is 1.
"""

import contextlib
import sys
from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from tests.support import ROOT

DEVICE = torch.device("meta")

# operations that only make or change a view, or allocate: nothing runs on the device
_NO_KERNEL = frozenset(
    [
        "_has_same_storage_numel",
        "_reshape_alias",
        "_unsafe_view",
        "alias",
        "as_strided",
        "chunk",
        "detach",
        "diagonal",
        "empty",
        "empty_like",
        "empty_strided",
        "expand",
        "is_pinned",
        "is_same_size",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
        "permute",
        "record_stream",
        "reshape",
        "resize_",
        "select",
        "set_",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "sym_numel",
        "sym_size",
        "t",
        "transpose",
        "unbind",
        "unfold",
        "unsqueeze",
        "view",
        "view_as",
    ]
)
# operations whose result has a shape that depends on values, so the host has to wait for them
_SHAPE_FROM_VALUES = frozenset(["masked_select", "nonzero", "_unique2", "unique_consecutive", "unique_dim"])
# a launch of torch's multi-tensor kernels takes this many tensors, by the number of lists (multi_tensor_apply.cuh),
# and this many chunks of so many elements
_TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_CHUNKS_PER_LAUNCH, _CHUNK = 320, 65536


class FakeGPU(TorchDispatchMode):
    """Records what a GPU would refuse or wait for, each with the operation and the line that asked for it.

    - `mixed`: operations on tensors of both devices (a 0-dim CPU tensor is allowed), errors on a GPU.
    - `waits`: the host waits for the device (.item(), .tolist(), .cpu(), nonzero), or copies from the host and blocks.
    - `launches`: kernel launches by operation; views launch none.

    Without `float64`, as on an Apple GPU, an operation that gives a float64 result raises TypeError.
    """

    def __init__(self, float64: bool = True) -> None:
        super().__init__()
        self.float64 = float64
        self.mixed: list[str] = []
        self.waits: list[str] = []
        self.launches: Counter[str] = Counter()
        self._patches = contextlib.ExitStack()

    @property
    def num_launches(self) -> int:
        return sum(self.launches.values())

    def clear(self) -> None:
        """Forget what was recorded so far."""
        self.mixed.clear()
        self.waits.clear()
        self.launches.clear()

    def __enter__(self) -> "FakeGPU":
        import torch._dynamo  # imported by torch itself on the way, which fails on a patched torch

        self._patches.enter_context(mock.patch.object(torch, "Generator", _Generator))
        for name in ("tensor", "as_tensor"):
            self._patches.enter_context(mock.patch.object(torch, name, self._from_numbers(getattr(torch, name))))
        for module in ("torch.optim.adam", "torch.optim.optimizer", "torch.utils._foreach_utils"):
            for kind in ("fused", "foreach"):
                name = f"_get_{kind}_kernels_supported_devices"
                if hasattr(sys.modules[module], name):
                    devices = ["cpu", "cuda", "meta", "mps"]
                    self._patches.enter_context(mock.patch(f"{module}.{name}", lambda found=devices: found))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[1]
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in inputs if tensor.device == DEVICE]
        on_host = [tensor for tensor in inputs if tensor.device != DEVICE]
        if kwargs.get("generator") is not None and kwargs.get("device") == DEVICE:
            kwargs["generator"] = None
        if name == "_local_scalar_dense" and on_device:
            self._note(self.waits, name)
            return 1.0 if on_device[0].is_floating_point() else 1
        if name in ("_to_copy", "copy_") and (copied := self._copy(name, args, kwargs)) is not None:
            return copied
        if on_device and name in _SHAPE_FROM_VALUES:
            self._note(self.waits, name)
        if on_device and on_host:
            args, kwargs = self._judge_mixture(name, args, kwargs, on_host)
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]
        if on_device or any(tensor.device == DEVICE for tensor in outputs):
            self._launch(name, args, outputs)
        return result

    def _from_numbers(self, make: Any) -> Any:
        """torch.tensor or torch.as_tensor, which copy numbers of the host to the device, and wait for that."""

        def made(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(data, *args, **kwargs)
            if tensor.device == DEVICE and not isinstance(data, torch.Tensor):
                self._note(self.waits, f"{make.__name__} of numbers on the host")
            return tensor

        return made

    def _copy(self, name: str, args: Any, kwargs: Any) -> torch.Tensor | None:
        """The result of a copy between host and device; None for a copy within one of them."""
        if name == "copy_":
            target, source = args[0], args[1]
            to_device, dtype = target.device == DEVICE, target.dtype
            asynchronous = (len(args) > 2 and args[2]) or kwargs.get("non_blocking")
        else:
            target, source = None, args[0]
            to_device, dtype = kwargs.get("device", source.device) == DEVICE, kwargs.get("dtype") or source.dtype
            asynchronous = kwargs.get("non_blocking")
        if to_device == (source.device == DEVICE):
            return None
        if not asynchronous:
            self._note(self.waits, f"{name} {'to the device' if to_device else 'to the host'}")
        # the conversion to another dtype happens on the device
        if dtype != source.dtype:
            self._launch(name, args, [torch.empty(0, dtype=dtype, device=DEVICE)])
        self.launches["copy between host and device"] += 1
        if target is not None:
            return target if to_device else target.fill_(1)
        if not to_device:
            return torch.ones(source.shape, dtype=dtype)
        copied = torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=DEVICE)
        layout = kwargs.get("memory_format")
        return copied if layout in (None, torch.preserve_format) else copied.contiguous(memory_format=layout)

    def _judge_mixture(self, name: str, args: Any, kwargs: Any, on_host: list[torch.Tensor]) -> tuple[Any, Any]:
        """Note a mixture of devices; returns the arguments with host tensors replaced by ones on the device."""
        large = [tensor for tensor in on_host if tensor.ndim]
        indexes = name in ("index", "index_put", "index_put_", "_unsafe_index") and args[0].device == DEVICE
        if large and indexes:
            self._note(self.waits, f"{name} by a host tensor")
        elif large:
            self._note(self.mixed, name)

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.device == DEVICE or not tensor.ndim:
                return tensor
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)

        return tree_map_only(torch.Tensor, moved, (args, kwargs))

    def _launch(self, name: str, args: Any, outputs: list[torch.Tensor]) -> None:
        for tensor in outputs:
            if not self.float64 and tensor.device == DEVICE and tensor.dtype == torch.float64:
                raise TypeError(f"{name}: this device has no float64, asked for in {_line()}")
        if name in _NO_KERNEL:
            return
        count = 1
        if name.startswith(("_foreach", "_fused")):
            lists = [value for value in args if isinstance(value, list | tuple)]
            tensors = lists[0]
            chunks = sum(-(-tensor.numel() // _CHUNK) for tensor in tensors)
            per_launch = _TENSORS_PER_LAUNCH[min(len(lists), 5)]
            count = max(-(-len(tensors) // per_launch), -(-chunks // _CHUNKS_PER_LAUNCH))
        self.launches[name] += count

    def _note(self, where: list[str], what: str) -> None:
        where.append(f"{what}: {_line()}")


class _Generator(torch.Generator):
    """A generator for any device: torch makes none for the meta device, whose random numbers have no values."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu" if torch.device(device) == DEVICE else device)


def _line() -> str:
    """The innermost line of the package that is being computed, such as "edm2kit/training/loop.py:99"."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(str(ROOT / "edm2kit")) or (file.startswith(str(ROOT / "tests")) and file != __file__):
            return f"{file.removeprefix(str(ROOT) + '/')}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside the package"
