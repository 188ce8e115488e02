"""Settings for a data set of one's own: every size of data, budget and machine gives a configuration that trains."""

import itertools
from dataclasses import replace

import pytest
import yaml

from edm2kit.models.networks import build_network, full_architecture
from edm2kit.training import recipe
from edm2kit.training.config import config_from_dict
from edm2kit.training.log import schedule_warnings
from edm2kit.training.recipe import Facts, Speed, choose, duration_nimg, settings, to_config, to_yaml

PHOTOS = Facts(3000, 32, False, 3, 1000.0)
IMAGENET_LATENTS = Facts(1_281_167, 64, True, 1000, 1281.0)


def speed_of(width: int) -> float:
    """A machine that trains 16 channels at 1,000 images/s, and others in proportion to their weights."""
    return 1000 * (16 / width) ** 2


def values(facts: Facts, speed: Speed, nimg: int, guide: bool = False) -> dict:
    return {setting.key: setting.value for setting in settings(facts, speed, nimg, guide=guide, more={})}


def test_the_widest_network_that_sees_enough_images_is_chosen():
    measured = []
    speed = choose(PHOTOS, 3700, lambda width: measured.append(width) or speed_of(width))
    # 40,000 (w/16)^2 images in 3,330 s at 1,000 (16/w)^2 images/s: w <= 3.02 * 16
    assert speed == Speed(48, speed_of(48), speed_of(24))
    assert measured == [16, 24, 32, 48, 64]
    assert choose(PHOTOS, 1, speed_of).width == 16  # the narrowest if none is fast enough
    assert choose(PHOTOS, 1e9, speed_of).width == 128  # no wider for few images
    assert choose(IMAGENET_LATENTS, 1e9, speed_of).width == 320


def test_both_networks_together_take_the_budget():
    speed = Speed(32, 250.0, 900.0)
    nimg = duration_nimg(PHOTOS, 1000, speed)
    assert nimg / 250 + nimg * 3 / 16 / 900 == pytest.approx(900, rel=0.001)
    assert duration_nimg(replace(PHOTOS, num_images=50_000), 1e9, speed) == 200_000_000
    assert duration_nimg(PHOTOS, 1e9, speed) == 0.9 * 12_000 * 3000


@pytest.mark.parametrize("num_images", [1, 50, 3000, 199_999, 200_000, 1_281_167])
@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize("budget_sec", [1e3, 1e5, 1e12])
def test_a_plan_is_never_what_the_dry_run_and_the_doctor_warn_of(num_images, latents, budget_sec):
    facts, speed = Facts(num_images, 64, latents, 0, 0), Speed(128, 1000.0, 4000.0)
    nimg = duration_nimg(facts, budget_sec, speed)
    for guide in (False, True):
        config = to_config(settings(facts, speed, nimg, guide=guide, more={}), data="x")
        if nimg >= 4096:
            assert schedule_warnings(config, num_images) == []


@pytest.mark.parametrize(
    ("num_images", "resolution", "latents"),
    [*itertools.product([300, 3000, 60_000, 1_281_167], [32, 64, 256], [False]), (50_000, 64, True)],
)
@pytest.mark.parametrize("nimg", [3000, 60_000, 2_000_000, 300_000_000])
def test_every_recipe_is_a_valid_run_with_enough_snapshots(num_images, resolution, latents, nimg):
    facts = Facts(num_images, resolution, latents, 10, num_images / 10)
    for width, guide in itertools.product([16, 24, 48, 96, 192], [False, True]):
        found = settings(facts, Speed(width, 1, 1), nimg, guide=guide, more={"precision": "fp32"})
        config = to_config(found, data="x")
        assert config.duration_nimg % config.batch_size == 0
        assert config.duration_nimg % config.snapshot_every_nimg == 0
        times = config.duration_nimg // config.snapshot_every_nimg
        # 1,024 images and a batch are the least between two snapshots
        fewest = 12 if config.snapshot_every_nimg > max(1024, config.batch_size) else 2
        assert fewest <= times <= 24, (times, config.snapshot_every_nimg)
        assert 0 < config.rampup_nimg < config.duration_nimg / 10
        assert config.ref_batches * config.batch_size < config.duration_nimg or times == 2
        again = config_from_dict({**yaml.safe_load(to_yaml(found, ["heading"])), "data": "x"}, "yaml")
        assert again == config


@pytest.mark.parametrize("width", [8, 12, *recipe.WIDTHS])
@pytest.mark.parametrize("resolution", [8, 16, 32, 64, 128, 256])
def test_every_network_can_be_built(width, resolution):
    import torch

    with torch.device("meta"):
        net = build_network(full_architecture(resolution, 3, 4, 0.5, recipe.network(resolution, width)))
    assert net.attention_blocks


def test_the_network_of_imagenet_is_that_of_the_paper():
    assert recipe.network(64, 192) == {
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "num_blocks": 3,
        "attn_resolutions": [16, 8],
        "channels_per_head": 64,
    }
    found = values(IMAGENET_LATENTS, Speed(192, 1, 1), 2 << 30)
    assert (found["batch_size"], found["ref_lr"], found["P_mean"], found["P_std"]) == (2048, 0.01, -0.4, 1.0)
    assert found["ref_batches"] == pytest.approx(70_000, rel=0.01)
    assert found["rampup_nimg"] == 10_000_000
    assert not found["flip"]
    assert found["augment"] == found["network"]["dropout"] == 0


def test_regularisation_is_for_many_epochs_of_few_images():
    short, long = (values(PHOTOS, Speed(64, 1, 1), nimg) for nimg in (60_000, 60_000_000))
    assert (short["augment"], short["network"]["dropout"]) == (0, 0)
    assert (long["augment"], long["network"]["dropout"]) == (0.15, 0.25)
    assert values(Facts(300, 32, False, 30, 10.0), Speed(64, 1, 1), 60_000)["cond"] is False


def test_every_setting_explains_itself():
    text = to_yaml(settings(PHOTOS, Speed(32, 1, 1), 100_000, guide=False, more={"precision": "bf16"}), ["Photos"])
    lines = text.splitlines()
    assert lines[0] == "# Photos"
    assert "# duration: 33 epochs, 6,144 steps" in lines
    keys = [k for k, line in enumerate(lines) if line[0] not in "# "]
    assert all(lines[k - 1].startswith("# ") for k in keys)
    assert "network:" in lines
    assert "  channel_mult: [1, 2, 4]" in lines
