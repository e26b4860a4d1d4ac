"""Pictures of a run as SVG text, for `report.html`.

Shapes: counts [C] training images, per_class [C] accuracies (None where the test part has no image of a class),
confidence and correct [N] on the test part. What is drawn over classes has the class with most training images first.
"""

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import numpy as np

from lpt.data.longtail import GROUPS, shot_groups
from lpt.errors import require
from lpt.report.quoting import for_html

COLORS = {"many": "#2f6690", "medium": "#e09f3e", "few": "#b23a48"}
INK, FAINT, OTHER = "#22303c", "#d9dee3", "#7d8b97"
VARIABLES = {"ink": INK, "faint": FAINT, "other": OTHER, **COLORS}
"""By the name under which a page may give another color, in a dark style."""


@contextmanager
def _figure(
    width: float = 5.6,
    height: float = 2.9,
    *,
    title: str = "a drawing of the run",
    dots: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[tuple[Any, Any, list[str]]]:
    """(figure, axes, svg): the text is appended to `svg` when the block ends. No global state of matplotlib changes.

    `width` and `height` are in inches; `dots` are what the markers of lines say when they are pointed at, by the gid of
    a line. The same data gives the same text: no date, and ids that are hashes with salt. Raises NotInstalled.
    """
    require("matplotlib", extra=None, gives=f"this drawing ({title})")
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
    svg: list[str] = []
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.subplots(), svg
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    svg.append(_for_a_page(text[text.index("<svg") :], title, dots or {}))


def _for_a_page(svg: str, title: str, dots: Mapping[str, Sequence[str]]) -> str:
    """A drawing that can stand beside others and on dark paper: a name for who cannot see it, ids that no other one
    has, colors as variables."""
    for gid, texts in dots.items():
        if texts:  # a line without markers is not drawn
            svg = _with_tips(svg, gid, texts)
    key = hashlib.sha256(f"{title}{svg}".encode()).hexdigest()[:8]
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", svg)
    for name, color in VARIABLES.items():
        svg = svg.replace(color, f"var(--{name}, {color})")
    opening, _, rest = svg.partition(">")
    named = f'{opening} role="img" aria-labelledby="{key}-title"><title id="{key}-title">{for_html(title)}</title>'
    return named + rest


def _with_tips(svg: str, gid: str, texts: Sequence[str]) -> str:
    """The markers of the line `gid`, one for each of `texts`, with that text as their title."""
    start = svg.index(f'<g id="{gid}">')
    end = svg.find('<g id="', start + 1)  # the group of what is drawn next
    end = len(svg) if end < 0 else end
    tips = iter(texts)
    drawn = re.sub(r"(<use [^>]*)/>", lambda m: f"{m[1]}><title>{for_html(next(tips))}</title></use>", svg[start:end])
    return svg[:start] + drawn + svg[end:]


def accuracy_by_rank(
    counts: Sequence[int],
    per_class: Sequence[float | None],
    group_rule: str,
    against: Mapping[str, Sequence[float | None]],
    classes: Sequence[str] | None = None,
) -> str:
    """Accuracy of every class in order of its training count, the counts behind it, and other runs as lines.

    Up to three of the runs in `against`, by name, are drawn. A dot says the name in `classes` when it is pointed at.
    """
    order = _by_count(counts)
    ranks = np.arange(1, len(order) + 1)
    accuracy = _percent(per_class)[order]
    groups = shot_groups(counts, group_rule)
    shown = {name: np.isin(order, members.numpy()) & ~np.isnan(accuracy) for name, members in groups.items()}
    dots: dict[str, list[str]] = {}
    called = classes or ()
    for name, in_group in shown.items() if called else ():
        drawn = zip(order[in_group], accuracy[in_group], strict=True)
        dots[f"dots-{name}"] = [f"{called[k]}: {value:.1f} %, {counts[k]} training images" for k, value in drawn]
    title = "Accuracy of each class, from most to fewest training images"
    with _figure(height=2.9 + 0.2 * bool(against), title=title, dots=dots) as (figure, axes, svg):
        _draw_counts(axes, np.asarray(counts)[order])
        for name, in_group in shown.items():
            x, y = ranks[in_group], accuracy[in_group]
            axes.plot(x, y, "o", ms=4, color=COLORS[name], label=name, alpha=0.75, gid=f"dots-{name}")
        axes.plot(ranks, _smooth(accuracy), color=INK, lw=2, label="this run")
        for style, (name, other) in zip(("--", ":", "-."), against.items(), strict=False):
            axes.plot(ranks, _smooth(_percent(other)[order]), color=OTHER, lw=1.8, ls=style, label=_name(name))
        axes.set(xlabel="class, from most to fewest training images", ylabel="accuracy, %", ylim=(-3, 103))
        figure.legend(frameon=False, ncols=4, loc="outside upper center", fontsize=9, columnspacing=1)
    return svg[0]


def _draw_counts(axes: Any, counts: np.ndarray) -> None:
    """A grey silhouette of the training counts behind what `axes` shows, with its own scale at the right."""
    behind = axes.twinx()
    behind.fill_between(np.arange(1, len(counts) + 1), counts, step="mid", color=FAINT, linewidth=0)
    ticks = [n for n in (1, 10, 100, 1000, 10_000, 100_000) if n <= 2 * max(counts)]
    behind.set(yscale="log", ylabel="training images (grey)", ylim=(0.5, None))
    behind.set_yticks(ticks, [f"{n:,}" for n in ticks])
    behind.minorticks_off()
    behind.tick_params(axis="y", length=0)
    # Twin axes are drawn over the first ones, which hide what is under them by a white patch
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)


