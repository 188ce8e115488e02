"""A diffusion transformer, DiT (Peebles and Xie 2023), inside EDM2's preconditioning.

The transformer is diffusers' DiTTransformer2DModel. diffusers is an optional package: `pip install 'diffusers>=0.27'`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from edm2kit.denoiser import AttentionRole
from edm2kit.models.preconditioning import Edits, Preconditioner, RawNetwork

# c_noise = ln(sigma)/4; between sigma = 0.002 and 80 the timestep moves by about 1000, as in the DiT paper
_TIMESTEPS_PER_C_NOISE = 400.0

DIT_DEFAULTS: dict[str, Any] = {
    "patch_size": 2,
    "num_layers": 12,
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "dropout": 0.0,
}


class DiT(RawNetwork):
    """The raw network F of kind "dit": x [N, C, H, W], c_noise [N], labels [N, label_dim] -> [N, C, H, W].

    `patch_size` is the side of a token in pixels; the width is `num_attention_heads` times `attention_head_dim`. The
    defaults are those of DiT-S/2. Half-precision `x` computes under autocast.

    A one-hot label selects a row of the class table, and the zero label the last row, which stands for no class.
    Other label vectors blend the rows.

    Its blocks with attention are "block0", "block1", ... In a transformer all have the same resolution: as roles, the
    first half counts as encoder, the second as decoder, and the block in between as middle.
    """

    supported_edits = frozenset(("attention", "skip", "return_attention"))

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        *,
        patch_size: int,
        num_layers: int,
        num_attention_heads: int,
        attention_head_dim: int,
        dropout: float,
    ):
        super().__init__()
        if patch_size < 1 or img_resolution % patch_size:
            raise ValueError(f"patch_size must divide the resolution {img_resolution}; got {patch_size}")
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1; got {num_layers}")
        width = num_attention_heads * attention_head_dim
        if width < 1 or width % 4:
            raise ValueError(
                f"num_attention_heads * attention_head_dim must be a multiple of 4 for position embeddings; got {width}"
            )
        self.label_dim = label_dim
        self.grid_size = img_resolution // patch_size
        self.transformer = _new_transformer(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=img_channels,
            num_layers=num_layers,
            dropout=dropout,
            sample_size=img_resolution,
            patch_size=patch_size,
            num_embeds_ada_norm=label_dim,
        )
        self.transformer.enable_gradient_checkpointing()
        for index, block in enumerate(self.transformer.transformer_blocks):
            block.attn1.set_processor(_AttentionProcessor(f"block{index}"))
            block.register_forward_hook(partial(_unless_skipped, f"block{index}"), with_kwargs=True)
            block.norm1.emb.class_embedder = ClassEmbedding(label_dim, width)
            _zero_(block.norm1.linear)  # adaLN-Zero: a new block changes nothing
        _zero_(self.transformer.proj_out_2)
        # the table of positions becomes part of the state dict: a network that is built without memory gets it back
        patches = self.transformer.pos_embed
        positions = patches.pos_embed
        del patches.pos_embed
        patches.register_buffer("pos_embed", positions)

    @property
    def attention_roles(self) -> dict[str, AttentionRole]:
        middle = len(self.blocks) // 2
        roles = {}
        for index in range(len(self.blocks)):
            side: Literal["encoder", "middle", "decoder"] = "encoder" if index < middle else "decoder"
            if index == middle:
                side = "middle"
            roles[f"block{index}"] = AttentionRole(side, self.grid_size, index)
        return roles

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.transformer.transformer_blocks)

    def forward(
        self, x: torch.Tensor, c_noise: torch.Tensor, labels: torch.Tensor | None, edits: Edits
    ) -> torch.Tensor:
        if labels is None:
            labels = c_noise.new_zeros(len(x), self.label_dim)
        self.transformer.gradient_checkpointing = self.recomputes(x, edits)
        arguments = {
            "hidden_states": x,
            "timestep": c_noise * _TIMESTEPS_PER_C_NOISE,
            "class_labels": labels,
            "cross_attention_kwargs": {"edits": edits},
        }
        if x.dtype == torch.float32:
            return self.transformer(**arguments).sample
        if x.is_meta:  # a forecast of memory; autocast does not know this device
            weights = {name: weight.to(x.dtype) for name, weight in self.transformer.named_parameters()}
            return torch.func.functional_call(self.transformer, weights, kwargs=arguments).sample
        with torch.autocast(x.device.type, dtype=x.dtype):
            return self.transformer(**arguments).sample


_EDITS_POSITION = 5  # of cross_attention_kwargs, if a block is called by position, as gradient checkpointing does


def _unless_skipped(
    name: str, block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], result: torch.Tensor
) -> torch.Tensor:
    """The result of a block [N, tokens, width], and its input for the images for which it is skipped."""
    given = kwargs["cross_attention_kwargs"] if kwargs else args[_EDITS_POSITION]
    skip = given["edits"].skip
    if name not in skip:
        return result
    return torch.where(skip[name].to(result.device).reshape(-1, 1, 1), args[0], result)


class ClassEmbedding(nn.Module):
    """Embedding of labels [N, K] -> [N, width]: row k of the table for class k, the last row for the zero label."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes + 1, width))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        no_class = 1 - labels.sum(dim=1, keepdim=True)
        return torch.cat([labels, no_class], dim=1).to(self.weight.dtype) @ self.weight


class _AttentionProcessor:
    """What diffusers calls in place of its own self-attention, with the edits of the current call."""

    def __init__(self, name: str):
        self.name = name

    def __call__(
        self,
        attention: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        edits: Edits,
    ) -> torch.Tensor:
        n, tokens, _ = hidden_states.shape
        projections = (attention.to_q, attention.to_k, attention.to_v)
        # each [N, heads, tokens, C/heads]
        q, k, v = (p(hidden_states).reshape(n, tokens, attention.heads, -1).transpose(1, 2) for p in projections)
        y = edits.attend(self.name, q, k, v).transpose(1, 2).reshape(n, tokens, -1)
        project, dropout = attention.to_out
        return dropout(project(y))


def build_dit(
    img_resolution: int,
    img_channels: int,
    label_dim: int,
    sigma_data: float = 0.5,
    logvar_channels: int = 128,
    **dit_kwargs: Any,
) -> Preconditioner:
    """A denoiser of kind "dit": EDM2's preconditioning around a `DiT`, whose arguments are `dit_kwargs`.

    Raises ValueError if diffusers is not installed or the arguments do not fit the resolution.
    """
    raw = DiT(img_resolution, img_channels, label_dim, **{**DIT_DEFAULTS, **dit_kwargs})
    return Preconditioner(raw, img_resolution, img_channels, label_dim, sigma_data, logvar_channels, raw_name="dit")


def freeze_dit_(net: Preconditioner) -> Preconditioner:
    """Prepare a network of kind "dit" for evaluation only, its weights in `net.compute_dtype`; returns it."""
    net.raw.to(net.compute_dtype)
    return net.eval().requires_grad_(False)


def _new_transformer(**arguments: Any) -> Any:
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as error:
        raise ValueError("a network of kind 'dit' needs diffusers: pip install 'diffusers>=0.27'") from error
    return DiTTransformer2DModel(**arguments)


def _zero_(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
