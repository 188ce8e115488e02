import pytest

from edm2kit.experiments.documents import fill, markdown_table, write_parts

TEXT = "a\n<!-- demo: begin -->\nold\n<!-- demo: end -->\nb\n<!-- other: begin -->\nx\n<!-- other: end -->\n"


def test_text_between_the_marks_is_replaced_and_the_rest_kept():
    once = fill(TEXT, {"demo": "new"})
    assert once == TEXT.replace("old", "new")
    assert fill(once, {"demo": "new"}) == once
    assert fill(TEXT, {"demo": "1", "other": "2"}) == TEXT.replace("old", "1").replace("x", "2")


@pytest.mark.parametrize("text", ["no marks", "<!-- demo: begin -->", "<!-- demo: begin --><!-- demo: end -->" * 2])
def test_a_document_without_exactly_one_place_is_refused(text):
    with pytest.raises(ValueError, match="no place for 'demo': it needs one line <!-- demo: begin -->"):
        fill(text, {"demo": "new"})


def test_marks_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match="swap the two lines"):
        fill("<!-- demo: end -->\n<!-- demo: begin -->\n", {"demo": "new"})


def test_a_refused_document_is_named_and_left_as_it_was(tmp_path):
    document = tmp_path / "page.md"
    document.write_text(TEXT)
    with pytest.raises(ValueError, match=r"page\.md: the document has no place for 'third'"):
        write_parts(document, {"demo": "new", "third": "new"})
    assert document.read_text() == TEXT
    write_parts(document, {"demo": "new"})
    assert document.read_text() == TEXT.replace("old", "new")


def test_a_table_aligns_columns_and_escapes_bars():
    table = markdown_table(("name", "n"), [("a|b", "1")], "lr")
    assert table == "| name | n |\n| --- | ---: |\n| a\\|b | 1 |"
