"""Two-network autoguidance inside diffusers: equal to ours, in plain pipelines and by a guider."""

import pytest
import torch

from edm2kit.conditions import TextPrompts
from edm2kit.guidance.base import Parts
from edm2kit.guidance.interval import guided_steps
from edm2kit.guidance.registry import Choice, guide
from edm2kit.integrations import diffusers as integration
from edm2kit.integrations.diffusers import autoguided
from edm2kit.models.diffusers_network import DiffusersNetwork
from edm2kit.models.diffusers_pipeline import own_levels, schedule_of
from edm2kit.sampling.solvers import euler
from tests.docs.support import code_blocks, page
from tests.support import tiny_diffusers as tiny

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
STEPS = 4


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    made = {name: tiny.pipeline(name, root / name) for name in ("SD", "SD3")}
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def weak(name):
    return tiny.fresh(name, seed=9)


NOISE = {"SD": [2, 4, 8, 8], "SD3": [2, 4, 4, 4]}


def noise_of(name):
    return torch.randn(NOISE[name], generator=torch.Generator().manual_seed(0))


def their_latents(name, pipe, **options):
    latents = noise_of(name)
    if name == "SD":
        pipe.scheduler.set_timesteps(STEPS)
        latents = latents * pipe.scheduler.sigmas[0] / pipe.scheduler.init_noise_sigma
    else:
        options |= {"height": 8, "width": 8}
    return pipe(
        ["a cat"] * 2, latents=latents, num_inference_steps=STEPS, guidance_scale=1.0, output_type="latent", **options
    ).images


def our_latents(name, pipe, choice):
    scheduler = pipe.scheduler
    main = DiffusersNetwork(tiny.model(name), *schedule_of(scheduler))
    gnet = DiffusersNetwork(weak(name), *schedule_of(scheduler))
    if name == "SD":
        tensors = {"prompt_embeds": pipe.encode_prompt(["a cat", ""], "cpu", 1, False)[0]}
    else:
        found = pipe.encode_prompt(["a cat", ""], None, None, do_classifier_free_guidance=False)
        tensors = {"prompt_embeds": found[0], "pooled": found[2]}
    condition = TextPrompts(("a cat",), {"net": tensors}, torch.tensor([0, 0]))
    sigmas = torch.tensor([*own_levels(scheduler, main, STEPS), 0.0], dtype=torch.float64)
    return euler(guide(choice, Parts(main, gnet)), noise_of(name), sigmas, condition).float()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SD", {}),
        ("SD3", {}),
        ("SD", {"rule": "apg", "rule_options": {"apg_norm": 5.0, "apg_momentum": 0.0}}),
        ("SD3", {"rule": "rescale"}),
        ("SD", {"interval": (0.5, 5.0)}),
    ],
)
def test_a_plain_pipeline_is_guided_as_our_engine_guides(name, options, pipes):
    pipe = pipes[name]
    plain = their_latents(name, pipe)
    with autoguided(pipe, weak(name), 2.0, **options):
        guided = their_latents(name, pipe)
    choice = Choice(
        "autoguidance", 2.0, interval=options.get("interval"), rule=options.get("rule", "linear"),
        options=options.get("rule_options", {}),
    )  # fmt: skip
    expected = our_latents(name, pipe, choice)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(guided / scale, expected / scale, atol=1e-4, rtol=0)
    assert not torch.allclose(guided, plain, atol=1e-3)
    assert torch.equal(their_latents(name, pipe), plain), "the pipeline's model was not restored"


