"""What a phase keeps between steps goes through a checkpoint as it is."""

import torch

from lpt.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lpt.engine.memory import Memory

CPU = torch.device("cpu")


def test_notes_are_kept_in_order_until_they_are_taken():
    memory = Memory()
    for step in range(3):
        memory.note(rows=torch.arange(2) + 2 * step, kept=torch.tensor([True, step == 1]))
    found = memory.take()
    assert found["rows"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found["kept"].dtype == torch.bool and found["kept"].tolist() == [True, False, True, True, True, False]
    assert memory.take() == {}


def test_a_note_has_no_graph():
    memory = Memory()
    memory.note(loss=torch.ones(2, requires_grad=True) * 2)
    assert not memory.take()["loss"].requires_grad


def test_everything_goes_through_a_checkpoint(tmp_path):
    memory = Memory()
    memory.state["average/head.weight"] = torch.randn(3, 2)
    memory.state["queued"] = torch.tensor([3, 0])
    memory.sums |= {"loss": 0.1 + 0.2, "kept": 1.0}
    memory.note(label=torch.tensor([1, 2]))
    memory.note(label=torch.tensor([0]))
    save_checkpoint(tmp_path / "c", Checkpoint(1, False, 0.0, {}, {}, memory.tensors(), 7), run_hash="a")
    found = load_checkpoint(tmp_path / "c", run_hash="a")
    assert found is not None and found.flops == 7
    other = Memory()
    other.state["old"], other.sums["old"] = torch.zeros(1), 1.0
    other.note(old=torch.zeros(1))
    other.restore(found.memory, CPU)
    assert other.state.keys() == memory.state.keys() and other.sums == memory.sums  # to the last bit
    assert all(torch.equal(other.state[name], value) for name, value in memory.state.items())
    other.note(label=torch.tensor([3]))
    assert other.take()["label"].tolist() == [1, 2, 0, 3]
    other.restore({}, CPU)
    assert not other.state and not other.sums and other.take() == {}
