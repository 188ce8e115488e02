"""What `import edm2kit` offers: a short list of names, each defined in its room, none loaded before it is used."""

import ast
import inspect
import subprocess
import sys
from importlib import import_module

import pytest

import edm2kit
from tests.support import ROOT

RELIED_UPON = {
    "Precond", "normalize_weights_", "EDM2Loss", "learning_rate", "PowerFunctionEMA", "std_to_exp", "exp_to_std",
    "power_function_beta", "solve_posthoc_coefficients", "load_snapshot", "save_snapshot", "read_header",
    "ImageDataset", "edm_sampler", "StackedGenerator", "Guided", "frechet_distance", "InceptionV3", "DINOv2ViT",
}  # fmt: skip


def test_the_list_is_short_and_holds_what_others_rely_on():
    assert set(edm2kit.__all__) >= RELIED_UPON
    assert len(edm2kit.__all__) <= 40


@pytest.mark.parametrize("name", edm2kit.__all__)
def test_every_name_is_found_and_documented(name):
    found = getattr(edm2kit, name)
    assert name in dir(edm2kit)
    assert "Example" in (inspect.getdoc(found) or ""), f"{name} has no example in its docstring"


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "edm2kit" / "__init__.py").read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {
        alias.name: node.module.removeprefix("edm2kit.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == edm2kit._HOMES


def test_retired_names_still_work_and_say_where_they_live():
    with pytest.warns(DeprecationWarning, match=r"edm2kit\.Option is now edm2kit\.guidance\.base\.Option"):
        found = edm2kit.Option
    assert found is import_module("edm2kit.guidance.base").Option
    assert not set(edm2kit._RETIRED) & set(edm2kit.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = edm2kit.nothing


def test_importing_the_package_loads_neither_torch_nor_any_room():
    code = "import sys, edm2kit; print([m for m in sys.modules if m == 'torch' or m.startswith('edm2kit.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
