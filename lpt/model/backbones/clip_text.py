"""Text towers of open_clip: vectors for the names of classes, in the joint space of images and texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpt.errors import BackboneError
from lpt.files import why_not_downloaded
from lpt.model.backbones.timm_vit import check_fit, read_weights

TEMPLATE = "a photo of a {}"
TEXTS_AT_A_TIME = 256
"""Texts that the tower encodes at a time."""


@dataclass(frozen=True)
class TextTower:
    """A text tower that stays on disk: `encode` reads it, in fp32, and drops it when done.

    So it takes no memory while a model trains, no `.to(bfloat16)` reaches it, and a copy of the backbone copies a path.
    """

    name: str
    """Of the backbone, for error messages."""
    model: str
    """open_clip's name of the architecture."""
    config: Mapping[str, Any]
    """Of open_clip's model: `embed_dim`, `text_cfg` and `quick_gelu`."""
    path: Path
    """The safetensors file of the whole model, image tower included."""

    @torch.no_grad()
    def encode(self, classes: Sequence[str], templates: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """Class name → vector [J] on the CPU: the unit mean over templates of unit text features, as in CLIP's
        zero-shot classifiers (Radford 2021, section 3.1.4). Underscores in names are read as spaces.

        Raises BackboneError where the tower or its tokenizer cannot be loaded.
        """
        tokenizer, tower = self._tokenizer(), self._tower().to(device)
        texts = [template.replace("{}", name.replace("_", " ")) for name in classes for template in templates]
        batches = [texts[start : start + TEXTS_AT_A_TIME] for start in range(0, len(texts), TEXTS_AT_A_TIME)]
        features = torch.cat([tower(tokenizer(batch).to(device)) for batch in batches])
        unit = F.normalize(features, dim=1).view(len(classes), len(templates), -1)
        return dict(zip(classes, F.normalize(unit.mean(1), dim=1).cpu(), strict=True))

    def _tower(self) -> nn.Module:
        from open_clip import CustomTextCLIP

        text = self.config["text_cfg"]
        if text.get("hf_model_name"):
            raise BackboneError(
                f"the texts of {self.name} are those of another library's tower ({text['hf_model_name']}), which is "
                "not supported: set prototypes.weights to a safetensors file"
            )
        # open_clip makes both towers at once: the smallest image tower, which is dropped again.
        image: Any = {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32}
        tower = CustomTextCLIP(self.config["embed_dim"], image, text, quick_gelu=self.config["quick_gelu"]).text
        tensors = {}
        for name, value in read_weights(self.path).items():
            # open_clip has two layouts of a file: the text tower's keys begin with `text.`, or stand beside `visual.`.
            bare_name = name.removeprefix("text.")
            if not bare_name.startswith(("visual.", "logit_")):
                tensors[bare_name] = value
        check_fit(tower.state_dict(), tensors, self.path, f"the text tower of {self.model}")
        tower.load_state_dict(tensors)
        return tower.requires_grad_(False).eval()

    def _tokenizer(self) -> Any:
        from open_clip import get_tokenizer

        try:
            return get_tokenizer(self.model)
        except Exception as error:  # transformers and its parts raise errors of any class
            wanted = self.config["text_cfg"].get("hf_tokenizer_name") or self.model
            raise BackboneError(
                f"the tokenizer {wanted} of {self.name} could not be loaded ({why_not_downloaded(error)}): it needs "
                "transformers and a download, or else set prototypes.weights to a safetensors file"
            ) from error


def read_templates(template: str) -> tuple[str, ...]:
    """Templates with `{}` for the class name: `template` itself, OpenAI's 80 for ImageNet for `ensemble`, or the lines
    of the file at `template`. Raises BackboneError."""
    if template == "ensemble":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return tuple(make_text("{}") for make_text in OPENAI_IMAGENET_TEMPLATES)
    if "{}" in template:
        return (template,)
    path = Path(template)
    if not path.is_file():
        raise BackboneError(
            f"prototypes.template {template!r} has no {{}} for the class name and is no file: give a text such as "
            f"{TEMPLATE!r}, `ensemble`, or a file with one template a line"
        )
    try:
        lines = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except UnicodeDecodeError:
        raise BackboneError(f"prototypes.template {path} is not a text file: give one with a template a line") from None
    for line in lines:
        if "{}" not in line:
            raise BackboneError(f"prototypes.template {path}: {line!r} has no {{}} for the class name: put it in")
    if not lines:
        raise BackboneError(f"prototypes.template {path} is empty: give it one template a line")
    return lines
