"""The API pages are built from the docstrings: a page for each module, and on the first one every public name."""

from click.testing import CliRunner

import edm2kit
from scripts import build_api


def test_pages_are_built(tmp_path):
    result = CliRunner().invoke(build_api.main, ["--dest", str(tmp_path)])
    assert result.exit_code == 0, result.output
    pages = {str(page.relative_to(tmp_path)) for page in tmp_path.rglob("*.html")}
    assert {name.replace(".", "/") + ".html" for name in build_api.modules()} <= pages
    first = (tmp_path / "edm2kit.html").read_text()
    assert [name for name in edm2kit.__all__ if f'id="{name}"' not in first] == []
