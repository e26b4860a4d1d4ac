"""What a run leaves for people: `report.md` from `report.json`, and the many/medium/few table of the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("accuracy", "class_accuracy", "many", "medium", "few", "worst_class", "ece")
COLUMN_NAMES = {"accuracy": "all", "class_accuracy": "class mean", "worst_class": "worst class", "ece": "ECE"}

SWAPS = (("tail", "head"), ("head", "tail"))
WATCHED = {
    "last": "last",
    "mean of 20": "mean20",
    "median of 20": "median20",
    "best (chosen on test: no result)": "best_on_test",
}
"""What papers report of evaluations on the test set, by what they are."""


def percent(value: float | None) -> str:
    """One decimal; an empty group is n/a, never NaN.

    >>> percent(0.6789), percent(None)
    ('67.9', 'n/a')
    """
    return "n/a" if value is None else f"{100 * value:.1f}"


def table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """A Markdown table of named metric rows, in percent."""
    head = ["", *(COLUMN_NAMES.get(c, c) for c in COLUMNS)]
    body = [[name, *(percent(metrics.get(c)) for c in COLUMNS)] for name, metrics in rows]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]

    def show(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "| " + " | ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([show(head), rule, *map(show, body)])


def cost_line(report: Mapping[str, Any]) -> str:
    """Steps, images, FLOPs, time and memory, each by itself: few steps of a large model are no little work."""
    cost, memory = report["cost"], report["peak_memory_bytes"] / 2**20
    flops = f"{cost['flops'] / 1e12:,.1f} TFLOPs" if cost["flops"] else "FLOPs not counted"
    return (
        f"{cost['steps']:,} steps, {cost['images']:,} images, {flops} in training, {report['seconds']:.0f} s in all, "
        f"peak memory {memory:,.0f} MiB"
    )


def pseudo_label_line(found: Mapping[str, Any]) -> str:
    """How many pseudo-labels of the last round were kept, and how rightly where that is known."""
    line = f"Round {found['round']}: {found['kept']:,} of {found['images']:,} kept ({percent(found['coverage'])} %)"
    if "precision" not in found:
        return line + "; the truth is not known."
    sure = "" if found["false_confidence"] is None else f", {found['false_confidence']:.2f} sure on average"
    return line + f", {percent(found['precision'])} % of them right; {found['false_kept']:,} wrong ones{sure}."


def single_head_line(alone: Mapping[str, Any]) -> str:
    """One head of two, by itself."""
    return f"class mean {percent(alone['class_accuracy'])}, few {percent(alone['few'])}"


def watched_line(seen: Mapping[str, Any]) -> str:
    """What papers report of evaluations on the test set during training; the best of them is no result."""
    values = ", ".join(f"{name} {percent(seen[key])}" for name, key in WATCHED.items())
    return f"{values}, of {seen['evaluations']} evaluations"


def markdown(report: Mapping[str, Any], *, classes: Sequence[str], command: str) -> str:
    """`report.md`: the table, what was run, the worst classes, and how to run it again."""
    data, sizes = report["data"], report["group_sizes"]
    groups = ", ".join(f"{name} {sizes[name]}" for name in ("many", "medium", "few"))
    ranked = sorted(
        (accuracy, name, count)
        for name, accuracy, count in zip(classes, report["per_class"], data["counts"], strict=True)
        if accuracy is not None
    )
    lines = [
        f"# {report['method']} on {data['name']}",
        "",
        f"Per cent on the test set; weights: {report['selection']}. ECE, NLL and Brier from "
        f"softmax({report['scale']:g} · logits).",
        "",
        table([(report["method"], report)]),
        "",
        f"Groups by training count, rule `{report['group_rule']}`: {groups} classes.",
        "",
        "| | |",
        "|---|---|",
        f"| backbone | {report['backbone']['name']}, weights {report['backbone']['fingerprint']} |",
        f"| data | {data['name']} ({data['variant']}), imbalance factor {data['imbalance_factor']:g}, "
        f"{sum(data['counts'])} training images |",
        f"| split SHA-256 | `{data['split_sha256']}` |",
        f"| trained | {report['trainable_parameters']:,} parameters, seed {report['seed']}, {report['precision']} |",
        f"| prompt file | {report['prompt_bytes']:,} bytes |",
        f"| cost | {cost_line(report)} |",
        f"| NLL, Brier | {report['nll']:.4f}, {report['brier']:.4f} |",
    ]
    if usage := report.get("key_usage"):
        lines.append(
            f"| keys on the test set | perplexity {usage['perplexity']:.1f} of {len(usage['selections'])}, "
            f"{usage['dead_keys']} dead |"
        )
    for name, alone in report.get("heads", {}).items():
        lines.append(f"| the {name} head alone | {single_head_line(alone)} |")
    if found := report.get("pseudo_labels"):
        lines.append(f"| pseudo-labels | {pseudo_label_line(found)} |")
        if "precision" in found:
            swaps = ", ".join(f"{a} taken for {b} {percent(found[f'{a}_taken_for_{b}'])} %" for a, b in SWAPS)
            far = f"KL to the truth {found['kl']:.2f}, " if "kl" in found else ""
            lines.append(f"| their bias | {far}{swaps} |")
    if seen := report.get("watched"):
        lines.append(f"| class mean on the test set | {watched_line(seen)} |")
    for name, number in report.get("labels_seen", {}).items():
        lines.append(f"| labels seen | the backbone knows {number} of these classes as labels of {name} |")
    if skipped := report.get("skipped_images"):
        lines.append(f"| skipped images | {len(skipped)}: {'; '.join(skipped[:10])} |")
    if report["absent_classes"]:
        lines.append(f"| classes without training images | {', '.join(report['absent_classes'])} |")
    lines += [
        "",
        "Worst classes: " + ", ".join(f"{n} {percent(a)} (n = {c})" for a, n, c in ranked[:10]) + ".",
        "",
    ]
    return "\n".join([*lines, "Run it again:", "", "```sh", command, "```", ""])
