"""Tiny random models of diffusers, their schedulers and pipelines; nothing is downloaded."""

import contextlib
import functools
import json
from pathlib import Path

import torch

TEXT, POOLED = 8, 8  # widths of embeddings
_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def diffusers():
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    with contextlib.suppress(ImportError):
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    return diffusers


def _unet2d(**changes):
    return diffusers().UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), **changes,
    )  # fmt: skip


def _unet2d_condition(**changes):
    options = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "cross_attention_dim": TEXT, "attention_head_dim": 4, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return diffusers().UNet2DConditionModel(**options | changes)


def _sdxl():
    return _unet2d_condition(
        cross_attention_dim=2 * TEXT,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + POOLED,
    )


def _deepfloyd():
    return _unet2d_condition(
        in_channels=3, out_channels=6, encoder_hid_dim=TEXT, addition_embed_type="text", act_fn="gelu",
        addition_embed_type_num_heads=2, resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )  # fmt: skip


def _dit():
    return diffusers().DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=3, sample_size=4,
        patch_size=2, num_embeds_ada_norm=5,
    )  # fmt: skip


def _pixart():
    return diffusers().PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=3, sample_size=4,
        patch_size=2, cross_attention_dim=8, caption_channels=TEXT, use_additional_conditions=False,
    )  # fmt: skip


def _sd3():
    return diffusers().SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=2 * TEXT, caption_projection_dim=8, pooled_projection_dim=2 * POOLED, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def _flux(guidance=True):
    return diffusers().FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=TEXT, pooled_projection_dim=POOLED, guidance_embeds=guidance, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip


_MODELS = {
    "UNet2D": _unet2d,
    "UNet2D with classes": lambda: _unet2d(num_class_embeds=5),
    "SD": _unet2d_condition,
    "SD v": _unet2d_condition,
    "SDXL": _sdxl,
    "IF": _deepfloyd,
    "DiT": _dit,
    "PixArt": _pixart,
    "SD3": _sd3,
    "Flux": _flux,
}
KINDS = tuple(_MODELS)
TAKES_TEXT = ("SD", "SD v", "SDXL", "IF", "PixArt", "SD3", "Flux")


def fresh(name: str, seed: int = 0):
    """A model of this kind with random weights, none of them zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _MODELS[name]().eval().requires_grad_(False)
        for parameter in model.parameters():  # what starts at zero would hide mistakes
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@functools.cache
def model(name: str):
    """The same, made once; not to be changed."""
    return fresh(name)


def scheduler(name: str):
    """The usual scheduler of this kind of model."""
    d = diffusers()
    if name in ("SD3", "Flux"):
        return d.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=name == "Flux")
    if name == "SD v":
        return d.DDIMScheduler(**_SD, prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    if name in ("SD", "SDXL"):
        return d.EulerDiscreteScheduler(**_SD, timestep_spacing="leading", steps_offset=1)
    if name == "IF":
        return d.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True, sample_max_value=1.5
        )
    if name == "UNet2D":
        return d.DDPMScheduler(clip_sample=True)
    return d.DDIMScheduler(clip_sample=False)


def text_tensors(name: str, count: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Made-up encodings of `count` prompts, the null prompt included."""
    rng = torch.Generator().manual_seed(seed)
    encoders = 2 if name in ("SD3", "SDXL") else 1
    found = {"prompt_embeds": torch.randn(count, 6, encoders * TEXT, generator=rng)}
    if name in ("SDXL", "SD3", "Flux"):
        found["pooled"] = torch.randn(count, 2 * POOLED if name == "SD3" else POOLED, generator=rng)
    if name == "PixArt":
        found["mask"] = (torch.arange(6) < torch.arange(2, 2 + count)[:, None]).long()
    return found


def _clip(folder: Path, with_projection: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    letters = [chr(code) for code in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=TEXT, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=POOLED, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    kind = CLIPTextModelWithProjection if with_projection else CLIPTextModel
    return tokenizer, kind(config).eval()


def _t5():
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in "▁abcdefghijklmnopqrstuvwxyz")]
    tokenizer = T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=12)
    config = T5Config(vocab_size=len(vocab), d_model=TEXT, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config).eval()


def vae(latent_channels=4, seed=0, **changes):
    """An AutoencoderKL that halves the size."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return diffusers().AutoencoderKL(
            latent_channels=latent_channels, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=8,
            **changes,
        ).eval()  # fmt: skip


def pipeline(name: str, folder: Path, seed: int = 0, text_seed: int = 0, **vae_options):
    """A pipeline of this kind; `folder` is for the files of its tokenizer."""
    d = diffusers()
    net, times = fresh(name, seed), scheduler(name)
    if name in ("SD3", "Flux"):
        vae_options = {"shift_factor": 0.1, "scaling_factor": 0.36, **vae_options}
    with torch.random.fork_rng():
        torch.manual_seed(text_seed)
        if name == "UNet2D":
            return d.DDIMPipeline(net, times)
        if name == "DiT":
            return d.DiTPipeline(net, vae(**vae_options), times, id2label={k: f"class {k}" for k in range(5)})
        if name == "IF":
            tokenizer, encoder = _t5()
            return d.IFPipeline(tokenizer, encoder, net, times, None, None, None, requires_safety_checker=False)
        if name == "PixArt":
            tokenizer, encoder = _t5()
            return d.PixArtAlphaPipeline(tokenizer, encoder, vae(**vae_options), net, times)
        tokenizer, encoder = _clip(folder / "clip", with_projection=name == "SD3")
        if name in ("SD", "SD v"):
            return d.StableDiffusionPipeline(
                vae(**vae_options), encoder, tokenizer, net, times, None, None, requires_safety_checker=False
            )
        if name == "Flux":
            t5_tokenizer, t5 = _t5()
            return d.FluxPipeline(times, vae(**vae_options), encoder, tokenizer, t5, t5_tokenizer, net)
        if name == "SDXL":
            second = _clip(folder / "clip2", with_projection=True)
            return d.StableDiffusionXLPipeline(
                vae(**vae_options), encoder, second[1], tokenizer, second[0], net, times, add_watermarker=False
            )
        if name == "SD3":
            return d.StableDiffusion3Pipeline(
                net, times, vae(**vae_options), encoder, tokenizer, encoder, tokenizer, None, None
            )
        raise KeyError(name)


def save(name: str, folder: Path, seed: int = 0, **options) -> Path:
    """A folder of this pipeline, as `save_pretrained` writes it."""
    pipeline(name, folder.parent / f"{folder.name}-files", seed, **options).save_pretrained(folder)
    return folder


def write_lora(folder, name="SD", component="unet", seed=0):
    """A LoRA of random weights in the format of diffusers."""
    import peft

    model = fresh(name)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    weights = peft.get_peft_model_state_dict(model)
    rng = torch.Generator().manual_seed(seed)
    weights = {key: 0.5 * torch.randn(tensor.shape, generator=rng) for key, tensor in weights.items()}
    kind = diffusers().StableDiffusionPipeline
    kind.save_lora_weights(folder, **{f"{component}_lora_layers": weights})
    return folder, weights
