"""Networks of diffusers on the command lines: images equal to their pipelines', prompts, guides, and clear refusals."""

import json
import shlex

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from edm2kit.cli import compare, distill, generate, metrics
from edm2kit.cli.generation import prepare
from edm2kit.cli.generation_options import parse_request
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support import tiny_diffusers as tiny
from tests.support.fakes import tiny_snapshot
from tests.support.pictures import cell

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipes")
    made = {name: tiny.save(name, root / name) for name in ("UNet2D", "SD", "SD v", "SDXL", "DiT", "IF", "SD3", "Flux")}
    made["SD weak"] = tiny.save("SD", root / "SD weak", seed=5)
    made["SD rescaled"] = tiny.save("SD", root / "SD rescaled", seed=5, scaling_factor=0.36430)
    tiny.fresh("SD", seed=5).save_pretrained(root / "checkpoint")
    made["checkpoint"] = root / "checkpoint"
    return made


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))


def words_of(line, pipes):
    """The words of a command line, in which {SD_v} stands for that pipeline."""
    places = {name.replace(" ", "_"): f"diffusers:{path}" for name, path in pipes.items()}
    return [word.format(**places) for word in shlex.split(line)]


def prepared(line, pipes):
    return prepare(parse_request(words_of(line, pipes)), torch.device("cpu"))


def run(command, line, pipes, code=0):
    done = CliRunner().invoke(command, words_of(line, pipes))
    assert done.exit_code == code, done.output + str(done.exception)
    return done.output


SEEDS = (7, 8)


def their_images(name, pipes, **options):
    """The pipeline's own images of the noise that our seeds have, float in [0, 1]."""
    d = tiny.diffusers()
    pipe = d.DiffusionPipeline.from_pretrained(
        pipes[name], **({"text_encoder_3": None, "tokenizer_3": None} if name == "SD3" else {})
    )
    pipe.set_progress_bar_config(disable=True)
    channels = pipe.vae.config.latent_channels
    size = options.pop("size")
    noise = StackedGenerator("cpu", SEEDS).randn([2, channels, size, size])
    if name in ("SD", "SDXL"):  # the scheduler scales what it is given by sqrt(sigma^2 + 1)
        pipe.scheduler.set_timesteps(options["num_inference_steps"])
        noise = noise * pipe.scheduler.sigmas[0] / pipe.scheduler.init_noise_sigma
    if name == "Flux":
        noise = pipe._pack_latents(noise, 2, channels, size, size)
        options |= {"height": size * 2, "width": size * 2}
    return pipe(["a cat"] * 2, latents=noise, output_type="pt", **options).images


@pytest.mark.parametrize(
    ("name", "line", "options"),
    [
        ("SD", "--guidance-method cfg --guidance 3", {"guidance_scale": 3.0, "size": 8}),
        ("SDXL", "--guidance-method cfg --guidance 3", {"guidance_scale": 3.0, "size": 8}),
        ("SD3", "--guidance-method cfg --guidance 2", {"guidance_scale": 2.0, "size": 4, "height": 8, "width": 8}),
        ("Flux", "--pixels 8", {"size": 4, "guidance_scale": 3.5}),
        ("Flux", "--pixels 8 --guidance-method cfg --guidance 2 --negative dog",
         {"size": 4, "true_cfg_scale": 2.0, "negative_prompt": ["dog"] * 2, "guidance_scale": 3.5}),
    ],
)  # fmt: skip
def test_images_are_those_of_the_pipeline_with_its_euler_steps(name, line, options, pipes):
    generation = prepared(f"--net {{{name}}} --prompt 'a cat' --solver euler --steps 5 {line}", pipes)
    ours = generation.engine.generate(SEEDS).images.float() / 255
    theirs = their_images(name, pipes, num_inference_steps=5, **options)
    assert (ours - theirs).abs().max() < 0.55 / 255 + 1e-3
    assert ours.std() > 0.01


def test_a_class_conditional_transformer_is_its_pipeline(pipes):
    generation = prepared("--net {DiT} --class 3 --solver euler --steps 5 --guidance-method cfg --guidance 2", pipes)
    latents = generation.engine.generate(SEEDS).latents
    d = tiny.diffusers()
    pipe = d.DiTPipeline.from_pretrained(pipes["DiT"])
    scheduler = pipe.scheduler
    scheduler.set_timesteps(5)
    x = StackedGenerator("cpu", SEEDS).randn([2, 4, 4, 4])
    first = scheduler.alphas_cumprod[scheduler.timesteps[0]]
    x = x * (1 - first).sqrt()  # of the same x = x0 + sigma n
    for t in scheduler.timesteps:  # the loop of DiTPipeline, whose class index for "none" is fixed to 1000
        out = [pipe.transformer(x, t.expand(2), torch.tensor([label] * 2)).sample[:, :4] for label in (3, 5)]
        with torch.no_grad():
            x = scheduler.step(out[1] + 2 * (out[0] - out[1]), t, x).prev_sample
    # the last step of DDIM goes to the noise level of time 0, ours to 0
    a = scheduler.final_alpha_cumprod
    assert float(a) == 1.0
    torch.testing.assert_close(latents, x, atol=2e-4, rtol=2e-4)


