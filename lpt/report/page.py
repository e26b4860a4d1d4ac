"""`report.html`: a run as one file that needs no network, readable on a phone.

Shapes: labels, predicted, confidence [N], in the order of the test part.
"""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lpt.data.longtail import GROUPS
from lpt.data.preprocess import decoded
from lpt.data.task import Files, Images
from lpt.errors import DataError
from lpt.report import plots
from lpt.report.markdown import single_head_line, cost_line, percent, pseudo_label_line, watched_line

WORST, SHOWN, SIDE = 10, 5, 72

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f7; color: #22303c; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 880px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: 1rem 0 .2rem; } h2 { font-size: 1.1rem; margin: 0 0 .4rem; }
p { margin: .3rem 0 .6rem; } .quiet { color: #5c6b78; font-size: .9rem; }
section { background: #fff; border-radius: 10px; padding: 1rem; margin: 1rem 0; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.2rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tile { background: #fff; border-radius: 10px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.4rem; white-space: nowrap; }
svg { width: 100%; height: auto; display: block; max-width: 700px; margin: 0 auto; }
.narrow svg { max-width: 440px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
td, th { text-align: left; padding: .35rem .6rem .35rem 0; border-top: 1px solid #e6e9ec; vertical-align: top; }
td.long { overflow-wrap: anywhere; }
.class { border-top: 1px solid #e6e9ec; padding: .5rem 0; }
.class header { display: flex; justify-content: space-between; gap: 1rem; flex-wrap: wrap; }
figure { display: inline-block; margin: 0 .4rem .3rem 0; width: 76px; vertical-align: top; font-size: .72rem; }
figure img { width: 72px; height: 72px; object-fit: cover; border-radius: 4px; display: block; }
figcaption { line-height: 1.2; overflow-wrap: anywhere; }
pre { background: #f5f6f7; padding: .7rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
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
) -> str:
    """`predictions` holds labels, predicted and confidence; `against` other runs' reports on the same classes;
    `test` the images to show, None where they are not at hand."""
    data, against = report["data"], against or {}
    title = f"{report['method']} on {data['name']}"
    right = (predictions["predicted"] == predictions["labels"]).numpy()
    rows = {"this run": report, **against}
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(report["backbone"]["name"])}; {len(classes)} classes, '
        f"{sum(data['counts']):,} training images, imbalance factor {data['imbalance_factor']:g}; "
        f"{len(right):,} test images; weights: {escape(report['selection'])}.</p>",
        _tiles(report),
        _section(
            "Accuracy over class rank",
            plots.accuracy_by_rank(
                data["counts"],
                report["per_class"],
                report["group_rule"],
                {name: other["per_class"] for name, other in against.items()},
            ),
            "One dot for each class; lines are running means.",
        ),
        _section("Many, medium, few", plots.accuracy_by_group(rows), _group_note(report, against)),
        _section(
            "Is its confidence right?",
            plots.reliability_diagram(predictions["confidence"].numpy(), right),
            f"Expected calibration error {percent(report['ece'])} % over 15 bins; NLL {report['nll']:.3f}.",
            narrow=True,
        ),
        _worst(report, classes, predictions, test),
    ]
    if usage := report.get("key_usage"):
        parts.append(
            _section(
                "Which keys were chosen",
                plots.key_usage(usage["selections"]),
                f"Perplexity {usage['perplexity']:.1f} of {len(usage['selections'])} keys on the test images, "
                f"{usage['dead_keys']} of them chosen less than once in a hundred.",
            )
        )
    parts += _pseudo_labels(report)
    if history:
        parts.append(_section("Training", plots.training_curves(history), "Mean loss of each epoch."))
    parts.append(_again(report, config, command))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _section(heading: str, body: str, note: str = "", *, narrow: bool = False) -> str:
    said = f'<p class="quiet">{escape(note)}</p>' if note else ""
    return f"<section{' class=narrow' if narrow else ''}><h2>{escape(heading)}</h2>{said}{body}</section>"


def _tiles(report: Mapping[str, Any]) -> str:
    facts = {"class mean": percent(report["class_accuracy"])} | {name: percent(report[name]) for name in GROUPS}
    facts |= {"prompt file": f"{report['prompt_bytes'] / 1000:,.0f} kB", "trained in": _time(report["seconds"])}
    tiles = (f'<div class="tile">{escape(name)}<b>{escape(value)}</b></div>' for name, value in facts.items())
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _pseudo_labels(report: Mapping[str, Any]) -> list[str]:
    """What a semi-supervised run believed of its unlabelled images, if it is one."""
    if not (found := report.get("pseudo_labels")):
        return []
    counts = report["data"]["counts"]
    silent = sum(n == 0 for n in found["predicted"])
    note = f"{pseudo_label_line(found)} {silent} of {len(counts)} classes have none."
    parts = [_section("What was believed", plots.pseudo_labels(found["predicted"], found.get("true"), counts), note)]
    if "precision" in found:
        curves = plots.precision_and_recall(found["per_class_precision"], found["per_class_recall"], counts)
        parts.append(_section("How rightly, class by class", curves, "Of the kept pseudo-labels of the last round."))
        wrong = "They train as the right ones do: the surer, the worse."
        parts.append(
            _section(
                "How sure the wrong ones are", plots.wrong_confidence(found["false_histogram"]), wrong, narrow=True
            )
        )
    return parts


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _group_note(report: Mapping[str, Any], against: Mapping[str, Any]) -> str:
    sizes = ", ".join(f"{n} {name}" for name, n in report["group_sizes"].items())
    note = f"Per cent of the test images, as a mean over classes; {sizes} classes (rule {report['group_rule']})."
    return note if against else note + " `lpt report RUN --against OTHER` puts another run beside it."


def _worst(
    report: Mapping[str, Any], classes: Sequence[str], predictions: Mapping[str, Tensor], test: Images | Files | None
) -> str:
    labels, predicted, confidence = (predictions[k] for k in ("labels", "predicted", "confidence"))
    ranked = sorted((a, k) for k, a in enumerate(report["per_class"]) if a is not None)[:WORST]
    lines = []
    for accuracy, k in ranked:
        wrong = ((labels == k) & (predicted != k)).nonzero().flatten()
        confused = Counter(predicted[wrong].tolist()).most_common(3)
        names = ", ".join(f"{classes[j]} {100 * n / int((labels == k).sum()):.0f} %" for j, n in confused)
        surest = wrong[confidence[wrong].argsort(descending=True)][:SHOWN]
        pictures = "".join(_thumbnail(test, int(i), classes[int(predicted[i])]) for i in surest) if test else ""
        lines.append(
            f'<div class="class"><header><b>{escape(classes[k])}</b><span>{percent(accuracy)} % right, '
            f"{report['data']['counts'][k]} training images</span></header>"
            f"<span class=quiet>taken for {escape(names) or 'nothing else'}</span><div>{pictures}</div></div>"
        )
    note = "Below each its surest mistakes, with what they were taken for." if test else "The images were not at hand."
    return _section("The worst classes", "".join(lines), note)


def _thumbnail(test: Images | Files, i: int, taken_for: str) -> str:
    (found,) = test.take(torch.tensor([i]))
    try:
        image = (
            Image.fromarray(found.permute(1, 2, 0).numpy())
            if isinstance(found, Tensor)
            else decoded(found, least=2 * SIDE)
        )
    except DataError:
        return ""
    small = ' class="pixels"' if max(image.size) < SIDE else ""
    image.thumbnail((2 * SIDE, 2 * SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    code = base64.b64encode(buffer.getvalue()).decode()
    name = escape(taken_for)
    return (
        f'<figure><img{small} alt="taken for {name}" src="data:image/png;base64,{code}">'
        f"<figcaption>{name}</figcaption></figure>"
    )


def _again(report: Mapping[str, Any], config: str, command: str) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    facts = {
        "backbone": f"{report['backbone']['name']}, weights {report['backbone']['fingerprint']}",
        "split": f"SHA-256 {report['data']['split_sha256']}",
        "trained": f"{report['trainable_parameters']:,} parameters in {report['seconds']:.0f} s, "
        f"seed {report['seed']}, {report['precision']}, peak memory {report['peak_memory_bytes'] / 2**20:,.0f} MiB",
        "cost": cost_line(report),
        "versions": versions,
        **{f"the {name} head alone": single_head_line(of) for name, of in report.get("heads", {}).items()},
    }
    if seen := report.get("watched"):
        facts["class mean on the test set"] = watched_line(seen)
    rows = "".join(
        f"<tr><th>{k}</th><td style='overflow-wrap:anywhere'>{escape(v)}</td></tr>" for k, v in facts.items()
    )
    return _section(
        "What was run, and how to run it again",
        f"<table>{rows}</table><pre>{escape(command)}</pre><details><summary>all settings</summary>"
        f"<pre>{escape(config)}</pre></details>",
    )
