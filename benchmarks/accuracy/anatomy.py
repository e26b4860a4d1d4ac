"""Where phase 2's accuracy goes: each of the two passes alone, on images seen, held out and of the test set.

    python -m benchmarks.accuracy.anatomy PROMPT... data.root=DIR backbone.weights=FILE

Each PROMPT, one for every seed, was trained with `method.query_head=true`, so it holds phase 1's head beside phase 2's;
the table has mean ± half width of the 95 % t-interval over them. Held out are 20 images a class that the long tail
leaves out (the largest class has none left: its held-out images are training images).
"""

import sys
from typing import Any

import torch

from lpt.config import nested
from lpt.data import Images, load_task
from lpt.metrics import summarize
from lpt.model.classifier import PromptedClassifier
from lpt.report.over_seeds import interval
from lpt.serve.opening import open_prompt

METRICS = ("accuracy", "class_accuracy", "many", "medium", "few")


def main() -> None:
    settings = nested([word for word in sys.argv[1:] if "=" in word])
    metrics_of: dict[tuple[str, str], list[dict[str, Any]]] = {}  # (images, pass) to a prompt file's metrics each
    for path in (word for word in sys.argv[1:] if "=" not in word):
        model, header = open_prompt(path, weights=settings["backbone"].get("weights"))
        data = header.data["settings"] | settings["data"]
        task, held_out = load_task(**data), load_task(**(data | {"val_per_class": 20})).val
        for name, images in (("training", task.train), ("held out", held_out), ("test", task.test)):
            for pass_name, logits in passes(model, images).items():
                metrics = summarize(model.probabilities(logits), images.labels, task.counts, group_rule=task.group_rule)
                metrics_of.setdefault((name, pass_name), []).append(metrics)
    print("| images | pass | all | class mean | many | medium | few |\n|---|---|---:|---:|---:|---:|---:|")
    for (name, pass_name), runs in metrics_of.items():
        cells = [interval([100 * run[metric] for run in runs]) for metric in METRICS]
        print(f"| {name} | {pass_name} | {' | '.join(cells)} |")


@torch.no_grad()
def passes(model: PromptedClassifier, images: Images) -> dict[str, torch.Tensor]:
    """Logits [N C] of the query under phase 1's head, of the prompted feature under phase 2's, and their mean."""
    backbone, device = model.backbone, next(model.parameters()).device
    phase1_parts, phase2_parts = [], []
    for rows in torch.arange(len(images)).split(128):
        views = backbone.preprocess.test(images.take(rows).to(device), dtype=backbone.dtype)
        tokens = model.prefix(views)
        query = model.query(tokens)
        phase1_parts.append(model.query_head(query).cpu())
        phase2_parts.append(model.head(model.tail(tokens, query=query).feature).cpu())
    phase1, phase2 = torch.cat(phase1_parts), torch.cat(phase2_parts)
    return {"phase 1 (query)": phase1, "phase 2": phase2, "mean": (phase1 + phase2) / 2}


if __name__ == "__main__":
    main()
