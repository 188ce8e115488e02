"""Every document says what its records say, and shows only pictures that exist."""

import re

import pytest
from click.testing import CliRunner

from edm2kit.experiments import documents
from scripts import write_documents
from tests.support import ROOT

PAGES = [
    *(ROOT / "docs" / f"{name}.md" for name in ("guidance", "performance", "reproduction", "scaling", "toy")),
    *sorted((ROOT / "experiments").rglob("*.md")),
]


@pytest.mark.parametrize("name", write_documents.DOCUMENTS)
def test_generated_parts_are_current(name):
    parts = write_documents.DOCUMENTS[name]()
    assert documents.is_current(ROOT / name, parts), "run: python scripts/write_documents.py"


def test_check_reports_an_outdated_document_and_writes_nothing(tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text("<!-- demo: begin -->\nold\n<!-- demo: end -->\n")
    monkeypatch.setattr(documents, "checkout", lambda: tmp_path)
    monkeypatch.setattr(write_documents, "DOCUMENTS", {"page.md": lambda: {"demo": "new"}})
    monkeypatch.setattr(write_documents, "_benchmark_documents", lambda root, check: True)
    refused = CliRunner().invoke(write_documents.main, ["--check"])
    assert refused.exit_code == 1
    assert "page.md: older than the records" in refused.output
    assert "old" in (tmp_path / "page.md").read_text()
    written = CliRunner().invoke(write_documents.main, [])
    assert "Updated page.md" in written.output
    assert CliRunner().invoke(write_documents.main, ["--check"]).exit_code == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_and_pictures_exist(page):
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []
