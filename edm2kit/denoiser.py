"""The one interface that networks, guidance and solvers share.

A denoiser is any callable `(x, sigma, condition) -> D`. Three optional methods let it follow a sampling run; the
functions `for_images`, `for_step` and `after_step` call them if they exist.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch.utils.weak import WeakIdKeyDictionary

from edm2kit.torch_utils.rng import StackedGenerator


@runtime_checkable
class Denoiser(Protocol):
    """An estimate D of the clean image behind a noisy one.

    Called as `denoiser(x, sigma, condition)`: `x` float32 [N, C, H, W]; `sigma` float32 [N] or a scalar tensor, the
    standard deviation of the noise in `x`; `condition` a label tensor [N, K], a `Condition` or None. Returns D,
    float32, of the shape of `x`. If `x` is float64 (a float64 solver), a denoiser may answer in float64.

    A denoiser may have three more methods. Each returns what to use next, so a denoiser itself never changes:

    - `for_images(rng) -> Denoiser` is called once per batch by the code that draws the noise. `rng` is a
      `StackedGenerator` with one generator per image, for methods that need random numbers.
    - `for_step(i, sigmas) -> Denoiser` is called by the solver at the start of step i, which goes from sigmas[i] to
      sigmas[i + 1]. Its result serves every evaluation of that step.
    - `after_step(x, i, sigmas) -> x` is called by the solver, on the result of `for_step`, at the end of step i.

    Example, the denoiser of data that are all zero: `lambda x, sigma, condition=None: torch.zeros_like(x)`.
    """

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, condition: Any = None, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class AttentionRole:
    """Where an attention block is in its network.

    `side` of the network; `resolution`, height and width of the block's token grid; `depth`, the block's place in the
    order of computation, from 0.
    """

    side: Literal["encoder", "middle", "decoder"]
    resolution: int
    depth: int


class Network(Protocol):
    """A denoiser that is a single network whose interior a call can change.

    `label_dim` is the length of a label, 0 if the network is unconditional. `supported_edits` names the keyword
    arguments below that this network takes; it refuses the others with a ValueError. `attention_roles` has an entry
    for each attention block, in the order of computation; `attention_blocks` are its names.

    - `attention` maps block names to functions (q, k, v) -> output, each [N, heads, H*W, C/heads].
    - `embedding` takes and returns the noise embedding [N, E].
    - `dropout(block, y)` returns what replaces the activations y [N, C, H, W] where the block has its dropout.
    - `skip` maps names of blocks with attention to bool [N]: the images for which the block adds nothing to its input.
    - With `return_attention`, block names, the call returns (D, maps): softmax attention [N, heads, H*W, H*W] by name.
    """

    label_dim: int

    @property
    def supported_edits(self) -> frozenset[str]: ...

    @property
    def attention_roles(self) -> Mapping[str, AttentionRole]: ...

    @property
    def attention_blocks(self) -> Sequence[str]: ...

    def __call__(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        condition: Any = None,
        /,
        *,
        attention: Mapping[str, Callable[..., torch.Tensor]] | None = None,
        embedding: Callable[[torch.Tensor], torch.Tensor] | None = None,
        dropout: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
        skip: Mapping[str, torch.Tensor] | None = None,
        return_attention: Sequence[str] = (),
    ) -> Any: ...


Part = TypeVar("Part")


_MAX_LINES, _MAX_WIDTH = 5, 200  # of a denoiser's description
_ADDRESS = re.compile(r"<(?:function )?([\w.<>]+)(?: object)? at 0x\w+>")  # what Python shows of functions and objects
_LEVELS: MutableMapping[torch.Tensor, tuple[int, list[float]]] = WeakIdKeyDictionary()


def levels_of(sigmas: torch.Tensor) -> list[float]:
    """The noise levels of a sampling run as numbers.

    Read from the device once per run, not once per step: the host waits for all queued work when it reads.
    """
    version = sigmas._version  # counts changes in place
    if sigmas not in _LEVELS or _LEVELS[sigmas][0] != version:
        _LEVELS[sigmas] = version, sigmas.tolist()
    return _LEVELS[sigmas][1]


def move_levels(sigmas: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`sigmas`, noise levels on the CPU, on `device`; `levels_of` then knows them without reading them back."""
    moved = sigmas.to(device, non_blocking=True)
    _LEVELS[moved] = moved._version, sigmas.tolist()
    return moved


def for_images(part: Part, rng: StackedGenerator) -> Part:
    """`part.for_images(rng)`, or `part` itself if it has no such method."""
    follow = getattr(part, "for_images", None)
    return part if follow is None else follow(rng)


def for_step(part: Part, i: int, sigmas: torch.Tensor) -> Part:
    """`part.for_step(i, sigmas)`, or `part` itself if it has no such method."""
    follow = getattr(part, "for_step", None)
    return part if follow is None else follow(i, sigmas)


def after_step(part: Any, x: torch.Tensor, i: int, sigmas: torch.Tensor) -> torch.Tensor:
    """`part.after_step(x, i, sigmas)`, or `x` itself if it has no such method."""
    follow = getattr(part, "after_step", None)
    return x if follow is None else follow(x, i, sigmas)


