"""What an LPT run says of its group prompts: the table of what they buy, and one sentence.

Shapes: predicted classes and labels [N], counts [C].
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lpt.data.longtail import shot_groups
from lpt.metrics import mean_of_present, paired_difference, per_class_accuracy
from lpt.report.quoting import for_markdown

ARMS = {
    "retrieved": "retrieved group prompts",
    "fixed": "the fixed group prompts",
    "constant": "the same ones for all images",
    "random": "random ones",
    "none": "no group prompts (phase 1)",
    "both": "mean of both heads",
}
"""What each answer is called in tables."""
AGAINST = (
    ("retrieved", "constant"),
    ("retrieved", "random"),
    ("retrieved", "none"),
    ("fixed", "none"),
    ("both", "constant"),
    ("both", "random"),
    ("both", "retrieved"),
    ("both", "fixed"),
    ("both", "none"),
)
"""Pairs of answers whose difference is reported."""
HEAD = ("answer", "class mean", "few", "difference")
TOO_WIDE = 0.01
"""An interval that reaches so far cannot say that nothing is bought."""


def bought(
    answers: Mapping[str, Tensor],
    labels: Tensor,
    counts: Tensor,
    *,
    group_rule: str,
    answer: str,
    images: str,
    constant: list[int],
    chosen_by: float,
) -> dict[str, Any]:
    """The `retrieval` of `report.json`: class mean and few of each answer, and their differences with intervals.

    `answer` names the one that the prompt file gives; `images` what they are of; `constant` are the group prompts of
    the answer of this name, which `chosen_by` of the training images choose.
    """
    few = torch.zeros(len(counts), dtype=torch.bool)
    few[shot_groups(counts, group_rule)["few"]] = True
    is_few, right = few[labels], {name: classes == labels for name, classes in answers.items()}
    arms, differences = {}, {}
    for name, classes in answers.items():
        accuracies = per_class_accuracy(classes, labels, len(counts))
        arms[name] = {"class_accuracy": mean_of_present(accuracies), "few": mean_of_present(accuracies[few])}
    for a, b in AGAINST:
        if a in right and b in right:
            differences[f"{a} - {b}"] = {
                "class_accuracy": paired_difference(right[a], right[b], labels),
                "few": paired_difference(right[a][is_few], right[b][is_few], labels[is_few]),
            }
    facts: dict[str, Any] = {"images": images, "number": len(labels), "answer": answer}
    if "constant" in answers:
        facts |= {"constant": constant, "chosen_by": chosen_by}
    facts |= {"arms": arms, "differences": differences}
    return {**facts, "says": sentence(facts)}


def sentence(retrieval: Mapping[str, Any]) -> str:
    """What the numbers of the class mean say to do; to choose by, they should be of held-out images."""
    differences, answer = retrieval["differences"], retrieval["answer"]

    def buys(pair: str) -> str:
        return points(differences[pair]["class_accuracy"])

    if "fixed - none" in differences:
        return f"The fixed group prompts add {buys('fixed - none')} points of class mean over phase 1 alone."
    text = f"Retrieval adds {buys('retrieved - constant')} points of class mean over the same prompts for all images"
    if answer == "both":
        text += f", with the query's own head beside it {buys('both - constant')}"
    _, low, high = differences[f"{answer} - constant"]["class_accuracy"]
    if low > 0:
        text += ": keep the query"
    elif high >= TOO_WIDE:
        text += ": too few images to tell, hold out more (data.val_per_class)"
    else:
        text += ": choose method.query=none (`lpt edit`), which spares the query's pass"
    _, low, high = differences[f"{answer} - none"]["class_accuracy"]
    over_phase1 = f"; phase 2 as a whole adds {buys(f'{answer} - none')} over phase 1 alone"
    return text + over_phase1 + (", which is no more than noise." if low <= 0 and high < TOO_WIDE else ".")


def points(difference: tuple[float, float, float] | None) -> str:
    """A difference with its interval, in points.

    >>> points((0.0012, -0.0021, 0.004)), points(None)
    ('+0.1 (-0.2 to +0.4)', 'n/a')
    """
    if difference is None:
        return "n/a"
    middle, low, high = (100 * value for value in difference)
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"


def note(retrieval: Mapping[str, Any]) -> str:
    """What the numbers of the table are of."""
    text = (
        f"{retrieval['number']:,} {retrieval['images']} images; * is what the prompt file answers, and differences of "
        "the class mean are to that, with 95 % normal intervals over images, paired and stratified by class."
    )
    if "constant" in retrieval:
        numbers = " and ".join(map(str, retrieval["constant"]))
        text += f" The same for all images are {numbers}, which {retrieval['chosen_by']:.0%} of training images choose."
    return text


def rows(retrieval: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(answer, class mean, few, class mean against the answer of the prompt file) of each answer, as text."""
    own, lines = retrieval["answer"], []
    for name, metrics in retrieval["arms"].items():
        values = ["n/a" if metrics[key] is None else f"{100 * metrics[key]:.1f}" for key in ("class_accuracy", "few")]
        against = _against(retrieval["differences"], name, own)
        lines.append((ARMS[name] + " *" * (name == own), values[0], values[1], against))
    return lines


def _against(differences: Mapping[str, Any], name: str, own: str) -> str:
    if f"{own} - {name}" in differences:
        middle, low, high = differences[f"{own} - {name}"]["class_accuracy"]
        return points((-middle, -high, -low))
    return points(differences[f"{name} - {own}"]["class_accuracy"]) if f"{name} - {own}" in differences else ""


def section(retrieval: Mapping[str, Any]) -> list[str]:
    """The lines of `report.md`."""
    lines = ["## What retrieval adds", "", sentence(retrieval), "", f"| {' | '.join(HEAD)} |", "|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(map(for_markdown, row))} |" for row in rows(retrieval)]
    return [*lines, "", for_markdown(note(retrieval)), ""]
