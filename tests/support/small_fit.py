"""The smallest model, step and phase that the loop can train, for tests of the loop.

Shapes: views [B 3 8 8], weight [3 192].
"""

import torch
from torch import nn

from lpt.data.preprocess import Preprocess
from lpt.data.samplers import InstanceBalanced
from lpt.engine.batches import Stream
from lpt.engine.history import History
from lpt.engine.loop import run_phase
from lpt.engine.phase import Phase
from lpt.engine.session import Session
from tests.support.toy import toy_images

LABELS = torch.arange(3).repeat(8)


class Linear(nn.Module):
    """The smallest thing that the loop can train."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3 * 8 * 8))
        self.register_buffer("centre", torch.zeros(2))

    def learned_state(self):
        return self.state_dict()

    def load_learned_state(self, tensors):
        self.load_state_dict(tensors)

    def only_train(self, *prefixes):
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(prefixes))


def step(model, batches, progress):
    (batch,) = batches.values()
    noise = progress.normal("noise", len(batch.labels), 3)
    logits = batch.views.flatten(1) @ model.weight.T + 0.1 * noise
    return {"loss": nn.functional.cross_entropy(logits, batch.labels)}


def session(folder=None, **changes):
    settings = {"images": toy_images(LABELS), "preprocess": Preprocess(size=8), "batch_size": 4, "checkpoints": folder}
    return Session(**(settings | changes))


def phase(name="phase1", step=step, *, streams=None, **changes):
    streams = streams or {"all": Stream(InstanceBalanced(LABELS, batch_size=4, seed=0))}
    settings = {"steps": 11, "steps_per_epoch": 4, "optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.01}
    return Phase(name=name, trains=("weight",), step=step, streams=streams, **(settings | changes))


def fit(folder=None, *, steps=11, optimizer="adamw", lr=1e-2, step=step, model=None, **changes):
    """(the model after a phase, its session)."""
    history = History(folder.parent / "history.jsonl" if folder else None)
    bound = session(folder, history=history, run_hash="a", **changes)
    model = model or Linear()
    run_phase(phase(step=step, steps=steps, optimizer=optimizer, lr=lr), model, bound)
    return model, bound
