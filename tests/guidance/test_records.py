import pytest

from edm2kit.guidance.records import settings_differences, settings_with_current_names, words_with_current_names

GNET = {"sha256": "abc"}


def recorded(method, gnet=None, options=None, also=None):
    guidance = {"method": method, "weight": 2.0, "interval": None, "options": options or {}, "steps": None}
    if also is not None:
        guidance["also"] = also
    return {"net": {"sha256": "def"}, "gnet": gnet, "guidance": guidance, "precision": "fp32"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (recorded("pair", GNET), recorded("autoguidance", GNET)),
        (recorded("pair", GNET), recorded("cfg", GNET)),  # by an unconditional network: the same formula
        (recorded("cfg"), recorded("cfg")),
        (
            recorded("mixed", GNET, {"mixed_share": 0.5}),
            recorded("cfg-plus-autoguidance", GNET, {"cfg_plus_autoguidance_share": 0.5}),
        ),
        (recorded("cfg", GNET, also=[["pair", 3.0]]), recorded("cfg", GNET, also=[["autoguidance", 3.0]])),
        (recorded("pag", also=[["icg", 3.0]]), recorded("pag", also=[["icg", 3.0]])),
    ],
)
def test_the_same_images_have_the_same_settings_whatever_the_release(old, new):
    assert settings_differences(old, new) == []
    assert settings_differences(new, old) == []


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        (recorded("pair", GNET), recorded("cfg"), ["gnet", "guidance.method"]),
        (recorded("cfg", GNET, also=[["pair", 3.0]]), recorded("cfg", GNET, also=[["pair", 2.0]]), ["guidance.also"]),
        (recorded("mixed", GNET, {"mixed_share": 0.5}), recorded("mixed", GNET, {"mixed_share": 0.4}), ["options"]),
        (recorded("pag"), recorded("seg"), ["guidance.method"]),
    ],
)
def test_other_images_do_not(old, new, names):
    found = settings_differences(old, new)
    assert len(found) == len(names)
    assert all(name in text for name, text in zip(names, found, strict=True))


def test_what_holds_no_guidance_stays_as_it_is():
    for settings in ({"precision": "fp32"}, None, 7, {"guidance": 2.0}):
        assert settings_with_current_names(settings) == settings


def test_command_lines_in_records():
    words = "--gnet {guide} --uncond {uncond} --guidance-method mixed --mixed-share 0.5 --guidance-also pair=2"
    assert words_with_current_names(words) == (
        "--gnet {guide} --uncond {uncond} --guidance-method cfg-plus-autoguidance --cfg-plus-autoguidance-share 0.5 "
        "--guidance-also autoguidance=2"
    )
    assert words_with_current_names("--net pair --class mixed") == "--net pair --class mixed"
