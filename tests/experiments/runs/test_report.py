"""The page of a training run: what it shows, that it is complete in one file, and that it works in a browser."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edm2kit.cli import report
from edm2kit.experiments.runs.folder import open_run
from edm2kit.experiments.runs.report import MEANING, Reported, thinned, write_report
from tests.experiments.runs import healthy
from tests.support import runs
from tests.support.browser import MOVE_SLIDER, dump, needs_browser, screenshot, with_script


def add_sheets(folder, colours):
    for thousands, colour in colours.items():
        Image.new("RGB", (40, 40), colour).save(folder / f"samples-{thousands:07d}.png")


def card(value: float, std: float | None, run_id: str = runs.HEADER.run_id) -> str:
    entry = {"min": value, "mean": value, "values": {"0": value}}
    net = {"run_id": run_id, "ema_std": std, "nimg": 256_000}
    return json.dumps({"results": {"fd_lite0": entry}, "settings": {"net": net}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with sheets, and with score cards of three EMA lengths beside it."""
    path = healthy.write_run(tmp_path_factory.mktemp("runs") / "main")
    add_sheets(path, {16: "red", 128: "lime", 256: "blue"})
    for std, value in ((0.05, 30.0), (0.1, 20.5), (0.15, 25.0)):
        (path.parent / f"card-{std}.json").write_text(card(value, std))
    (path / "guided.json").write_text(card(12.25, None))
    (path / "stranger.json").write_text(card(3.125, 0.1, "another run"))
    (path / "other.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "page.html"
    write_report(path, [Reported("main </script>", open_run(folder), healthy.moments())], "made by a test")
    return path


@pytest.fixture(scope="module")
def comparison(folder, tmp_path_factory):
    other = healthy.write_run(tmp_path_factory.mktemp("other") / "other", snapshots=False, ref_lr=0.02)
    add_sheets(other, {64: "yellow"})
    (other / "heldout.jsonl").unlink()
    path = tmp_path_factory.mktemp("pages") / "both.html"
    both = [
        Reported("main", open_run(folder), healthy.moments()),
        Reported("other", open_run(other), None, "it is gone"),
    ]
    write_report(path, both, "made by a test")
    return path


def test_a_page_is_complete_in_one_file(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(|https?://(?!www\.w3\.org/2000/svg)""", text)
    assert text.count("<script") == text.count("</script>") == 2


def test_a_page_shows_what_the_run_has(page):
    text = page.read_text(encoding="utf-8")
    assert "Nothing wrong found. Looked at: log, non-finite gradients" in text
    for title in (
        "loss against training images (thousands)",
        "loss against noise level sigma: main &lt;/script&gt;, filter, nothing learned",
        "learning rate against",
        "gradient norm against",
        "images per second against",
        "held-out images, training images",
        "fd_lite0 against EMA length",
    ):
        assert title in text
    assert "negative loss is a good sign and not a fault" in text
    assert "<td>ref_lr</td><td>--lr</td><td>0.01</td>" in text
    assert '<td class="right">256,000</td>' in text


def test_scores_are_those_of_this_run(page):
    text = page.read_text(encoding="utf-8")
    for name, value in (("card-0.1.json", "20.5"), ("guided.json", "12.25")):
        assert f'<td>{name}</td><td>fd_lite0</td><td class="right">{value}</td>' in text
    assert "3.125" not in text


def test_the_slider_shows_the_sheets_in_order(page):
    packed = re.search(r'<script type="application/json">(.*?)</script>', page.read_text(encoding="utf-8"))[1]
    [group] = json.loads(packed)
    assert [stop["label"] for stop in group["stops"]] == [f"{k} thousand images" for k in (16, 128, 256)]
    assert (group["start"], group["unguided"]) == (2, None)
    assert 'class="unguided"' not in page.read_text(encoding="utf-8")


def test_a_comparison_says_what_differs_and_what_is_missing(comparison):
    text = comparison.read_text(encoding="utf-8")
    different = text[text.index("Different:") : text.index("The same in all:")]
    assert re.findall(r"<td>(\w+)</td><td>--", different) == ["lr"] or "<td>ref_lr</td>" in different
    assert different.count("<tr>") == 2
    assert "other: Not looked at: loss by noise level (the expected curve needs the data: it is gone)" in text
    assert "main, held-out images, main, training images" in text
    packed = json.loads(re.search(r'<script type="application/json">(.*?)</script>', text)[1])
    assert [(group["title"], len(group["stops"])) for group in packed] == [("main", 3), ("other", 1)]


def test_a_run_without_anything_has_a_page_that_says_so(tmp_path):
    folder = healthy.write_run(tmp_path / "run", snapshots=False)
    for file in ("stats.jsonl", "heldout.jsonl", "run.json"):
        (folder / file).unlink()
    write_report(tmp_path / "page.html", [Reported("run", open_run(folder), None, "no data")], "")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "The log has no loss." in text
    assert "stats.jsonl is missing or empty" in text
    assert "No sample sheets." in text
    assert f"gen --net {folder} --ref REFERENCE.npz --record {folder / 'card.json'}" in text


def test_curves_are_thinned_to_means(tmp_path):
    x, y = thinned(np.arange(1000.0), np.where(np.arange(1000) % 2 == 0, 1.0, 3.0), 10)
    assert (len(x), len(y)) == (10, 10)
    assert x[0] == pytest.approx(49.5)
    assert y == pytest.approx([2.0] * 10)
    assert thinned(np.array([1.0, 2.0]), np.array([np.nan, 5.0])) == ([2.0], [5.0])
    assert thinned(np.array([]), np.array([])) == ([], [])


def test_the_meaning_of_the_loss_has_right_numbers():
    text = " ".join(MEANING)
    for loss, error in re.findall(r"loss (-?\d) (?:a weighted error|one) of (\d\.\d+)", text):
        assert np.exp(float(loss) - 1) == pytest.approx(float(error), abs=0.005)
    assert len(re.findall(r"loss (-?\d) (?:a weighted error|one) of", text)) == 2


def test_the_command_writes_beside_the_run_or_where_it_is_told(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = healthy.write_run(tmp_path / "a" / "run", snapshots=False)
    other = healthy.write_run(tmp_path / "b" / "run", snapshots=False)
    done = CliRunner().invoke(report.main, [str(own)])
    assert done.exit_code == 0, done.output
    assert (own / "report.html").exists()
    done = CliRunner().invoke(report.main, [str(own), str(other)])
    assert done.exit_code == 0, done.output
    assert "<td>a/run</td>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    record = json.loads((own / "run.json").read_text())
    record["data_identity"]["teacher"] = {}
    (own / "run.json").write_text(json.dumps(record))
    assert CliRunner().invoke(report.main, [str(own)]).exit_code == 0
    assert "distils a denoiser" in (own / "report.html").read_text(encoding="utf-8")
    for words, message in (
        ([str(own), str(own)], "the same run is named twice"),
        ([str(tmp_path)], "is not a run folder"),
    ):
        done = CliRunner().invoke(report.main, words)
        assert done.exit_code == 1
        assert message in done.output


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_the_page_without_errors_and_the_slider_moves_by_keyboard(page, comparison, tmp_path):
    for path in (page, comparison):
        document, console = dump(path)
        assert console == []
        assert '<output class="shown">256 thousand images</output>' in document
    script = f"""{MOVE_SLIDER}
      document.title += first + "," + document.querySelector(".guided").alt + "," + pick.getAttribute("aria-label");
    """
    document, console = dump(with_script(comparison, tmp_path / "moved.html", script))
    assert console == []
    title = re.search("<title>(.*?)</title>", document)[1]
    assert title.startswith("true")
    assert title.endswith("128 thousand images,Images of other, 64 thousand images,Run")
    for dark in (False, True):
        screenshot(page, tmp_path / f"{dark}.png", dark=dark)
    with Image.open(tmp_path / "False.png") as light, Image.open(tmp_path / "True.png") as dark_image:
        assert light.convert("L").getpixel((2, 2)) > 200
        assert dark_image.convert("L").getpixel((2, 2)) < 60