def describe(part: Any) -> str:
    """A dataclass made of denoisers in at most five lines: its settings, then its parts, each object once.

    It is the `__repr__` of such classes; what dataclasses print by default has a network's whole module tree in it.
    """
    lines = _tree(part, set())
    if len(lines) > _MAX_LINES:
        more = len(lines) - _MAX_LINES + 1
        lines = [*lines[: _MAX_LINES - 1], f"  and {more} more parts"]
    return "\n".join(map(_cut, lines))


def _cut(line: str) -> str:
    return line if len(line) <= _MAX_WIDTH else f"{line[: _MAX_WIDTH - 3]}..."


def _tree(part: Any, seen: set[int]) -> list[str]:
    """The lines of `describe`, without a limit; objects in `seen` are left out."""
    if type(part).__repr__ is not describe:
        return [_one_line(part)]
    if not dataclasses.is_dataclass(part):
        return [type(part).__name__]
    settings, lines = [], []
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        inner = value if isinstance(value, tuple) and any(map(_is_denoiser, value)) else (value,)
        if not any(map(_is_denoiser, inner)):
            if field.repr and not (value is None or value is field.default):
                settings.append(f"{field.name}={_one_line(value)}")
            continue
        for one in inner:
            if id(one) not in seen:
                seen.add(id(one))
                first, *rest = _tree(one, seen)
                lines += [f"  {field.name}: {first}", *(f"  {line}" for line in rest)]
    return [f"{type(part).__name__}({', '.join(settings)})", *lines]


def _is_denoiser(value: Any) -> bool:
    """Whether a field holds something with parts of its own, or a network."""
    return isinstance(value, torch.nn.Module) or type(value).__repr__ is describe


def _one_line(value: Any) -> str:
    """A value, or the first line of what it says of itself."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, MethodType):  # not with all of the object that it belongs to
        return f"{type(value.__self__).__name__}.{value.__name__}"
    if isinstance(value, torch.device):
        return str(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__qualname__.replace("<locals>.", "")
    if isinstance(value, torch.nn.Module) and type(value).__repr__ is torch.nn.Module.__repr__:
        return f"{type(value).__name__}: {count_text(value)}"
    text = _ADDRESS.sub(r"\1", repr(value).partition("\n")[0])
    return _cut(text)


def count_text(net: torch.nn.Module) -> str:
    """The number of parameters in words: "1.05 M parameters"."""
    # the kernels of a network that is frozen for evaluation are buffers
    tensors = [*net.parameters(), *(buffer for buffer in net.buffers() if buffer.ndim > 1)]
    count = sum(tensor.numel() for tensor in tensors)
    for size, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit} parameters"
    return f"{count} parameters"


class Wrapper:
    """Base class of frozen dataclasses made of parts, which follows the sampling run in all of them.

    `for_images` and `for_step` return a copy whose fields have followed; `after_step` passes x through the fields in
    their order. Fields that are tuples follow element by element, and fields without these methods (numbers, tensors,
    functions) stay as they are. A subclass that is off names the parts it does not use in `idle_fields`.

    Example:

        @dataclass(frozen=True)
        class Average(Wrapper):
            first: Denoiser
            second: Denoiser

            def __call__(self, x, sigma, condition=None):
                return (self.first(x, sigma, condition) + self.second(x, sigma, condition)) / 2
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):
            cls.__repr__ = describe  # type: ignore[method-assign]  # or @dataclass would write another

    def idle_fields(self) -> frozenset[str]:
        """Names of fields that are not in use, and so do not follow."""
        return frozenset()

    def for_images(self, rng: StackedGenerator) -> Any:
        """The same for the images of one batch; `rng` holds one generator per image."""
        return self._with_parts(lambda part: for_images(part, rng))

    def for_step(self, i: int, sigmas: torch.Tensor) -> Any:
        """The same for step i, which goes from sigmas[i] to sigmas[i + 1]."""
        return self._with_parts(lambda part: for_step(part, i, sigmas))

    def after_step(self, x: torch.Tensor, i: int, sigmas: torch.Tensor) -> torch.Tensor:
        """x [N, C, H, W] at the end of step i, as the parts move it."""
        for _, value in self._parts():
            for part in value if isinstance(value, tuple) else (value,):
                x = after_step(part, x, i, sigmas)
        return x

    def _parts(self) -> list[tuple[str, Any]]:
        idle = self.idle_fields()
        names = [field.name for field in dataclasses.fields(self) if field.name not in idle]  # type: ignore[arg-type]
        return [(name, getattr(self, name)) for name in names]

    def _with_parts(self, follow: Callable[[Any], Any]) -> Self:
        followed = {}
        for name, value in self._parts():
            new = tuple(follow(part) for part in value) if type(value) is tuple else follow(value)
            if new is not value:
                followed[name] = new
        return dataclasses.replace(self, **followed)  # type: ignore[type-var]
