"""Magnitude-preserving building blocks (Karras et al. 2023, "Analyzing and Improving the Training Dynamics")."""

import math
import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.utils._python_dispatch import _get_current_dispatch_mode

SILU_GAIN = 1 / 0.596  # Eq. 81: the RMS of silu(N(0,1))
_LARGE_PIXELS = 64 * 64
_PACKED_PIXELS = 64 * 64  # of a batch: with more, reordering the weight takes little of a convolution's time
_PACKED_WEIGHTS = 1 << 22  # of a layer, because a reordered weight is a second copy


def normalize(
    x: torch.Tensor, dims: Sequence[int] | None = None, eps: float = 1e-4, magnitude: float = 1.0
) -> torch.Tensor:
    """Scale `x` to an RMS of `magnitude` over `dims` (default: all but the first), in float32; returns x's dtype.

    x / (eps + ||x|| * sqrt(#norms / #entries)): a tensor of unit-variance entries keeps its scale. Eq. 30.
    """
    dims = list(range(1, x.ndim)) if dims is None else list(dims)
    if x.device.type != "cpu" and x.numel():
        compute = _Normalized.apply if torch.is_grad_enabled() else _Normalized.forward
        return compute(x, dims, eps, magnitude)[0]
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    norm = norm * math.sqrt(norm.numel() / x.numel()) if x.numel() else norm
    return x * (magnitude / (eps + norm)).to(x.dtype)


class _Normalized(torch.autograd.Function):
    """`normalize` in half as many kernels, up to rounding.

    A GPU computes most of these tensors faster than the host can launch kernels for them. On a CPU the other form is
    as fast, and results there stay the same bits.
    """

    @staticmethod
    def forward(x: torch.Tensor, dims: list[int], eps: float, magnitude: float) -> Any:
        norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
        slope = math.sqrt(norm.numel() / x.numel()) / magnitude
        divisor = torch.rsub(norm, eps / magnitude, alpha=-slope)  # eps / magnitude + slope * norm in one kernel
        return x / divisor.to(x.dtype), norm, divisor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        x, ctx.dims, _, magnitude = inputs
        _, norm, divisor = output
        ctx.slope = math.sqrt(norm.numel() / x.numel()) / magnitude
        ctx.mark_non_differentiable(norm, divisor)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, norm, divisor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *unused: None) -> tuple[torch.Tensor | None, ...]:
        x, norm, divisor = ctx.saved_tensors
        # y = x / d with d = a + b |x|, so dL/dx = (g - x * b (g . x) / (|x| d)) / d, and |x| = 0 only if x = 0
        along = (grad * x).sum(dim=ctx.dims, keepdim=True, dtype=torch.float32)
        share = along / (norm * divisor).clamp_min(torch.finfo(torch.float32).tiny)
        return torch.addcmul(grad, x, share.to(x.dtype), value=-ctx.slope) / divisor.to(x.dtype), None, None, None


def clip(x: torch.Tensor, limit: float) -> torch.Tensor:
    """Limit the values of `x` to -limit..limit, as `torch.clamp` does; its gradient takes a tenth of the time on a CPU.

    Gradients pass where values were within, including the limits.
    """
    return _Clipped.apply(x, limit)


class _Clipped(torch.autograd.Function):
    """`torch.clamp` with a gradient in one kernel instead of four."""

    @staticmethod
    def forward(x: torch.Tensor, limit: float) -> torch.Tensor:
        return x.clamp(-limit, limit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, float], output: torch.Tensor) -> None:
        x, limit = inputs
        # hardtanh passes nothing at its limits themselves, so these are the next larger numbers of the dtype
        spacing = _spacing(limit, x.dtype)
        rounded = round(limit / spacing) * spacing
        ctx.beyond = rounded + _spacing(rounded, x.dtype)
        ctx.save_for_backward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, x, -ctx.beyond, ctx.beyond), None


def _spacing(value: float, dtype: torch.dtype) -> float:
    """The distance from a positive value to the next larger number of a dtype."""
    return 2.0 ** (math.frexp(value)[1] - 1) * torch.finfo(dtype).eps


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU that keeps unit-variance input at unit magnitude. Eq. 81."""
    return nn.functional.silu(x) * SILU_GAIN


def balance(t: float) -> tuple[float, float]:
    """The factors of a and b in a magnitude-preserving sum with weight `t` of b. Eq. 88."""
    size = math.sqrt((1 - t) ** 2 + t**2)
    return (1 - t) / size, t / size


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float = 0.5) -> torch.Tensor:
    """Blend `a` and `b` with weight `t` of `b`, preserving the magnitude of independent inputs. Eq. 88."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: torch.Tensor, b: torch.Tensor, t: float = 0.5) -> torch.Tensor:
    """Concatenate channels; `b` contributes a fraction `t` of the magnitude, independent of its width. Eq. 103."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale / math.sqrt(n_a) * (1 - t)), b * (scale / math.sqrt(n_b) * t)], dim=1)


def downsample(x: torch.Tensor) -> torch.Tensor:
    """Halve height and width by averaging 2x2 pixels (the separable filter [1, 1])."""
    return nn.functional.avg_pool2d(x, 2)


def upsample(x: torch.Tensor) -> torch.Tensor:
    """Double height and width by repeating pixels."""
    return nn.functional.interpolate(x, scale_factor=2, mode="nearest")


class MPFourier(nn.Module):
    """Random Fourier features of a scalar: [N] -> [N, num_channels], unit magnitude, in x's dtype. Eq. 75."""

    freqs: torch.Tensor
    phases: torch.Tensor

    def __init__(self, num_channels: int, bandwidth: float = 1.0):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num_channels) * bandwidth)
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.outer(x.float(), self.freqs) + self.phases
        return (y.cos() * math.sqrt(2)).to(x.dtype)


def convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Apply `weight` [out, in, *kernel]: a linear layer if the kernel is empty, else a size-preserving convolution."""
    if weight.ndim == 2:
        return nn.functional.linear(x, weight)
    if (
        weight.requires_grad
        and weight.shape[-1] > 1
        and x.device.type == "cpu"
        and x.shape[2:].numel() >= _LARGE_PIXELS
    ):
        return _TrainedConvolution.apply(x, weight)
    return nn.functional.conv2d(x, weight, padding=weight.shape[-1] // 2)


class _TrainedConvolution(torch.autograd.Function):
    """A convolution that computes the gradient of its weight with channels first.

    On a CPU and large images, computing it with channels last takes up to twice as long. On small images, changing the
    memory layout would cost more than it saves.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return nn.functional.conv2d(x, weight, padding=weight.shape[-1] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        padding = weight.shape[-1] // 2
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = conv2d_input(x.shape, weight, grad, padding=padding)
        if ctx.needs_input_grad[1]:
            weight_grad = conv2d_weight(x.contiguous(), weight.shape, grad.contiguous(), padding=padding)
            weight_grad = weight_grad.contiguous(memory_format=torch.channels_last)
        return x_grad, weight_grad


class MPConv(nn.Module):
    """Bias-free convolution (kernel [k, k]) or linear layer (kernel []) whose weight is normalised on use. Eq. 47.

    The effective weight has unit-norm filters times `gain`, so activations keep their magnitude. `factor` holds
    constants that would otherwise scale the activations before or after the layer; scaling the weight is cheaper.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int], factor: float = 1.0):
        super().__init__()
        weight = torch.empty(out_channels, in_channels, *kernel)
        # on the meta device, initializing would take most of the time of building a network
        self.weight = nn.Parameter(weight if weight.is_meta else weight.normal_())
        self.factor = factor

    def effective_weight(self, gain: torch.Tensor | None = None) -> torch.Tensor:
        """The normalised and scaled weight, float32 [out, in, *kernel]."""
        weight = normalize(self.weight.float(), magnitude=self.factor / math.sqrt(self.weight[0].numel()))
        return weight if gain is None else weight * gain

    def forward(self, x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        return convolve(x, self.effective_weight(gain).to(x.dtype))


@torch.no_grad()
def normalize_weights_(net: nn.Module) -> None:
    """Replace the weight of every `MPConv` in `net` by its normalised version, in place.

    This is forced weight normalisation (Karras et al. 2023, Eq. 66). Training calls it before each step: weights would
    otherwise grow, and the effective learning rate would decay with them. `forward` never writes parameters. Other
    layers stay as they are.

    Example: `normalize_weights_(net); optimizer.zero_grad()`, at the start of a training step.
    """
    for module in net.modules():
        if isinstance(module, MPConv):
            module.weight.copy_(normalize(module.weight))


def _dtypes_of_onednn() -> tuple[torch.dtype, ...]:
    """What oneDNN's convolutions compute in on this machine; nothing on processors on which this was not measured."""
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return ()
    return (torch.float32, *([torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []))


_ONEDNN = _dtypes_of_onednn()


class FrozenConv(nn.Module):
    """An `MPConv` that holds its effective weight, gain included, and no parameter.

    On a CPU, `conv2d` computes a single small image without oneDNN, which is faster, and lets oneDNN reorder the weight
    in each call, which takes up to half of the time if the image is small. Here oneDNN computes all images, and the
    reordered weight of the latest shape is kept. Results do not depend on who has reordered it: in compiled code, the
    call does.
    """

    effective: torch.Tensor

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        # not persistent: it must not be saved as a weight, nor normalised again
        self.register_buffer("effective", weight, persistent=False)
        self._packed: tuple[torch.Size, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        if not self._is_for_onednn(x):
            return convolve(x, self.effective)
        padding, ones = [self.effective.shape[-1] // 2] * 2, [1, 1]
        weight = self.effective
        if not torch.compiler.is_compiling() and self._is_worth_packing(x):
            packed = self._packed
            if packed is None or packed[0] != x.shape:
                reorder = torch.ops.mkldnn._reorder_convolution_weight
                packed = self._packed = (x.shape, reorder(weight, padding, ones, ones, 1, list(x.shape)))
            weight = packed[1]
        return torch.ops.mkldnn._convolution_pointwise(x, weight, None, padding, ones, ones, 1, "none", [], "")

    def _is_for_onednn(self, x: torch.Tensor) -> bool:
        if x.device.type != "cpu" or self.effective.ndim != 4 or x.numel() == 0:
            return False
        if x.dtype not in _ONEDNN or x.dtype != self.effective.dtype:
            return False
        if x.requires_grad and torch.is_grad_enabled():
            return False
        # a mode that counts operations or memory, say, does not know oneDNN's
        return torch.compiler.is_compiling() or _get_current_dispatch_mode() is None

    def _is_worth_packing(self, x: torch.Tensor) -> bool:
        return x.shape[0] * x.shape[2:].numel() <= _PACKED_PIXELS and self.effective.numel() <= _PACKED_WEIGHTS

    def _apply(self, function: Callable[..., torch.Tensor], recurse: bool = True) -> "FrozenConv":
        self._packed = None  # of the weight as it was
        return super()._apply(function, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # copies reorder for themselves


class Columns(nn.Module):
    """Columns `start` to `stop` of its input: the output of one layer among several computed as one."""

    def __init__(self, start: int, stop: int):
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        return x[:, self.start : self.stop]
