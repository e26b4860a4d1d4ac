"""Modules under the names that they had in lpt 0.1: found for one more release, with a warning."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

NEW_NAMES = {
    "adapters": "model.adapters",
    "augment": "data.augment",
    "backbones": "model.backbones",
    "backbones.base": "model.backbones.base",
    "backbones.clip_text": "model.backbones.clip_text",
    "backbones.clip_vit": "model.backbones.clip_vit",
    "backbones.nano": "model.backbones.nano",
    "backbones.timm_vit": "model.backbones.timm_vit",
    "classifier": "model.classifier",
    "doctor": "data.doctor",
    "engine.memory": "engine.step_memory",
    "finished": "report.finished",
    "heads": "model.heads",
    "history": "engine.history",
    "longtail": "data.longtail",
    "matching": "model.matching",
    "page": "report.page",
    "plots": "report.plots",
    "preprocess": "data.preprocess",
    "prompts": "model.prompts",
    "pseudo_labels": "report.pseudo_labels",
    "samplers": "data.samplers",
    "selection": "engine.selection",
    "serving": "serve",
    "stage": "methods.supervised",
    "tensors": "files",
    "unlabelled": "methods.semi_supervised",
}
"""Old name → new name, both without `lpt.`"""


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module under its old name: it is the module of the new name itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.removeprefix("lpt.") not in NEW_NAMES or not fullname.startswith("lpt."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new_name = f"lpt.{NEW_NAMES[spec.name.removeprefix('lpt.')]}"
        warnings.warn(f"{spec.name} is {new_name} now; lpt 0.3 will not find the old name", FutureWarning, stacklevel=2)
        module = importlib.import_module(new_name)
        spec.loader_state = module.__spec__  # which importing under another name replaces
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module was executed under its new name, and keeps what it says of itself."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """From now on the old names are found."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        # In front: the usual finder would load a moved package's modules once more, under their old names.
        sys.meta_path.insert(0, MovedModules())