def accuracy_by_group(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """Bars of class mean, many, medium and few for each named run; the first is this one."""
    metrics = {"class_accuracy": INK} | {group: COLORS[group] for group in GROUPS}
    places = np.arange(len(metrics))
    height, title = 0.6 + 0.42 * (len(rows) + 0.6) * len(metrics) / 2, "Accuracy of many, medium and few classes"
    with _figure(height=height, title=title) as (_, axes, svg):
        thickness = 0.8 / len(rows)
        for i, (run, values) in enumerate(rows.items()):
            heights = places + (i - (len(rows) - 1) / 2) * thickness  # a run's bar in each bundle
            for height, (metric, color) in zip(heights, metrics.items(), strict=True):
                value = values.get(metric)
                length = 0 if value is None else 100 * value
                axes.barh(height, length, thickness * 0.92, color=color, alpha=1 if i == 0 else 0.35)
                text = "n/a" if value is None else f"{length:.1f}"
                axes.text(length + 0.8, height, f"{text}  {_name(run)}", va="center", fontsize=10)
        # Room for the longest bar's name at the right of 100 %
        axes.set(yticks=range(len(metrics)), yticklabels=["class mean", *GROUPS], xlim=(0, 125), xlabel="accuracy, %")
        axes.set_xticks(range(0, 101, 20))
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
    return svg[0]


def reliability_diagram(confidence: np.ndarray, correct: np.ndarray, *, bins: int = 15) -> str:
    """Accuracy against confidence in the bins of the ECE; how many predictions fall into each, behind."""
    bin_of = np.clip(np.ceil(confidence * bins).astype(int), 1, bins) - 1  # bins are open at their lower end
    total = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):  # an empty bin is 0/0 = NaN, which is not drawn
        accuracy = np.bincount(bin_of, weights=correct, minlength=bins) / total
        mean_confidence = np.bincount(bin_of, weights=confidence, minlength=bins) / total
    left_edges = np.arange(bins) / bins
    with _figure(4.4, 4.0, title="Accuracy against confidence") as (_, axes, svg):
        axes.bar(left_edges, total / total.max(), 1 / bins, align="edge", color=FAINT, label="share of predictions")
        axes.plot([0, 1], [0, 1], color=OTHER, lw=1, ls="--", label="perfectly calibrated")
        axes.plot(mean_confidence, accuracy, "o-", color=COLORS["many"], ms=5, label="this run")
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02), aspect="equal")
        axes.legend(frameon=False, loc="upper left", fontsize=10)
    return svg[0]


