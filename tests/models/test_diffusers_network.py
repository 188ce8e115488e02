"""Models of diffusers as denoisers: equal to their own scheduler's x0, and to their own Euler trajectory."""

import pytest
import torch

from edm2kit.conditions import ClassLabels, TextPrompts
from edm2kit.denoiser import for_images
from edm2kit.guidance.base import Parts
from edm2kit.guidance.combine import Guided
from edm2kit.guidance.registry import Choice, guide
from edm2kit.models.adapters import Rescaled
from edm2kit.models.diffusers_network import DiffusersNetwork
from edm2kit.models.diffusers_pipeline import own_levels, schedule_of
from edm2kit.sampling.solvers import euler, heun
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support import tiny_diffusers as tiny

pytest.importorskip("diffusers")
N = 2


def network(name, **options):
    return DiffusersNetwork(tiny.model(name), *schedule_of(tiny.scheduler(name)), **options)


def condition_of(name, net):
    """Two images: of two prompts, of classes 3 and 1, or of nothing."""
    if name in tiny.TAKES_TEXT:
        return TextPrompts(("a", "b", "c"), {"net": tiny.text_tensors(name, 4)}, torch.tensor([2, 0]))
    return ClassLabels.of([3, 1], 5) if net.label_dim else None


def noise_of(net, count=N):
    size = net.img_resolution if net.img_resolution < 128 else 4
    return StackedGenerator("cpu", range(count)).randn([count, net.img_channels, size, size])


