"""EDM2's preconditioning: a denoiser D(x; sigma, labels) around any raw network F (Karras et al. 2022, Table 1).

F may compute in half precision; PRECISIONS names what it can compute in.
"""

import difflib
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from edm2kit.conditions import ConditionLike, condition_tensor
from edm2kit.denoiser import AttentionRole, count_text
from edm2kit.models.layers import MPConv, MPFourier, normalize_weights_
from edm2kit.torch_utils.files import check_type, short

# the names that command lines, configs and records use
PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_MAX_SIZE, _MAX_LENGTH = 1 << 16, 128  # of numbers and lists among the arguments of a network
_CAN_BE_OFF = ("clip_act",)  # with null
_FEW_TOKENS = 512  # attention of so few is faster unfused, see `attention`
LOGVAR_CHANNELS = 128  # default width of the uncertainty head

# dtype -> functions of torch.cpu that report fast instructions for it; older versions of torch lack some of them
_FAST_IF = {
    torch.bfloat16: ("_is_amx_tile_supported", "_is_avx512_bf16_supported"),
    torch.float16: ("_is_amx_fp16_supported",),
}

# (q, k, v), each [N, heads, H*W, C/heads] -> the output of attention, same shape
AttentionEdit = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# noise embedding [N, E] -> noise embedding
EmbeddingEdit = Callable[[torch.Tensor], torch.Tensor]
# (block name, activations [N, C, H, W]) -> activations, in place of the block's own dropout
DropoutEdit = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass
class Edits:
    """What one call changes or reads inside the network; `maps` collects the attention maps to return."""

    attention: Mapping[str, AttentionEdit] = field(default_factory=dict)
    embedding: EmbeddingEdit | None = None
    dropout: DropoutEdit | None = None
    skip: Mapping[str, torch.Tensor] = field(default_factory=dict)
    return_attention: Sequence[str] = ()
    augment: torch.Tensor | None = None
    maps: dict[str, torch.Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.changes_code or self.augment is not None

    @property
    def changes_code(self) -> bool:
        """Whether other operations run than usual; augmentation labels are an input like others."""
        return bool(self.attention or self.embedding or self.dropout or self.skip or self.return_attention)

    def unless_skipped(self, block: str, added: torch.Tensor) -> torch.Tensor:
        """What `block` adds to its input, [N, ...], and 0 for the images for which it is skipped."""
        if block not in self.skip:
            return added
        skipped = self.skip[block].to(added.device).reshape(-1, *[1] * (added.ndim - 1))
        return torch.where(skipped, 0, added)  # keeps the order of memory, and so the bits of what is not skipped

    def attend(self, block: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The attention of `block`, edited if it is named; all [N, heads, H*W, C/heads]."""
        if block in self.attention:
            return self.attention[block](q, k, v)
        if block in self.return_attention:
            self.maps[block] = (q.float() @ k.float().transpose(2, 3) / math.sqrt(q.shape[3])).softmax(dim=3)
            return self.maps[block].to(v.dtype) @ v
        return attention(q, k, v)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(C)) v, all [N, heads, H*W, C].

    On a CPU in bfloat16, torch's fused kernel takes three to seven times as long as matrix products for few tokens.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= _FEW_TOKENS:
        return ((q / math.sqrt(q.shape[3])) @ k.transpose(2, 3)).softmax(dim=3) @ v
    return nn.functional.scaled_dot_product_attention(q, k, v)


class RawNetwork(nn.Module):
    """Base class of the raw network F, which `Preconditioner` turns into a denoiser.

    `forward(x, c_noise, labels, edits)`: `x` [N, C, H, W] with unit variance, in the dtype to compute in; `c_noise`
    float32 [N]; `labels` float32 [N, label_dim], or None for an unconditional network; returns F, shaped as `x`.

    Memory: if `recompute` is set, a gradient by `x` outside of training stores no activations of `blocks` and computes
    them again in the backward pass; `recompute_in_training` does the same in training. Results are the same bits.
    """

    supported_edits: frozenset[str] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.recompute = True
        self.recompute_in_training = False

    @property
    def attention_roles(self) -> Mapping[str, AttentionRole]:
        """Role of each block that has attention, by name, in the order of computation."""
        return {}

    @property
    def summary(self) -> str:
        """What kind of network this is, in a few words."""
        attention = f", {len(self.attention_roles)} with attention" if self.attention_roles else ""
        return f"{type(self).__name__} of {len(self.blocks)} blocks{attention}" if self.blocks else type(self).__name__

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that are recomputed one at a time; empty if this network cannot recompute."""
        return []

    def recomputes(self, x: torch.Tensor, edits: Edits) -> bool:
        """Whether a forward pass with input `x` should store no activations of its blocks."""
        if edits.dropout or edits.return_attention:
            return False  # a second pass would use other random numbers, or collect the maps twice
        if not torch.is_grad_enabled():
            return False
        if self.training:
            return self.recompute_in_training
        return self.recompute and x.requires_grad


class Preconditioner(nn.Module):
    """The denoiser D(x; sigma, labels) around a raw network (EDM Table 1), with the uncertainty head of EDM2 Eq. 21.

    `raw` is the network F, stored under `raw_name` (the prefix of its weights in the state dict); `img_resolution` in
    pixels; `label_dim` is the number of classes or the length of label vectors, 0 if unconditional; `sigma_data` is
    the standard deviation of the data; `logvar_channels` the width of the uncertainty head.

    `compute_dtype` (an attribute) is the dtype inside F; everything outside stays float32. `fast_raw`, if it is set,
    computes F in its place, except for calls with edits or with gradients by the input.
    """

    def __init__(
        self,
        raw: RawNetwork,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
        *,
        raw_name: str = "raw_network",
    ):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_data = sigma_data
        self.compute_dtype = torch.float32
        self.label_names: tuple[str, ...] | None = None  # of the classes, if the file has them
        self.fast_raw: Callable[..., torch.Tensor] | None = None
        self._raw_name = raw_name
        self.add_module(raw_name, raw)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1, [])

    def __repr__(self) -> str:
        # the module tree is long; print(net.raw), or print(net.unet), shows it
        labels = f"label_dim {self.label_dim}" if self.label_dim else "no labels"
        size = f"{self.img_resolution}x{self.img_resolution} with {self.img_channels} channels"
        dtype = str(self.compute_dtype).removeprefix("torch.")
        device = next(iter(self.state_dict().values())).device
        return (
            f"{type(self).__name__}: {self.raw.summary}, {size}, {labels}, {count_text(self)}\n"
            f"  computes in {dtype} on {device}; print(net.{self._raw_name}) shows its modules"
        )

    @property
    def raw(self) -> Any:
        """The raw network F."""
        return getattr(self, self._raw_name)

    @property
    def attention_roles(self) -> Mapping[str, AttentionRole]:
        """Role of each block that has attention, by the names that `attention` and `return_attention` take."""
        return self.raw.attention_roles

    @property
    def attention_blocks(self) -> list[str]:
        """Names of the blocks that have attention, in the order of computation."""
        return list(self.raw.attention_roles)

    @property
    def supported_edits(self) -> frozenset[str]:
        """Which of the keyword arguments of a call this network takes."""
        return self.raw.supported_edits

    def recompute_in_training_(self) -> None:
        """From now on, store no activations in training; raises ValueError if the network cannot do that."""
        if not self.raw.blocks:
            kind = type(self.raw).__name__
            raise ValueError(f"a {kind} network cannot recompute activations; train without --recompute")
        self.raw.recompute_in_training = True

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        labels: ConditionLike = None,
        return_logvar: bool = False,
        *,
        attention: Mapping[str, AttentionEdit] | None = None,
        embedding: EmbeddingEdit | None = None,
        dropout: DropoutEdit | None = None,
        skip: Mapping[str, torch.Tensor] | None = None,
        return_attention: Sequence[str] = (),
        augment: torch.Tensor | None = None,
    ) -> Any:
        """Estimate the clean image.

        `x` [N, C, H, W]; `sigma` [N] or a scalar; `labels` [N, label_dim] or a `Condition`, None for the zero vector,
        ignored by an unconditional network. `attention` maps block names (see `attention_roles`) to functions that
        replace their attention; `embedding` changes the noise embedding [N, E] before labels join it; `dropout`
        replaces dropout in every block, also in eval mode; `skip` maps block names to bool [N], the images for which
        the block adds nothing to its input. `augment` float32 [N, 9] says how the images were augmented in training
        (`edm2kit.training.augmentation`); None, as for sampling, is the same as zeros: not augmented.

        Returns D, float32, shaped as `x`. With `return_logvar`, the log-variance [N, 1, 1, 1] follows; with
        `return_attention`, a dict of softmax attention maps [N, heads, H*W, H*W] of these blocks. Raises ValueError
        for a block without attention, for an edit outside `supported_edits`, and for labels of another shape.
        """
        edits = Edits(attention or {}, embedding, dropout, skip or {}, return_attention, augment)
        if edits:
            self._check(edits)
        x = x.float()
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(x.shape[0])
        s = sigma.reshape(-1, 1, 1, 1)
        c_skip = self.sigma_data**2 / (s**2 + self.sigma_data**2)
        c_out = s * self.sigma_data / (s**2 + self.sigma_data**2).sqrt()
        c_in = 1 / (self.sigma_data**2 + s**2).sqrt()
        c_noise = sigma.log() / 4
        raw = self.raw if edits or self.fast_raw is None else self.fast_raw
        if edits.changes_code or x.requires_grad:
            raw = self.raw.forward  # a compiled network knows neither (models/compilation.py)
        f = raw((c_in * x).to(self.compute_dtype), c_noise, self._labels(x, labels), edits)
        outputs: list[Any] = [c_skip * x + c_out * f.float()]
        if return_logvar:
            outputs.append(self.logvar_linear(self.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1))
        if return_attention:
            outputs.append(edits.maps)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _labels(self, x: torch.Tensor, condition: ConditionLike) -> torch.Tensor | None:
        if not self.label_dim:
            return None
        labels = condition if isinstance(condition, torch.Tensor) else condition_tensor(condition)
        if labels is None:
            return torch.zeros(x.shape[0], self.label_dim, device=x.device)
        if labels.shape != (x.shape[0], self.label_dim):
            raise ValueError(f"labels have shape {list(labels.shape)}; expected [{x.shape[0]}, {self.label_dim}]")
        return labels.float()

    def _check(self, edits: Edits) -> None:
        given = {
            "attention": bool(edits.attention),
            "embedding": edits.embedding is not None,
            "dropout": edits.dropout is not None,
            "skip": bool(edits.skip),
            "return_attention": bool(edits.return_attention),
            "augment": edits.augment is not None,
        }
        for name, is_given in given.items():
            if not is_given or name in self.supported_edits:
                continue
            kind = type(self.raw).__name__
            supported = ", ".join(sorted(self.supported_edits)) or "none"
            raise ValueError(f"a {kind} network does not support the edit {name!r}; it supports: {supported}")
        roles = self.attention_roles
        for block in (*edits.attention, *edits.skip, *edits.return_attention):
            if block in roles:
                continue
            raise ValueError(f"no attention in a block called {block!r}; blocks with attention: {', '.join(roles)}")


