"""From the command line's options to a guided denoiser."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from edm2kit.cli.generation import Request, prepare
from edm2kit.guidance.classifier.noise_classifier import ClassifierHeader, NoiseClassifier, save_classifier
from edm2kit.guidance.losses.augmentation import AugmentedLoss
from edm2kit.guidance.losses.freedom import FreeDoMStep
from edm2kit.guidance.losses.gradient_step import GradientStep
from edm2kit.guidance.losses.lgd import ClosedFormAverage, MonteCarloAverage
from edm2kit.guidance.losses.loss import OnPixels
from edm2kit.guidance.losses.polyak import PolyakStep, TruePolyakStep
from edm2kit.guidance.losses.restoration import (
    DownsamplingOperator,
    GaussianBlurOperator,
    InpaintingOperator,
    MeanColourOperator,
)
from edm2kit.guidance.losses.score import LossGuided
from edm2kit.guidance.losses.tfg import TFG
from edm2kit.guidance.option_types import existing_file, read_picture
from edm2kit.guidance.registry import METHODS, Choice, Parts, guide
from edm2kit.sampling.solvers import Sampler, edm_sampler
from edm2kit.torch_utils.rng import StackedGenerator
from tests.support.fakes import Constant, Gaussian, tiny_snapshot, tiny_vae

OPTIONS = {option.name: option for option in METHODS["loss"].options}


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def mask(tmp_path):
    """The left half is known."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, :4] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def parsed(text):
    """Options as from a command line: "kind=inpaint rule=dps"."""
    pairs = [part.split("=", 1) for part in text.split()]
    return {f"loss_{name}": OPTIONS[f"loss-{name}"].parse(value) for name, value in pairs}


def guided(text, net=None, weight=2.0, pixels=None):
    return guide(Choice("loss", weight, options=parsed(text)), Parts(net or Constant(0.0), pixels=pixels))


def test_each_kind_sees_what_it_says(picture, mask):
    inpaint = guided(f"kind=inpaint image={picture} mask={mask}").loss.loss
    assert isinstance(inpaint.operator, InpaintingOperator)
    assert torch.equal(inpaint.target[:, :, :4], read_picture(picture)[:, :, :4])
    assert inpaint.target[:, :, 4:].abs().max() == 0
    assert guided(f"kind=downsample image={picture} factor=2").loss.loss.operator == DownsamplingOperator(2)
    assert guided(f"kind=blur image={picture} blur=1.5").loss.loss.operator == GaussianBlurOperator(1.5)
    colour = guided("kind=colour colour=255,0,127.5 noise=0.2").loss.loss
    assert (colour.operator, colour.target.tolist(), colour.noise_std) == (MeanColourOperator(), [1, -1, 0], 0.2)


def test_the_picture_is_read_as_the_network_sees_pictures(picture):
    raw = torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1)
    assert torch.equal(read_picture(picture), raw.float() / 127.5 - 1)
    assert read_picture(picture, grey=True).shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("text", "kind", "rule"),
    [
        ("", LossGuided, None),
        ("rule=freedom", GradientStep, FreeDoMStep()),
        ("rule=polyak step=0.7", GradientStep, PolyakStep(0.7)),
        ("rule=polyak-true", GradientStep, TruePolyakStep(0.0)),
        ("augment=3", GradientStep, FreeDoMStep()),
    ],
)
def test_rules(text, kind, rule):
    denoiser = guided(f"kind=colour colour=9,9,9 {text}", weight=3.5)
    assert type(denoiser) is kind
    assert denoiser.scale == 2.5
    assert denoiser.backprop
    assert getattr(denoiser, "rule", None) == rule
    assert not guided(f"kind=colour colour=9,9,9 backprop=no {text}").backprop


def test_averages():
    assert isinstance(guided("kind=colour colour=9,9,9").loss, ClosedFormAverage)
    assert isinstance(guided("kind=colour colour=9,9,9 average=none").loss.operator, MeanColourOperator)
    for rule in ("dps", "freedom", "level", "polyak", "polyak-true"):  # published without an average
        assert isinstance(guided(f"kind=colour colour=9,9,9 rule={rule}").loss.operator, MeanColourOperator)
    drawn = guided("kind=colour colour=9,9,9 average=7 augment=2").loss
    assert (type(drawn), drawn.count, type(drawn.loss)) == (MonteCarloAverage, 7, AugmentedLoss)


def test_the_noise_is_small_for_the_score_and_makes_a_sum_of_squares_for_pushes():
    assert guided("kind=colour colour=9,9,9").loss.loss.noise_std == 0.05
    assert guided("kind=colour colour=9,9,9 rule=dps average=none").loss.noise_std == 0.5**0.5
    assert guided("kind=colour colour=9,9,9 rule=dps average=none noise=0.3").loss.noise_std == 0.3


def test_tfg_has_its_settings_and_without_backprop_no_rho():
    text = "kind=colour colour=9,9,9 rule=tfg rho=2 mu=0.5 gamma=0.1 iterations=3"
    tfg = guided(text, weight=1.5)
    assert isinstance(tfg, TFG)
    assert (tfg.rho, tfg.mu, tfg.gamma, tfg.iterations) == (1.0, 0.25, 0.1, 3)
    assert guided(f"{text} backprop=no").rho == 0


def test_latents_are_decoded_before_the_loss_but_for_a_classifier(tmp_path):
    denoiser = guided("kind=colour colour=9,9,9", pixels=torch.neg)
    assert isinstance(denoiser.loss, OnPixels)
    assert denoiser.rule == FreeDoMStep()
    architecture = {"img_resolution": 4, "img_channels": 2, "num_classes": 3, "width": 8, "levels": 2}
    path = tmp_path / "c.safetensors"
    with torch.random.fork_rng(devices=[]):
        save_classifier(path, NoiseClassifier(**architecture), ClassifierHeader(architecture, 0))
    loss = guided(f"kind=class classifier={path} class=1", pixels=torch.neg).loss
    assert not isinstance(loss, OnPixels)
    assert loss(torch.zeros(2, 2, 4, 4)).shape == (2,)


