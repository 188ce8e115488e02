"""Training on latents: a run records the encoder that made its data."""

from pathlib import Path

import numpy as np
import pytest

from edm2kit.cli import train
from edm2kit.data.dataset import ENCODER_FILE, EncoderRecord, ImageDataset, read_encoder_record
from edm2kit.models.encoders import StabilityVAEEncoder
from edm2kit.models.vae import STABILITY_VAE
from edm2kit.training.config import config_from_dict
from edm2kit.training.run import resolve
from tests.support import tiny

MADE_BY = EncoderRecord("some/vae", "0123")


@pytest.fixture
def latents(tmp_path) -> Path:
    folder = tmp_path / "latents"
    folder.mkdir()
    for k in range(4):
        np.save(folder / f"{k}.npy", np.ones((8, 4, 4), np.float32))
    return folder


def encoder_of(path: Path, *, vae: str | None = None) -> dict:
    values = {**tiny.TINY, "cond": False}
    config = train.compose_config(None, None, {**values, "vae": vae})
    return dict(resolve(config, ImageDataset(path)).header.encoder)


def test_latents_that_say_nothing_are_of_the_published_vae(latents):
    assert read_encoder_record(ImageDataset(latents)) is None
    assert encoder_of(latents) == StabilityVAEEncoder(STABILITY_VAE).spec()


def test_the_vae_that_encode_recorded_goes_into_the_snapshots(latents):
    (latents / ENCODER_FILE).write_bytes(MADE_BY.to_json())
    assert read_encoder_record(ImageDataset(latents)) == MADE_BY
    assert encoder_of(latents) == StabilityVAEEncoder("some/vae").spec()


def test_a_folder_may_stand_in_for_it(latents):
    (latents / ENCODER_FILE).write_bytes(MADE_BY.to_json())
    assert encoder_of(latents, vae="a/folder/of/mine")["vae_name"] == "a/folder/of/mine"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"vae": 3}', "unknown field 'vae'; known: vae_name, vae_sha256"),
        ('{"vae_name": 5, "vae_sha256": "x"}', "vae_name must be str; got 5"),
        ('{"vae_name": "x"}', "vae_sha256"),
        ("[]", "the record must be a mapping; got list"),
        ("", "Expecting value"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_damaged_record_is_named(latents, text, reason):
    (latents / ENCODER_FILE).write_text(text)
    with pytest.raises(ValueError, match=rf"encoder\.json: is damaged: .*{reason}") as caught:
        encoder_of(latents)
    assert "\n" not in str(caught.value)


def test_an_encoder_for_other_data_is_refused(latents, tmp_path):
    with pytest.raises(ValueError, match="holds latents, but the configuration is for pixels"):
        resolve(config_from_dict({**tiny.TINY, "cond": False, "encoder": {"kind": "rgb"}}, "x"), ImageDataset(latents))
    pixels = tiny.make_dataset(tmp_path / "pixels", 4)
    with pytest.raises(ValueError, match=r"holds pixels, but the configuration is for latents\. Encode them"):
        encoder_of(pixels, vae="some/vae")
