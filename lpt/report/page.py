"""`report.html`: a run as one file that needs no network, readable on a phone.

Shapes: labels, predicted, confidence [N], in the order of the test part.
"""

import base64
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lpt.data.longtail import GROUPS
from lpt.data.preprocess import decoded
from lpt.data.task import Files, Images
from lpt.errors import DataError, NotInstalled
from lpt.report import plots, retrieval
from lpt.report.class_table import class_table
from lpt.report.markdown import cost_line, percent, pseudo_label_line, row_name, single_head_line, watched_line
from lpt.report.quoting import for_html
from lpt.report.search import search_html

WORST_CLASSES = 10
MISTAKES_SHOWN = 5
"""Of each of the worst classes."""
SIDE = 72
"""Of a thumbnail, in CSS pixels; stored with twice as many for dense screens."""

STYLE = """
:root { color-scheme: light dark; --paper: #f5f6f7; --card: #fff; --quiet: #5c6b78; --line: #e6e9ec; --ink: #22303c; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181c; --card: #1e242a; --quiet: #9aa7b3; --line: #323a42; --ink: #e3e8ec;
    --faint: #3a434c; --other: #94a1ad; --many: #7db3dc; --medium: #e0a95c; --few: #e5808c; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 880px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: 1rem 0 .2rem; } h2 { font-size: 1.1rem; margin: 0 0 .4rem; }
p { margin: .3rem 0 .6rem; } .quiet { color: var(--quiet); font-size: .9rem; }
section { background: var(--card); border-radius: 10px; padding: 1rem; margin: 1rem 0; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.2rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tile { background: var(--card); border-radius: 10px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.4rem; white-space: nowrap; }
svg { width: 100%; height: auto; display: block; max-width: 700px; margin: 0 auto; }
.narrow svg { max-width: 440px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
td, th { text-align: left; padding: .35rem .6rem .35rem 0; border-top: 1px solid var(--line); vertical-align: top; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " ↑"; } th[aria-sort=descending] button::after { content: " ↓"; }
.classes tbody th { font-weight: normal; overflow-wrap: anywhere; }
td.long { overflow-wrap: anywhere; }
.class { border-top: 1px solid var(--line); padding: .5rem 0; }
.class header { display: flex; justify-content: space-between; gap: 1rem; flex-wrap: wrap; }
figure { display: inline-block; margin: 0 .4rem .3rem 0; width: 76px; vertical-align: top; font-size: .72rem; }
figure img { width: 72px; height: 72px; object-fit: cover; border-radius: 4px; display: block; }
figcaption { line-height: 1.2; overflow-wrap: anywhere; }
pre { background: var(--paper); padding: .7rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
.pixels { image-rendering: pixelated; }
@media (max-width: 560px) {
  main { padding: .6rem; } figure { width: 60px; } figure img { width: 56px; height: 56px; }
}
"""


def html(
    report: Mapping[str, Any],
    *,
    classes: Sequence[str],
    predictions: Mapping[str, Tensor],
    history: Sequence[Mapping[str, Any]],
    config: str,
    command: str,
    test: Images | Files | None = None,
    against: Mapping[str, Mapping[str, Any]] | None = None,
    search: Mapping[str, Any] | None = None,
) -> str:
    """The text of the page.

    `predictions` holds labels, predicted and confidence [N]; `history` the lines of the training log; `config` the YAML
    and `command` the command line of the run; `against` other runs' reports on the same classes, by name; `test` the
    images to show, None where they are not at hand; `search` is what `lpt fit` compared before. Raises KeyError for a
    report of another version.
    """
    against = against or {}
    parts = [
        *_heading(report, classes, len(predictions["labels"])),
        _tiles(report),
        *([_section("What was compared", *search_html(search))] if search else []),
        *_accuracy(report, classes, against),
        _calibration(report, predictions),
        _worst_classes(report, classes, predictions, test),
        _all_classes(report, classes, predictions),
        *_key_usage(report),
        *_retrieval(report),
        *_pseudo_labels(report),
    ]
    if history:
        parts.append(_section("Training", _drawn(plots.training_curves, history), "Mean loss of each epoch."))
    parts.append(_rerun(report, config, command))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{for_html(_title(report))}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _title(report: Mapping[str, Any]) -> str:
    return f"{row_name(report)} on {report['data']['name']}"


def _heading(report: Mapping[str, Any], classes: Sequence[str], test_images: int) -> list[str]:
    data = report["data"]
    return [
        f"<h1>{for_html(_title(report))}</h1>",
        f'<p class="quiet">{for_html(report["backbone"]["name"])}; {len(classes)} classes, '
        f"{sum(data['counts']):,} training images, imbalance factor {data['imbalance_factor']:g}; "
        f"{test_images:,} test images; weights: {for_html(report['selection'])}.</p>",
    ]