def key_usage(selections: Sequence[int]) -> str:
    """How often each key was chosen on the test part, most used first; the dashed line is an even share."""
    share = 100 * np.sort(np.asarray(selections))[::-1] / max(sum(selections), 1)
    with _figure(height=2.2, title="How often each key was chosen") as (_, axes, svg):
        axes.bar(range(1, len(share) + 1), share, color=COLORS["many"])
        axes.axhline(100 / len(share), color=OTHER, lw=1, ls="--")
        axes.set(xlabel="key, from most to least used", ylabel="choices, %")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return svg[0]


def pseudo_labels(predicted: Sequence[int], true: Sequence[int] | None, counts: Sequence[int]) -> str:
    """How the kept pseudo-labels are spread over the classes, against the truth where it is known; both as shares.

    `predicted` and `true` [C] count unlabeled images, `counts` [C] labeled ones.
    """
    order = _by_count(counts)
    with _figure(height=2.5, title="Pseudo-labels of each class") as (_, axes, svg):
        for numbers, color, label, width in (
            (predicted, COLORS["many"], "kept pseudo-labels", 1.8),
            (true, INK, "the truth", 1.2),
        ):
            if numbers is not None and sum(numbers):
                share = 100 * np.asarray(numbers)[order] / sum(numbers)
                axes.step(np.arange(1, len(order) + 1), share, where="mid", color=color, label=label, lw=width)
        axes.set(xlabel="class, from most to fewest labeled images", ylabel="share, %", ylim=(0, None))
        axes.legend(frameon=False, fontsize=10)
    return svg[0]


def precision_and_recall(
    precision: Sequence[float | None], recall: Sequence[float | None], counts: Sequence[int]
) -> str:
    """Of the kept pseudo-labels, class by class in order of the labeled count [C]; lines are running means."""
    order = _by_count(counts)
    ranks = np.arange(1, len(order) + 1)
    with _figure(height=2.5, title="Precision and recall of pseudo-labels, class by class") as (_, axes, svg):
        for values, color, label in ((precision, COLORS["many"], "precision"), (recall, COLORS["few"], "recall")):
            percents = _percent(values)[order]
            axes.plot(ranks, percents, "o", ms=3, color=color, alpha=0.6)
            axes.plot(ranks, _smooth(percents), color=color, lw=2, label=label)
        axes.set(xlabel="class, from most to fewest labeled images", ylabel="%", ylim=(-3, 103))
        axes.legend(frameon=False, fontsize=10)
    return svg[0]


def wrong_confidence(histogram: Sequence[int]) -> str:
    """How sure the wrong ones among the kept pseudo-labels are, in equal bins of confidence from 0 to 1."""
    width = 1 / len(histogram)
    with _figure(4.4, 2.2, title="Confidence of wrong pseudo-labels") as (_, axes, svg):
        axes.bar(np.arange(len(histogram)) * width, histogram, width * 0.95, align="edge", color=COLORS["few"])
        axes.set(xlabel="confidence", ylabel="wrong pseudo-labels", xlim=(0, 1))
    return svg[0]


