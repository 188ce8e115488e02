"""The interior of diffusers models: where their attention is, and changing it for the length of one call.

Nothing of a model is replaced. For an edited call, hooks are put on the modules concerned and taken off afterwards;
inside the attention of an edited block, PyTorch's attention function is diverted (`TorchFunctionMode`).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from edm2kit.denoiser import AttentionRole
from edm2kit.models.preconditioning import Edits

# class of a transformer block -> its modules with self-attention
_SELF_ATTENTION: dict[str, tuple[str, ...]] = {
    "BasicTransformerBlock": ("attn1",),
    "JointTransformerBlock": ("attn", "attn2"),
    "FluxTransformerBlock": ("attn",),
    "FluxSingleTransformerBlock": ("attn",),
}
# class of a module -> those of its parts whose outputs are what a block adds to its input, besides attention
_BRANCHES: dict[str, tuple[str, ...]] = {
    "BasicTransformerBlock": ("attn1.to_out", "attn2.to_out", "ff"),
    "JointTransformerBlock": ("attn.to_out", "attn.to_add_out", "attn2.to_out", "ff", "ff_context"),
    "FluxTransformerBlock": ("attn.to_out", "attn.to_add_out", "ff", "ff_context"),
    "FluxSingleTransformerBlock": ("proj_out",),
    "ResnetBlock2D": ("dropout",),
}
_EMBEDDERS = ("time_embedding", "timestep_embedder")  # not add_embedding, which embeds image sizes or text


def attention_modules(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules with self-attention of each block, by its name; in a UNet downwards, middle, upwards."""
    found: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        is_block = kind in _SELF_ATTENTION or kind == "Attention"
        if not is_block or getattr(module, "only_cross_attention", False):
            continue
        if kind in _SELF_ATTENTION:
            parts = [getattr(module, part, None) for part in _SELF_ATTENTION[kind]]
            found[name] = [part for part in parts if isinstance(part, nn.Module)]
        elif name.split(".")[-2:-1] == ["attentions"]:
            found[name] = [module]  # UNets with attention as blocks of its own
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0].split(".")[0], 0)))


def attention_roles(model: nn.Module, size: int) -> dict[str, AttentionRole]:
    """The role of each block with self-attention, for images or latents of `size` pixels."""
    names = list(attention_modules(model))
    if not hasattr(model, "down_blocks"):
        return _transformer_roles(names, size // patch_size(model))
    resolutions = _unet_resolutions(model, size)
    roles = {}
    for depth, name in enumerate(names):
        first, second = [*name.split("."), ""][:2]
        side: Literal["encoder", "middle", "decoder"] = "encoder" if first == "down_blocks" else "decoder"
        key = f"{first}.{second}"
        if first == "mid_block":
            side, key = "middle", first
        roles[name] = AttentionRole(side, resolutions[key], depth)
    return roles


def _transformer_roles(names: list[str], size: int) -> dict[str, AttentionRole]:
    """As in this project's `DiT`: the first half counts as encoder, the block at its end as middle."""
    middle = len(names) // 2
    roles = {}
    for depth, name in enumerate(names):
        side: Literal["encoder", "middle", "decoder"] = "encoder" if depth < middle else "decoder"
        if depth == middle:
            side = "middle"
        roles[name] = AttentionRole(side, size, depth)
    return roles


def _unet_resolutions(model: Any, size: int) -> dict[str, int]:
    """Height of the maps inside each block of a UNet."""
    found, height = {}, size
    for k, block in enumerate(model.down_blocks):
        found[f"down_blocks.{k}"] = height
        if getattr(block, "downsamplers", None) is not None:
            height = (height + 1) // 2
    found["mid_block"] = height
    heights = list(dict.fromkeys(found.values()))
    for k, block in enumerate(model.up_blocks):
        found[f"up_blocks.{k}"] = height
        if getattr(block, "upsamplers", None) is not None:
            height = heights[heights.index(height) - 1]
    return found


def patch_size(model: Any) -> int:
    """Side of a token in pixels of what the model takes; Flux takes latents as tokens of 2x2."""
    return 2 if type(model).__name__ == "FluxTransformer2DModel" else int(model.config.patch_size)


@contextlib.contextmanager
def edited(model: nn.Module, edits: Edits, num_image_tokens: int | None, text_first: bool) -> Iterator[None]:
    """Run calls of `model` inside with `edits`.

    `num_image_tokens` is the number of tokens of an image in a transformer, None in a UNet, whose blocks differ.
    `text_first` says which come first where text and image attend together. Raises ValueError, when the call is over,
    if the attention of an edited block did not pass through PyTorch's attention function.
    """
    with contextlib.ExitStack() as stack:
        modes = []
        for name, modules in attention_modules(model).items():
            if name not in edits.attention and name not in edits.return_attention:
                continue
            for module in modules:
                mode = _EditedAttention(name, edits, num_image_tokens, text_first)
                modes.append(mode)
                stack.callback(module.register_forward_pre_hook(mode.enter).remove)
                stack.callback(module.register_forward_hook(mode.leave, always_call=True).remove)
        for name, module in model.named_modules():
            if edits.embedding is not None and name.split(".")[-1] in _EMBEDDERS:
                change = edits.embedding
                stack.callback(module.register_forward_hook(lambda m, a, y, f=change: f(y)).remove)
            if edits.dropout is not None or name in edits.skip:
                for branch in _branches(module):
                    stack.callback(branch.register_forward_hook(_branch_hook(name, edits)).remove)
        for name in edits.skip:
            module = model.get_submodule(name)
            if type(module).__name__ == "Attention":  # a block of its own; its input is added inside
                output: Any = module.to_out
                stack.callback(output[-1].register_forward_hook(_branch_hook(name, edits)).remove)
        yield
        for mode in modes:
            if not mode.was_used:
                raise ValueError(
                    f"the attention of {mode.block} does not use PyTorch's scaled_dot_product_attention, so it cannot "
                    "be edited; choose the attention backend 'native', and no xformers"
                )


def _branches(module: nn.Module) -> Iterator[nn.Module]:
    for path in _BRANCHES.get(type(module).__name__, ()):
        found: Any = module
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.ModuleList):  # to_out: a linear layer, then dropout
            found = found[-1]
        if isinstance(found, nn.Module):
            yield found


