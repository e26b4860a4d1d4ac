"""Class prototypes from a supervised checkpoint's own classifier, whose classes have names in WordNet.

Shapes: rows [K D'] of K classes, prototype [D'].
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lpt.errors import BackboneError, quoted
from lpt.model.backbones.base import comparable, fingerprint_of, read_prototypes
from lpt.model.backbones.timm_vit import download_errors, quiet, read_weights

LEADING = re.compile(
    "a|an|the|any|one|some|each|either|of|various|several|numerous|certain|kind|type|sort|species|breed|variety"
)
"""Words before what a definition is about."""
AFTER = re.compile(
    "of|with|without|for|that|which|who|whose|whom|in|on|at|from|to|by|as|into|having|used|made|and|or|but|than|like|"
    "resembling|containing|where|when|not|is|are|has|usually|especially"
)
"""Words behind the noun that says of which kind something is; so are participles behind the first word."""


@dataclass(frozen=True)
class ClassifierRows:
    """The rows of the classifier of `timm:<name>`, which stay on disk until class names are asked for.

    A class's prototype is the mean of the rows of all classes that its name matches in the first of three ways: it is a
    lemma; the last word of a lemma; the genus of the definition (ours). A class that nothing matches is taken from the
    file `otherwise`, if there is one.
    """

    name: str
    """Of the backbone, `timm:<name>`."""
    weights: Path | None
    """Its local file; None where timm has downloaded it."""
    otherwise: Path | None

    @torch.no_grad()
    def encode(self, classes: Sequence[str], templates: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """Class name → vector [D'] on the CPU; `templates` and `device` are those of texts, and not needed.

        Raises BackboneError where the checkpoint has no classifier with names, and where a class has no prototype.
        """
        rows, label_set = self._rows()
        matched = match_names(classes, label_set)
        found = {name: rows[matched[name]].mean(0) for name in classes if matched[name]}
        lack = [name for name in classes if not matched[name]]
        given = read_prototypes(self.otherwise) if self.otherwise and lack else {}
        known = {comparable(name): row for name, row in given.items()}
        absent = [name for name in lack if comparable(name) not in known]
        if absent:
            raise BackboneError(
                f"{len(absent)} of {len(classes)} classes match none of {label_set}, the classifier of {self.name}: "
                f"{quoted(', '.join(absent), 1000)}; set prototypes.weights to a safetensors file that has them"
            )
        return found | {name: known[comparable(name)] for name in lack}

    def identity(self) -> str:
        """What of them moves a run's numbers beside the backbone, as a text: the classifier, and the file."""
        otherwise = read_prototypes(self.otherwise) if self.otherwise else {}
        return f"rows {fingerprint_of([('rows', self._rows()[0]), *otherwise.items()])}"

    def remark(self, classes: Sequence[str]) -> str:
        """What a run reports about them."""
        _, label_set = self._rows()
        matched = match_names(classes, label_set)
        lack = [name for name in classes if not matched[name]]
        said = (
            f"class prototypes: rows of {self.name}'s classifier of {label_set} for {len(classes) - len(lack)} of "
            f"{len(classes)} classes"
        )
        return f"{said}; no match, so from prototypes.weights: {quoted(', '.join(lack), 1000)}" if lack else said

    def _rows(self) -> tuple[Tensor, str]:
        """(rows, the label set that they are of in timm's table)."""
        from timm.data.imagenet_info import infer_imagenet_subset

        rows = self._stored() if self.weights else self._published()
        count = 0 if rows is None else len(rows)
        label_set = infer_imagenet_subset({"num_classes": count})
        if rows is None or label_set is None:
            has = f"a classifier of {count} classes, whose names timm does not know" if count else "no classifier"
            raise BackboneError(f"prototypes.from=classifier: {self.name} has {has}: use prototypes.weights")
        return rows.float(), label_set

    def _stored(self) -> Tensor | None:
        assert self.weights is not None
        return read_weights(self.weights).get("head.weight")

    def _published(self) -> Tensor | None:
        import timm

        with quiet("timm"), download_errors(self.name, "timm"), torch.random.fork_rng(devices=[]):
            vit: Any = timm.create_model(self.name.removeprefix("timm:"), pretrained=True)
        classifier = vit.get_classifier()
        return classifier.weight.detach() if isinstance(classifier, nn.Linear) else None


def match_names(classes: Sequence[str], label_set: str) -> dict[str, list[int]]:
    """Class name → the indices of what it matches in a label set of timm: by lemma, or else by last word, or else by
    genus."""
    from timm.data.imagenet_info import ImageNetInfo

    labels = ImageNetInfo(label_set).label_descriptions(detailed=True)
    assert isinstance(labels, list)
    return match(classes, [entry.split(": ", 1) for entry in labels])


def match(classes: Sequence[str], entries: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """Class name → the indices of those `entries`, (lemmas between commas, definition), that it matches.

    >>> entries = [("apple", "fruit with red or yellow skin"), ("crab apple, crabapple", "small sour apple"),
    ...            ("rocking chair, rocker", "a chair mounted on rockers"), ("park bench", "a bench in a public park")]
    >>> match(["Apple", "chair", "bench", "cat"], entries)
    {'Apple': [0], 'chair': [2], 'bench': [3], 'cat': []}
    """
    ways: tuple[dict[str, list[int]], ...] = ({}, {}, {})
    for index, (lemmas, *definition) in enumerate(entries):
        names = {comparable(lemma.strip()) for lemma in lemmas.split(",")}
        last_words = {name.rpartition(" ")[2] for name in names}
        genera = {genus(text) for text in definition}
        for way, keys in zip(ways, (names, last_words, genera), strict=True):
            for key in keys:
                way.setdefault(key, []).append(index)
    wanted = {name: comparable(name) for name in classes}
    return {name: next((way[key] for way in ways if key in way), []) for name, key in wanted.items()}


def genus(definition: str) -> str:
    """The noun that says of which kind something is, in a definition of WordNet: the last word of its first phrase.

    >>> genus("a chair mounted on rockers"), genus("any of various large monkeys of forests"), genus("")
    ('chair', 'monkeys', '')
    """
    phrase: list[str] = []
    for word in re.findall(r"[a-z'-]+|[^\sa-z'-]", definition.lower()):
        if not phrase and LEADING.fullmatch(word):
            continue
        participle = bool(phrase) and word.endswith(("ed", "ing"))
        if AFTER.fullmatch(word) or participle or not word[0].isalpha():
            break
        phrase.append(word)
    return phrase[-1] if phrase else ""
