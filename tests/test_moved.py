"""Modules are found under their old names, with a warning, and are the same modules."""

import importlib
import subprocess
import sys
import warnings

import pytest

from lpt.moved import NEW_NAMES


@pytest.mark.parametrize("old", NEW_NAMES)
def test_an_old_name_is_the_module_of_the_new_one(old):
    importlib.import_module(f"lpt.{NEW_NAMES[old]}")
    with warnings.catch_warnings():  # the room of a module has moved too, and is looked for first
        warnings.simplefilter("ignore", FutureWarning)
        importlib.import_module(f"lpt.{old}")
    sys.modules.pop(f"lpt.{old}", None)
    with pytest.warns(FutureWarning, match=rf"lpt\.{old} is lpt\.{NEW_NAMES[old]} now"):
        found = importlib.import_module(f"lpt.{old}")
    new = importlib.import_module(f"lpt.{NEW_NAMES[old]}")
    assert found is new and new.__name__ == new.__spec__.name == f"lpt.{NEW_NAMES[old]}"


def test_old_imports_in_a_program_of_somebody_work():
    program = (
        "from lpt.classifier import PromptedClassifier\n"
        "from lpt.backbones.timm_vit import TimmViT\n"
        "import lpt, lpt.backbones.base\n"
        "assert PromptedClassifier is lpt.PromptedClassifier and issubclass(TimmViT, lpt.Backbone)\n"
        "assert lpt.backbones.base.Backbone is lpt.Backbone\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("FutureWarning") >= 3


def test_a_name_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"lpt\.nothing"):
        importlib.import_module("lpt.nothing")
