"""Pictures of a run as SVG text, for `report.html`.

Shapes: counts [C] training images, per_class [C] accuracies (None where the test part has no image of a class),
confidence and correct [N] on the test part.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lpt.data.longtail import GROUPS, shot_groups

COLORS = {"many": "#2f6690", "medium": "#e09f3e", "few": "#b23a48"}
INK, FAINT, OTHER = "#22303c", "#d9dee3", "#7d8b97"


@contextmanager
def _figure(width: float = 5.6, height: float = 2.9) -> Iterator[tuple[Any, Any, list[str]]]:
    """(figure, axes, out): the SVG is appended to `out` at the end. No global state of matplotlib is touched."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "lpt",
        "font.size": 11,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    out: list[str] = []
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.subplots(), out
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    out.append(text[text.index("<svg") :])


def accuracy_by_rank(
    counts: Sequence[int],
    per_class: Sequence[float | None],
    group_rule: str,
    against: Mapping[str, Sequence[float | None]],
) -> str:
    """Accuracy of every class in order of its training count, the counts behind it, and other runs as lines."""
    order = np.argsort(-np.asarray(counts), kind="stable")
    accuracy = np.array([np.nan if a is None else 100 * a for a in per_class])[order]
    x = np.arange(1, len(order) + 1)
    with _figure(height=2.9 + 0.2 * bool(against)) as (figure, axes, out):
        behind = axes.twinx()
        behind.fill_between(x, np.asarray(counts)[order], step="mid", color=FAINT, linewidth=0)
        ticks = [n for n in (1, 10, 100, 1000, 10_000, 100_000) if n <= 2 * max(counts)]
        behind.set(yscale="log", ylabel="training images (grey)", ylim=(0.5, None))
        behind.set_yticks(ticks, [f"{n:,}" for n in ticks])
        behind.minorticks_off()
        behind.tick_params(axis="y", length=0)
        axes.set_zorder(behind.get_zorder() + 1)
        axes.patch.set_visible(False)
        for name, classes in shot_groups(counts, group_rule).items():
            mine = np.isin(order, classes.numpy())
            axes.plot(x[mine], accuracy[mine], "o", ms=4, color=COLORS[name], label=name, alpha=0.75)
        axes.plot(x, _smooth(accuracy), color=INK, lw=2, label="this run")
        for style, (name, values) in zip(("--", ":", "-."), list(against.items())[:3], strict=False):
            theirs = np.array([np.nan if a is None else 100 * a for a in values])[order]
            axes.plot(x, _smooth(theirs), color=OTHER, lw=1.8, ls=style, label=_name(name))
        axes.set(xlabel="class, from most to fewest training images", ylabel="accuracy, %", ylim=(-3, 103))
        figure.legend(frameon=False, ncols=4, loc="outside upper center", fontsize=9, columnspacing=1)
    return out[0]


def accuracy_by_group(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """Bars of class mean, many, medium and few for each named run; the first is this one."""
    names = ("class_accuracy", *GROUPS)
    with _figure(height=0.6 + 0.42 * (len(rows) + 0.6) * len(names) / 2) as (_, axes, out):
        size = 0.8 / len(rows)
        for i, (label, metrics) in enumerate(rows.items()):
            values = [metrics.get(name) for name in names]
            y = np.arange(len(names)) + (i - (len(rows) - 1) / 2) * size
            colors = [INK, *(COLORS[g] for g in GROUPS)]
            for at, value, color in zip(y, values, colors, strict=True):
                wide = 0 if value is None else 100 * value
                axes.barh(at, wide, size * 0.92, color=color, alpha=1 if i == 0 else 0.35)
                text = "n/a" if value is None else f"{wide:.1f}"
                axes.text(wide + 0.8, at, f"{text}  {_name(label)}", va="center", fontsize=10)
        axes.set(yticks=range(len(names)), yticklabels=["class mean", *GROUPS], xlim=(0, 125), xlabel="accuracy, %")
        axes.set_xticks(range(0, 101, 20))
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
    return out[0]


def reliability_diagram(confidence: np.ndarray, correct: np.ndarray, *, bins: int = 15) -> str:
    """Accuracy against confidence in the bins of the ECE; how many predictions fall into each, behind."""
    bin_of = np.clip(np.ceil(confidence * bins).astype(int), 1, bins) - 1
    total = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        accuracy = np.bincount(bin_of, weights=correct, minlength=bins) / total
        mean = np.bincount(bin_of, weights=confidence, minlength=bins) / total
    left = np.arange(bins) / bins
    with _figure(4.4, 4.0) as (_, axes, out):
        axes.bar(left, total / total.max(), 1 / bins, align="edge", color=FAINT, label="share of predictions")
        axes.plot([0, 1], [0, 1], color=OTHER, lw=1, ls="--", label="perfectly calibrated")
        axes.plot(mean, accuracy, "o-", color=COLORS["many"], ms=5, label="this run")
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02), aspect="equal")
        axes.legend(frameon=False, loc="upper left", fontsize=10)
    return out[0]


