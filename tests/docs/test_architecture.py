"""The picture of the architecture shows the imports of today, all pointing down."""

import re

from scripts import draw_architecture as drawing
from tests.support import ROOT, house


def test_the_picture_is_that_of_the_source():
    assert drawing.PICTURE.read_text(encoding="utf-8") == drawing.svg(drawing.imports()), (
        "docs/architecture.svg is out of date; run `python scripts/draw_architecture.py`"
    )


def test_every_room_has_a_box_and_every_arrow_points_down():
    edges = drawing.imports()
    assert {room for edge in edges for room in edge} <= set(drawing.BOXES)
    for own, other in drawing.arrows(edges):
        down = drawing.BOXES[own].bottom < drawing.BOXES[other].y
        assert down or (other, own) in edges, f"{own} -> {other}"


def test_boxes_do_not_overlap():
    boxes = list(drawing.BOXES.values())
    for k, a in enumerate(boxes):
        for b in boxes[k + 1 :]:
            assert a.right < b.x or b.right < a.x or a.bottom < b.y or b.bottom < a.y


def test_an_arrow_that_follows_from_others_is_left_out():
    edges = {("cli", "training"), ("training", "models"), ("cli", "models")}
    assert drawing.arrows(edges) == {("cli", "training"), ("training", "models")}


def test_the_page_names_the_rooms_and_only_files_that_exist():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = {folder.name for folder in (ROOT / "edm2kit").iterdir() if (folder / "__init__.py").exists()}
    rooms = (set(house.ROOMS) - {"denoiser", "conditions"}) | {"denoiser.py", "conditions.py"}
    assert {room for room in rooms if f"`{room}`" not in page} == set()
    assert folders - {"configs"} <= set(house.ROOMS)
    for room, files in re.findall(r"^\| `([a-z_]+)` \|.*\| (`.*`) \|$", page, re.MULTILINE):
        for file in re.findall(r"`([\w/.]+)`", files):
            assert (ROOT / "edm2kit" / room / file).exists(), f"{room}/{file}"
    for path in re.findall(r"`((?:cli|training|data|ema|guidance|sampling|metrics)/[\w/]+\.py)`", page):
        assert (ROOT / "edm2kit" / path).exists(), path