def their_output(name, x_t, t, rows):
    """The model called as its pipeline calls it; `rows` are those of the encoded prompts, or classes."""
    model, text = tiny.model(name), {}
    if name in tiny.TAKES_TEXT:
        text = {key: tensor[rows] for key, tensor in tiny.text_tensors(name, 4).items()}
    t = torch.as_tensor(t).expand(len(x_t))
    if name == "UNet2D":
        return model(x_t, t).sample
    if name == "UNet2D with classes":
        return model(x_t, t, class_labels=torch.tensor(rows)).sample
    if name in ("SD", "SD v", "IF"):
        return model(x_t, t, text["prompt_embeds"]).sample
    if name == "SDXL":
        height = x_t.shape[2] * 8
        added = {"text_embeds": text["pooled"], "time_ids": torch.tensor([[height, height, 0, 0, height, height]] * N)}
        return model(x_t, t, text["prompt_embeds"], added_cond_kwargs=added).sample
    if name == "DiT":
        return model(x_t, timestep=t, class_labels=torch.tensor(rows)).sample
    if name == "PixArt":
        sizes = {"resolution": None, "aspect_ratio": None}
        return model(x_t, text["prompt_embeds"], t, added_cond_kwargs=sizes, encoder_attention_mask=text["mask"]).sample
    if name == "SD3":
        return model(x_t, text["prompt_embeds"], text["pooled"], t).sample
    pipeline = tiny.diffusers().FluxPipeline
    height, width = x_t.shape[2:]
    tokens = pipeline._pack_latents(x_t, len(x_t), x_t.shape[1], height, width)
    ids = pipeline._prepare_latent_image_ids(len(x_t), height // 2, width // 2, x_t.device, x_t.dtype)
    output = model(
        tokens, text["prompt_embeds"], text["pooled"], t / 1000, ids, torch.zeros(6, 3), torch.full([N], 3.5)
    ).sample
    return pipeline._unpack_latents(output, height * 8, width * 8, 8)


ROWS = {name: [2, 0] if name in tiny.TAKES_TEXT else [3, 1] for name in tiny.KINDS}


@pytest.mark.parametrize("name", tiny.KINDS)
def test_D_is_the_scheduler_s_own_x0_at_its_own_times(name):
    net = network(name, pixels_per_latent=8)
    scheduler, noise = tiny.scheduler(name), noise_of(net)
    scheduler.set_timesteps(10, **({"mu": 1.0} if name == "Flux" else {}))
    condition = condition_of(name, net)
    for k in (1, 5, 9):
        t = scheduler.timesteps[k]
        if name in ("SD3", "Flux"):
            u = scheduler.sigmas[k].double()
            sigma, x_t = u / (1 - u), noise * 1.3
        else:
            a2 = scheduler.alphas_cumprod[int(t)].double()
            sigma, x_t = ((1 - a2) / a2).sqrt(), noise * 1.3
        output = their_output(name, x_t, t.float() if name in ("SD3", "Flux") else t, ROWS[name])[:, : x_t.shape[1]]
        if name in ("SD3", "Flux"):
            a = 1 - u
            expected = x_t - u.float() * output  # the scheduler has no pred_original_sample: x0 = x_t - sigma v
        else:
            a = a2.sqrt()
            unlimited = tiny.diffusers().DDIMScheduler.from_config(
                scheduler.config, clip_sample=False, thresholding=False
            )
            unlimited.set_timesteps(10)
            expected = unlimited.step(output, int(t), x_t).pred_original_sample
        D = net((x_t / a).float(), sigma.float(), condition)
        size = max(1.0, float(sigma))  # in float32, x = x_t / a is known to that many times 1e-7
        torch.testing.assert_close(D, expected, atol=1e-5 * size, rtol=0)
        torch.testing.assert_close(net(x_t.double() / a, sigma, condition).float(), expected, atol=1e-5, rtol=1e-5)


def trajectory(name, scheduler, noise, steps, weight):
    """What the pipeline's loop makes of noise in our coordinates, with classifier-free guidance if weight is not 1."""
    if name in ("SD3", "Flux"):
        flux = {"sigmas": [1 - k / steps for k in range(steps)], "mu": 1.15 if name == "Flux" else None}
        scheduler.set_timesteps(**flux) if name == "Flux" else scheduler.set_timesteps(steps)
        x = noise.clone()
    else:
        scheduler.set_timesteps(steps)
        x = noise * scheduler.sigmas[0]  # of the same x = x0 + sigma n; pipelines add a little for x0
    null = [3, 3] if name in tiny.TAKES_TEXT else [5, 5]
    for t in scheduler.timesteps:
        x_t = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = their_output(name, x_t, t, ROWS[name])[:, : x.shape[1]]
        if weight != 1:
            uncond = their_output(name, x_t, t, null)[:, : x.shape[1]]
            output = uncond + weight * (output - uncond)
        x = scheduler.step(output, t, x).prev_sample
    return x


@pytest.mark.parametrize(
    ("name", "weight"),
    [("UNet2D", 1.0), ("SD", 1.0), ("Flux", 1.0)]
    + [(name, 3.0) for name in ("SD", "SD v", "SDXL", "IF", "DiT", "PixArt", "SD3", "Flux")],
)
def test_an_euler_trajectory_is_that_of_the_pipeline(name, weight):
    d = tiny.diffusers()
    scheduler = tiny.scheduler(name)
    if name not in ("SD3", "Flux"):  # those of the DDPM family, run by the Euler scheduler
        scheduler = d.EulerDiscreteScheduler.from_config(scheduler.config, timestep_spacing="leading", steps_offset=1)
    net = DiffusersNetwork(tiny.model(name), *schedule_of(scheduler), pixels_per_latent=8)
    if name == "Flux":
        net = DiffusersNetwork(tiny.model(name), *schedule_of(scheduler), size=4)
        scheduler = d.FlowMatchEulerDiscreteScheduler.from_config(
            scheduler.config, base_image_seq_len=4, max_image_seq_len=16, base_shift=1.15
        )  # so that mu is 1.15 for 4 tokens
    noise, condition = noise_of(net), condition_of(name, net)
    levels = own_levels(scheduler, net, 6)
    assert len(levels) == 6
    sigmas = torch.tensor([*levels, 0.0], dtype=torch.float64)
    denoiser = net if weight == 1 else guide(Choice("cfg", weight), Parts(net))
    ours = euler(denoiser, noise, sigmas, condition)
    theirs = trajectory(name, scheduler, noise, 6, weight)
    scale = max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(ours.float() / scale, theirs / scale, atol=1e-4, rtol=0)


def test_labels_that_are_not_one_hot_or_not_of_the_network_are_refused():
    net = network("DiT")
    x = noise_of(net)
    with pytest.raises(ValueError, match="must be one-hot, or zero"):
        net(x, 1.0, torch.full([2, 5], 0.2))
    with pytest.raises(ValueError, match=r"labels have shape \[2, 4\]; expected \[2, 5\]"):
        net(x, 1.0, torch.eye(4)[:2])
    with pytest.raises(ValueError, match="takes class labels or vectors"):
        net(x, 1.0, condition_of("SD", network("SD")))


def test_a_network_without_an_embedding_for_no_class_refuses_to_leave_it_out():
    net = network("UNet2D with classes")
    with pytest.raises(ValueError, match="no embedding for 'no class'"):
        net(noise_of(net), 1.0, torch.zeros(2, 5))


def test_a_text_network_without_text_says_what_it_takes():
    net = network("SD")
    with pytest.raises(ValueError, match=r"takes text prompts .*got nothing"):
        net(noise_of(net), 1.0)
    other = TextPrompts(("a",), {"guide": tiny.text_tensors("SD", 2)}, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="not encoded for 'net'; encoded for: guide"):
        net(noise_of(net), 1.0, other)


def test_models_of_other_kinds_are_refused():
    d = tiny.diffusers()
    with pytest.raises(ValueError, match="models of the class UNet1DModel are not known; known: UNet2DModel, "):
        DiffusersNetwork(d.UNet1DModel(), *schedule_of(tiny.scheduler("SD")))
    upscaler = tiny._unet2d_condition(in_channels=6, class_embed_type="timestep")
    with pytest.raises(ValueError, match=r"cannot generate images from noise alone: .*super-resolution"):
        DiffusersNetwork(upscaler, *schedule_of(tiny.scheduler("IF")))
    with pytest.raises(ValueError, match="the scheduler EDMEulerScheduler with predictions of the type 'epsilon'"):
        schedule_of(d.EDMEulerScheduler())


ATTENTION = [name for name in tiny.KINDS if name != "UNet2D with classes"]


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_that_is_replaced_by_itself_changes_nothing(name):
    """Text and image together: the edited attention of the image, at its share of the softmax, and that to the text."""
    net = network(name)
    condition, x = condition_of(name, net), noise_of(net)
    plain = net(x, 2.0, condition)
    same = dict.fromkeys(net.attention_blocks, torch.nn.functional.scaled_dot_product_attention)
    torch.testing.assert_close(net(x, 2.0, condition, attention=same), plain, atol=2e-5, rtol=1e-4)
    D, maps = net(x, 2.0, condition, return_attention=net.attention_blocks)
    torch.testing.assert_close(D, plain, atol=2e-5, rtol=1e-4)
    for block, role in net.attention_roles.items():
        tokens = role.resolution**2 if name != "Flux" else 4
        assert maps[block].shape[2:] == (tokens, tokens)
        torch.testing.assert_close(maps[block].sum(3), torch.ones_like(maps[block].sum(3)))
    assert torch.equal(net(x, 2.0, condition), plain), "a hook was left in the model"


@pytest.mark.parametrize("name", ATTENTION)
def test_every_block_with_attention_is_reached_by_its_name_alone(name):
    net = network(name)
    condition, x = condition_of(name, net), noise_of(net)
    plain = net(x, 2.0, condition)
    for block in net.attention_blocks:
        D = net(x, 2.0, condition, attention={block: lambda q, k, v: v})
        assert not torch.allclose(D, plain, atol=1e-6), block
        assert torch.equal(net(x, 2.0, condition, attention={}), plain)
    with pytest.raises(ValueError, match=f"'nowhere.0'; blocks with it: {net.attention_blocks[0]}"):
        net(x, 2.0, condition, attention={"nowhere.0": lambda q, k, v: v})


def test_joint_attention_is_edited_among_image_tokens_only():
    """SD3: with text that gets all of the attention, an edit of the image tokens changes nothing."""
    seen = []
    net = network("SD3")
    condition, x = condition_of("SD3", net), noise_of(net)

    def edit(q, k, v):
        seen.append(q.shape[2])
        return v

    net(x, 2.0, condition, attention={net.attention_blocks[1]: edit})
    assert seen == [4]  # 2x2 tokens of the image, none of the 6 of the text


def test_roles_of_a_unet_are_where_its_blocks_are():
    net = network("SD")
    sides = {name.split(".")[0]: role.side for name, role in net.attention_roles.items()}
    assert sides == {"down_blocks": "encoder", "mid_block": "middle", "up_blocks": "decoder"}
    assert [role.depth for role in net.attention_roles.values()] == list(range(4))
    assert {role.resolution for role in net.attention_roles.values()} == {4}


METHODS = ["pag", "seg", "sag", "slg", "tpg", "tsg", "dropout", "icg"]


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in ("SD", "SD3") for method in METHODS] + [("IF", "pag"), ("DiT", "sag"), ("Flux", "slg")],
)
def test_single_network_methods_act(name, method):
    net = network(name) if name != "Flux" else DiffusersNetwork(
        tiny.model(name), *schedule_of(tiny.scheduler(name)), size=4
    )  # fmt: skip
    condition, x = condition_of(name, net), 3 * noise_of(net)
    sigmas = torch.tensor([3.0, 1.0, 0.0])
    results = []
    for weight in (1.0, 2.0, 2.0):
        guided = for_images(guide(Choice(method, weight), Parts(net)), StackedGenerator("cpu", [5, 6]))
        results.append(heun(guided, x / 3, sigmas, condition))
    plain = heun(net, x / 3, sigmas, condition)
    assert torch.equal(results[0], plain)
    assert torch.equal(results[1], results[2])
    assert not torch.allclose(results[1], plain, atol=1e-5)


