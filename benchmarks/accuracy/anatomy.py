"""Where phase 2's accuracy goes: each of the two passes alone, on images seen, held out and of the test set.

    python -m benchmarks.accuracy.anatomy PROMPT... data.root=DIR backbone.weights=FILE

Each PROMPT, one for every seed, was trained with `method.query_head=true`, so it holds phase 1's opinion beside phase
2's; the table has mean ± half width of the 95 % t-interval over them. Held out are 20
images a class that the long tail leaves out (the largest class has none left and is shown its own).
"""

import sys
from typing import Any

import torch

from benchmarks.accuracy.__main__ import interval
from lpt.config import nested
from lpt.data import Images, load_task
from lpt.metrics import summarize
from lpt.serve.opening import open_prompt


def main() -> None:
    settings = nested([word for word in sys.argv[1:] if "=" in word])
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in (word for word in sys.argv[1:] if "=" not in word):
        model, header = open_prompt(path, weights=settings["backbone"].get("weights"))
        data = header.data["settings"] | settings["data"]
        task, held = load_task(**data), load_task(**(data | {"val_per_class": 20})).val
        for name, images in (("training", task.train), ("held out", held), ("test", task.test)):
            for which, logits in passes(model, images).items():
                metrics = summarize(model.probabilities(logits), images.labels, task.counts, group_rule=task.group_rule)
                found.setdefault((name, which), []).append(metrics)
    print("| images | pass | all | class mean | many | medium | few |\n|---|---|---:|---:|---:|---:|---:|")
    for (name, which), runs in found.items():
        keys = ("accuracy", "class_accuracy", "many", "medium", "few")
        print(f"| {name} | {which} | " + " | ".join(interval([100 * r[k] for r in runs]) for k in keys) + " |")


@torch.no_grad()
def passes(model, images: Images) -> dict[str, torch.Tensor]:
    """Logits [N C] of the query under phase 1's head, of the prompted feature under phase 2's, and their mean."""
    backbone, first, second = model.backbone, [], []
    device = next(model.parameters()).device
    for part in torch.arange(len(images)).split(128):
        views = backbone.preprocess.test(images.take(part).to(device), dtype=backbone.dtype)
        tokens = model.prefix(views)
        query = model.query(tokens)
        first.append(model.query_head(query).cpu())
        second.append(model.head(model.tail(tokens, query=query).feature).cpu())
    one, two = torch.cat(first), torch.cat(second)
    return {"phase 1 (query)": one, "phase 2": two, "mean": (one + two) / 2}


if __name__ == "__main__":
    main()
