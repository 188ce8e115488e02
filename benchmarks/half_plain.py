"""The plain way on any device and in half precision: the U-Net in half, everything else in float32."""

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.plain import PlainNetwork, PlainTraining, State, dropout, mp_conv, mp_silu


class HalfPlainNetwork(PlainNetwork):
    """A `PlainNetwork` whose U-Net computes in `dtype`."""

    def __init__(self, architecture: Mapping[str, Any], state: State, dtype: torch.dtype, training: bool = False):
        super().__init__(architecture, state, training)
        self.dtype = dtype

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor | float, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        return super().__call__(x, torch.as_tensor(sigma, device=x.device), labels)

    def unet(self, x: torch.Tensor, c_noise: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        return super().unet(x.to(self.dtype), c_noise, labels).float()

    def _residual(self, x: torch.Tensor, emb: torch.Tensor, prefix: str) -> torch.Tensor:
        y = mp_conv(mp_silu(x), self.state[f"{prefix}conv_res0.weight"])
        c = mp_conv(emb, self.state[f"{prefix}emb_linear.weight"], self.state[f"{prefix}emb_gain"]) + 1
        y = mp_silu(y * c[:, :, None, None].to(y.dtype))  # the embedding is float32
        if self.training and self.settings["dropout"]:
            y = dropout(y, self.settings["dropout"])
        return mp_conv(y, self.state[f"{prefix}conv_res1.weight"])


class HalfPlainTraining(PlainTraining):
    """A `PlainTraining` of such a network."""

    def __init__(
        self, architecture: Mapping[str, Any], state: State, ema_exponents: tuple[float, ...], dtype: torch.dtype
    ):
        super().__init__(architecture, state, ema_exponents, P_mean=-0.4, P_std=1.0)
        self.net = HalfPlainNetwork(architecture, self.state, dtype, training=True)

    def loss(self, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        # as in PlainTraining, but on the device of the images; switching torch's default device would slow every call
        sd = self.net.settings["sigma_data"]
        sigma = (torch.randn(len(images), 1, 1, 1, device=images.device) * self.P_std + self.P_mean).exp()
        noisy = images + torch.randn_like(images) * sigma
        weight = (sigma**2 + sd**2) / (sigma * sd) ** 2
        u = self.net.logvar(sigma)
        return weight / u.exp() * (self.net(noisy, sigma, labels) - images) ** 2 + u
