"""Requests, checked and made ready."""

import dataclasses
import json

import pytest
import torch

from edm2kit.cli.generation import Request, check_pair, parse_classes, prepare
from edm2kit.guidance.combine import Guided
from edm2kit.guidance.interval import GuidanceInterval
from edm2kit.guidance.registry import Choice
from edm2kit.guidance.reuse import Reuse
from edm2kit.models.edm2 import Precond
from edm2kit.sampling import fitted_levels
from edm2kit.sampling.solvers import Sampler
from edm2kit.snapshots.loading import load_snapshot
from tests.support.fakes import tiny_snapshot

CPU = torch.device("cpu")
NAMES = ("cat", "dog", "fish, big", "goldfish")
QUICK = Sampler(num_steps=3)


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("snapshots")
    return {
        "main": tiny_snapshot(folder / "main", label_names=NAMES),
        "guide": tiny_snapshot(folder / "guide", seed=1, label_names=NAMES, model_channels=8),
        "uncond": tiny_snapshot(folder / "uncond", seed=2, label_dim=0),
        "grey": tiny_snapshot(folder / "grey", img_channels=1),
        "large": tiny_snapshot(folder / "large", img_resolution=16),
        "more-classes": tiny_snapshot(folder / "more-classes", label_dim=5),
        "shuffled": tiny_snapshot(folder / "shuffled", label_names=NAMES[::-1]),
        "other-scale": tiny_snapshot(folder / "other-scale", encoder={"kind": "vae", "final_std": 1.0}),
        "four": tiny_snapshot(folder / "four", img_channels=4),
    }


def request(snapshots, gnet=None, weight=2.0, interval=None, **other):
    choice = Choice() if gnet is None else Choice("autoguidance", weight, interval)
    path = None if gnet is None else str(snapshots[gnet])
    return Request(str(snapshots["main"]), path, choice, QUICK, **other)


@pytest.mark.parametrize("gnet", ["guide", "uncond"])
def test_a_smaller_net_and_an_unconditional_net_may_guide(snapshots, gnet):
    generation = prepare(request(snapshots, gnet), CPU)
    assert isinstance(generation.engine.denoiser, Guided)
    batch = generation.engine.generate([0, 1])
    assert batch.images.shape == (2, 3, 8, 8)
    plain = prepare(request(snapshots), CPU).engine.generate([0, 1])
    assert not torch.equal(batch.images, plain.images)
    assert torch.equal(batch.classes, plain.classes)


def test_the_guide_gets_the_labels(snapshots):
    generation = prepare(request(snapshots, "guide", weight=0.0), CPU)
    x, sigma = torch.zeros(2, 3, 8, 8), torch.tensor(1.0)
    first, second = generation.engine.denoiser(x, sigma, torch.eye(4)[:2])
    assert not torch.equal(first, second)


def test_an_interval_gates_the_pair(snapshots):
    generation = prepare(request(snapshots, "guide", interval=(0.0, 10.0)), CPU)
    assert isinstance(generation.engine.denoiser, GuidanceInterval)
    assert generation.settings["guidance"]["steps"] == [1, 2]


def test_an_interval_without_steps_warns(snapshots, capsys):
    prepare(request(snapshots, "guide", interval=(20.0, 20.1)), CPU)
    assert "contains no step" in capsys.readouterr().err


def test_the_settings_are_json_and_differ_between_requests(snapshots):
    requests = [
        request(snapshots),
        request(snapshots, "guide"),
        request(snapshots, "guide", weight=3.0),
        request(snapshots, "uncond"),
        request(snapshots, classes="1,2"),
        request(snapshots, precision="bf16"),
    ]
    texts = [json.dumps(prepare(r, CPU).settings, allow_nan=False) for r in requests]
    assert len(set(texts)) == len(requests)
    assert json.loads(texts[0])["sampler"]["churn"]["S_max"] == "inf"


def test_the_settings_differ_for_weights_with_the_same_header(snapshots, tmp_path):
    twin = tiny_snapshot(tmp_path / "main", seed=9, label_names=NAMES)
    nets = [prepare(Request(str(path)), CPU).settings["net"] for path in (snapshots["main"], twin)]
    assert [key for key in nets[0] if nets[0][key] != nets[1][key]] == ["sha256"]


def test_precision_is_that_inside_the_networks(snapshots):
    generation = prepare(request(snapshots, precision="bf16"), CPU)
    assert isinstance(generation.engine.denoiser, Precond)
    assert generation.engine.denoiser.compute_dtype == torch.bfloat16
    assert prepare(request(snapshots), CPU).engine.denoiser.compute_dtype == torch.float32
    assert generation.engine.generate([0]).latents.dtype == torch.float32


def test_networks_are_frozen(snapshots):
    guided = prepare(request(snapshots, "guide"), CPU).engine.denoiser
    for net in (guided.pos, guided.neg):
        assert not any(name.endswith("weight") for name in net.state_dict())


