"""Tables of published results: equal to the published ones, and honest about the files behind them."""

import re
from pathlib import Path

import pytest
import yaml

from edm2kit.cli.presets import load_presets
from edm2kit.experiments.paper_tables.networks import PublishedNetwork
from edm2kit.experiments.paper_tables.report import html_page, lines_of, markdown
from edm2kit.experiments.paper_tables.tables import load_table, table_names
from tests.support.golden import DATA

RAW = "https://nvlabs-fi-cdn.nvidia.com/edm2/raw-snapshots/"
PUBLISHED = "edm2-img512-xs-2147483-0.135"
PAG = {"net": PUBLISHED, "method": "pag", "guidance": 3, "value": 1}


def published_rows() -> list[list[str]]:
    lines = [line for line in (DATA / "published_table1.md").read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("number", range(16), ids=lambda k: published_rows()[k][0])
def test_a_row_is_that_of_the_published_table(number):
    row, published = load_table("autoguidance-1").rows[number], published_rows()[number]
    assert [cell.metric for cell in row.cells] == ["fid", "fd_dinov2"]
    for cell, text in zip(row.cells, published[1:], strict=True):
        pattern = r"([\d.]+) \(([\d.]+); ([.\d]+)(?:/([.\d]+))?(?:; (?:sigma in )?\(([\d.]+), ([\d.]+)\])?\)"
        value, weight, main, guide, lo, hi = re.fullmatch(pattern, text).groups()
        assert (cell.value, cell.guidance.weight) == (float(value), float(weight))
        assert cell.net.ema_std == float(main)
        assert (None if cell.gnet is None else cell.gnet.ema_std) == (None if guide is None else float(guide))
        assert cell.guidance.interval == (None if lo is None else (float(lo), float(hi)))
        assert cell.dataset.img_channels == (3 if cell.net.run.startswith("edm2-img64") else 4)


def test_networks_of_the_ablations_are_those_the_paper_names():
    rows = {row.name: row for row in load_table("autoguidance-1").rows}
    guides = {name: {(c.gnet.run, c.gnet.nimg) for c in rows[name].cells} for name in rows if rows[name].cells[0].gnet}
    training = 2048 << 20
    assert guides["img512-s-autog"] == {("edm2-img512-xs", training // 16)}
    assert guides["img512-s-autog-same-ema"] == {("edm2-img512-xs", training // 16)}
    assert guides["img512-s-autog-training"] == {("edm2-img512-s", training // 16)}
    assert guides["img512-s-autog-capacity"] == {("edm2-img512-xs", training)}
    assert guides["img64-s-autog"] == {("edm2-img64-xs", (1024 << 20) // 8)}


def test_every_preset_stands_in_a_table():
    cells = [cell for name in table_names() for cell in load_table(name).cells()]
    there = {(cell.net.name, cell.metric, cell.value) for cell in cells}
    for preset in load_presets().values():
        assert (Path(preset.net).stem, preset.metric, preset.value) in there


def test_what_is_not_published_ready_made_names_its_raw_snapshots():
    assert (
        PublishedNetwork.named("edm2-img512-s-2147483-0.130")
        .urls[0]
        .endswith("reconstructions/edm2-img512-s-2147483-0.130.pkl")
    )
    stored = PublishedNetwork.named("edm2-img512-xs-0134217-0.050").urls
    assert stored == (f"{RAW}edm2-img512-xs/edm2-img512-xs-0134217-0.050.pkl",)
    rebuilt = PublishedNetwork.named("edm2-img512-xs-0134217-0.115").urls
    assert len(rebuilt) == 8
    assert rebuilt[0] == f"{RAW}edm2-img512-xs/edm2-img512-xs-0033554-0.050.pkl"
    assert rebuilt[-1] == f"{RAW}edm2-img512-xs/edm2-img512-xs-0134217-0.100.pkl"
    assert PublishedNetwork.named("edm2-img512-s-2147483-0.130").fit is None
    assert PublishedNetwork.named("edm2-img512-xs-0134217-0.050").fit is None
    with pytest.raises(ValueError, match="no raw snapshot was taken"):
        _ = PublishedNetwork.named("edm2-img512-xs-0134000-0.115").urls


def test_no_more_raw_snapshots_are_taken_than_a_good_fit_needs():
    quarter = PublishedNetwork.named("edm2-img512-s-2147483-0.115")
    assert len(quarter.urls) == 32
    assert quarter.urls[-1].endswith("edm2-img512-s-2147483-0.100.pkl")
    assert quarter.fit.error < 0.005
    # 128Mi images are four times 32Mi: all that is stored gives no better
    assert 0.1 < PublishedNetwork.named("edm2-img512-s-0134217-0.170").fit.error < 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "img32"}, "unknown data set 'img32'"),
        ({"fd_dinov3": {}}, "unknown key 'fd_dinov3'"),
        ({"fid": {"preset": "edm2-img512-s-fidd"}}, "did you mean 'edm2-img512-s-fid'"),
        ({"fid": {"preset": "edm2-img512-s-dino"}}, "is for fd_dinov2, not fid"),
        ({"fid": {"net": "best", "value": 1}}, "expected RUN-KIMG-EMA"),
        ({"fid": {"net": PUBLISHED, "wait": 2, "value": 1}}, "unknown key 'wait'"),
        ({"fid": {"net": PUBLISHED, "method": "pair", "value": 1}}, "needs a gnet"),
        ({"fid": {"net": PUBLISHED}}, "'value' is missing"),
        ({"name": "../a", "fid": {"net": PUBLISHED, "value": 1}}, "the name becomes a file name"),
        ({"fid": {"net": "run-0000000-0.130", "value": 1}}, "expected RUN-KIMG-EMA"),
        ({"fid": {**PAG, "options": {"pag_blokcs": "auto"}}}, "no option 'pag_blokcs'; did you mean 'pag_blocks'"),
        ({"fid": {**PAG, "options": {"pag-blocks": "everywhere"}}}, "'everywhere' is not a list of blocks"),
        ({"fid": {**PAG, "interval": [1]}}, "interval is [1]; expected two noise levels"),
        ({"fid": {**PAG, "interval": "all"}}, "interval is 'all'; expected two noise levels"),
    ],
)
def test_a_malformed_table_is_refused(tmp_path, changes, message):
    row = {"name": "a", "group": "g", "setting": "s", "dataset": "img512", **changes}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"title": "t", "source": "s", "rows": [row]}))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_table(tmp_path / "t.yaml")


def test_a_report_has_the_columns_of_every_method_that_a_row_uses(tmp_path):
    common = {"group": "g", "setting": "s", "dataset": "img512"}
    cells = [
        {"net": PUBLISHED, "value": 1},
        {**PAG, "options": {"pag_blocks": "enc.8x8_block0,dec.8x8_in0"}},
        {"net": PUBLISHED, "method": "tsg", "guidance": 2, "options": {"tsg_scale": 0.5}, "value": 1},
    ]
    rows = [{"name": f"r{k}", **common, "fid": cell} for k, cell in enumerate(cells)]
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"title": "t", "source": "s", "rows": rows}))
    table = load_table(tmp_path / "t.yaml")
    plain, pag, tsg = lines_of(table, tmp_path)
    assert (plain["method"], pag["method"], tsg["method"]) == ("", "pag", "tsg")
    assert (plain["weight"], pag["weight"], tsg["weight"]) == ("", "3", "2")
    assert (pag["pag_blocks"], tsg["pag_blocks"]) == ("enc.8x8_block0,dec.8x8_in0", "")
    assert (pag["tsg_scale"], tsg["tsg_scale"], tsg["tsg_power"]) == ("", "0.5", "1.0")  # TSG's published power
    assert "| pag_blocks |" in markdown(table, [plain, pag, tsg], [])
    assert "<th>tsg_scale</th>" in html_page(table, [plain, pag, tsg], [])
