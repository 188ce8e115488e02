"""Published snapshots become networks with the published outputs, or one line that says why not."""

import copy
import math
import shutil
import sys

import numpy as np
import pytest
import torch

from edm2kit.models.edm2 import Precond
from edm2kit.snapshots.file_format import read_header
from edm2kit.snapshots.loading import WeightReader, load_snapshot, open_weights
from edm2kit.snapshots.published import convert_published, published_time
from tests.support import fake_published, golden
from tests.support.fake_published import ARCHITECTURE, Persistent


@pytest.fixture(scope="module")
def net() -> Precond:
    torch.manual_seed(0)
    return Precond(**ARCHITECTURE).half()


def expected(kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    arrays = golden.load(f"published_layout_{kind}_expected.npz")
    return arrays, arrays.pop("D")


@pytest.mark.parametrize("kind", ["rgb", "vae"])
def test_published_layout_gives_the_published_outputs(kind):
    inputs, output = expected(kind)
    snapshot = load_snapshot(golden.DATA / f"published_layout_{kind}.pkl")
    golden.assert_close(snapshot.net(**{"labels": None, **inputs}), output, 1e-5)
    assert not {"dnnlib", "torch_utils.persistence"} & set(sys.modules)
    assert not snapshot.net.training
    assert not any(parameter.requires_grad for parameter in snapshot.net.parameters())
    assert all(tensor.dtype == torch.float32 for tensor in snapshot.net.state_dict().values())
    assert snapshot.encoder.spec()["kind"] == kind
    assert snapshot.header.dtype == "float16"
    assert snapshot.header.training_config["loss"] == {"P_mean": -0.4, "P_std": 1.0, "sigma_data": 0.5}


@pytest.mark.parametrize("kind", ["rgb", "vae"])
def test_a_converted_snapshot_is_the_same_network(kind, tmp_path):
    inputs, output = expected(kind)
    header = convert_published(golden.DATA / f"published_layout_{kind}.pkl", tmp_path / "a.safetensors")
    snapshot = load_snapshot(tmp_path / "a.safetensors")
    golden.assert_close(snapshot.net(**{"labels": None, **inputs}), output, 1e-5)
    original = load_snapshot(golden.DATA / f"published_layout_{kind}.pkl")
    assert snapshot.header == read_header(tmp_path / "a.safetensors") == original.header == header
    same = original.net.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in snapshot.net.state_dict().items())


def test_load_snapshot_takes_pickles_and_a_compute_dtype():
    snapshot = load_snapshot(golden.DATA / "published_layout_rgb.pkl", dtype=torch.bfloat16)
    assert snapshot.net.compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("edm2-img512-xs-2147483-0.135.pkl", ("edm2-img512-xs", 2147483648, 0.135)),
        ("edm2-img64-xs-uncond-0134217-0.110.pkl", ("edm2-img64-xs-uncond", 134217728, 0.110)),
        ("edm2-img512-l-1879048-0.085.pkl", ("edm2-img512-l", 1879048192, 0.085)),
        ("edm2-img512-xxl-0939524-0.070.pkl", ("edm2-img512-xxl", 939524096, 0.070)),
        ("network-snapshot-0008388-0.100.pkl", ("network-snapshot", 8388608, 0.100)),
        ("renamed.pkl", None),
        ("edm2-img512-xs-2147483-0.135.pkl.bak", None),
    ],
)
def test_file_names_hold_the_time(name, expected):
    assert published_time(name) == expected


def test_the_rounding_of_names_is_undone_for_every_multiple_of_1024():
    for nimg in [*range(1024, 1 << 20, 1024), *range((1 << 31) - (1 << 20), 1 << 31, 1024)]:
        assert published_time(f"x-{nimg // 1000:07d}-0.050.pkl")[1] == nimg


def test_name_and_contents_fill_the_header(net, tmp_path):
    path = fake_published.write_snapshot(tmp_path / "edm2-img8-xxs-0134217-0.050.pkl", net, ARCHITECTURE)
    header = open_weights(path).header
    assert (header.run_id, header.nimg, header.ema_std) == ("edm2-img8-xxs", 1 << 27, 0.050)
    assert header.architecture["model_channels"] == 8
    assert header.architecture["sigma_data"] == 0.5
    assert "use_fp16" not in header.architecture
    shutil.copy(path, tmp_path / "renamed.pkl")
    assert open_weights(tmp_path / "renamed.pkl").header.ema_std is None
    shutil.copy(path, tmp_path / "network-snapshot-0000100-0.050.pkl")
    assert open_weights(tmp_path / "network-snapshot-0000100-0.050.pkl").header.run_id == ""


def test_weights_stay_in_the_file_and_are_read_in_stretches(net, tmp_path):
    path = fake_published.write_snapshot(tmp_path / "a.pkl", net, ARCHITECTURE)
    weights = open_weights(path)
    assert weights.tensors.keys() == net.state_dict().keys()
    with WeightReader(weights) as reader:
        for name, tensor in net.state_dict().items():
            assert torch.equal(reader.read(name, 0, tensor.numel()), tensor.flatten())


def test_weights_in_another_memory_layout_are_the_same(net, tmp_path):
    turned = copy.deepcopy(net).to(memory_format=torch.channels_last)
    path = fake_published.write_snapshot(tmp_path / "a.pkl", turned, ARCHITECTURE)
    state = load_snapshot(path).net.state_dict()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in net.state_dict().items())
    with WeightReader(open_weights(path)) as reader:
        name = "unet.enc.8x8_conv.weight"
        assert torch.equal(reader.read(name, 0, 288), net.state_dict()[name].flatten())


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float32, "float32"), (torch.bfloat16, "bfloat16")])
def test_other_dtypes_lose_nothing(net, tmp_path, dtype, stored):
    other = copy.deepcopy(net).to(dtype)
    path = fake_published.write_snapshot(tmp_path / "a.pkl", other, ARCHITECTURE)
    assert convert_published(path, tmp_path / "a.safetensors").dtype == stored
    state = load_snapshot(tmp_path / "a.safetensors").net.state_dict()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in other.state_dict().items())


