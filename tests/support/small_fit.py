"""A fit of the smallest model that the loop can train. Shapes: views [B 3 8 8], weight [C 3·8·8]."""

import torch
from torch import nn

from lpt.data.preprocess import Preprocess
from lpt.data.samplers import InstanceBalanced
from lpt.engine.batches import Stream
from lpt.engine.history import History
from lpt.engine.loop import Fit
from tests.support.toy import toy_images

LABELS = torch.arange(3).repeat(8)


class Linear(nn.Module):
    """The smallest thing that the loop can train."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3 * 8 * 8))
        self.register_buffer("centre", torch.zeros(2))

    def adapted(self):
        return self.state_dict()

    def load_adapted(self, tensors):
        self.load_state_dict(tensors)


def step(model, batches, progress):
    (batch,) = batches.values()
    noise = progress.normal("noise", len(batch.labels), 3)
    logits = batch.views.flatten(1) @ model.weight.T + 0.1 * noise
    return {"loss": nn.functional.cross_entropy(logits, batch.labels)}


def fit(folder=None, *, steps=11, optimizer="adamw", lr=1e-2, step=step, model=None, **changes):
    """(model, Fit) after `steps` steps of one phase; checkpoints lie in `folder`."""
    bound = Fit(
        images=toy_images(LABELS),
        preprocess=Preprocess(size=8),
        batch_size=4,
        checkpoints=folder,
        history=History(folder.parent / "history.jsonl" if folder else None),
        run_hash="a",
        **changes,
    )
    model = model or Linear()
    sampler = InstanceBalanced(LABELS, batch_size=4, seed=0)
    bound(
        "phase1", model, step, {"all": Stream(sampler)},
        steps=steps, steps_per_epoch=4, optimizer=optimizer, lr=lr, weight_decay=0.01,
    )  # fmt: skip
    return model, bound
