"""Models of the diffusers library as denoisers, with an interior that guidance can reach.

`FAMILIES` names the model classes and how each is called. What surrounds a model (its scheduler, VAE, text encoder)
is read in diffusers_pipeline.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from edm2kit.conditions import ConditionLike, TextPrompts, condition_tensor
from edm2kit.denoiser import AttentionRole
from edm2kit.models.adapters import Schedule, to_D
from edm2kit.models.diffusers_interior import attention_roles, edited, patch_size
from edm2kit.models.preconditioning import Edits


@dataclass(frozen=True)
class Family:
    """How the models of one class are called.

    - `call(network, x_t, t, condition)` -> prediction [N, C or 2C, H, W]; `condition` is a dict of encoded prompts for
      models that take text, class indices [N] for those that take classes, else None.
    - `takes`: "text", "classes" or "nothing", as far as the class alone decides (`UNet2DModel`: see its configuration).
    - `text_first`: whether text tokens come before those of the image where both attend together.
    - `latent_channels(config)`: channels of the images or latents. `refuse(config)`: why such a model cannot be used.
    """

    call: Callable[..., torch.Tensor]
    takes: str
    text_first: bool = False
    latent_channels: Callable[[Any], int] = lambda config: int(config.in_channels)
    refuse: Callable[[Any], str | None] = lambda config: None
    is_unet: bool = False


def _call_unet2d(net: "DiffusersNetwork", x: torch.Tensor, t: torch.Tensor, classes: Any) -> torch.Tensor:
    if classes is None:
        return net.model(x, t, return_dict=False)[0]
    return net.model(x, t, class_labels=classes, return_dict=False)[0]


def _call_unet2d_condition(net: "DiffusersNetwork", x: torch.Tensor, t: torch.Tensor, text: Any) -> torch.Tensor:
    more = {}
    if net.model.config.addition_embed_type == "text_time":  # SDXL: the size of the image, uncropped
        height, width = (side * net.pixels_per_latent for side in x.shape[2:])
        sizes = x.new_tensor([height, width, 0, 0, height, width]).expand(len(x), -1)
        more["added_cond_kwargs"] = {"text_embeds": text["pooled"], "time_ids": sizes}
    return net.model(x, t, encoder_hidden_states=text["prompt_embeds"], return_dict=False, **more)[0]


def _call_dit(net: "DiffusersNetwork", x: torch.Tensor, t: torch.Tensor, classes: Any) -> torch.Tensor:
    return net.model(x, timestep=t, class_labels=classes, return_dict=False)[0]


def _call_pixart(net: "DiffusersNetwork", x: torch.Tensor, t: torch.Tensor, text: Any) -> torch.Tensor:
    sizes: dict[str, torch.Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if net.model.config.sample_size == 128:  # PixArt-alpha at 1024 pixels
        height, width = (side * net.pixels_per_latent for side in x.shape[2:])
        sizes["resolution"] = x.new_tensor([height, width]).expand(len(x), -1)
        sizes["aspect_ratio"] = x.new_tensor([height / width]).expand(len(x), -1)
    return net.model(
        x,
        encoder_hidden_states=text["prompt_embeds"],
        encoder_attention_mask=text["mask"],
        timestep=t,
        added_cond_kwargs=sizes,
        return_dict=False,
    )[0]


def _call_sd3(net: "DiffusersNetwork", x: torch.Tensor, t: torch.Tensor, text: Any) -> torch.Tensor:
    return net.model(
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=text["prompt_embeds"],
        pooled_projections=text["pooled"],
        return_dict=False,
    )[0]


def _call_flux(net: "DiffusersNetwork", x: torch.Tensor, t: torch.Tensor, text: Any) -> torch.Tensor:
    n, channels, height, width = x.shape
    rows, columns = height // 2, width // 2
    # a token is a square of 2x2 latents; its position is (0, row, column)
    tokens = x.reshape(n, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, -1)
    places = x.new_zeros(rows, columns, 3)
    places[..., 1] = torch.arange(rows, device=x.device)[:, None]
    places[..., 2] = torch.arange(columns, device=x.device)
    strength = None
    if net.model.config.guidance_embeds:
        strength = torch.full([n], net.embedded_guidance, device=x.device)
    output = net.model(
        hidden_states=tokens,
        timestep=t / 1000,
        guidance=strength,
        pooled_projections=text["pooled"],
        encoder_hidden_states=text["prompt_embeds"],
        txt_ids=x.new_zeros(text["prompt_embeds"].shape[1], 3),
        img_ids=places.reshape(-1, 3),
        return_dict=False,
    )[0]
    squares = output.reshape(n, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(n, channels, height, width)


def _refuse_unet2d_condition(config: Any) -> str | None:
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        return "it takes class labels or noise levels besides text, as super-resolution stages do"
    if config.addition_embed_type not in (None, "text", "text_time"):
        return f"it takes a condition of the kind {config.addition_embed_type!r}"
    return None


# class of a model in diffusers -> how to call it
FAMILIES: dict[str, Family] = {
    "UNet2DModel": Family(_call_unet2d, "nothing", is_unet=True),
    "UNet2DConditionModel": Family(
        _call_unet2d_condition, "text", text_first=True, refuse=_refuse_unet2d_condition, is_unet=True
    ),
    "DiTTransformer2DModel": Family(_call_dit, "classes"),
    "PixArtTransformer2DModel": Family(_call_pixart, "text"),
    "SD3Transformer2DModel": Family(_call_sd3, "text"),
    "FluxTransformer2DModel": Family(
        _call_flux, "text", text_first=True, latent_channels=lambda config: int(config.in_channels) // 4
    ),
}


class DiffusersNetwork:
    """A model of diffusers as a denoiser, called as `net(x, sigma, condition)`.

    - `model`: of a class in `FAMILIES`, in eval mode; it computes in its own dtype. `schedule` and `prediction`: as
      for `edm2kit.models.adapters.Adapted`; see `diffusers_pipeline.schedule_of`.
    - `size`: height of the images or latents it generates, None for the one it was trained at.
    - `prompts_name`: by which name the model finds its encodings in `TextPrompts`.
    - `pixels_per_latent`: how much the VAE enlarges, 1 without a VAE. `embedded_guidance`: for models that were
      distilled to take a guidance weight (Flux).
    - `lora`: an adapter of the model to switch on in its own calls, and off in those of other networks on it;
      `lora_scale`: how strongly.

    Raises ValueError for a model of another class or kind.

    Example: `DiffusersNetwork(UNet2DModel.from_pretrained(folder), *schedule_of(scheduler))`.
    """

    supported_edits = frozenset(("attention", "return_attention", "embedding", "dropout", "skip"))

    def __init__(
        self,
        model: Any,
        schedule: Schedule,
        prediction: str,
        *,
        size: int | None = None,
        prompts_name: str = "net",
        pixels_per_latent: int = 1,
        embedded_guidance: float = 3.5,
        lora: str | None = None,
        lora_scale: float = 1.0,
    ):
        kind = type(model).__name__
        if kind not in FAMILIES:
            raise ValueError(f"models of the class {kind} are not known; known: {', '.join(FAMILIES)}")
        self.family = FAMILIES[kind]
        reason = self.family.refuse(model.config)
        if reason:
            raise ValueError(f"this {kind} cannot generate images from noise alone: {reason}")
        self.model, self.schedule, self.prediction = model.eval().requires_grad_(False), schedule, prediction
        self.prompts_name, self.pixels_per_latent = prompts_name, pixels_per_latent
        self.embedded_guidance, self.lora, self.lora_scale = embedded_guidance, lora, lora_scale
        self.img_channels = self.family.latent_channels(model.config)
        self.img_resolution = size or trained_size(model)

    @cached_property
    def label_dim(self) -> int:
        """Number of classes; for text the width of an embedding; 0 if the model takes neither."""
        config = self.model.config
        if self.family.takes == "text":
            widths = ("cross_attention_dim", "joint_attention_dim", "caption_channels")
            width = next((config[name] for name in widths if config.get(name)), 1)
            return int(width if isinstance(width, int) else width[0])
        return int(config.get("num_class_embeds") or config.get("num_embeds_ada_norm") or 0)

    @property
    def takes_text(self) -> bool:
        """Whether the condition is `TextPrompts`."""
        return self.family.takes == "text"

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The lowest and the highest noise level that the network knows."""
        return self.schedule.sigma_range

    @cached_property
    def attention_roles(self) -> Mapping[str, AttentionRole]:
        """Role of each block with self-attention, by the names that `attention` and `return_attention` take."""
        return attention_roles(self.model, self.img_resolution)

    @property
    def attention_blocks(self) -> Sequence[str]:
        """Names of the blocks with self-attention, in the order of computation."""
        return list(self.attention_roles)

    def __call__(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        condition: ConditionLike = None,
        /,
        *,
        attention: Mapping[str, Callable[..., torch.Tensor]] | None = None,
        embedding: Callable[[torch.Tensor], torch.Tensor] | None = None,
        dropout: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
        skip: Mapping[str, torch.Tensor] | None = None,
        return_attention: Sequence[str] = (),
    ) -> Any:
        """D in the dtype of x (float32 or float64); with `return_attention` also the maps; see `denoiser.Network`.

        `condition`: labels [N, K] or `ClassLabels`, one-hot or zero; `TextPrompts`; None for no class or without any.
        Raises ValueError for a condition of another kind, and for a block without self-attention.
        """
        edits = Edits(attention or {}, embedding, dropout, skip=skip or {}, return_attention=return_attention)
        for block in (*edits.attention, *edits.skip, *edits.return_attention):
            if block not in self.attention_roles:
                known = ", ".join(self.attention_roles)
                raise ValueError(f"no self-attention in a block called {block!r}; blocks with it: {known}")
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        a, s, t = self.schedule.at(sigma)
        a, s, sigma = (value.reshape(-1, 1, 1, 1) for value in (a, s, sigma))
        x_t, inputs = (a * x).to(self.model.dtype), self._condition(x, condition)
        self._switch_lora()
        if edits:
            tokens = None
            if not self.family.is_unet:
                tokens = x.shape[2] * x.shape[3] // patch_size(self.model) ** 2
            with edited(self.model, edits, tokens, self.family.text_first):
                output = self.family.call(self, x_t, t.float(), inputs)
        else:
            output = self.family.call(self, x_t, t.float(), inputs)
        D = to_D(self.prediction, output, x, sigma, a, s)
        return (D, edits.maps) if return_attention else D

    def _switch_lora(self) -> None:
        if not getattr(self.model, "peft_config", None):
            return
        if self.lora is None:
            self.model.disable_lora()
        else:
            self.model.enable_lora()
            self.model.set_adapters(self.lora, self.lora_scale)

    def _condition(self, x: torch.Tensor, condition: ConditionLike) -> Any:
        if self.takes_text:
            if not isinstance(condition, TextPrompts):
                given = "nothing" if condition is None else f"a {type(condition).__name__}"
                raise ValueError(f"this network takes text prompts (TextPrompts); got {given}")
            return condition.encoded(self.prompts_name, x.device, self.model.dtype)
        if not self.label_dim:
            return None
        return self._class_indices(x, condition_tensor(condition))

    def _class_indices(self, x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """int64 [N]; the index after the last class, for no class, if the model has an embedding for it."""
        if labels is None:
            labels = x.new_zeros(len(x), self.label_dim)
        if labels.shape != (len(x), self.label_dim):
            raise ValueError(f"labels have shape {list(labels.shape)}; expected [{len(x)}, {self.label_dim}]")
        is_one_hot = (labels != 0).sum(dim=1) <= 1
        total = labels.sum(dim=1)
        if not bool((is_one_hot & ((total == 1) | (total == 0))).all()):
            raise ValueError("this network looks classes up in a table, so its labels must be one-hot, or zero")
        no_class = total == 0
        if self.family.takes != "classes" and bool(no_class.any()):
            raise ValueError("this network has no embedding for 'no class'; use a method that keeps the classes")
        return torch.where(no_class, self.label_dim, labels.argmax(dim=1))


def trained_size(model: Any) -> int:
    """Height of the images or latents that a model was trained at, according to its configuration.

    Raises ValueError if it is not square.
    """
    size = model.config.get("sample_size")
    if size is None:
        return 128  # Flux, for 1024 pixels
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise ValueError(f"the model was trained at {list(size)}; only square images are supported, so give a size")
    return int(size[0])
