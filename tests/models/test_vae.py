"""The VAE: its inputs and outputs, where it may come from, and its error messages."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from edm2kit.cli.generation import Request, prepare
from edm2kit.models.encoders import StabilityVAEEncoder
from edm2kit.models.vae import PINNED_REVISIONS, STABILITY_VAE, load_vae, vae_decode, vae_encode, vae_folder, vae_sha256
from edm2kit.sampling.solvers import Sampler
from edm2kit.torch_utils.files import sha256_of
from tests.support.fake_server import serve
from tests.support.fakes import tiny_snapshot, tiny_vae

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def server_of_hub(folder, tmp_path, monkeypatch):
    """A mirror of the hub that has the tiny VAE under the name and revision asked for; caches are empty."""
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("EDM2_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def start(name, revision):
        files = {f"/{name}/resolve/{revision}/{f.name}": f.read_bytes() for f in folder.iterdir()}
        return serve(files)

    return start


def images(n, size=8):
    return torch.randint(256, (n, 3, size, size), generator=torch.Generator().manual_seed(n)).to(torch.uint8)


def test_raw_latents_are_mean_and_std_of_the_posterior_of_pixels_in_0_to_1(folder):
    vae = load_vae(str(folder), CPU)
    raw = vae_encode(vae, images(10))  # more than one internal batch
    mean, logvar = vae.quant_conv(vae.encoder(images(10).float() / 255)).chunk(2, dim=1)
    assert raw.shape == (10, 8, 4, 4)
    torch.testing.assert_close(raw, torch.cat([mean, (logvar / 2).exp()], dim=1), atol=1e-5, rtol=1e-5)


def test_decoding_clamps_and_truncates():
    stub = SimpleNamespace(decode=lambda z: SimpleNamespace(sample=z))
    values = torch.tensor([-0.3, 0.0, 0.5, 0.9999, 1.0, 1.7]).reshape(1, 1, 1, -1)
    assert vae_decode(stub, values).flatten().tolist() == [0, 0, 127, 254, 255, 255]


def test_the_encoder_undoes_its_normalisation_before_the_vae(folder):
    encoder = StabilityVAEEncoder(str(folder))
    raw = vae_encode(load_vae(str(folder), CPU), images(9)) * 4
    certain = torch.cat([raw[:, :4], torch.zeros_like(raw[:, :4])], dim=1)
    pixels = encoder.decode(encoder.encode(certain))
    expected = vae_decode(load_vae(str(folder), CPU), raw[:, :4])
    assert pixels.shape == (9, 3, 8, 8)
    assert (pixels.int() - expected.int()).abs().max() <= 1


def test_pixels_are_what_is_decoded_and_gradients_flow_back_to_latents(folder):
    encoder = StabilityVAEEncoder(str(folder))
    latents = torch.randn([2, 4, 4, 4], generator=torch.Generator().manual_seed(0)).requires_grad_()
    pixels = encoder.pixels(latents)
    rounded = ((pixels + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8)
    assert (rounded.int() - encoder.decode(latents).int()).abs().max() <= 1
    gradient = torch.autograd.grad(pixels[0].square().sum(), latents)[0]
    assert gradient[0].abs().min() > 0
    assert gradient[1].abs().max() == 0


def test_the_vae_is_frozen_and_in_float32(folder):
    vae = load_vae(str(folder), CPU)
    assert not vae.training
    assert {(p.requires_grad, p.dtype) for p in vae.parameters()} == {(False, torch.float32)}
    assert vae_sha256(str(folder)) == sha256_of(folder / WEIGHTS)


def test_a_hub_name_goes_through_the_cache(server_of_hub, folder, monkeypatch):
    with server_of_hub("someone/tiny", "main") as server:
        monkeypatch.setenv("EDM2_MIRROR", server.url(""))
        assert vae_sha256("someone/tiny") == sha256_of(folder / WEIGHTS)
        load_vae("someone/tiny", CPU)
        assert len(server.seen) == 2


def test_the_published_vae_is_asked_for_at_its_revision_and_checked(server_of_hub, monkeypatch):
    with server_of_hub(STABILITY_VAE, PINNED_REVISIONS[STABILITY_VAE]) as server:
        monkeypatch.setenv("EDM2_MIRROR", server.url(""))
        with pytest.raises(ValueError, match="expected 334643276"):
            vae_folder(STABILITY_VAE)
        assert all(PINNED_REVISIONS[STABILITY_VAE] in path for path, _ in server.seen)


def test_offline_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("EDM2_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"(?s)forbids downloads.*put it at.*in a folder and pass that as --vae"):
        load_vae(STABILITY_VAE, CPU)


def test_what_is_not_a_vae_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="there is no VAE folder"):
        load_vae(str(tmp_path / "missing"), CPU)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_vae(str(tmp_path), CPU)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="does not hold a VAE"):
        load_vae(str(broken), CPU)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "block_out_channels": [6, 6]}))
    with pytest.raises(ValueError, match="does not hold a VAE"):
        load_vae(str(other), CPU)


def test_without_safetensors_no_pickle_is_opened(folder, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    (old / WEIGHTS).rename(old / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=f"has no {WEIGHTS}"):
        load_vae(str(old), CPU)


def test_a_folder_stands_in_for_the_vae_that_a_snapshot_names(folder, tmp_path):
    encoder = StabilityVAEEncoder("somebody/elsewhere").spec()
    latent = tiny_snapshot(tmp_path / "latent", img_channels=4, encoder=encoder)
    generation = prepare(Request(str(latent), sampler=Sampler(num_steps=2), vae=str(folder)), CPU)
    assert generation.engine.generate([0]).images.shape == (1, 3, 16, 16)
    assert generation.settings["vae_sha256"] == vae_sha256(str(folder))
    pixels = tiny_snapshot(tmp_path / "pixels")
    assert prepare(Request(str(pixels)), CPU).settings["vae_sha256"] is None
    with pytest.raises(ValueError, match="leave out --vae"):
        prepare(Request(str(pixels), vae=str(folder)), CPU)