def resolve_precision(name: str, device: torch.device) -> str:
    """The key of PRECISIONS that `name` means on `device`: "auto" is fp16 on a CUDA device and fp32 elsewhere."""
    if name != "auto":
        return name
    return "fp16" if device.type == "cuda" else "fp32"


def slow_precision(dtype: torch.dtype, device: torch.device | str = "cpu") -> str | None:
    """Why `dtype` is slower than float32 on `device`, or None if it is not (as far as is known)."""
    if torch.device(device).type == "cuda" and dtype == torch.bfloat16:
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return None
        name = torch.cuda.get_device_name(device)
        return f"{name} has no instructions for bfloat16 and only emulates it, slower than float32; use fp16"
    if torch.device(device).type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return None
    if dtype not in _FAST_IF:
        return None
    for function in _FAST_IF[dtype]:
        if getattr(torch.cpu, function, lambda: False)():
            return None
    name = str(dtype).removeprefix("torch.")
    return f"this CPU has no instructions for {name}, which makes it many times slower than float32; use fp32"


def evaluation_only_(net: nn.Module) -> nn.Module:
    """Switch to eval mode, without gradients of weights; returns `net`."""
    return net.eval().requires_grad_(False)


def _check_argument(name: str, value: Any, default: Any) -> None:
    """Raise ValueError unless `value` is of the type of `default`; None may stand for an optional number."""
    if isinstance(default, tuple | list):
        whole = all(isinstance(item, int) for item in default)
        check_type(value, tuple[int, ...] if whole else tuple[float, ...], name)
        if len(value) > _MAX_LENGTH:
            raise ValueError(f"{name} has {len(value)} entries; at most {_MAX_LENGTH} are allowed")
        numbers = list(value)
    elif isinstance(default, bool):
        return check_type(value, bool, name)
    elif isinstance(default, int):
        check_type(value, int, name)
        numbers = [value]
    elif default is None:
        check_type(value, Any if isinstance(value, str | Mapping) else float | None, name)
        return None
    elif isinstance(default, float):
        return check_type(value, float | None if name in _CAN_BE_OFF else float, name)
    else:
        return None
    for number in numbers:
        if not 0 <= number <= _MAX_SIZE:
            raise ValueError(f"{name} must be from 0 to {_MAX_SIZE}; got {short(number)}")
    return None