def test_buffers_that_a_state_dict_leaves_out_are_left_out(net, tmp_path):
    other = copy.deepcopy(net)
    other.unet.register_buffer("scratch", torch.zeros(3), persistent=False)
    weights = open_weights(fake_published.write_snapshot(tmp_path / "a.pkl", other, ARCHITECTURE))
    assert weights.tensors.keys() == net.state_dict().keys()


def change(**arguments: object) -> dict:
    return {"arguments": {**ARCHITECTURE, **arguments}}


def without(name: str) -> dict:
    return {"arguments": {key: value for key, value in ARCHITECTURE.items() if key != name}}


REFUSED = {
    "unknown argument": (change(use_flash=True), "unknown network argument 'use_flash'"),
    "missing argument": (without("label_dim"), "no argument 'label_dim'"),
    "other width": (change(model_channels=16), r"weights do not fit the header's architecture \(first at '"),
    "more blocks": (change(num_blocks=2), "weights do not fit"),
    "endless blocks": (change(num_blocks=10**9), "the network's 'num_blocks' is 1000000000"),
    "endless blocks in levels": (change(num_blocks=60, channel_mult=[1] * 100), "asks for 6000 blocks"),
    "negative channels": (change(img_channels=-3), "'img_channels' is -3"),
    "negative widths": (change(channel_mult=[1, -2]), r"'channel_mult' is \[1, -2\]"),
    "heads of no channels": (change(channels_per_head=0), "channels_per_head to be a divisor of 16; got 0"),
    "a text for a number": (change(model_channels="8\n8"), r"'model_channels' is '8\\n8'"),
    "a dictionary for a number": (change(channel_mult={}), "'channel_mult' is {}"),
    "not a number": (change(sigma_data=math.nan), "'sigma_data' is nan"),
    "no ema": ({"ema": None}, "ema or encoder is not an object|'ema' is not a module"),
    "ema of another kind": ({"ema": Persistent("Precond", {})}, "'ema' has no _parameters"),
    "unknown encoder": ({"encoder": Persistent("Other\nEncoder", {})}, r"unknown encoder 'Other\\nEncoder'"),
    "unnamed arguments": ({"encoder": Persistent("StandardRGBEncoder", {"_init_args": (1,)})}, "positional arguments"),
    "another VAE": (
        {"encoder": Persistent("StabilityVAEEncoder", {"_init_kwargs": {"vae_name": "evil/vae"}})},
        "its VAE is 'evil/vae'",
    ),
    "another scale": (
        {"encoder": Persistent("StabilityVAEEncoder", {"scale": np.ones(4)})},
        "scale does not follow from its arguments",
    ),
    "VAE with a crooked argument": (
        {"encoder": Persistent("StabilityVAEEncoder", {"_init_kwargs": {"x\ny\x1b[31m": 1}})},
        r"unexpected keyword argument 'x\\ny\\x1b\[31m'",
    ),
    "VAE with an endless number": (
        {"encoder": Persistent("StabilityVAEEncoder", {"_init_kwargs": {"raw_mean": [10**400] * 4}})},
        "unknown VAE encoder: int too large",
    ),
    "VAE that divides by zero": (
        {"encoder": Persistent("StabilityVAEEncoder", {"_init_kwargs": {"raw_std": [0.0, 1.0, 1.0, 1.0]}})},
        "scale and bias of the VAE encoder are not four finite numbers",
    ),
    "VAE of five channels": (
        {"encoder": Persistent("StabilityVAEEncoder", {"_init_kwargs": {"raw_mean": [1.0] * 5, "raw_std": [1.0] * 5}})},
        "scale and bias of the VAE encoder are not four finite numbers",
    ),
    "an endless name": (
        {"ema": Persistent("Precond", {"_parameters": {"x" * 5000: 1}, "_buffers": {}, "_modules": {}})},
        "is not a tensor",
    ),
    "RGB with arguments": ({"encoder": Persistent("StandardRGBEncoder", {"_init_kwargs": {"x": 1}})}, "argument 'x'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(net, tmp_path, case):
    changes, said = REFUSED[case]
    path = fake_published.write_snapshot(tmp_path / "a.pkl", net, **{"arguments": ARCHITECTURE, **changes})
    for refuse in (load_snapshot, lambda path: convert_published(path, tmp_path / "out.safetensors")):
        with pytest.raises(ValueError, match=said) as error:
            refuse(path)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 600 + len(str(path))
        assert "a.pkl" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pkl"]


def test_statistics_are_no_snapshot(tmp_path):
    path = fake_published.write_pickle(tmp_path / "ref.pkl", {"num_images": 7, "fid": {"mu": np.zeros(3)}})
    with pytest.raises(ValueError, match="not a published snapshot: a snapshot has the entries ema and encoder"):
        load_snapshot(path)


def test_a_small_file_is_no_large_network(net, tmp_path):
    """Many names for the same bytes."""
    shared = copy.deepcopy(net)
    shared.unet.dec = torch.nn.ModuleDict({f"{k}": shared.unet.enc for k in range(50)})
    path = fake_published.write_snapshot(tmp_path / "a.pkl", shared, ARCHITECTURE)
    with pytest.raises(ValueError, match="its weights are larger than the file"):
        load_snapshot(path)
