"""Pipelines of diffusers in parts: folders, schedules, prompts, VAEs and LoRAs; what is missing is one clear line."""

import json
import shutil
import sys

import pytest
import torch

from edm2kit.conditions import TextPrompts
from edm2kit.models import diffusers_pipeline
from edm2kit.models.diffusers_loading import LatentDecoder, in_space_of, load_diffusers, with_lora
from edm2kit.models.diffusers_network import DiffusersNetwork
from edm2kit.models.diffusers_pipeline import (
    encode_prompts,
    limit_of,
    open_repository,
    own_levels,
    prompt_encoder_identity,
    schedule_of,
)
from edm2kit.models.encoders import RGBEncoder, StabilityVAEEncoder
from tests.support import tiny_diffusers as tiny
from tests.support.fakes import Gaussian

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
TEXTS = ("a cat", "a dog on a mat")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of pipelines by kind, written when they are first asked for."""
    root, made = tmp_path_factory.mktemp("pipelines"), {}

    def folder(name, **options):
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = tiny.save(name, root / f"pipeline{len(made)}", **options)
        return made[key]

    return folder


THEIR_ENCODERS = {
    "SD": lambda pipe, texts: [pipe.encode_prompt(list(texts), "cpu", 1, False)[0]],
    "SDXL": lambda pipe, texts: pipe.encode_prompt(list(texts), do_classifier_free_guidance=False)[::2],
    "SD3": lambda pipe, texts: pipe.encode_prompt(list(texts), None, None, do_classifier_free_guidance=False)[::2],
    "Flux": lambda pipe, texts: pipe.encode_prompt(list(texts))[:2],
    "PixArt": lambda pipe, texts: pipe.encode_prompt(list(texts), do_classifier_free_guidance=False)[:2],
    "IF": lambda pipe, texts: [pipe.encode_prompt(list(texts), do_classifier_free_guidance=False)[0]],
}


@pytest.mark.parametrize("name", THEIR_ENCODERS)
def test_prompts_are_encoded_by_the_pipeline_and_cached(name, folders, tmp_path, monkeypatch):
    repository = open_repository(str(folders(name)))
    found = encode_prompts(repository, TEXTS, None, cache=tmp_path)
    kind = getattr(tiny.diffusers(), repository.index["_class_name"])
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None} if name == "SD3" else {}
    pipe = kind.from_pretrained(folders(name), **without_t5)
    for ours, theirs in zip(found.values(), THEIR_ENCODERS[name](pipe, TEXTS), strict=True):
        torch.testing.assert_close(ours[:2], theirs, atol=1e-4, rtol=1e-4)
    assert all(len(tensor) == 3 for tensor in found.values())

    monkeypatch.setattr(diffusers_pipeline, "_encode", None)  # would fail if the cache were not used
    again = encode_prompts(repository, TEXTS, None, cache=tmp_path)
    assert all(torch.equal(again[key], tensor) for key, tensor in found.items())


@pytest.mark.parametrize("name", ["SD", "PixArt", "Flux", "IF"])
def test_the_null_prompt_is_the_empty_one_or_the_negative_one(name, folders, tmp_path):
    repository = open_repository(str(folders(name)))
    empty = encode_prompts(repository, ["", "blurry"], None, cache=tmp_path)
    negative = encode_prompts(repository, ["", "blurry"], "blurry", cache=tmp_path)
    for key in empty:
        torch.testing.assert_close(empty[key][2], empty[key][0])
        torch.testing.assert_close(negative[key][2], negative[key][1])


def test_the_null_prompt_of_sdxl_is_zero_unless_there_is_a_negative_one(folders, tmp_path):
    repository = open_repository(str(folders("SDXL")))
    empty = encode_prompts(repository, ["blurry"], None, cache=tmp_path)
    negative = encode_prompts(repository, ["blurry"], "blurry", cache=tmp_path)
    for key in empty:
        assert not empty[key][1].any()  # force_zeros_for_empty_prompt
        torch.testing.assert_close(negative[key][1], negative[key][0])


def test_a_damaged_cache_is_made_again(folders, tmp_path):
    repository = open_repository(str(folders("SD")))
    found = encode_prompts(repository, TEXTS, None, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(encode_prompts(repository, TEXTS, None, cache=tmp_path)["prompt_embeds"], found["prompt_embeds"])


def test_text_encoders_are_told_apart_by_their_contents(folders):
    first, same, other = (folders("SD", seed=seed, text_seed=text) for seed, text in ((0, 0), (1, 0), (0, 1)))
    identities = [prompt_encoder_identity(open_repository(str(folder))) for folder in (first, same, other)]
    assert identities[0] == identities[1] != identities[2]


@pytest.mark.parametrize("name", ["UNet2D", "SD", "DiT", "SD3", "Flux", "IF", "PixArt"])
def test_a_saved_pipeline_loads_as_the_denoiser_that_was_saved(name, folders):
    loaded = load_diffusers(f"diffusers:{folders(name)}", pixels=8 if name == "Flux" else None)
    expected = DiffusersNetwork(
        tiny.model(name), *schedule_of(tiny.scheduler(name)), size=loaded.net.img_resolution,
        pixels_per_latent=1 if name in ("UNet2D", "IF") else 2,
    )  # fmt: skip
    size = loaded.net.img_resolution
    x = torch.randn(1, loaded.net.img_channels, size, size, generator=torch.Generator().manual_seed(0))
    condition = None
    if name in tiny.TAKES_TEXT:
        condition = TextPrompts(("a",), {"net": tiny.text_tensors(name, 2)}, torch.tensor([0]))
    torch.testing.assert_close(loaded.net(x, 1.0, condition), expected(x, 1.0, condition))
    pixels = loaded.encoder.decode(loaded.net(x, 1.0, condition))
    assert pixels.shape == (1, 3, *[size * loaded.net.pixels_per_latent] * 2)
    assert pixels.dtype == torch.uint8


def test_latents_are_decoded_as_the_pipeline_does():
    vae = tiny.vae(scaling_factor=0.3611, shift_factor=0.1159)
    latents = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        image = vae.decode(latents / 0.3611 + 0.1159).sample
        ours = LatentDecoder(vae)
        torch.testing.assert_close(ours.pixels(latents), image)
        expected = (image / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        assert (ours.decode(latents).int() - expected.int()).abs().max() <= 1
    with pytest.raises(ValueError, match="only decodes here"):
        ours.encode(latents)


def test_tiles_are_used_if_asked_for():
    vae = tiny.vae()
    LatentDecoder(vae, tiled=True)
    assert vae.use_tiling


@pytest.mark.parametrize(("name", "expected"), [("SD", None), ("UNet2D", 1.0), ("IF", 1.5)])
def test_D_is_limited_as_the_scheduler_does_it(name, expected):
    scheduler, rng = tiny.scheduler(name), torch.Generator().manual_seed(0)
    limit = limit_of(scheduler)
    if expected is None:
        assert limit is None
        return
    assert limit.value == expected
    x_t, epsilon = (torch.randn(2, 3, 8, 8, generator=rng) for _ in range(2))
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[3]
    a2 = scheduler.alphas_cumprod[t]
    D = (x_t - (1 - a2).sqrt() * epsilon) / a2.sqrt()
    theirs = scheduler.step(
        torch.cat([epsilon, torch.zeros_like(epsilon)], 1) if name == "IF" else epsilon, t, x_t
    ).pred_original_sample
    torch.testing.assert_close(limit(D), theirs)
    assert not torch.allclose(limit(D), D)


def test_own_levels_are_those_of_the_scheduler():
    d = tiny.diffusers()
    net = DiffusersNetwork(tiny.model("SD"), *schedule_of(tiny.scheduler("SD")))
    euler = tiny.scheduler("SD")
    euler.set_timesteps(5)
    assert own_levels(tiny.scheduler("SD"), net, 5) == pytest.approx(euler.sigmas[:-1].tolist(), rel=1e-5)
    twice = d.PNDMScheduler.from_config(tiny.scheduler("SD").config)  # evaluates one time twice
    levels = own_levels(twice, net, 5)
    assert list(levels) == sorted(set(levels), reverse=True)
    flow = DiffusersNetwork(tiny.model("SD3"), *schedule_of(tiny.scheduler("SD3")))
    t = tiny.scheduler("SD3")
    t.set_timesteps(4)
    expected = [1e8, *(float(u / (1 - u)) for u in t.sigmas[1:-1].double())]
    assert own_levels(tiny.scheduler("SD3"), flow, 4) == pytest.approx(expected, rel=1e-5)


# ---- two networks of different latents

VAE = {"kind": "diffusers", "autoencoder": "ab" * 32, "scaling_factor": 0.18215, "shift_factor": 0.0}


def test_latents_of_one_vae_in_two_scales_are_converted():
    """The Gaussian of VAE latents z, seen by networks on z times 0.18215 and on (z - 0.1) times 0.3611."""
    own = {**VAE, "scaling_factor": 0.3611, "shift_factor": 0.1}
    guide = Gaussian(0.3611 * (2.0 - 0.1), (0.3611 * 3.0) ** 2)
    converted = in_space_of(guide, own, VAE)
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    expected = Gaussian(0.18215 * 2.0, (0.18215 * 3.0) ** 2)(x, 0.7)
    torch.testing.assert_close(converted(x, torch.tensor(0.7, dtype=torch.float64)), expected)
    assert in_space_of(guide, VAE, dict(VAE)) is guide


@pytest.mark.parametrize(
    ("own", "wanted", "reason"),
    [
        ({**VAE, "autoencoder": "cd" * 32}, VAE, "on latents of the VAE cdcdcdcd times 0.18215, the main network on"),
        (RGBEncoder().spec(), VAE, "on pixels, the main network on latents of the VAE abababab"),
        (VAE, StabilityVAEEncoder().spec(), "the main network on latents that are normalised per channel"),
        ({**VAE, "latents_mean": [0.0], "latents_std": [1.0]}, VAE, "only networks on pixels, or on latents of one"),
    ],
)
def test_networks_of_other_latents_are_refused(own, wanted, reason):
    with pytest.raises(ValueError, match=reason):
        in_space_of(Gaussian(0.0, 1.0), own, wanted)


def test_the_space_of_latents_is_that_of_the_encoder_s_weights():
    same, other = LatentDecoder(tiny.vae(seed=0)).spec(), LatentDecoder(tiny.vae(seed=1)).spec()
    assert LatentDecoder(tiny.vae(seed=0)).spec() == same != other
    assert LatentDecoder(tiny.vae(seed=0).half()).spec()["autoencoder"] == same["autoencoder"]


# ---- the bad version: a model alone, and a LoRA


def test_a_model_alone_is_used_with_what_surrounds_the_main_one(folders, tmp_path):
    main = load_diffusers(str(folders("SD")))
    tiny.fresh("SD", seed=3).save_pretrained(tmp_path / "checkpoint")
    earlier = load_diffusers(str(tmp_path / "checkpoint"), main=main)
    assert earlier.net.schedule is main.net.schedule
    assert earlier.encoder is main.encoder
    with pytest.raises(ValueError, match="holds a UNet2DConditionModel alone: what it predicts"):
        load_diffusers(str(tmp_path / "checkpoint"))
    with pytest.raises(ValueError, match="and the main network is a DiTTransformer2DModel"):
        load_diffusers(str(tmp_path / "checkpoint"), main=load_diffusers(str(folders("DiT"))))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_lora_guides_the_network_that_it_degrades(folders, tmp_path, scale):
    pytest.importorskip("peft")
    folder, weights = tiny.write_lora(tmp_path / "lora")
    main = load_diffusers(str(folders("SD")))
    condition = TextPrompts(("a",), {"net": tiny.text_tensors("SD", 2)}, torch.tensor([0]))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = main.net(x, 1.0, condition)
    guide = with_lora(main, str(folder), scale)
    assert torch.equal(main.net(x, 1.0, condition), before)
    degraded = guide.net(x, 1.0, condition)
    assert torch.equal(main.net(x, 1.0, condition), before)
    assert guide.net.model is main.net.model  # one set of weights in memory

    merged = tiny.fresh("SD")  # W + scale * B A, by hand
    for name, module in merged.named_modules():
        if f"{name}.lora_A.weight" in weights:
            module.weight += scale * weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
    expected = DiffusersNetwork(merged, main.net.schedule, main.net.prediction)(x, 1.0, condition)
    torch.testing.assert_close(degraded, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(degraded, before, atol=1e-3)


def test_what_is_not_a_lora_for_the_network_is_refused(folders, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    main = load_diffusers(str(folders("SD")))
    with pytest.raises(ValueError, match=r"no LoRA there; give a \.safetensors file, or a folder with pytorch_lora"):
        with_lora(main, str(tmp_path))
    folder, _ = tiny.write_lora(tmp_path / "text", component="text_encoder")
    with pytest.raises(ValueError, match="is not a LoRA for this UNet2DConditionModel: it has no weights for the unet"):
        with_lora(main, str(folder))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"a LoRA needs peft: pip install 'edm2kit\[diffusers\]'"):
        with_lora(main, str(folder))


# ---- what is missing


def test_a_folder_or_name_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="no such folder; give one, or a hub name such as diffusers:org/name"):
        open_repository("diffusers:/no/such/folder")
    with pytest.raises(ValueError, match=r"has neither model_index\.json"):
        open_repository(str(tmp_path))


def test_without_a_connection_the_reason_names_what_to_do(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("We couldn't connect to the hub to load this model.\nCheck your connection.")

    monkeypatch.setattr(tiny.diffusers().DiffusionPipeline, "download", refuse)
    with pytest.raises(ValueError, match="couldn't connect") as caught:
        open_repository("diffusers:nobody/nothing")
    text = str(caught.value)
    assert "\n" not in text
    assert "copy the repository into a folder and give diffusers:FOLDER" in text


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut"), "not hold a UNet2DCond"),
        (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "not hold a UNet2DCond"),
        (lambda f: shutil.rmtree(f / "scheduler"), "does not hold a EulerDiscreteScheduler"),
        (lambda f: (f / "model_index.json").write_text("{"), "model_index.json is damaged"),
        (lambda f: (f / "model_index.json").write_text(json.dumps({"prior": ["diffusers", "X"]})), "neither a unet"),
        (
            lambda f: (f / "model_index.json").write_text(
                json.dumps({"unet": ["diffusers", "UNet3DConditionModel"], "scheduler": ["diffusers", "DDIMScheduler"]})
            ),
            "models of the class UNet3DConditionModel are not known; known: UNet2DModel, ",
        ),
        (
            lambda f: (f / "model_index.json").write_text(
                json.dumps({"unet": ["their_code", "Net"], "scheduler": ["diffusers", "DDIMScheduler"]})
            ),
            "unet is a Net of their_code, not of diffusers",
        ),
    ],
)
def test_an_incomplete_or_unknown_pipeline_is_one_line(spoil, reason, folders, tmp_path):
    folder = shutil.copytree(folders("SD"), tmp_path / "copy")
    spoil(folder)
    with pytest.raises(ValueError, match=reason) as caught:
        load_diffusers(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
def test_a_missing_package_says_what_to_install(package, folders, tmp_path, monkeypatch):
    folder = str(folders("SD"))
    monkeypatch.setitem(sys.modules, package, None)
    repository = open_repository(folder)
    use = {
        "diffusers": lambda: load_diffusers(folder),
        "transformers": lambda: encode_prompts(repository, TEXTS, None, cache=tmp_path),
    }
    with pytest.raises(ValueError, match=r"need.* transformers: pip install 'edm2kit\[diffusers\]'"):
        use[package]()


def test_a_pipeline_whose_prompts_are_not_understood_is_refused(folders, tmp_path, monkeypatch):
    monkeypatch.delitem(diffusers_pipeline.PROMPT_ENCODERS, "StableDiffusionPipeline")
    with pytest.raises(ValueError, match="how a StableDiffusionPipeline encodes prompts is not known"):
        encode_prompts(open_repository(str(folders("SD"))), TEXTS, None, cache=tmp_path)


@pytest.mark.parametrize("pixels", [7, 0])
def test_a_size_that_does_not_fit_is_refused(pixels, folders):
    with pytest.raises(ValueError, match=f"images of {pixels} pixels: expected a multiple of 4"):
        load_diffusers(str(folders("DiT")), pixels=pixels)


def test_parts_are_offloaded_by_diffusers(folders):
    main = load_diffusers(str(folders("SD")))
    moved = load_diffusers(str(folders("SD")), offload="layers")
    condition = TextPrompts(("a",), {"net": tiny.text_tensors("SD", 2)}, torch.tensor([0]))
    x = torch.ones(1, 4, 8, 8)
    assert torch.equal(main.net(x, 1.0, condition), moved.net(x, 1.0, condition))
    assert hasattr(moved.net.model.conv_in, "_diffusers_hook")
    with pytest.raises(ValueError, match="offload 'disk' is unknown; available: blocks, layers"):
        load_diffusers(str(folders("SD")), offload="disk")