def _section(heading: str, body: str, note: str = "", *, narrow: bool = False) -> str:
    """`body` is HTML, the other two are text."""
    paragraph = f'<p class="quiet">{for_html(note)}</p>' if note else ""
    return f"<section{' class=narrow' if narrow else ''}><h2>{for_html(heading)}</h2>{paragraph}{body}</section>"


def _drawn(draw: Callable[..., str], *data: Any) -> str:
    """A drawing, or a sentence where it cannot be made."""
    try:
        return draw(*data)
    except NotInstalled as error:
        return f'<p class="quiet">{for_html(error)}</p>'


def _tiles(report: Mapping[str, Any]) -> str:
    facts = {
        "class mean": percent(report["class_accuracy"]),
        **{name: percent(report[name]) for name in GROUPS},
        "prompt file": f"{report['prompt_bytes'] / 1000:,.0f} kB",
        "trained in": _duration(report["seconds"]),
    }
    tiles = (f'<div class="tile">{for_html(name)}<b>{for_html(value)}</b></div>' for name, value in facts.items())
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _accuracy(report: Mapping[str, Any], classes: Sequence[str], against: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Class by class, and of many, medium and few, with the other runs beside it."""
    by_rank = _drawn(
        plots.accuracy_by_rank,
        report["data"]["counts"],
        report["per_class"],
        report["group_rule"],
        {name: other["per_class"] for name, other in against.items()},
        classes,
    )
    by_group = _drawn(plots.accuracy_by_group, {"this run": report, **against})
    sizes = ", ".join(f"{number} {name}" for name, number in report["group_sizes"].items())
    note = f"Per cent of the test images, as a mean over classes; {sizes} classes (rule {report['group_rule']})."
    if not against:
        note += " `lpt report RUN --against OTHER` puts another run beside it."
    return [
        _section("Accuracy over class rank", by_rank, "One dot for each class; lines are running means."),
        _section("Many, medium, few", by_group, note),
    ]


def _calibration(report: Mapping[str, Any], predictions: Mapping[str, Tensor]) -> str:
    correct = predictions["predicted"] == predictions["labels"]
    diagram = _drawn(plots.reliability_diagram, predictions["confidence"].numpy(), correct.numpy())
    note = f"Expected calibration error {percent(report['ece'])} % over 15 bins; NLL {report['nll']:.3f}."
    return _section("Is its confidence right?", diagram, note, narrow=True)


def _worst_classes(
    report: Mapping[str, Any], classes: Sequence[str], predictions: Mapping[str, Tensor], test: Images | Files | None
) -> str:
    ranked = sorted((accuracy, k) for k, accuracy in enumerate(report["per_class"]) if accuracy is not None)
    entries = []
    for accuracy, k in ranked[:WORST_CLASSES]:
        entries.append(_worst_class(k, accuracy, report["data"]["counts"][k], classes, predictions, test))
    note = "With each, its most confident mistakes and the classes that they were predicted as."
    note = note if test else "The images were not at hand."
    return _section("The worst classes", "".join(entries), note)


def _all_classes(report: Mapping[str, Any], classes: Sequence[str], predictions: Mapping[str, Tensor]) -> str:
    table = class_table(
        report["data"]["counts"],
        report["per_class"],
        report["group_rule"],
        classes,
        predictions["labels"],
        predictions["predicted"],
    )
    return _section("All classes", table)


def _worst_class(
    k: int,
    accuracy: float,
    training_images: int,
    classes: Sequence[str],
    predictions: Mapping[str, Tensor],
    test: Images | Files | None,
) -> str:
    """One of the worst classes: what it is predicted as, and its most confident mistakes as pictures."""
    labels, predicted, confidence = (predictions[name] for name in ("labels", "predicted", "confidence"))
    of_class = labels == k
    mistakes = (of_class & (predicted != k)).nonzero().flatten()
    confusions = []
    for other, number in Counter(predicted[mistakes].tolist()).most_common(3):
        confusions.append(f"{classes[other]} {100 * number / int(of_class.sum()):.0f} %")
    pictures = ""
    if test:
        surest = mistakes[confidence[mistakes].argsort(descending=True)][:MISTAKES_SHOWN].tolist()
        pictures = "".join(_thumbnail(test, i, classes[int(predicted[i])]) for i in surest)
    taken_for = for_html(", ".join(confusions)) or "nothing else"
    return (
        f'<div class="class"><header><b>{for_html(classes[k])}</b><span>{percent(accuracy)} % right, '
        f"{training_images} training images</span></header>"
        f"<span class=quiet>predicted as {taken_for}</span><div>{pictures}</div></div>"
    )


def _thumbnail(test: Images | Files, i: int, taken_for: str) -> str:
    """Test image `i` as a figure, nothing where its file cannot be decoded any more."""
    (picture,) = test.take(torch.tensor([i]))
    try:
        if isinstance(picture, Tensor):
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        else:
            image = decoded(picture, min_side=2 * SIDE)
    except DataError:
        return ""
    pixelated = ' class="pixels"' if max(image.size) < SIDE else ""
    image.thumbnail((2 * SIDE, 2 * SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    png = base64.b64encode(buffer.getvalue()).decode()
    name = for_html(taken_for)
    return (
        f'<figure><img{pixelated} alt="predicted as {name}" src="data:image/png;base64,{png}">'
        f"<figcaption>{name}</figcaption></figure>"
    )


def _key_usage(report: Mapping[str, Any]) -> list[str]:
    """Which prompts of the pool were chosen on the test part, if the method has one."""
    usage = report.get("key_usage")
    if not usage:
        return []
    note = (
        f"Perplexity {usage['perplexity']:.1f} of {len(usage['selections'])} keys on the test images, "
        f"{usage['dead_keys']} of them chosen less than once in a hundred."
    )
    return [_section("Which keys were chosen", _drawn(plots.key_usage, usage["selections"]), note)]


def _retrieval(report: Mapping[str, Any]) -> list[str]:
    """What the pool's prompts and their choice buy, if the method has one."""
    bought = report.get("retrieval")
    if not bought:
        return []
    head = "".join(f'<th scope="col">{for_html(cell)}</th>' for cell in retrieval.HEAD)
    body = "".join(
        f"<tr>{''.join(f'<td>{for_html(cell)}</td>' for cell in row)}</tr>" for row in retrieval.rows(bought)
    )
    sentence = f"<p>{for_html(retrieval.sentence(bought))}</p>"
    table = f"{sentence}<table><tr>{head}</tr>{body}</table>"
    return [_section("What retrieval adds", table, retrieval.note(bought))]


def _pseudo_labels(report: Mapping[str, Any]) -> list[str]:
    """The pseudo-labels of a semi-supervised run, if it is one."""
    diagnosis = report.get("pseudo_labels")
    if not diagnosis:
        return []
    counts = report["data"]["counts"]
    empty_classes = diagnosis["predicted"].count(0)
    spread = _drawn(plots.pseudo_labels, diagnosis["predicted"], diagnosis.get("true"), counts)
    note = f"{pseudo_label_line(diagnosis)} {empty_classes} of {len(counts)} classes have none."
    sections = [_section("Pseudo-labels", spread, note)]
    if "precision" in diagnosis:
        of_class = (diagnosis[f"per_class_{metric}"] for metric in ("precision", "recall"))
        by_class = _drawn(plots.precision_and_recall, *of_class, counts)
        note = "Of the kept pseudo-labels of the last round."
        sections.append(_section("How rightly, class by class", by_class, note))
        wrong = _drawn(plots.wrong_confidence, diagnosis["false_histogram"])
        note = "They train as the right ones do: the surer, the worse."
        sections.append(_section("Confidence of wrong pseudo-labels", wrong, note, narrow=True))
    return sections


def _rerun(report: Mapping[str, Any], config: str, command: str) -> str:
    facts = {
        "backbone": f"{report['backbone']['name']}, weights {report['backbone']['fingerprint']}",
        "split": f"SHA-256 {report['data']['split_sha256']}",
        "trained": f"{report['trainable_parameters']:,} parameters in {report['seconds']:.0f} s, "
        f"seed {report['seed']}, {report['precision']}, peak memory {report['peak_memory_bytes'] / 2**20:,.0f} MiB",
        "cost": cost_line(report),
        "versions": ", ".join(f"{package} {version}" for package, version in report["versions"].items()),
    }
    for name, metrics in report.get("heads", {}).items():
        facts[f"the {name} head alone"] = single_head_line(metrics)
    if crops := report.get("five_crops"):
        facts["mean of five crops"] = single_head_line(crops)
    if watched := report.get("watched"):
        facts["class mean on the test set"] = watched_line(watched)
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td class="long">{for_html(text)}</td></tr>' for name, text in facts.items()
    )
    lines = "\n".join(for_html(line) for line in config.split("\n"))
    return _section(
        "What was run, and how to run it again",
        f"<table>{rows}</table><pre>{for_html(command)}</pre><details><summary>all settings</summary>"
        f"<pre>{lines}</pre></details>",
    )