def _branch_hook(block: str, edits: Edits) -> Callable[..., torch.Tensor]:
    def hook(module: nn.Module, arguments: Any, y: torch.Tensor) -> torch.Tensor:
        if edits.dropout is None:
            return edits.unless_skipped(block, y)
        if y.ndim == 4:
            return edits.unless_skipped(block, edits.dropout(block, y))
        tokens = y.transpose(1, 2).unsqueeze(3)  # [N, tokens, C] -> [N, C, tokens, 1]
        changed = edits.dropout(block, tokens).squeeze(3).transpose(1, 2).to(y.dtype)
        return edits.unless_skipped(block, changed)

    return hook


class _EditedAttention(TorchFunctionMode):
    """Inside a block's attention: diverts PyTorch's attention function to the edit."""

    def __init__(self, block: str, edits: Edits, num_image_tokens: int | None, text_first: bool):
        super().__init__()
        self.block, self.edits, self.was_used = block, edits, False
        self.num_image_tokens, self.text_first = num_image_tokens, text_first

    def enter(self, module: nn.Module, arguments: Any) -> None:
        self.__enter__()

    def leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.was_used = True
        q, k, v = (args[i] if i < len(args) else kwargs[("query", "key", "value")[i]] for i in range(3))
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        scale = kwargs.get("scale")
        if scale is not None and abs(scale * q.shape[3] ** 0.5 - 1) > 1e-6:
            raise ValueError(f"the attention of {self.block} has a scale of its own, so it cannot be edited")
        return self._attend(q, k, v, mask)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention of all tokens, with that of image tokens among themselves edited.

        Softmax over image and text tokens is a mean of the softmaxes over either, weighted by the mass on each. The
        edit replaces the first; its mass, and the attention to and of text tokens, stay.
        """
        num_queries, num_keys = q.shape[2], k.shape[2]
        n = num_queries if self.num_image_tokens is None else self.num_image_tokens
        if n == num_keys == num_queries:
            if mask is not None:
                raise ValueError(f"the attention of {self.block} has a mask, so it cannot be edited")
            return self.edits.attend(self.block, q, k, v)
        if n > num_queries or n > num_keys:
            raise ValueError(f"{self.block} has {num_keys} tokens to attend to, fewer than the {n} of the image")
        keys, queries = self._image_part(num_keys, n), self._image_part(num_queries, n)
        image_q, image_k, image_v = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        new = self.edits.attend(self.block, image_q, image_k, image_v)
        logits = image_q.float() @ k.float().transpose(2, 3) * q.shape[3] ** -0.5
        if mask is not None:
            rows = mask if mask.shape[-2] == 1 else mask[..., queries, :]
            logits = logits.masked_fill(~rows, -torch.inf) if rows.dtype == torch.bool else logits + rows.float()
        weights = logits.softmax(dim=3)
        mass = weights[..., keys].sum(dim=3, keepdim=True)
        weights[..., keys] = 0
        result = nn.functional.scaled_dot_product_attention(q, k, v, mask) if n < num_queries else torch.empty_like(q)
        result[:, :, queries] = (mass * new.float() + weights @ v.float()).to(q.dtype)
        return result

    def _image_part(self, count: int, n: int) -> slice:
        """Where the n image tokens are among `count` tokens."""
        return slice(count - n, count) if self.text_first else slice(0, n)
