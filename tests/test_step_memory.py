"""What a phase keeps between steps goes through a checkpoint as it is."""

import torch

from lpt.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lpt.engine.step_memory import StepMemory

CPU = torch.device("cpu")


def test_notes_are_kept_in_order_until_they_are_taken():
    memory = StepMemory()
    for step in range(3):
        memory.note(rows=torch.arange(2) + 2 * step, kept=torch.tensor([True, step == 1]))
    found = memory.take_notes()
    assert found["rows"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found["kept"].dtype == torch.bool and found["kept"].tolist() == [True, False, True, True, True, False]
    assert memory.take_notes() == {}


def test_many_notes_are_few_tensors_in_their_order():
    memory = StepMemory()
    for step in range(1000):
        memory.note(rows=torch.arange(step % 3) + 10 * step)
    assert len(memory._notes["rows"]) < 64
    assert memory.take_notes()["rows"].tolist() == [10 * step + i for step in range(1000) for i in range(step % 3)]


def test_a_note_has_no_graph():
    memory = StepMemory()
    memory.note(loss=torch.ones(2, requires_grad=True) * 2)
    assert not memory.take_notes()["loss"].requires_grad


def test_everything_goes_through_a_checkpoint(tmp_path):
    memory = StepMemory()
    memory.tensors["average/head.weight"] = torch.randn(3, 2)
    memory.tensors["queued"] = torch.tensor([3, 0])
    memory.note(label=torch.tensor([1, 2]))
    memory.note(label=torch.tensor([0]))
    save_checkpoint(tmp_path / "c", Checkpoint(1, False, 0.0, {}, {}, memory.stored(), 7), run_hash="a")
    found = load_checkpoint(tmp_path / "c", run_hash="a")
    assert found is not None and found.flops == 7
    other = StepMemory()
    other.tensors["old"] = torch.zeros(1)
    other.note(old=torch.zeros(1))
    other.restore(found.memory, CPU)
    assert other.tensors.keys() == memory.tensors.keys()
    assert all(torch.equal(other.tensors[name], value) for name, value in memory.tensors.items())
    other.note(label=torch.tensor([3]))
    assert other.take_notes()["label"].tolist() == [1, 2, 0, 3]
    other.restore({}, CPU)
    assert not other.tensors and other.take_notes() == {}