@pytest.mark.parametrize("name", ["DiT", "SD3", "Flux", "PixArt"])
def test_a_transformer_with_all_blocks_skipped_knows_neither_text_nor_neighbours(name):
    """Skip-layer guidance leaves the residual path only: a block adds nothing, to image or text."""
    net = network(name)
    condition, x = condition_of(name, net), noise_of(net)
    skip = {block: torch.tensor([True, False]) for block in net.attention_blocks}  # in the first image only
    plain, D = net(x, 2.0, condition), net(x, 2.0, condition, skip=skip)
    moved = x.clone()
    moved[:, :, 2:, 2:] += 1.0  # one token of 2x2
    changed = (net(moved, 2.0, condition, skip=skip) - D).abs().amax(1) > 1e-6
    assert changed[0, 2:, 2:].all()
    assert not changed[0, :2, :].any()
    assert changed[1, :2, :].any()
    torch.testing.assert_close(D[1], plain[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["UNet2D", "SD", "IF"])
def test_a_skipped_block_of_a_unet_adds_nothing(name):
    """The same as its linear layers set to zero."""
    net = network(name)
    condition, x = condition_of(name, net), noise_of(net)
    block = net.attention_blocks[-1]
    silent = DiffusersNetwork(tiny.fresh(name), net.schedule, net.prediction)
    module = silent.model.get_submodule(block)
    last = [module.to_out[0]] if name != "SD" else [module.attn1.to_out[0], module.attn2.to_out[0], module.ff.net[2]]
    for linear in last:
        linear.weight.zero_()
        linear.bias.zero_()
    D = net(x, 2.0, condition, skip={block: torch.tensor([True, True])})
    torch.testing.assert_close(D, silent(x, 2.0, condition), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(D, net(x, 2.0, condition), atol=1e-4)


def test_an_attention_that_does_not_pass_through_pytorch_is_refused():
    from diffusers.models.attention_processor import AttnProcessor

    model = tiny.fresh("SD")
    model.set_attn_processor(AttnProcessor())
    net = DiffusersNetwork(model, *schedule_of(tiny.scheduler("SD")))
    with pytest.raises(ValueError, match="does not use PyTorch's scaled_dot_product_attention"):
        net(noise_of(net), 2.0, condition_of("SD", net), attention={net.attention_blocks[0]: lambda q, k, v: v})
    net(noise_of(net), 2.0, condition_of("SD", net))


def test_two_networks_of_different_predictions_guide_each_other():
    """SD that predicts v, guided by SD that predicts epsilon: the same as the denoisers one by one."""
    main, weak = network("SD v"), network("SD")
    condition, x = condition_of("SD", main), 2 * noise_of(main)
    guided = Guided(main, weak, 1.5)(x, 2.0, condition)
    expected = weak(x, 2.0, condition) + 1.5 * (main(x, 2.0, condition) - weak(x, 2.0, condition))
    torch.testing.assert_close(guided, expected)
    assert not torch.allclose(main(x, 2.0, condition), weak(x, 2.0, condition), atol=1e-3)


def test_a_text_network_counts_as_conditional_through_a_change_of_scale():
    net = network("SD")
    assert net.label_dim == tiny.TEXT
    assert Rescaled(net, 2.0).label_dim == tiny.TEXT


def test_half_precision_stays_inside_the_network():
    model = tiny.fresh("SD").to(torch.bfloat16)
    net = DiffusersNetwork(model, *schedule_of(tiny.scheduler("SD")))
    x, condition = noise_of(net), condition_of("SD", net)
    D = net(x, 1.0, condition)
    assert D.dtype == torch.float32
    assert (D - network("SD")(x, 1.0, condition)).abs().max() < 0.1
