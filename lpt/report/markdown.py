"""What a run leaves for people: `report.md` from `report.json`, and the many/medium/few table of the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from lpt.report.quoting import code_block, for_markdown
from lpt.results import COLUMN_NAMES, COLUMNS, percent

SWAPS = (("tail", "head"), ("head", "tail"))
"""(true, pseudo-labeled as) of the mistakes that tell how pseudo-labels are biased."""
WATCHED = {
    "last": "last",
    "mean of 20": "mean20",
    "median of 20": "median20",
    "best (chosen on test: no result)": "best_on_test",
}
"""What papers report of evaluations on the test set during training: its name here, its key in `report.json`."""

FIVE_CROPS = ", five crops"
"""What is added to the name of a row whose answers are of five crops."""


def table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """A Markdown table of named metric rows, in percent."""
    header = ["", *(COLUMN_NAMES.get(column, column) for column in COLUMNS)]
    lines = [header]
    for name, metrics in rows:
        lines.append([for_markdown(name), *(percent(metrics.get(column)) for column in COLUMNS)])
    return aligned_table(header, lines[1:])


def aligned_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is one in a terminal, too; all columns but the first are numbers."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def aligned(cells: Sequence[str]) -> str:
        name = cells[0].ljust(widths[0])
        numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([name, *numbers]) + " |"

    # Markdown's colon at the end of a rule aligns a column of numbers to the right
    rules = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([aligned(header), "|" + "|".join(rules) + "|", *map(aligned, lines[1:])])


def row_name(report: Mapping[str, Any]) -> str:
    """What a run is called in tables: its method, and what sets it apart from others of that name. Reports of lpt 0.1
    have the first alone."""
    return report.get("described", report["method"])


def rows_of(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The rows of a run in a table: its answers to the test views, and where it has them to five crops of each."""
    rows = [(row_name(report), report)]
    if crops := report.get("five_crops"):
        rows.append((row_name(report) + FIVE_CROPS, crops))
    return rows


def cost_line(report: Mapping[str, Any]) -> str:
    """Steps, images, FLOPs, time and memory, each by itself: a few steps of a large model are much work, too."""
    cost, memory = report["cost"], report["peak_memory_bytes"] / 2**20
    flops = f"{cost['flops'] / 1e12:,.1f} TFLOPs" if cost["flops"] else "FLOPs not counted"
    return (
        f"{cost['steps']:,} steps, {cost['images']:,} images, {flops} in training, {report['seconds']:.0f} s in all, "
        f"peak memory {memory:,.0f} MiB"
    )


def pseudo_label_line(diagnosis: Mapping[str, Any]) -> str:
    """How many pseudo-labels of the last round were kept, and how many of them are right where that is known."""
    line = (
        f"Round {diagnosis['round']}: {diagnosis['kept']:,} of {diagnosis['images']:,} kept "
        f"({percent(diagnosis['coverage'])} %)"
    )
    if "precision" not in diagnosis:
        return line + "; the truth is not known."
    line += f", {percent(diagnosis['precision'])} % of them right; {diagnosis['false_kept']:,} wrong ones"
    if diagnosis["false_confidence"] is not None:
        line += f", {diagnosis['false_confidence']:.2f} mean confidence"
    return line + "."


def single_head_line(metrics: Mapping[str, Any]) -> str:
    """One head of a model with two, evaluated without the other."""
    return f"class mean {percent(metrics['class_accuracy'])}, few {percent(metrics['few'])}"


def watched_line(watched: Mapping[str, Any]) -> str:
    """What papers report of evaluations on the test set during training; the best of them is no result."""
    values = ", ".join(f"{name} {percent(watched[key])}" for name, key in WATCHED.items())
    return f"{values}, of {watched['evaluations']} evaluations"


