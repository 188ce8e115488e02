import pytest

from edm2kit.experiments.documents import fill_in


def test_text_between_the_marks_is_replaced_and_the_rest_kept():
    text = "a\n<!-- demo: begin -->\nold\n<!-- demo: end -->\nb\n<!-- other: begin -->\nx\n<!-- other: end -->\n"
    once = fill_in(text, "demo", "new")
    assert once == text.replace("old", "new")
    assert fill_in(once, "demo", "new") == once


@pytest.mark.parametrize("text", ["no marks", "<!-- demo: begin -->", "<!-- demo: begin --><!-- demo: end -->" * 2])
def test_a_document_without_one_place_for_it_is_refused(text):
    with pytest.raises(ValueError, match="expected one <!-- demo: begin -->"):
        fill_in(text, "demo", "new")
