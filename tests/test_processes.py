"""Two processes are one: the sums and rows that they share, and semi-supervised runs (acceptance 9 of ULFine)."""

import os
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from lpt.engine import processes
from lpt.engine.evaluate import PrefixCache, features, predict
from lpt.engine.processes import all_agree, all_gather_rows, all_reduce_sum, naming_lost_peers, rank_and_world
from lpt.engine.step_memory import StepMemory
from lpt.errors import TrainingError
from lpt.methods.semi_supervised import PseudoLabels
from lpt.methods.ulfine import Fitting
from lpt.model.heads import FusedHead
from tests.support.semi import Killed, normal, semi
from tests.support.toy import prompted, small_backbone, toy_task

SHARED = {"steps": 4, "rounds": 2, "lr": 0.05, "batch_size": 8}
RUNS = {
    "ulfine": {"method": "ulfine", "tau": 0.4, "adapter_dim": 3, "orth_weight": 3.0, "mu": 0.3, "micro_batches": 2},
    "text": {
        "method": "ulfine",
        "tau": 0.4,
        "adapter_dim": 3,
        "orth_on": "learnable_text",
        "pu_estimator": "masked",
        "gnm": 0.02,
    },
    "cached": {"method": "ulfine", "tau": 0.4, "tuning": "head", "cached_views": 2, "pu_estimator": "histogram"},
    "daso": {"method": "daso", "tau": 0.4, "bottleneck": 3, "ratio": 2},
}


def backbone():
    made = small_backbone(depth=2)
    rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(8))
    made.prototypes = {f"class {k}": row for k, row in enumerate(rows)}
    return made


def fitted(rank, world):
    """Prototypes and gradient of one large batch, of which this process has its rows."""
    feature, labels = normal(240, 16), torch.arange(240) // 6
    probability = normal(240, 40, seed=1).softmax(1)
    head = FusedHead(num_classes=40, width=16, joint_width=16)
    with torch.no_grad():
        head.texts.copy_(normal(40, 16, seed=2))
        head.prototypes.copy_(head.texts)
    kept = probability.amax(1) > 0.15
    found = PseudoLabels(*(whole[rank::world] for whole in (probability, kept, kept.float())), {})
    done = Fitting(mu=0.4, pu_estimator="masked")(head, feature[rank::world], labels[rank::world], found)
    done.commit()
    return {**head.state_dict(), "loss": done.loss, "gradient": done.gradient}


def of_one_image():
    """Fewer images than there are processes."""
    model, one = prompted(backbone(), num_classes=4), toy_task().test.subset([2])
    return {"logits": predict(model, one, cache=PrefixCache()).logits, "features": features(model, one)}