def cost_of_accuracy(points: Mapping[str, tuple[float, float]], cost: str) -> str:
    """Class mean in per cent over a cost, on a logarithmic axis that `cost` names, for each row: `points` are (cost,
    class mean) by name. Rows that no cheaper one reaches have their names, and a line joins them; other dots say theirs
    when they are pointed at."""
    title = f"Class mean over {cost}"
    ahead: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not ahead or points[name][1] > points[ahead[-1]][1]:
            ahead.append(name)
    drawn = {"others": [name for name in points if name not in ahead], "front": ahead}
    dots = {}
    for gid, names in drawn.items():
        dots[gid] = [f"{name}: {points[name][1]:.1f} % at {points[name][0]:,.0f}" for name in names]
    with _figure(7.0, 3.6, title=title, dots=dots) as (_, axes, svg):
        axes.step(*zip(*(points[name] for name in ahead), strict=True), where="post", color=FAINT, lw=1.5)
        for (gid, names), color in zip(drawn.items(), (OTHER, COLORS["many"]), strict=True):
            x, y = [points[name][0] for name in names], [points[name][1] for name in names]
            axes.plot(x, y, "o", ms=5, color=color, alpha=0.8, gid=gid)
        for name, below in zip(ahead, cycle((False, True)), strict=False):  # neighbours write over each other less
            place = (4, -12 if below else 4)
            axes.annotate(_name(name), points[name], xytext=place, textcoords="offset points", fontsize=9)
        axes.set(xscale="log", xlabel=cost, ylabel="class mean, %")
        axes.margins(x=0.15, y=0.1)
    return svg[0]


def training_curves(history: Sequence[Mapping[str, Any]]) -> str:
    """Training loss of each epoch over all phases, and held-out accuracy where there was a held-out part."""
    with _figure(title="Training loss and held-out accuracy over steps") as (_, axes, svg):
        phases = dict.fromkeys(line["phase"] for line in history)  # in the order of their first lines
        steps_before = 0
        for phase, color in zip(phases, cycle(COLORS.values()), strict=False):
            lines = [line for line in history if line["phase"] == phase]
            steps = [steps_before + line["step"] for line in lines]
            axes.plot(steps, [line["loss"] for line in lines], "o-", ms=4, color=color, label=f"loss, {phase}")
            steps_before = steps[-1]
        held_out = [line for line in history if "val" in line]
        if held_out:
            _draw_held_out(axes.twinx(), held_out)
        lowest = min(line["loss"] for line in history)  # LPT's key term can take it below zero
        axes.set(xlabel="step", ylabel="training loss", xlim=(0, None), ylim=(min(0.0, lowest), None))
        axes.legend(frameon=False, loc="lower left", fontsize=10)
    return svg[0]


def _draw_held_out(axes: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    """Held-out accuracy over steps, which `lines` count from 0 again in each phase."""
    steps: list[int] = []
    steps_before = last_step = 0
    for line in lines:
        if line["step"] <= last_step:  # a new phase
            steps_before += last_step
        last_step = line["step"]
        steps.append(steps_before + last_step)
    for metric, color in (("class_accuracy", INK), ("few", COLORS["few"])):
        percents = _percent([line["val"][metric] for line in lines])
        axes.plot(steps, percents, ls="--", color=color, label=f"held out, {metric.replace('_', ' ')}")
    axes.set(ylabel="held-out accuracy, %")
    axes.legend(frameon=False, loc="upper right", fontsize=10)


def _by_count(counts: Sequence[int]) -> np.ndarray:
    """Classes from most to fewest images; of equal ones the first comes first."""
    return np.argsort(-np.asarray(counts), kind="stable")


def _percent(values: Sequence[float | None]) -> np.ndarray:
    """Shares as per cent; None is NaN, which matplotlib leaves out."""
    return np.array([np.nan if value is None else 100 * value for value in values])


def _name(text: str) -> str:
    """As matplotlib takes it for text: short, no formula, and no leading underscore, which would hide it."""
    short = text if len(text) <= 32 else "…" + text[-31:]
    return short.replace("$", r"\$").lstrip("_") or "run"


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over about a twelfth of the classes, which ignores classes without test images."""
    half = max(1, len(values) // 24)
    known = ~np.isnan(values)
    window = np.ones(2 * half + 1)
    middle = slice(half, half + len(values))  # np.convolve returns `half` more values at either end
    total = np.convolve(np.where(known, values, 0), window)[middle]
    number = np.convolve(known.astype(float), window)[middle]
    with np.errstate(invalid="ignore"):  # 0/0 = NaN where no class of the window has test images
        return total / number
