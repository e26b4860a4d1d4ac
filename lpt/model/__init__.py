"""The whole model and its parts. The package is callable: `lpt.model(task, backbone)` is `lpt.tuning.model`."""

import importlib
import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """`lpt.model` is where `lpt.model.classifier` lives, and the name that people look for a model under."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return importlib.import_module("lpt.tuning").model(*arguments, **settings)


sys.modules[__name__].__class__ = _CallablePackage