def work(rank, folder, port):
    """What each of the two processes does; its findings go into files."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert rank_and_world() == (rank, 2) == (accelerator.process_index, accelerator.num_processes)

    assert all_reduce_sum(torch.tensor([1.0 + rank, 5.0])).tolist() == [3.0, 10.0]
    for total in (1, 4, 5):
        whole = torch.arange(2 * total).view(total, 2)
        assert torch.equal(all_gather_rows(whole[rank::2], total), whole)
    flags = torch.tensor([True, False, False, True])
    assert torch.equal(all_gather_rows(flags[rank::2], 4), flags)
    assert all_agree(True) and not all_agree(rank == 0) and not all_agree(False)
    save_file(of_one_image(), folder / f"one-{rank}.safetensors")
    memory = StepMemory()
    memory.note(rows=torch.arange(6)[rank::2])
    assert memory.take_notes()["rows"].tolist() == [0, 1, 2, 3, 4, 5]

    save_file(fitted(rank, 2), folder / f"fitted-{rank}.safetensors")
    for name, settings in RUNS.items():
        place = folder / name
        model, fit, _ = semi(backbone=backbone(), folder=place, **SHARED, **settings)
        keep(model, fit, folder / f"{name}-{rank}.safetensors")
    settings = {**SHARED, **RUNS["ulfine"]}
    try:
        semi(backbone=backbone(), folder=folder / "killed", killed_at=3, **settings)
    except Killed:
        accelerator.wait_for_everyone()
    model, fit, _ = semi(backbone=backbone(), folder=folder / "killed", **settings)
    keep(model, fit, folder / f"killed-{rank}.safetensors")
    torch.distributed.destroy_process_group()


def keep(model, fit, path):
    cost = [sum(getattr(cost, key) for cost in fit.costs.values()) for key in ("steps", "images", "flops")]
    found = {"losses": torch.tensor([line["loss"] for line in fit.history.lines]), "cost": torch.tensor(cost)}
    found |= {name: value.detach().contiguous() for name, value in model.learned_state().items()}
    save_file(found | {f"memory/{name}": value for name, value in fit.memory.stored().items()}, path)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(folder, port), nprocs=2)
    return folder


@pytest.mark.parametrize("name", list(RUNS))
def test_two_processes_are_one(two, tmp_path, name):
    import pyarrow.parquet as pq

    model, fit, _ = semi(backbone=backbone(), folder=tmp_path / "one", **SHARED, **RUNS[name])
    keep(model, fit, tmp_path / "one.safetensors")
    one = load_file(tmp_path / "one.safetensors")
    first, second = (load_file(two / f"{name}-{rank}.safetensors") for rank in range(2))
    losses = second.pop("losses")  # the history is the first one's
    assert len(losses) == 0 and len(first["losses"]) == 2
    assert all(torch.equal(value, first[part]) for part, value in second.items()), "the two do not hold the same"
    assert one.keys() == first.keys() and {"head.frequency", "head.visual", "head.prototypes"} <= one.keys()
    assert {"memory/state/queue"} <= one.keys() or name != "daso"
    for part, value in one.items():
        torch.testing.assert_close(first[part], value, rtol=1e-3, atol=1e-5, msg=lambda m, p=part: p + m)
    told = [pq.read_table(place / "pseudo_labels").to_pylist() for place in (two / name, tmp_path / "one")]
    for mine, theirs in zip(*told, strict=True):
        for column in ("image", "truth", "round", "step", "label", "kept"):
            assert mine[column] == theirs[column]
        assert mine["confidence"] == pytest.approx(theirs["confidence"], rel=1e-3)


def test_two_processes_fit_the_same_prototypes_to_their_batch(two):
    first, second = (load_file(two / f"fitted-{rank}.safetensors") for rank in range(2))
    one = fitted(0, 1)
    gradient = torch.stack([first.pop("gradient"), second.pop("gradient")], 1).flatten(0, 1)
    torch.testing.assert_close(gradient / 2, one.pop("gradient"), rtol=1e-4, atol=1e-8)  # it is averaged later
    assert all(torch.equal(value, second[name]) for name, value in first.items()), "the two do not hold the same"
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)


def test_a_process_may_have_no_image_to_predict(two):
    for rank in range(2):
        found = load_file(two / f"one-{rank}.safetensors")
        for name, value in of_one_image().items():
            assert len(value) == 1
            torch.testing.assert_close(found[name], value)


def test_it_is_said_that_another_process_is_gone(monkeypatch):
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer")
    with pytest.raises(RuntimeError, match="pair"), naming_lost_peers():  # of one process it would say nothing
        raise gone
    monkeypatch.setattr(processes, "rank_and_world", lambda: (1, 2))
    for error in (gone, torch.distributed.DistBackendError("NCCL")):
        with (
            pytest.raises(TrainingError, match=r"another of the 2 processes has ended: .* --resume"),
            naming_lost_peers(),
        ):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), naming_lost_peers():
        raise RuntimeError("shapes do not match")


def test_two_processes_go_on_after_a_kill_to_the_same_bits(two):
    for rank in range(2):
        whole, killed = (load_file(two / f"{name}-{rank}.safetensors") for name in ("ulfine", "killed"))
        assert whole.keys() == killed.keys() and all(torch.equal(value, killed[part]) for part, value in whole.items())
