"""Pages and figures: complete in one file, correct markup, and a slider that works by keyboard."""

import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from edm2kit.experiments.pages.figures import Curve, heat_map, line_chart, standalone
from edm2kit.experiments.pages.page import (
    SliderGroup,
    SliderStop,
    command,
    figure,
    heading,
    image_data,
    paragraph,
    picture,
    table,
    weight_slider,
    write_page,
)
from tests.support.browser import MOVE_SLIDER, dump, needs_browser, screenshot, with_script


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (8, 8), colour)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    curves = [Curve("guide </script> & co", [0.1, 1, 10], [3, 2, 4], [2, 1, 3], [4, 3, 5]), Curve("b", [1], [5])]
    stops = [
        SliderStop("w = 1.5", plain("red"), "better"),
        SliderStop("w = 2", plain("green"), "best </script> <!--<script>"),
    ]
    groups = [
        SliderGroup("autoguidance", plain("white"), stops, start=1),
        SliderGroup("icg", plain("black"), [SliderStop("w = 3", plain("blue"), "worse")]),
    ]
    blocks = [
        heading("Results <1>"),
        paragraph("%%about%% stays as it is"),
        command("python generate.py --preset x"),
        table(["a", "b"], [["<b>", "2"]], "lr"),
        figure(line_chart(curves, "sigma", "loss", log_x=True, references=[(1.0, "one")]), "Loss"),
        figure(heat_map(["0.05", "0.1"], ["x"], [[2.0], [None]], "main", "guide"), "EMA"),
        picture(plain("grey"), "grey"),
        weight_slider(groups),
    ]
    write_page(path, "A & B", blocks, "made by a test")
    return path


def test_text_between_backticks_is_code_and_nothing_else_becomes_markup():
    assert paragraph("run `a --b <c>` & `d`") == "<p>run <code>a --b &lt;c&gt;</code> &amp; <code>d</code></p>"
    assert paragraph("one ` alone") == "<p>one ` alone</p>"
    assert "<td><code>x</code></td>" in table(["a"], [["`x`"]])


def test_a_page_is_complete_in_one_file(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(|https?://(?!www\.w3\.org/2000/svg)""", text)
    assert "<h2>Results &lt;1&gt;</h2>" in text
    assert "%%about%% stays as it is" in text
    assert '<td>&lt;b&gt;</td><td class="right">2</td>' in text
    assert text.count("<script") == text.count("</script>") == 2


def test_slider_data_are_those_given(page):
    packed = re.search(r'<script type="application/json">(.*?)</script>', page.read_text(encoding="utf-8"))[1]
    first, second = json.loads(packed)
    assert [stop["label"] for stop in first["stops"]] == ["w = 1.5", "w = 2"]
    assert first["stops"][1]["note"] == "best </script> <!--<script>"
    assert second["unguided"] == image_data(plain("black"))


def circles(svg: str) -> list[tuple[float, float]]:
    found = ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}circle")
    return [(float(one.get("cx")), float(one.get("cy"))) for one in found]


def test_a_chart_puts_points_where_they_belong():
    (x0, y0), (x1, y1), (x2, y2) = circles(line_chart([Curve("a", [0, 1, 4], [0, 1, 4])], "x", "y"))
    assert (x2 - x0) / (x1 - x0) == pytest.approx(4, rel=0.01)
    assert (y2 - y0) / (y1 - y0) == pytest.approx(4, rel=0.01)
    assert y2 < y0  # up is more
    points = circles(line_chart([Curve("a", [1, 10, 100], [1, 10, 100])], "x", "y", log_x=True, log_y=True))
    assert points[2][0] - points[1][0] == pytest.approx(points[1][0] - points[0][0], rel=0.01)


def test_every_label_of_an_axis_is_in_range_and_there_are_several():
    for low, high, log in ((0.002, 80, True), (1.9, 2.1, True), (1, 3, False), (105.2, 105.9, False), (5, 5, False)):
        svg = line_chart([Curve("a", [low, high], [1, 2])], "x", "y", log_x=log)
        labels = [one.text for one in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text") if one.get("y") != ""]
        numbers = [float(text) for text in labels if text and re.fullmatch(r"-?[\d.]+(e-?\d+)?", text)]
        assert len(numbers) >= 4, (low, high, numbers)
        assert all(math.isfinite(number) for number in numbers)


def test_a_heat_map_frames_the_best_cell_and_leaves_gaps():
    for smaller, best in ((True, "1.5"), (False, "3")):
        svg = heat_map(["a", "b"], ["c", "d"], [[1.5, 2], [None, 3]], "main", "guide", smaller)
        root = ET.fromstring(svg)
        boxes = list(root.iter("{http://www.w3.org/2000/svg}rect"))
        (frame,) = (box for box in boxes if box.get("class") == "best")
        assert len(boxes) == 5
        inside = [
            text.text
            for text in root.iter("{http://www.w3.org/2000/svg}text")
            if 0 < float(text.get("x")) - float(frame.get("x")) < float(frame.get("width"))
            and 0 < float(text.get("y")) - float(frame.get("y")) < float(frame.get("height"))
        ]
        assert inside == [best]


def test_figures_without_values_are_refused():
    with pytest.raises(ValueError, match="at least one point"):
        line_chart([Curve("a", [], [])], "x", "y")
    with pytest.raises(ValueError, match="at least one value"):
        heat_map(["a"], ["b"], [[None]], "x", "y")


def test_a_figure_of_its_own_brings_its_colours():
    root = ET.fromstring(standalone(line_chart([Curve("a", [1, 2], [1, 2])], "x", "y")))
    assert "prefers-color-scheme: dark" in root[0].text


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_the_page_without_errors_and_the_slider_moves_by_keyboard(page, tmp_path):
    document, console = dump(page)
    assert console == []
    assert ">best &lt;/script&gt; &lt;!--&lt;script&gt;</p>" in document  # the group's start
    assert '<output class="shown">w = 2</output>' in document
    script = MOVE_SLIDER + "document.title += first + document.querySelector('.guided').alt;"
    document, console = dump(with_script(page, tmp_path / "moved.html", script))
    assert console == []
    title = re.search("<title>(.*?)</title>", document)[1]
    assert title.startswith("true")
    assert title.endswith("w = 1.5Images of icg, w = 3")
    broken = with_script(page, tmp_path / "broken.html", "undefined_name();")
    assert len(dump(broken)[1]) == 1  # the check sees errors
    for dark in (False, True):
        screenshot(page, tmp_path / f"{dark}.png", dark=dark)
    with Image.open(tmp_path / "False.png") as light, Image.open(tmp_path / "True.png") as dark_image:
        assert sum(light.convert("L").getpixel((2, 2)) for _ in range(1)) > 200
        assert dark_image.convert("L").getpixel((2, 2)) < 60