def key_usage(selections: Sequence[int]) -> str:
    """How often each key was chosen on the test part, most used first; the dashed line is an even share."""
    share = 100 * np.sort(np.asarray(selections))[::-1] / max(sum(selections), 1)
    with _figure(height=2.2) as (_, axes, out):
        axes.bar(range(1, len(share) + 1), share, color=COLORS["many"])
        axes.axhline(100 / len(share), color=OTHER, lw=1, ls="--")
        axes.set(xlabel="key, from most to least used", ylabel="choices, %")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return out[0]


def pseudo_labels(predicted: Sequence[int], true: Sequence[int] | None, counts: Sequence[int]) -> str:
    """How the kept pseudo-labels are spread over the classes, against the truth where it is known; both as shares."""
    order = np.argsort(-np.asarray(counts), kind="stable")
    x = np.arange(1, len(order) + 1)
    with _figure(height=2.5) as (_, axes, out):
        for values, color, label in ((predicted, COLORS["many"], "kept pseudo-labels"), (true, INK, "the truth")):
            if values is not None and sum(values):
                share = 100 * np.asarray(values)[order] / sum(values)
                axes.step(x, share, where="mid", color=color, label=label, lw=1.8 if values is predicted else 1.2)
        axes.set(xlabel="class, from most to fewest labelled images", ylabel="share, %", ylim=(0, None))
        axes.legend(frameon=False, fontsize=10)
    return out[0]


def precision_and_recall(
    precision: Sequence[float | None], recall: Sequence[float | None], counts: Sequence[int]
) -> str:
    """Of the kept pseudo-labels, class by class in order of the labelled count; lines are running means."""
    order = np.argsort(-np.asarray(counts), kind="stable")
    x = np.arange(1, len(order) + 1)
    with _figure(height=2.5) as (_, axes, out):
        for values, color, label in ((precision, COLORS["many"], "precision"), (recall, COLORS["few"], "recall")):
            shown = np.array([np.nan if v is None else 100 * v for v in values])[order]
            axes.plot(x, shown, "o", ms=3, color=color, alpha=0.6)
            axes.plot(x, _smooth(shown), color=color, lw=2, label=label)
        axes.set(xlabel="class, from most to fewest labelled images", ylabel="%", ylim=(-3, 103))
        axes.legend(frameon=False, fontsize=10)
    return out[0]


def wrong_confidence(histogram: Sequence[int]) -> str:
    """How sure the wrong ones among the kept pseudo-labels are, in equal bins of confidence from 0 to 1."""
    width = 1 / len(histogram)
    with _figure(4.4, 2.2) as (_, axes, out):
        axes.bar(np.arange(len(histogram)) * width, histogram, width * 0.95, align="edge", color=COLORS["few"])
        axes.set(xlabel="confidence", ylabel="wrong pseudo-labels", xlim=(0, 1))
    return out[0]


def training_curves(history: Sequence[Mapping[str, Any]]) -> str:
    """Training loss of each epoch over all phases, and held-out accuracy where there was a held-out part."""
    with _figure() as (_, axes, out):
        done = 0
        phases = list(dict.fromkeys(line["phase"] for line in history))
        for color, phase in zip(list(COLORS.values()) * 9, phases, strict=False):
            lines = [line for line in history if line["phase"] == phase]
            x = [done + line["step"] for line in lines]
            axes.plot(x, [line["loss"] for line in lines], "o-", ms=4, color=color, label=f"loss, {phase}")
            done = x[-1]
        held = [(line["step"], line["val"]) for line in history if "val" in line]
        if held:
            right = axes.twinx()
            done, last, xs = 0, 0, []
            for step, _ in held:
                done, last = done + (last if step <= last else 0), step
                xs.append(done + step)
            for key, color in (("class_accuracy", INK), ("few", COLORS["few"])):
                values = [100 * v[key] if v[key] is not None else np.nan for _, v in held]
                right.plot(xs, values, ls="--", color=color, label=f"held out, {key.replace('_', ' ')}")
            right.set(ylabel="held-out accuracy, %")
            right.legend(frameon=False, loc="upper right", fontsize=10)
        lowest = min(line["loss"] for line in history)  # LPT's key term can take it below zero
        axes.set(xlabel="step", ylabel="training loss", xlim=(0, None), ylim=(min(0.0, lowest), None))
        axes.legend(frameon=False, loc="lower left", fontsize=10)
    return out[0]


def _name(text: str) -> str:
    """As matplotlib takes it for text: short, no formula, and no leading underscore, which would hide it."""
    short = text if len(text) <= 32 else "…" + text[-31:]
    return short.replace("$", r"\$").lstrip("_") or "run"


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over about a twelfth of the classes, which ignores classes without test images."""
    half = max(1, len(values) // 24)
    known = ~np.isnan(values)
    ones = np.ones(2 * half + 1)
    middle = slice(half, half + len(values))
    total = np.convolve(np.where(known, values, 0), ones)[middle]
    number = np.convolve(known.astype(float), ones)[middle]
    with np.errstate(invalid="ignore"):
        return total / number