def markdown(report: Mapping[str, Any], *, classes: Sequence[str], command: str) -> str:
    """`report.md`: the table, what was run, the worst classes, and how to run it again."""
    sizes = report["group_sizes"]
    groups = ", ".join(f"{name} {sizes[name]}" for name in ("many", "medium", "few"))
    lines = [
        f"# {for_markdown(row_name(report))} on {for_markdown(report['data']['name'])}",
        "",
        f"Per cent on the test set; weights: {report['selection']}. ECE, NLL and Brier from "
        f"softmax({report['scale']:g} · logits).",
        "",
        table(rows_of(report)),
        "",
        f"Groups by training count, rule `{report['group_rule']}`: {groups} classes.",
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {name} | {text} |" for name, text in [*_facts_of_every_run(report), *_facts_of_some_runs(report)]]
    lines += ["", f"Worst classes: {_worst_classes(report, classes)}.", ""]
    if bought := report.get("retrieval"):
        from lpt.report import retrieval  # which imports torch, and `lpt inspect` takes a function from here

        lines += retrieval.section(bought)
    return "\n".join([*lines, "Run it again:", "", *code_block(command), ""])


def _facts_of_every_run(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = report["data"]
    return [
        ("backbone", f"{for_markdown(report['backbone']['name'])}, weights {report['backbone']['fingerprint']}"),
        (
            "data",
            f"{for_markdown(data['name'])} ({for_markdown(data['variant'])}), "
            f"imbalance factor {data['imbalance_factor']:g}, {sum(data['counts'])} training images",
        ),
        ("split SHA-256", f"`{data['split_sha256']}`"),
        ("trained", f"{report['trainable_parameters']:,} parameters, seed {report['seed']}, {report['precision']}"),
        ("prompt file", f"{report['prompt_bytes']:,} bytes"),
        ("cost", cost_line(report)),
        ("NLL, Brier", f"{report['nll']:.4f}, {report['brier']:.4f}"),
    ]


def _facts_of_some_runs(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What depends on the method, the backbone and the data."""
    facts: list[tuple[str, str]] = []
    if usage := report.get("key_usage"):
        keys = f"perplexity {usage['perplexity']:.1f} of {len(usage['selections'])}, {usage['dead_keys']} dead"
        facts.append(("keys on the test set", keys))
    for name, metrics in report.get("heads", {}).items():
        facts.append((f"the {name} head alone", single_head_line(metrics)))
    if diagnosis := report.get("pseudo_labels"):
        facts.append(("pseudo-labels", pseudo_label_line(diagnosis)))
        if "precision" in diagnosis:
            facts.append(("their bias", _bias(diagnosis)))
    if watched := report.get("watched"):
        facts.append(("class mean on the test set", watched_line(watched)))
    for name, number in report.get("labels_seen", {}).items():
        facts.append(("labels seen", f"the backbone knows {number} of these classes as labels of {name}"))
    if skipped := report.get("skipped_images"):
        facts.append(("skipped images", f"{len(skipped)}: {for_markdown('; '.join(skipped[:10]))}"))
    if report["absent_classes"]:
        absent = ", ".join(for_markdown(name) for name in report["absent_classes"])
        facts.append(("classes without training images", absent))
    return facts


def _bias(diagnosis: Mapping[str, Any]) -> str:
    """KL divergence of the kept labels from the truth, and how often tail and head were predicted as each other."""
    parts = [f"KL to the truth {diagnosis['kl']:.2f}"] if "kl" in diagnosis else []
    for true, taken_for in SWAPS:
        parts.append(f"{true} predicted as {taken_for} {percent(diagnosis[f'{true}_taken_for_{taken_for}'])} %")
    return ", ".join(parts)


def _worst_classes(report: Mapping[str, Any], classes: Sequence[str], limit: int = 10) -> str:
    """Name, accuracy and training count of the classes with the lowest accuracies."""
    ranked = sorted(
        (accuracy, name, count)
        for name, accuracy, count in zip(classes, report["per_class"], report["data"]["counts"], strict=True)
        if accuracy is not None
    )
    return ", ".join(
        f"{for_markdown(name)} {percent(accuracy)} (n = {count})" for accuracy, name, count in ranked[:limit]
    )
