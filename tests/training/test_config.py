"""Configurations: complete, checked, written and read back the same."""

import dataclasses

import pytest

from edm2kit.training.config import (
    TrainConfig,
    config_from_dict,
    preset_names,
    read_yaml,
    refuse_changes,
    run_id,
    write_config,
)


def test_written_configuration_reads_back_equal(tmp_path):
    config = config_from_dict(
        {"network": {"channel_mult": [1, 2]}, "duration_nimg": "8Mi", "ema_stds": [0.05], "data": "x"}, "here"
    )
    assert config.duration_nimg == 8 << 20
    write_config(config, tmp_path / "config.yaml")
    assert config_from_dict(read_yaml(tmp_path / "config.yaml"), "there") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bach_size": 3}, "here: unknown key 'bach_size'; did you mean 'batch_size'"),
        ({"batch_size": True}, "--batch must be int"),
        ({"batch_size": "12Q"}, "--batch must be int; got '12Q'"),
        ({"seed": 1.5}, "--seed must be int"),
        ({"ema_stds": [0.05, 0.3]}, "at most 0.2886"),
        ({"ema_stds": [0.05, 0.0501]}, "three decimals"),
        ({"precision": "fp8"}, "fp32, fp16, bf16"),
        ({"snapshot_dtype": "int8"}, "snapshot_dtype .* must be one of"),
        ({"network": 3}, "network must be a mapping"),
        ({"network": {"img_channels": 3}}, "unknown network argument 'img_channels'"),
        ({"workers": -1}, "--workers must not be negative"),
        ({"P_std": 1000.0}, "--P_mean -0.4 and --P_std 1000 give noise levels whose squares float32 cannot hold"),
        ({"P_mean": -50}, r"whose squares float32 cannot hold; \|P_mean\| \+ 6 P_std must be at most 40"),
        ({"sigma_data": 1e-30}, r"sigma_data must be from 1e-09 to 1e\+09; got 1e-30"),
        ({"snapshot_every_nimg": -1}, "--snapshot must not be negative"),
        ({"loss_scaling": 0}, "--ls must be above 0"),
        ({"batch_size": 0}, "here: batch_size: --batch must be above 0; got 0"),
        ({"batch_size": 10**18 - 1}, "batch_size: --batch must be at most 16777216"),
        ({"workers": 10**6}, "workers must be at most 1024"),
        ({"duration_nimg": 10**17}, "--duration must be at most"),
        ({"rampup_nimg": 1000.5}, "rampup_nimg: --rampup must be int; got 1000.5"),
    ],
)
def test_wrong_values_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict(values, "here")


def test_an_option_is_not_blamed_on_the_file():
    with pytest.raises(ValueError, match=r"^--lr must be above 0"):
        config_from_dict({"ref_lr": -1.0, "seed": 3}, "here", options=["ref_lr"])


