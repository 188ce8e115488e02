"""The changelog is of this version, and what it says moved is where it says."""

import importlib.util
import re
import tomllib

from tests.docs.support import page


def test_it_begins_with_this_version():
    version = tomllib.loads(page("pyproject.toml"))["project"]["version"]
    assert re.search(r"^## (\S+)", page("CHANGELOG.md"), re.MULTILINE)[1] == version


def test_modules_are_where_it_says():
    moved = re.findall(r"^\| `([\w.]+)` \| `(edm2kit[\w.]+)` \|$", page("CHANGELOG.md"), re.MULTILINE)
    assert len(moved) > 80
    assert [new for _, new in moved if importlib.util.find_spec(new) is None] == []
