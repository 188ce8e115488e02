"""The plain way: the published formulas as they are stated, without optimisation.

The baseline of the benchmarks and the oracle of their tests. Eager, NCHW, float32, weights normalised on every call,
attention by einsum and softmax, one parameter at a time. Shares no code with edm2kit.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import avg_pool2d, conv2d, dropout, interpolate, linear, silu

State = Mapping[str, torch.Tensor]
Denoise = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def normalize(x: torch.Tensor, dims: list[int] | None = None, eps: float = 1e-4) -> torch.Tensor:
    """Normalise to unit RMS over `dims`, by default all but the first."""
    dims = list(range(1, x.ndim)) if dims is None else dims
    norm = torch.linalg.vector_norm(x.float(), dim=dims, keepdim=True)
    return (x / (eps + norm * math.sqrt(norm.numel() / x.numel()))).to(x.dtype)


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    return silu(x) / 0.596


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    return torch.lerp(a, b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    c = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2))
    return torch.cat([c / math.sqrt(a.shape[1]) * (1 - t) * a, c / math.sqrt(b.shape[1]) * t * b], dim=1)


def mp_conv(x: torch.Tensor, weight: torch.Tensor, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
    effective = (normalize(weight.float()) * (gain / math.sqrt(weight[0].numel()))).to(x.dtype)
    if weight.ndim == 2:
        return linear(x, effective)
    return conv2d(x, effective, padding=weight.shape[-1] // 2)


class PlainNetwork:
    """D(x; sigma, labels) from the architecture and state dict of a `Precond`; uses the tensors without copying.

    `training` enables dropout. `logvar(sigma)` is the uncertainty u, [N, 1, 1, 1].
    """

    def __init__(self, architecture: Mapping[str, Any], state: State, training: bool = False):
        self.state, self.training = state, training
        self.label_dim = architecture["label_dim"]
        defaults = {"sigma_data": 0.5, "label_balance": 0.5, "concat_balance": 0.5, "res_balance": 0.3}
        defaults |= {"attn_balance": 0.3, "channels_per_head": 64, "clip_act": 256.0, "dropout": 0.0}
        self.settings = {name: architecture.get(name, value) for name, value in defaults.items()}
        # state dicts list the blocks in the order of computation
        self.blocks = {
            side: list(dict.fromkeys(key.split(".")[2] for key in state if key.startswith(f"unet.{side}.")))
            for side in ("enc", "dec")
        }

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor | float, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(len(x), 1, 1, 1)
        sd = self.settings["sigma_data"]
        c_skip = sd**2 / (sigma**2 + sd**2)
        c_out = sigma * sd / (sigma**2 + sd**2).sqrt()
        c_in = 1 / (sd**2 + sigma**2).sqrt()
        if labels is None and self.label_dim:
            labels = torch.zeros(len(x), self.label_dim)
        return c_skip * x + c_out * self.unet(c_in * x, sigma.flatten().log() / 4, labels)

    def logvar(self, sigma: torch.Tensor) -> torch.Tensor:
        features = self._fourier(sigma.flatten().log() / 4, "logvar_fourier")
        return mp_conv(features, self.state["logvar_linear.weight"]).reshape(-1, 1, 1, 1)

    def unet(self, x: torch.Tensor, c_noise: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        state, settings = self.state, self.settings
        emb = mp_conv(self._fourier(c_noise, "unet.emb_fourier"), state["unet.emb_noise.weight"])
        if self.label_dim:
            by_label = mp_conv(labels * math.sqrt(self.label_dim), state["unet.emb_label.weight"])
            emb = mp_sum(emb, by_label, settings["label_balance"])
        emb = mp_silu(emb)
        x, skips = torch.cat([x, torch.ones_like(x[:, :1])], dim=1), []
        for name in self.blocks["enc"]:
            weight = state.get(f"unet.enc.{name}.weight")
            x = self._encoder_block(x, emb, f"unet.enc.{name}.") if weight is None else mp_conv(x, weight)
            skips.append(x)
        for name in self.blocks["dec"]:
            if "_block" in name:
                x = mp_cat(x, skips.pop(), settings["concat_balance"])
            x = self._decoder_block(x, emb, f"unet.dec.{name}.")
        return mp_conv(x, state["unet.out_conv.weight"], state["unet.out_gain"])

    def _fourier(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        phase = torch.outer(x, self.state[f"{prefix}.freqs"]) + self.state[f"{prefix}.phases"]
        return math.sqrt(2) * phase.cos()

    def _encoder_block(self, x: torch.Tensor, emb: torch.Tensor, prefix: str) -> torch.Tensor:
        if "_down" in prefix:
            x = avg_pool2d(x, 2)
        if f"{prefix}conv_skip.weight" in self.state:
            x = mp_conv(x, self.state[f"{prefix}conv_skip.weight"])
        x = normalize(x, dims=[1])
        return self._rest(mp_sum(x, self._residual(x, emb, prefix), self.settings["res_balance"]), prefix)

    def _decoder_block(self, x: torch.Tensor, emb: torch.Tensor, prefix: str) -> torch.Tensor:
        if "_up" in prefix:
            x = interpolate(x, scale_factor=2, mode="nearest")
        y = self._residual(x, emb, prefix)
        if f"{prefix}conv_skip.weight" in self.state:
            x = mp_conv(x, self.state[f"{prefix}conv_skip.weight"])
        return self._rest(mp_sum(x, y, self.settings["res_balance"]), prefix)

    def _residual(self, x: torch.Tensor, emb: torch.Tensor, prefix: str) -> torch.Tensor:
        y = mp_conv(mp_silu(x), self.state[f"{prefix}conv_res0.weight"])
        c = mp_conv(emb, self.state[f"{prefix}emb_linear.weight"], self.state[f"{prefix}emb_gain"]) + 1
        y = mp_silu(y * c[:, :, None, None])
        if self.training and self.settings["dropout"]:
            y = dropout(y, self.settings["dropout"])
        return mp_conv(y, self.state[f"{prefix}conv_res1.weight"])

    def _rest(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        if f"{prefix}attn_qkv.weight" in self.state:
            x = mp_sum(x, self._attention(x, prefix), self.settings["attn_balance"])
        clip = self.settings["clip_act"]
        return x if clip is None else x.clip(-clip, clip)

    def _attention(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        n, channels, height, width = x.shape
        width_of_head = self.settings["channels_per_head"]
        qkv = mp_conv(x, self.state[f"{prefix}attn_qkv.weight"])
        qkv = qkv.reshape(n, channels // width_of_head, width_of_head, 3, height * width)
        q, k, v = normalize(qkv, dims=[2]).unbind(3)
        weights = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(width_of_head)).softmax(dim=3)
        y = torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(x.shape)
        return mp_conv(y, self.state[f"{prefix}attn_proj.weight"])


class PlainTraining:
    """A training run, one step at a time: loss, backward, Adam, averages, each weight separately.

    `weights` are the network's parameters, `state` all of its tensors, `averages` one state per EMA length in
    `ema_exponents` (gamma of the power function).
    """

    def __init__(
        self,
        architecture: Mapping[str, Any],
        state: State,
        ema_exponents: tuple[float, ...],
        P_mean: float,
        P_std: float,
    ):
        buffers = ("freqs", "phases")
        self.state = {name: value.detach().clone() for name, value in state.items()}
        self.weights = {name: value for name, value in self.state.items() if not name.endswith(buffers)}
        for weight in self.weights.values():
            weight.requires_grad_()
        self.net = PlainNetwork(architecture, self.state, training=True)
        self.averages = [{n: v.detach().clone() for n, v in self.state.items()} for _ in ema_exponents]
        self.ema_exponents, self.P_mean, self.P_std = ema_exponents, P_mean, P_std
        self.adam = torch.optim.Adam(self.weights.values(), betas=(0.9, 0.99), eps=1e-8)
        self.nimg = 0

    def loss(self, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Loss per element, [N, C, H, W]; noise levels, then noise, from torch's global generator."""
        sd = self.net.settings["sigma_data"]
        sigma = (torch.randn(len(images), 1, 1, 1) * self.P_std + self.P_mean).exp()
        noisy = images + torch.randn_like(images) * sigma
        weight = (sigma**2 + sd**2) / (sigma * sd) ** 2
        u = self.net.logvar(sigma)
        return weight / u.exp() * (self.net(noisy, sigma, labels) - images) ** 2 + u

    def step(self, images: torch.Tensor, labels: torch.Tensor | None, lr: float) -> torch.Tensor:
        """One optimizer step on one batch; returns the loss per element."""
        with torch.no_grad():
            for weight in self.weights.values():
                if weight.ndim > 1:
                    weight.copy_(normalize(weight))
        self.adam.zero_grad()
        loss = self.loss(images, labels)
        (loss.sum() / len(images)).backward()
        for weight in self.weights.values():
            weight.grad = torch.nan_to_num(weight.grad, nan=0, posinf=0, neginf=0)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.nimg += len(images)
        self.average(len(images))
        return loss.detach()

    @torch.no_grad()
    def average(self, batch_size: int) -> None:
        """Add the weights to every average."""
        for average, exponent in zip(self.averages, self.ema_exponents, strict=True):
            beta = (1 - batch_size / self.nimg) ** (exponent + 1)
            for name, value in self.state.items():
                if name in self.weights:
                    average[name].copy_(average[name].lerp(value, 1 - beta))
                else:
                    average[name].copy_(value)


@torch.no_grad()
def guided_heun(
    net: Denoise,
    guide: Denoise,
    weight: float,
    noise: torch.Tensor,
    labels: torch.Tensor | None,
    num_steps: int = 32,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> torch.Tensor:
    """`num_steps` Heun steps of D_guide + weight * (D - D_guide); both networks in every evaluation."""
    ramp = torch.arange(num_steps, dtype=torch.float64) / (num_steps - 1)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)]).float()

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.lerp(guide(x, sigma, labels), net(x, sigma, labels), weight)

    x = noise * sigmas[0]
    for i in range(num_steps):
        slope = (x - denoise(x, sigmas[i])) / sigmas[i]
        x_next = x + (sigmas[i + 1] - sigmas[i]) * slope
        if i < num_steps - 1:
            slope_next = (x_next - denoise(x_next, sigmas[i + 1])) / sigmas[i + 1]
            x_next = x + (sigmas[i + 1] - sigmas[i]) * (slope + slope_next) / 2
        x = x_next
    return x