def test_a_precision_that_is_slow_on_this_machine_warns(snapshots, capsys, monkeypatch):
    monkeypatch.setattr(
        "edm2kit.cli.generation.slow_precision", lambda dtype, device: dtype == torch.bfloat16 and "slow"
    )
    prepare(request(snapshots), CPU)
    assert capsys.readouterr().err == ""
    prepare(request(snapshots, precision="bf16"), CPU)
    assert "--precision bf16: slow" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gnet", "wrong"),
    [
        ("grey", "number of channels is 1, the main network's 3"),
        ("large", "resolution is 16, the main network's 8"),
        ("more-classes", "has 5 classes, the main network 4"),
        ("shuffled", "other names or another order"),
        ("other-scale", "encoder is"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused(snapshots, gnet, wrong):
    with pytest.raises(ValueError, match=wrong):
        prepare(request(snapshots, gnet), CPU)


def test_a_conditional_guide_does_not_fit_an_unconditional_net(snapshots):
    choice = Choice("autoguidance", 2.0)
    with pytest.raises(ValueError, match="has 4 classes, the main network 0"):
        prepare(Request(str(snapshots["uncond"]), str(snapshots["guide"]), choice), CPU)


def test_a_guide_with_its_decoder_in_another_place_fits(tmp_path):
    spec = {"kind": "vae", "vae_name": "here"}
    main, gmain, shifted = (
        load_snapshot(tiny_snapshot(tmp_path / str(k), img_channels=4, encoder={**spec, **change}))
        for k, change in enumerate([{}, {"vae_name": "there"}, {"final_mean": 0.1}])
    )
    check_pair(main, gmain)
    with pytest.raises(ValueError, match="encoder"):
        check_pair(main, shifted)


def test_unsuitable_channels_are_refused_before_sampling(snapshots):
    with pytest.raises(ValueError, match="images of 4 channels; expected 1"):
        prepare(Request(str(snapshots["four"])), CPU)


# ---- classes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("", (0, 1, 2, 3)),
        ("2", (2,)),
        ("3,1", (3, 1)),
        ("0-2,0", (0, 1, 2, 0)),
        ("dog", (1,)),
        ("goldfish, cat,2", (3, 0, 2)),
        ("fish, big", (2,)),
    ],
)
def test_classes_by_number_and_name(text, expected):
    assert parse_classes(text, 4, NAMES) == expected


@pytest.mark.parametrize(
    ("text", "label_dim", "names", "wrong"),
    [
        ("4", 4, NAMES, "class 4 is out of range; the network has classes 0 to 3"),
        ("2-1", 4, NAMES, "class 2-1 is out of range"),
        ("dgo", 4, NAMES, "class 'dgo' is unknown; did you mean 'dog'"),
        ("xylophone", 4, NAMES, "available: cat, dog"),
        ("dog", 4, None, "names no classes; use numbers from 0 to 3"),
        ("-1", 4, NAMES, "class '-1' is unknown"),
        ("1,", 4, NAMES, "class '' is unknown"),
        ("1", 0, None, "has no classes"),
        ("", 0, None, "has no classes"),
    ],
)
def test_wrong_classes_are_refused(text, label_dim, names, wrong):
    with pytest.raises(ValueError, match=wrong):
        parse_classes(text, label_dim, names)


def test_records_from_before_a_setting_existed_stay_equal(snapshots):
    settings = prepare(request(snapshots, "guide"), CPU).settings
    assert "reuse" not in settings["guidance"]
    assert "levels" not in settings["sampler"]


def test_cheaper_guidance_is_recorded_and_said(snapshots):
    wanted = request(snapshots, "guide")
    choice = dataclasses.replace(wanted.guidance, reuse=Reuse(every=2, stop=0.99))
    generation = prepare(dataclasses.replace(wanted, guidance=choice), CPU)
    assert generation.settings["guidance"]["reuse"] == {"every": 2, "stop": 0.99, "once": False}
    assert "evaluated every 2 steps, until cos(D, D_neg) > 0.99" in generation.summary
    guided = prepare(wanted, CPU).engine.generate([0, 1])
    assert not torch.equal(generation.engine.generate([0, 1]).latents, guided.latents)


def test_noise_levels_fitted_to_the_denoiser_are_recorded(snapshots, monkeypatch):
    monkeypatch.setattr(fitted_levels, "IMAGES", 4)
    monkeypatch.setattr(fitted_levels, "BATCH", 2)
    wanted = dataclasses.replace(request(snapshots, "guide"), sampler=Sampler(4, levels="gits", solver="dpmpp2m"))
    generation = prepare(wanted, CPU)
    levels = generation.settings["sampler"]["levels"]
    assert levels == sorted(levels, reverse=True)
    assert (len(levels), levels[0], levels[-1]) == (4, 80, pytest.approx(0.002))
    assert generation.engine.generate([0]).images.shape == (1, 3, 8, 8)
    assert generation.settings == prepare(wanted, CPU).settings
