"""lpt: adapt one frozen ViT to a long-tailed dataset with a few learned prompts.

Five lines are a program:

    backbone = lpt.load_backbone("timm:deit_tiny_patch16_224", weights="deit_tiny.safetensors")
    task = lpt.load_task("cifar100-lt", root="data/cifar100")
    model = lpt.tune(task, backbone, method="lpt", epochs=(4, 4), optimizer="adamw", lr=(5e-3, 2e-3))
    print(lpt.evaluate(model, task))
    lpt.save_prompt("cifar100_lt.safetensors", model, method="lpt", counts=task.counts)
"""

from importlib.metadata import version

from lpt import moved
from lpt.config import load_config as load_config
from lpt.data import Images as Images
from lpt.data import Task as Task
from lpt.data import load_task as load_task
from lpt.engine.evaluate import evaluate as evaluate
from lpt.engine.phase import Phase as Phase
from lpt.engine.phase import Recipe as Recipe
from lpt.engine.session import Session as Session
from lpt.errors import LptError as LptError
from lpt.model.backbones import load_backbone as load_backbone
from lpt.model.backbones.base import Backbone as Backbone
from lpt.model.classifier import PromptedClassifier as PromptedClassifier
from lpt.prompt_file import load_prompt as load_prompt
from lpt.prompt_file import read_prompt as read_prompt
from lpt.prompt_file import save_prompt as save_prompt
from lpt.run import tune as tune

__version__ = version("lpt")

moved.install()
