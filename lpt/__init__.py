"""lpt: adapt one frozen ViT to a long-tailed dataset with a few learned prompts.

Five lines are a program:

    backbone = lpt.load_backbone("timm:deit_tiny_patch16_224", weights="deit_tiny.safetensors")
    task = lpt.load_task("cifar100-lt", root="data/cifar100")
    model = lpt.tune(task, backbone, method="lpt", epochs=(4, 4), optimizer="adamw", lr=(5e-3, 2e-3))
    print(lpt.evaluate(model, task))
    lpt.save_prompt("cifar100_lt.safetensors", model, method="lpt", counts=task.counts)

A name is imported when it is first asked for: torch takes seconds to load.
"""

import importlib
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

from lpt import moved
from lpt.errors import LptError

if TYPE_CHECKING:
    from lpt.config import load_config
    from lpt.data import Images, Task, load_task
    from lpt.data.given import task_from
    from lpt.engine.evaluate import evaluate
    from lpt.engine.phase import Phase, Recipe
    from lpt.engine.session import Session
    from lpt.estimator import Estimator
    from lpt.model.backbones import load_backbone
    from lpt.model.backbones.base import Backbone
    from lpt.model.classifier import PromptedClassifier
    from lpt.prompt_file import load_prompt, read_prompt, save_prompt
    from lpt.results import Report
    from lpt.serve.bank import TaskBank
    from lpt.tuning import model, tune

    __version__: str

__all__ = [
    "Backbone",
    "Estimator",
    "Images",
    "LptError",
    "Phase",
    "PromptedClassifier",
    "Recipe",
    "Report",
    "Session",
    "Task",
    "TaskBank",
    "evaluate",
    "load_backbone",
    "load_config",
    "load_prompt",
    "load_task",
    "model",
    "read_prompt",
    "save_prompt",
    "task_from",
    "tune",
]

HOMES = {
    "Backbone": "model.backbones.base",
    "Estimator": "estimator",
    "Images": "data",
    "Phase": "engine.phase",
    "PromptedClassifier": "model.classifier",
    "Recipe": "engine.phase",
    "Report": "results",
    "Session": "engine.session",
    "Task": "data",
    "TaskBank": "serve.bank",
    "evaluate": "engine.evaluate",
    "load_backbone": "model.backbones",
    "load_config": "config",
    "load_prompt": "prompt_file",
    "load_task": "data",
    "read_prompt": "prompt_file",
    "save_prompt": "prompt_file",
    "task_from": "data.given",
    "tune": "tuning",
}
"""Where each public name is at home, as the imports for type checkers have it."""


def __getattr__(name: str) -> Any:
    if name in HOMES:
        value = getattr(importlib.import_module(f"lpt.{HOMES[name]}"), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("lpt")
    elif not name.startswith("_") and PathFinder.find_spec(f"lpt.{name}", __path__):
        # `import lpt` was enough for lpt.model.classifier and the others that the public names are at home in.
        for home in HOMES.values():
            importlib.import_module(f"lpt.{home}")
        value = importlib.import_module(f"lpt.{name}")
    else:
        raise AttributeError(f"module 'lpt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


moved.install()