@pytest.mark.parametrize("rule", ["linear", "rescale"])
def test_a_learned_variance_stays_that_of_the_main_model(rule):
    x, main, weaker = torch.randn(3, 2, 6, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    settings = integration.PredictionRule(2.0, rule=rule, scheduler=tiny.scheduler("SD"))
    x, t = x[:, :3], torch.tensor(500.0)
    guided = settings.combine(settings.made(), main, {"guide": (weaker, 2.0)}, x, t)
    assert torch.equal(guided[:, 3:], main[:, 3:])
    alone = settings.combine(settings.made(), main[:, :3], {"guide": (weaker[:, :3], 2.0)}, x, t)
    torch.testing.assert_close(guided[:, :3], alone)


def test_the_model_is_restored_after_an_error(pipes):
    pipe = pipes["SD"]
    with pytest.raises(RuntimeError, match="stop"), autoguided(pipe, weak("SD")):
        raise RuntimeError("stop")
    assert "forward" not in vars(pipe.unet)


def run_guider(guider, model, scheduler, x, conditions, steps=STEPS):
    """The loop of a modular pipeline: conditions is (tensor with the prompt, tensor without)."""
    scheduler.set_timesteps(steps)
    x = x * scheduler.sigmas[0]
    counts = []
    for i, t in enumerate(scheduler.timesteps):
        guider.set_state(step=i, num_inference_steps=steps, timestep=t)
        batches = guider.prepare_inputs({"prompt_embeds": conditions})
        for batch in batches:
            guider.prepare_models(model)
            batch.noise_pred = model(scheduler.scale_model_input(x, t), t, batch.prompt_embeds).sample
            guider.cleanup_models(model)
        counts.append(len(batches))
        x = scheduler.step(guider(batches)[0], t, x).prev_sample
    return x, counts


@pytest.mark.parametrize("share", [1.0, 0.25, 0.0])
def test_the_guider_is_the_published_combination(share):
    model, guide_model, scheduler = tiny.fresh("SD"), weak("SD"), tiny.scheduler("SD")
    text = tiny.text_tensors("SD", 2)["prompt_embeds"]
    conditions = text[:1].expand(2, -1, -1), text[1:].expand(2, -1, -1)
    guider = integration.AutoguidanceGuider(guide_model, 3.0, share)
    found, counts = run_guider(guider, model, scheduler, noise_of("SD"), conditions)
    assert counts == [3 if share == 0.25 else 2] * STEPS

    main, gnet = (DiffusersNetwork(m, *schedule_of(tiny.scheduler("SD"))) for m in (model, guide_model))
    condition = TextPrompts(("a",), {"net": {"prompt_embeds": text}}, torch.tensor([0, 0]))
    choice = Choice("cfg-plus-autoguidance", 3.0, options={"cfg_plus_autoguidance_share": share})
    sigmas = torch.tensor([*own_levels(tiny.scheduler("SD"), main, STEPS), 0.0], dtype=torch.float64)
    expected = euler(guide(choice, Parts(main, gnet)), noise_of("SD"), sigmas, condition).float()
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-4, rtol=0)
    assert "forward" not in vars(model)


def test_the_guider_calls_the_main_model_alone_where_it_is_off():
    model, text = tiny.fresh("SD"), tiny.text_tensors("SD", 2)["prompt_embeds"]
    conditions = text[:1].expand(2, -1, -1), text[1:].expand(2, -1, -1)
    noise = noise_of("SD")
    guider = integration.AutoguidanceGuider
    off, counts = run_guider(guider(weak("SD"), 1.0), model, tiny.scheduler("SD"), noise, conditions)
    assert counts == [1] * STEPS
    never, _ = run_guider(guider(weak("SD"), 3.0, enabled=False), model, tiny.scheduler("SD"), noise, conditions)
    assert torch.equal(off, never)
    scheduler = tiny.scheduler("SD")
    inside = guider(weak("SD"), 3.0, interval=(0.5, 5.0), scheduler=scheduler)
    _, counts = run_guider(inside, model, scheduler, noise, conditions)
    steps = guided_steps(scheduler.sigmas.double(), 0.5, 5.0)
    assert counts == [2 if step in steps else 1 for step in range(STEPS)]
    assert 0 < len(steps) < STEPS
    _, counts = run_guider(guider(weak("SD"), 3.0, stop=0.5), model, tiny.scheduler("SD"), noise, conditions)
    assert counts == [2, 2, 1, 1]


def test_mistakes_are_refused(pipes):
    guider = integration.AutoguidanceGuider
    with pytest.raises(ValueError, match="share is 2; expected a number from 0 to 1"):
        guider(weak("SD"), 2.0, 2.0)
    with pytest.raises(ValueError, match="needs the pipeline's scheduler"):
        guider(weak("SD"), 2.0, interval=(0.5, 5.0))
    with pytest.raises(ValueError, match="unknown guidance rule 'best'"):
        guider(weak("SD"), 2.0, rule="best", scheduler=tiny.scheduler("SD"))
    with (
        pytest.raises(ValueError, match="its in_channels is 3, that of the model 4"),
        autoguided(pipes["SD"], tiny.fresh("UNet2D")),
    ):
        pass
    with pytest.raises(AttributeError, match="has no attribute 'Guider'"):
        _ = integration.Guider


def test_the_example_of_the_page_is_short_and_runs(tmp_path, monkeypatch):
    """Twelve lines; with a tiny pipeline in the place of the one that they would download."""
    (example,) = (block for block in code_blocks(page("docs/any-model.md"), "python") if "autoguided" in block)
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    folder = tiny.save("SD", tmp_path / "pipe")
    weak("SD").save_pretrained(tmp_path / "weaker")
    monkeypatch.chdir(tmp_path)
    run = example.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(folder)).replace(
        "my-weaker-unet", "weaker"
    )
    names = {}
    exec(run.replace("torch.float16", "torch.float32").replace('"cuda"', '"cpu"'), names)
    assert names["image"].size == (16, 16)