@pytest.mark.parametrize("rule", ["score", "dps", "freedom", "level", "polyak", "polyak-true", "tfg"])
@pytest.mark.parametrize("backprop", ["yes", "no"])
def test_weight_1_is_off_bitwise(rule, backprop):
    net, noise = Gaussian(0.2, 0.25), StackedGenerator("cpu", range(2)).randn([2, 3, 8, 8])
    off = guided(f"kind=colour colour=9,9,9 rule={rule} backprop={backprop}", net, 1.0)
    assert torch.equal(edm_sampler(off, noise, num_steps=4), edm_sampler(net, noise, num_steps=4))


@pytest.mark.parametrize("backprop", ["yes", "no"])
def test_inpainting_a_gaussian_reaches_the_posterior_where_it_knows_and_the_prior_elsewhere(picture, mask, backprop):
    net, noise = Gaussian(0.0, 0.25), StackedGenerator("cpu", range(3)).randn([3, 3, 8, 8])
    denoiser = guided(f"kind=inpaint image={picture} mask={mask} noise=0.1 backprop={backprop}", net)
    x, plain = (edm_sampler(d, noise, num_steps=64) for d in (denoiser, net))
    assert torch.equal(x[..., 4:], plain[..., 4:])
    known = read_picture(picture)[:, :, :4]
    # posterior N(y v / (v + s^2), v s^2 / (v + s^2)), reached from noise / its deviation at the start
    mean, std = known * 0.25 / 0.26, math.sqrt(0.25 * 0.01 / 0.26)
    torch.testing.assert_close(x[..., :4], mean + std * noise[..., :4], atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "needs --loss-kind, one of inpaint"),
        ("kind=inpaint", "--loss-kind inpaint needs --loss-image"),
        ("kind=colour", "needs --loss-colour"),
        ("kind=class", "needs --loss-classifier"),
    ],
)
def test_what_is_missing_is_refused(text, wrong):
    with pytest.raises(ValueError, match=wrong):
        guided(text)


def test_files_and_numbers_that_do_not_fit_are_refused(picture, mask, tmp_path):
    with pytest.raises(ValueError, match="write for example 200,30,30"):
        parsed("colour=1,2")
    with pytest.raises(ValueError, match="no file at nowhere"):
        parsed("image=nowhere")
    with pytest.raises(ValueError, match="not a whole number"):
        parsed("average=much")
    (tmp_path / "text").write_text("no picture")
    with pytest.raises(ValueError, match="not an image, or a damaged one"):
        guided(f"kind=blur image={tmp_path / 'text'}")
    Image.new("L", (4, 4)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match="the mask is"):
        guided(f"kind=inpaint image={picture} mask={tmp_path / 'small.png'}")
    with pytest.raises(ValueError, match="known exactly only for pixels"):
        guided("kind=colour colour=9,9,9 augment=2 average=exact rule=score")
    with pytest.raises(ValueError, match="weight is nan"):
        guided("kind=colour colour=9,9,9", weight=math.nan)


def test_a_file_is_recorded_by_its_content_not_its_place(picture, tmp_path):
    (tmp_path / "other").mkdir()
    picture.rename(tmp_path / "other" / "picture.png")
    moved = str(existing_file(str(tmp_path / "other" / "picture.png")))
    assert moved.startswith("picture.png sha256:")
    assert str(tmp_path) not in moved


def test_with_a_network_known_pixels_come_out_as_they_are(picture, mask, tmp_path):
    net = str(tiny_snapshot(tmp_path / "net.safetensors", label_dim=0))
    plain = prepare(Request(net, sampler=Sampler(8)), torch.device("cpu")).engine.generate([0, 1])
    choice = Choice("loss", 2.0, options=parsed(f"kind=inpaint image={picture} mask={mask} backprop=no"))
    generation = prepare(Request(net, guidance=choice, sampler=Sampler(8)), torch.device("cpu"))
    drawn = generation.engine.generate([0, 1])
    seen = read_picture(picture)[:, :, :4]
    errors = [(batch.latents[..., :4] - seen).abs().mean() for batch in (drawn, plain)]
    assert errors[0] < 0.2 * errors[1]
    assert "picture.png sha256:" in str(generation.settings)
    torch.testing.assert_close(generation.engine.generate([1]).latents, drawn.latents[1:], atol=1e-4, rtol=1e-4)


def test_with_a_vae_the_colour_of_the_decoded_picture_follows(tmp_path):
    pytest.importorskip("diffusers")
    encoder = {"kind": "vae", "vae_name": str(tiny_vae(tmp_path / "vae"))}
    net = str(tiny_snapshot(tmp_path / "net.safetensors", label_dim=0, img_channels=4, encoder=encoder))
    means = {}
    for colour in ("0,0,0", "255,255,255"):
        choice = Choice("loss", 20.0, options=parsed(f"kind=colour colour={colour}"))
        engine = prepare(Request(net, guidance=choice, sampler=Sampler(8)), torch.device("cpu")).engine
        means[colour] = engine.generate([0, 1]).images.float().mean()
    assert means["0,0,0"] < means["255,255,255"] - 3  # a random decoder: dark anyhow


def test_a_picture_of_gigabytes_is_refused_by_its_header(tmp_path):
    Image.new("1", (8192, 4096)).save(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"a\.png: .*8192x4096 pixels; make it as large as generated images"):
        read_picture(tmp_path / "a.png")
