"""The example of docs/any-model.md runs."""

from tests.docs.support import code_blocks, page


def test_the_example_makes_images():
    names = {}
    exec(code_blocks(page("docs/any-model.md"), "python")[0], names)
    assert names["images"].shape == (4, 3, 32, 32)
    assert names["images"].isfinite().all()
