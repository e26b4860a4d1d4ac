"""Where phase 2's accuracy goes: each of the two passes alone, on images seen, held out and of the test set.

    python -m benchmarks.accuracy.anatomy PROMPT data.root=DIR backbone.weights=FILE

PROMPT was trained with `method.query_head=true`, so it holds phase 1's opinion beside phase 2's. Held out are 20
images a class that the long tail leaves out (the largest class has none left and is shown its own).
"""

import sys

import torch

from lpt.config import nested
from lpt.data import Images, load_task
from lpt.metrics import summarise
from lpt.report import percent
from lpt.run import open_prompt


def main() -> None:
    path, settings = sys.argv[1], nested(sys.argv[2:])
    model, header = open_prompt(path, weights=settings["backbone"].get("weights"))
    data = header.data["settings"] | settings["data"]
    task, held = load_task(**data), load_task(**(data | {"val_per_class": 20})).val
    assert held is not None
    print("| images | pass | all | class mean | many | medium | few |\n|---|---|---:|---:|---:|---:|---:|")
    for name, images in (("training", task.train), ("held out", held), ("test", task.test)):
        for which, logits in passes(model, images).items():
            found = summarise(model.probabilities(logits), images.labels, task.counts, group_rule=task.group_rule)
            keys = ("accuracy", "class_accuracy", "many", "medium", "few")
            print(f"| {name} | {which} | " + " | ".join(percent(found[k]) for k in keys) + " |", flush=True)


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
