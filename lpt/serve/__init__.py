"""What a prompt file is for once it is there: opened on its backbone, evaluated on a task, asked about images.

A name is imported when it is first asked for: a library is listed without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpt.serve.evaluating import evaluate_prompt as evaluate_prompt
    from lpt.serve.opening import open_prompt as open_prompt
    from lpt.serve.predicting import image_files as image_files
    from lpt.serve.predicting import predict_files as predict_files

HOMES = {
    "evaluate_prompt": "evaluating",
    "open_prompt": "opening",
    "image_files": "predicting",
    "predict_files": "predicting",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'lpt.serve' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lpt.serve.{HOMES[name]}"), name)