def test_unconditional_pixels_with_a_guide(pipes, tmp_path):
    out = tmp_path / "out"
    line = f"--net {{UNet2D}} --gnet {{UNet2D}} --guidance 2 --steps 3 --seeds 0-2 --outdir {out}"
    output = run(generate.main, line, pipes)
    assert "UNet2DModel of diffusers, 3x8x8, no classes, fp32" in output
    assert len(list(out.glob("*.png"))) == 3
    settings = json.loads(next(out.glob("*.json")).read_text())
    assert settings["settings"]["diffusers"]["limit"] == {"value": 1.0, "ratio": None}
    assert "already exist" in run(generate.main, line, pipes)


def test_a_sheet_of_prompts_by_guidance_weights(pipes, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    out, grid = tmp_path / "out", tmp_path / "grid.png"
    line = f"--net {{SD}} --prompts {tmp_path / 'prompts.txt'} --steps 2 --seeds 1 --guidance-method cfg --guidance 2"
    run(generate.main, f"{line} --grid {grid} --grid-weights 1,2,4 --outdir {out}", pipes)
    with Image.open(grid) as file:
        sheet = np.asarray(file)
    for row in range(2):
        for column, weight in enumerate((1, 2, 4)):
            with Image.open(out / f"weight-{weight}" / f"prompt-000{row}" / "000001.png") as image:
                assert np.array_equal(cell(sheet, 2, row, column, 16), np.asarray(image))
    alone = tmp_path / "alone"
    run(generate.main, f"{line} --outdir {alone}", pipes)
    same = [folder / "prompt-0001" / "000001.png" for folder in (out / "weight-2", alone)]
    assert same[0].read_bytes() == same[1].read_bytes()


def test_one_image_per_prompt_and_seed(pipes, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    out, grid = tmp_path / "out", tmp_path / "grid.png"
    line = f"--net {{SD}} --prompts {tmp_path / 'prompts.txt'} --steps 2 --solver euler --seeds 1-3 --outdir {out}"
    run(generate.main, f"{line} --grid {grid} --batch 2", pipes)
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.png")) == [
        f"prompt-000{k}/00000{seed}.png" for k in (0, 1) for seed in (1, 2, 3)
    ]
    with Image.open(grid) as sheet, Image.open(out / "prompt-0001" / "000003.png") as image:
        assert np.array_equal(cell(np.asarray(sheet), 2, 1, 2, 16), np.asarray(image))  # a row per prompt
    records = [json.loads(next((out / f"prompt-000{k}").glob("*.json")).read_text()) for k in (0, 1)]
    assert [record["settings"]["diffusers"]["prompts"] for record in records] == [["a cat"], ["a dog"]]
    single = tmp_path / "single"
    run(generate.main, f"--net {{SD}} --prompt 'a dog' --steps 2 --solver euler --seeds 1-3 --outdir {single}", pipes)
    for seed in (1, 2, 3):  # the same image, whatever the other prompts
        both = [
            np.asarray(Image.open(folder / f"00000{seed}.png")).astype(int) for folder in (out / "prompt-0001", single)
        ]
        assert abs(both[0] - both[1]).max() <= 1


def test_a_network_of_another_prediction_and_scale_guides(pipes):
    """v guided by epsilon; the guide's latents are twice as large, and converted."""
    line = "--net {SD_v} --prompt cat --gnet %s --guidance 2 --steps 3"
    same = prepared(line % "{SD_weak}", pipes).engine
    rescaled = prepared(line % "{SD_rescaled}", pipes).engine
    x, condition = torch.randn(1, 4, 8, 8), same.prompts
    guide, converted = same.denoiser.neg, rescaled.denoiser.neg
    expected = guide(2 * x, torch.tensor(2.0), condition) / 2
    torch.testing.assert_close(converted(x, torch.tensor(1.0), condition), expected, atol=1e-5, rtol=1e-5)


def test_an_earlier_checkpoint_alone_guides_like_its_pipeline(pipes):
    line = "--net {SD} --prompt cat --gnet %s --guidance 2 --steps 2"
    images = [prepared(line % guide, pipes).engine.generate([0]).latents for guide in ("{checkpoint}", "{SD_weak}")]
    torch.testing.assert_close(images[0], images[1])


def test_a_lora_is_the_bad_version(pipes, tmp_path):
    pytest.importorskip("peft")
    folder, _ = tiny.write_lora(tmp_path / "lora")
    line = "--net {SD} --prompt cat --steps 2"
    plain = prepared(line, pipes).engine.generate([0]).latents
    generation = prepared(f"{line} --gnet-lora {folder} --gnet-lora-scale 0.5 --guidance 2", pipes)
    assert "Guide:    the same with the LoRA" in generation.summary
    assert "Guidance: autoguidance, weight 2" in generation.summary
    assert generation.settings["gnet"]["scale"] == 0.5
    assert not torch.allclose(generation.engine.generate([0]).latents, plain, atol=1e-3)
    off = prepared(f"{line} --gnet-lora {folder} --guidance 1", pipes)
    torch.testing.assert_close(off.engine.generate([0]).latents, plain)


def test_images_of_a_network_are_scored(pipes, tmp_path):
    folder = tmp_path / "real"
    run(generate.main, f"--net {{UNet2D}} --steps 2 --seeds 0-5 --outdir {folder}", pipes)
    reference = tmp_path / "reference.npz"
    run(metrics.main, f"ref --data {folder} --dest {reference} --metrics fd_random", pipes)
    line = f"gen --net {{SD}} --prompt cat --pixels 16 --steps 2 --num 6 --ref {reference} --bootstrap 0"
    assert "fd_random" in run(metrics.main, line, pipes)


def test_compare_takes_networks_of_diffusers(pipes, tmp_path):
    rows = tmp_path / "rows.yaml"
    rows.write_text(
        "metric: fd_random\ntune: {images: 6, seeds: [0]}\nreport: {images: 6, seeds: [9]}\n"
        'common: --net {main} --steps 2 --prompt cat\nrows:\n  plain: {title: Plain, options: ""}\n'
    )
    output = run(
        compare.main, f"sheet --rows-file {rows} --network main={{SD}} --images 1 --dest {tmp_path / 's.png'}", pipes
    )
    assert "Wrote" in output


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--net {SD}", "the network takes text; give --prompt TEXT, or --prompts FILE"),
        ("--net {SD} --prompt cat --class 3", "the network takes text; use --prompt or --prompts instead of --class"),
        ("--net {DiT} --prompt cat", "are for networks that take text; this one does not"),
        ("--net {SD} --prompts /no/such", "--prompts /no/such: cannot be read"),
        ("--net {DiT} --class 9", "class 9 is out of range; the network has classes 0 to 4"),
        ("--net {SD} --prompt cat --gnet {DiT} --guidance 2", "its labels are classes, the main network's text"),
        ("--net {SD} --prompt cat --gnet {UNet2D} --guidance 2", "works on pixels, the main network on latents"),
        ("--net {SD} --prompt cat --sigma_max 80", "from 80 to 0.002, but the network of --net knows 14.6"),
        ("--net {SD} --prompt cat --compile", "--compile is for snapshots of this project"),
        ("--net {SD} --prompt cat --vae x", "--vae is for snapshots of this project"),
        ("--net diffusers:no/such/place --prompt cat", "no such folder; give one, or a hub name"),
        ("--net {checkpoint} --prompt cat", "alone: what it predicts and its noise schedule are not known"),
        ("--net {UNet2D} --guidance-method cfg --guidance 2", "this one has no classes"),
        ("--net {SD} --prompt cat --gnet-lora /no/lora --guidance 2", "no LoRA there"),
        ("--net {IF} --prompt cat --guidance-method pag --pag-blocks none.0", "'none.0' is not an attention block"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(line, reason, pipes):
    with pytest.raises(ValueError) as caught:
        prepared(f"{line} --steps 2", pipes)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "option", ["--prompt cat", "--negative dog", "--pixels 16", "--offload blocks", "--levels own"]
)
def test_options_of_diffusers_are_refused_for_other_networks(option, tmp_path):
    with pytest.raises(ValueError, match="for networks of diffusers"):
        prepared(f"--net {tiny_snapshot(tmp_path / 'net.safetensors')} {option}", {})


def test_guidance_of_these_networks_is_not_distilled(pipes, tmp_path):
    line = f"--net {{DiT}} --gnet {{DiT}} --guidance 2 --data {tmp_path} --outdir {tmp_path / 'out'} --device cpu"
    assert "only snapshots of this project can be fine-tuned to it" in run(distill.main, line, pipes, code=1)


def test_a_guide_is_a_network_or_a_lora(pipes):
    with pytest.raises(ValueError, match="give one guide network: --gnet, or --gnet-lora"):
        parse_request(shlex.split("--net diffusers:a --gnet diffusers:b --gnet-lora c"))


def test_help_lists_the_options_of_diffusers():
    text = run(generate.main, "--help-diffusers", {})
    for option in ("--prompt TEXT", "--prompts FILE", "--negative TEXT", "--gnet-lora PATH", "--pixels N", "--offload"):
        assert option in text
