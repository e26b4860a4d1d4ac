"""How much memory metrics take beside the numbers that they are of: 24,426 images of 8,142 classes."""

from typing import Any

from benchmarks.data.memory import measured

CODE = """
import torch
from types import SimpleNamespace
from lpt.engine.evaluate import Predictions, measure
from lpt.metrics import summarize
images, classes = int(sys.argv[1]), int(sys.argv[2])
counts = torch.arange(classes) % 500 + 1
model = SimpleNamespace(probabilities=lambda logits: (20 * logits).softmax(1), pool=None)
labels = torch.arange(images) % classes
small = torch.rand(100, classes)
summarize(small.softmax(1), labels[:100], counts), measure(model, Predictions(small, labels[:100], None), counts)
before = peak()
numbers = torch.empty(images, classes)
for part in numbers.split(256):
    part.uniform_()
if sys.argv[3] == "summarize":
    summarize(numbers.div_(classes / 2), labels, counts)
else:
    measure(model, Predictions(numbers, labels, None), counts)
print(json.dumps((peak() - before) / numbers.nbytes))
"""


def metrics_memory(*, quick: bool = False) -> list[dict[str, Any]]:
    """Peak memory over the memory of the numbers, these included: of probabilities, and of logits, from which the
    probabilities have to be made."""
    size = ("2000", "8142") if quick else ("24426", "8142")
    rows = []
    for what in ("summarize", "measure"):
        ratio = round(measured(CODE, *size, what), 3)
        unit = f"of the {'probabilities' if what == 'summarize' else 'logits'}, {' × '.join(size)} (lpt's {what})"
        rows.append({"ratio": ratio, "unit": unit})
    return rows