def test_whole_numbers_may_be_written_with_an_exponent(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbframpup_nimg: 1e5\nduration_nimg: 2000.0\nref_lr: 1e-2\n")
    config = config_from_dict(read_yaml(tmp_path / "c.yaml"), "here")
    assert (config.rampup_nimg, config.duration_nimg, config.ref_lr) == (100_000, 2000, 0.01)
    assert type(config.rampup_nimg) is int


def test_very_many_keys_are_refused_in_little_time(tmp_path):
    (tmp_path / "c.yaml").write_text("".join(f"k{k}: 1\n" for k in range(11_000)))
    with pytest.raises(ValueError, match="holds 10000 values or more"):
        read_yaml(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("seed: 1\nseed: 2\n")
    with pytest.raises(ValueError, match="the key 'seed' is given twice"):
        read_yaml(tmp_path / "c.yaml")


def test_a_configuration_that_never_ends_is_refused():
    with pytest.raises(ValueError, match="larger than a configuration can be"):
        read_yaml("/dev/zero")


def test_run_id_ignores_what_may_change_and_nothing_else():
    config, data = TrainConfig(data="a"), {"sha256": "1"}
    free = dataclasses.replace(config, data="b", duration_nimg=5, batch_gpu=2, workers=7, status_every_nimg=1)
    assert run_id(config, data) == run_id(free, data)
    others = [run_id(dataclasses.replace(config, seed=1), data), run_id(config, {"sha256": "2"})]
    assert len({run_id(config, data), *others}) == 3


def test_changes_are_refused_by_the_names_users_know():
    old = TrainConfig(ref_lr=0.01, P_mean=-0.4)
    with pytest.raises(ValueError, match=r"--P_mean was -0\.4, is now -0\.8; --lr was 0\.01, is now 0\.02"):
        refuse_changes(dataclasses.asdict(old), TrainConfig(ref_lr=0.02, P_mean=-0.8), "run")
    before = {**dataclasses.asdict(old), "network": {"num_blocks": 3, "channel_mult": [1, 2]}}
    with pytest.raises(ValueError, match=r"network .* was {'num_blocks': 3}, is now {'num_blocks': 2}[;.]"):
        refuse_changes(before, TrainConfig(network={"num_blocks": 2, "channel_mult": [1, 2]}), "run")
    refuse_changes(
        {**dataclasses.asdict(old), "workers": 9, "ema_stds": [0.05, 0.1], "adam_betas": [0.9, 0.99]}, old, "run"
    )


def test_every_field_is_documented_and_options_are_unique():
    fields = dataclasses.fields(TrainConfig)
    assert [f.name for f in fields if not f.metadata.get("help")] == []
    options = [f.metadata["option"] for f in fields if "option" in f.metadata]
    assert len(options) == len(set(options))


def test_presets_are_listed_in_order_of_size():
    names = [name for name in preset_names() if name.startswith("edm2-img512")]
    assert [name.rpartition("-")[2] for name in names] == ["xxs", "xs", "s", "m", "l", "xl", "xxl"]


def test_a_home_folder_in_the_file_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert config_from_dict({"data": "~/set.zip"}, "test").data == "/home/me/set.zip"


def test_merged_mappings_do_not_double_without_end(tmp_path):
    levels = [f"a{k}: &a{k} {{<<: [*a{k - 1}, *a{k - 1}]}}" for k in range(1, 30)]
    path = tmp_path / "a.yaml"
    path.write_text("\n".join(["a0: &a0 {k: v}", *levels]))
    with pytest.raises(ValueError, match=r"a\.yaml is not valid YAML: '<<' merges more than 10000 values"):
        read_yaml(path)
    path.write_text("a: &a {k: v}\nb:\n  <<: [" + ", ".join(["*a"] * 17) + "]")
    with pytest.raises(ValueError, match="'<<' merges more than 16 mappings"):
        read_yaml(path)
    path.write_text("a: &a {k: v}\nb: {<<: *a, l: w}\nc: {<<: [*a, {m: 1}]}")
    assert read_yaml(path) == {"a": {"k": "v"}, "b": {"k": "v", "l": "w"}, "c": {"k": "v", "m": 1}}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed: 2024-13-45", "month must be in 1..12"),
        ("cond: !!bool maybe", "maybe"),
        ("cond: !!timestamp today", "is not valid YAML"),
        ("sigma_data: !!float half", "half"),
        ("seed: !!int", "is not a plain number"),
        ("? [1, 2]\n: 3", "unhashable key"),
        ("a: 1\n\tb: 2", "is not valid YAML"),
        ("seed: \0", "is not valid YAML"),
    ],
)
def test_what_yaml_cannot_build_is_one_line_that_names_the_file(tmp_path, text, reason):
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        read_yaml(tmp_path / "odd.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'odd.yaml'} is not valid YAML: ")
    assert "\n" not in str(caught.value)


def test_a_text_that_is_not_utf8_says_what_to_do(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\n", encoding="utf-16")  # as PowerShell writes it
    with pytest.raises(ValueError, match=r"a\.yaml is not UTF-8 text \(invalid .* at byte 0\); save it as UTF-8"):
        read_yaml(tmp_path / "a.yaml")


def test_on_and_off_and_counts_mean_what_they_mean_on_the_command_line(tmp_path):
    (tmp_path / "c.yaml").write_text("compile: off\nduration_nimg: 1.5Mi\nbatch_gpu: 1Ki\nsnapshot_every_nimg: 2e6\n")
    config = config_from_dict(read_yaml(tmp_path / "c.yaml"), "c.yaml")
    assert (config.compile, config.duration_nimg, config.batch_gpu) == ("off", 3 << 19, 1024)
    assert config.snapshot_every_nimg == 2_000_000
    assert config_from_dict({"compile": True}, "c.yaml").compile == "on"
    for value in ("1.3Ki", "8mi", "1 Mi", 1.5):
        with pytest.raises(ValueError, match="must be int; got"):
            config_from_dict({"duration_nimg": value}, "c.yaml")
    assert config_from_dict({"data": "128Ki"}, "c.yaml").data == "128Ki"  # a folder may be called so
