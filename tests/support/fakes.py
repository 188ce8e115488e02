"""Denoisers whose answers are known in closed form, and snapshots of tiny networks."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from edm2kit.denoiser import AttentionRole, Denoiser
from edm2kit.models.edm2 import Precond
from edm2kit.snapshots.file_format import Header, save_snapshot


def column(sigma: torch.Tensor | float, x: torch.Tensor) -> torch.Tensor:
    """`sigma`, a scalar or one per image, in a shape that broadcasts against `x`."""
    return torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Gaussian:
    """The exact denoiser of N(mean, variance) in every dimension: (v x + sigma^2 m) / (v + sigma^2)."""

    mean: float
    variance: float

    def __call__(self, x, sigma, labels=None):
        sigma = column(sigma, x)
        return (self.variance * x + sigma**2 * self.mean) / (self.variance + sigma**2)


@dataclass(frozen=True)
class Mixture:
    """The exact denoiser of a mixture of isotropic Gaussians; `labels` [N,K] weight the components, None equally."""

    means: torch.Tensor  # [K,C,H,W]
    variance: float

    def __call__(self, x, sigma, labels=None):
        sigma, means = column(sigma, x), self.means.to(x.dtype)
        total = self.variance + sigma**2
        log_p = -((x[:, None] - means) ** 2).flatten(2).sum(2) / (2 * total.flatten(1))
        if labels is not None:
            log_p = log_p + labels.to(x.dtype).log()
        share = torch.einsum("nk,kchw->nchw", log_p.softmax(1), means)
        return (self.variance * x + sigma**2 * share) / total


@dataclass(frozen=True)
class Constant:
    """Always the same image."""

    value: float

    def __call__(self, x, sigma, labels=None):
        return torch.full_like(x, self.value)


@dataclass(frozen=True)
class ByLabel:
    """The exact denoiser of point masses, one value per class; class 0 without labels."""

    values: tuple[float, ...]

    def __call__(self, x, sigma, labels=None):
        values = torch.tensor(self.values, dtype=x.dtype)
        chosen = values[:1] if labels is None else labels.to(x.dtype) @ values
        return column(chosen, x).expand_as(x)


@dataclass(frozen=True)
class Counting:
    """Passes calls on and notes them: `calls` holds (sigma, labels) of every evaluation."""

    inner: Denoiser
    calls: list = field(default_factory=list)

    def __call__(self, x, sigma, labels=None):
        self.calls.append((float(torch.as_tensor(sigma).flatten()[0]), labels))
        return self.inner(x, sigma, labels)


@dataclass(frozen=True)
class Following:
    """Notes, in `heard`, every optional call; its answers are copies that know what they answered to."""

    inner: Denoiser
    heard: list = field(default_factory=list)
    step: int | None = None

    def __call__(self, x, sigma, labels=None):
        self.heard.append(("call", self.step))
        return self.inner(x, sigma, labels)

    def for_images(self, rng):
        self.heard.append(("for_images", len(rng)))
        return Following(self.inner, self.heard)

    def for_step(self, i, sigmas):
        self.heard.append(("for_step", i))
        return Following(self.inner, self.heard, i)

    def after_step(self, x, i, sigmas):
        self.heard.append(("after_step", i))
        return x


@dataclass(frozen=True)
class Jittered:
    """A denoiser that draws at random: one number per image and step, the same for all evaluations of the step."""

    inner: Denoiser
    scale: float = 1.0
    rng: object = None
    shift: torch.Tensor | None = None

    def __call__(self, x, sigma, labels=None):
        return self.inner(x, sigma, labels) + self.scale * self.shift.to(x)

    def for_images(self, rng):
        return Jittered(self.inner, self.scale, rng)

    def for_step(self, i, sigmas):
        return Jittered(self.inner, self.scale, self.rng, self.rng.randn([len(self.rng), 1, 1, 1]))


def tiny_snapshot(path: Path, seed: int = 0, label_names=None, encoder=None, **architecture) -> Path:
    """A snapshot of a random network: 8x8 RGB and 4 classes unless `architecture` says otherwise."""
    arguments = {
        "img_resolution": 8,
        "img_channels": 3,
        "label_dim": 4,
        "model_channels": 4,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [],
        "channels_per_head": 4,
        **architecture,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Precond(**arguments)
    state = net.state_dict()
    # gains start at 0: such a network would ignore its labels and answer the same whatever its weights
    gains = {name: torch.ones([]) for name, value in state.items() if name.endswith("gain")}
    header = Header(arguments, encoder or {"kind": "rgb"}, 1 << 20, 0.1, label_names, dtype="float32")
    save_snapshot(path, {**state, **gains}, header)
    return path


def tiny_vae(folder: Path, seed: int = 0) -> Path:
    """A folder with a random AutoencoderKL of the Stable Diffusion kind that halves images once: [3,2h,2w], [4,h,w]."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
            layers_per_block=1,
        )
    vae.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class CountingNetwork:
    """A network that notes how many images it evaluates, in `images`, whatever it is asked to change inside."""

    inner: Precond
    images: list = field(default_factory=list)

    @property
    def label_dim(self):
        return self.inner.label_dim

    @property
    def attention_roles(self):
        return self.inner.attention_roles

    @property
    def supported_edits(self):
        return self.inner.supported_edits

    def __call__(self, x, sigma, labels=None, **edits):
        self.images.append(len(x))
        return self.inner(x, sigma, labels, **edits)


@dataclass(frozen=True)
class Flat:
    """A network without insides: `inner` as its answer, evenly spread maps where it is asked for attention."""

    inner: Denoiser
    label_dim: int = 0
    supported_edits: frozenset[str] = frozenset({"attention", "embedding", "dropout", "skip", "return_attention"})

    @property
    def attention_roles(self):
        return {
            "enc.8x8_block0": AttentionRole("encoder", 8, 0),
            "dec.8x8_in0": AttentionRole("middle", 8, 1),
            "dec.8x8_block0": AttentionRole("decoder", 8, 2),
        }

    def __call__(self, x, sigma, labels=None, *, return_attention=(), **edits):
        D = self.inner(x, sigma, labels)
        return (
            (D, {name: torch.full([len(x), 2, 64, 64], 1 / 64) for name in return_attention}) if return_attention else D
        )