@dataclass(frozen=True)
class NetworkKind:
    """How to make, train and evaluate one kind of network.

    - `build(img_resolution, img_channels, label_dim, sigma_data, logvar_channels, **arguments)` returns the denoiser;
      raises ValueError or TypeError for arguments that do not fit.
    - `defaults` holds every argument of its own with its default, so that snapshots record the complete architecture.
    - `added` names the arguments that were added later. An architecture only mentions them if they differ from their
      default, so that snapshots of a run from before and after agree.
    - `label_weights` is the end of the names of the weights whose shape depends on the number of classes. Fine-tuning
      on other classes starts these at random.
    - `count_blocks(architecture)` is the number of blocks that `build` would make; a damaged file may ask for billions.
    - `normalize_weights_(net)` is called before each training step. By default it normalises `MPConv` layers, as the
      uncertainty head of `Preconditioner` has one, and leaves all others.
    - `freeze_(net)` prepares a network for evaluation only, in `net.compute_dtype`, and returns it. By default it turns
      on eval mode and turns off gradients.
    """

    build: Callable[..., Preconditioner]
    defaults: Mapping[str, Any]
    label_weights: str
    count_blocks: Callable[[Mapping[str, Any]], int]
    added: frozenset[str] = frozenset()
    normalize_weights_: Callable[[nn.Module], None] = normalize_weights_
    freeze_: Callable[[Any], Any] = evaluation_only_

    def check_arguments(self, network: Mapping[str, Any], name: str) -> None:
        """Raise ValueError for a key of `network` (a configuration's mapping) that this kind, `name`, does not take.

        Values must be of the type of their defaults, and in a range that makes sense.
        """
        known = [*self.defaults, "logvar_channels"]
        for argument in network:
            if argument in known:
                _check_argument(argument, network[argument], self.defaults.get(argument, LOGVAR_CHANNELS))
            if argument == "kind" or argument in known:
                continue
            close = difflib.get_close_matches(str(argument), known, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}?" if close else f"available: {', '.join(known)}"
            raise ValueError(f"unknown network argument {argument!r} ({name}); {hint}")

    def full_architecture(
        self, img_resolution: int, img_channels: int, label_dim: int, sigma_data: float, network: Mapping[str, Any]
    ) -> dict[str, Any]:
        """All arguments of `build`, with defaults written out, so that a later change of a default changes nothing.

        `network` holds the arguments that differ from their defaults, and possibly `kind`. Values are plain lists and
        numbers.
        """
        architecture = {
            "img_resolution": img_resolution,
            "img_channels": img_channels,
            "label_dim": label_dim,
            "sigma_data": sigma_data,
            "logvar_channels": LOGVAR_CHANNELS,
            **self.defaults,
            **network,
        }
        architecture.pop("kind", None)
        for name in self.added:
            if architecture[name] == self.defaults[name]:
                del architecture[name]
        return {name: list(value) if isinstance(value, tuple | list) else value for name, value in architecture.items()}
