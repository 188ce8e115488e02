"""A preset for latents refuses pixels, and the other way around, before anything is forecast."""

import numpy as np
import pytest
from click.testing import CliRunner

from edm2kit.cli import train
from edm2kit.data.dataset import open_source
from edm2kit.data.image_files import encode_npy
from edm2kit.training.config import TrainConfig, config_from_dict, preset_path, read_yaml
from edm2kit.training.run import resolve
from tests.support import tiny
from tests.support.pictures import write_folder


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(train.main, [*map(str, arguments), "--cond", "false", "-n"])
    assert done.exit_code == 1
    assert len(done.output.strip().splitlines()) == 1
    return done.output


def latents(folder):
    values = np.random.default_rng(0).standard_normal([8, 8, 8]).astype(np.float32)
    files = {f"{k}.npy": encode_npy(values) for k in range(2)}
    return write_folder(folder, {**files, "encoder.json": b'{"vae_name": "my/vae", "vae_sha256": "0"}'})


def test_pixels_with_a_preset_for_latents_are_refused(tmp_path):
    data = tiny.make_dataset(tmp_path / "photos", num_images=4)
    said = invoke("--preset", "edm2-img512-s", "--data", data, "--outdir", tmp_path / "run")
    assert "holds pixels, but the configuration is for latents. Encode them" in said


def test_latents_with_a_preset_for_pixels_are_refused(tmp_path):
    said = invoke("--preset", "edm2-img64-s", "--data", latents(tmp_path / "latents"), "--outdir", tmp_path / "run")
    assert "holds latents, but the configuration is for pixels" in said


@pytest.mark.parametrize("preset", ["edm2-img512-xxs", None])
def test_the_vae_of_the_data_is_found_with_and_without_a_preset(tmp_path, preset):
    values = read_yaml(preset_path(preset)) if preset else {}
    data = latents(tmp_path / "latents")
    small = {"network": {"model_channels": 64, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}}
    config = config_from_dict({**values, **small, "data": str(data), "cond": False}, "test")
    run = resolve(config, open_source(data))
    assert run.config.encoder["vae_name"] == "my/vae"
    assert TrainConfig().encoder == {"kind": "auto"}
