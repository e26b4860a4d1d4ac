"""Which classes a backbone has been trained to tell apart, as far as its name says so."""

from collections.abc import Sequence

from lpt.model.backbones import nano

LABEL_SETS = {"in1k": "imagenet-1k", "in12k": "imagenet-12k", "in21k": "imagenet-21k-goog", "in22k": "imagenet-22k"}
"""What timm's tags call a label set, and what timm's table of label sets calls it."""


def labels_seen(classes: Sequence[str], backbone: str) -> dict[str, list[str]]:
    """Those of `classes` that the backbone has been trained to tell apart: label set → names, where there are any."""
    shared_with: dict[str, list[str]] = {}
    for label_set, labels in label_sets(backbone).items():
        shared = [name for name in classes if name.replace("_", " ").lower() in labels]
        if shared:
            shared_with[label_set] = shared
    return shared_with


def label_sets(backbone: str) -> dict[str, set[str]]:
    """The label sets that a backbone was trained with, as far as its name says so: name → labels in lower case."""
    if backbone == "nano":
        return {"CIFAR-100": nano.labels()}
    from timm.data.imagenet_info import ImageNetInfo

    tag = _tag(backbone).lower()
    sets: dict[str, set[str]] = {}
    for in_tag, label_set in LABEL_SETS.items():
        if in_tag in tag:
            info = ImageNetInfo(label_set)
            descriptions = (info.label_name_to_description(label) for label in info.label_names())
            # A description lists synonyms: "tench, Tinca tinca".
            sets[label_set] = {word.strip().lower() for text in descriptions for word in text.split(",")}
    return sets


def _tag(backbone: str) -> str:
    """What the name says of the training: after the dot; of a timm model without one, what timm takes for it."""
    from timm.models import get_pretrained_cfg

    family, _, model = backbone.partition(":")
    if "." in model or family != "timm":
        return backbone.rpartition(".")[2] if "." in backbone else ""
    config = get_pretrained_cfg(model)
    return config.tag or "" if config else ""


def overlap_notes(classes: Sequence[str], backbone: str) -> list[str]:
    """A sentence for each label set of the backbone that shares names with `classes`, or one that says that its name
    does not tell which labels it was trained with."""
    if not label_sets(backbone):
        return [f"what labels {backbone} was trained with is not in its name: overlap not checked"]
    notes = []
    for label_set, shared in labels_seen(classes, backbone).items():
        more = f", and {len(shared) - 5} more" if len(shared) > 5 else ""
        notes.append(
            f"{backbone} was trained with the labels of {label_set}, which has {len(shared)} of these {len(classes)} "
            f"classes: {', '.join(shared[:5])}{more}; accuracy on them is not that of unseen labels"
        )
    return notes
