from collections import Counter
from itertools import pairwise

import pytest
import torch

from lpt.data.samplers import ClassBalanced, InstanceBalanced, InstancePerStep, instance_weight
from lpt.errors import DataError

LABELS = torch.repeat_interleave(torch.arange(5), torch.tensor([23, 9, 4, 2, 1]))


def make(kind, *, batch_size=8, seed=0, labels=LABELS, num_classes=5):
    if kind is ClassBalanced:
        return ClassBalanced(labels, batch_size=batch_size, seed=seed)
    return kind(labels, batch_size=batch_size, seed=seed)


ALL = pytest.mark.parametrize("kind", [InstanceBalanced, InstancePerStep, ClassBalanced])


def stream(sampler, steps):
    return torch.cat([sampler.batch(t) for t in range(steps)])


@ALL
@pytest.mark.parametrize("batch_size", [1, 6, 8, 50])
def test_a_batch_is_a_pure_function_of_its_step(kind, batch_size):
    sampler = make(kind, batch_size=batch_size)
    in_order = [sampler.batch(t) for t in range(30)]
    assert all(b.shape == (batch_size,) and b.dtype == torch.long for b in in_order)
    for t in (29, 3, 17, 0, 29, 11):
        assert torch.equal(sampler.batch(t), in_order[t])
        assert torch.equal(make(kind, batch_size=batch_size).batch(t), in_order[t])


@ALL
def test_another_seed_gives_other_batches(kind):
    assert not torch.equal(stream(make(kind), 4), stream(make(kind, seed=1), 4))


@ALL
def test_the_global_random_state_plays_no_part(kind):
    torch.manual_seed(1)
    before, state = make(kind).batch(5), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(make(kind).batch(5), before)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch_size", [3, 8, 39, 100])
def test_every_image_comes_once_per_pass_in_a_fresh_order(batch_size):
    images = len(LABELS)
    drawn = stream(make(InstanceBalanced, batch_size=batch_size), 4 * images // batch_size + 1)
    passes = drawn[: 4 * images].view(4, images)
    assert torch.equal(passes.sort(1).values, torch.arange(images).expand(4, -1))
    assert len(passes.unique(dim=0)) == 4


def test_per_step_batches_are_fresh_permutations():
    sampler = make(InstancePerStep, batch_size=20)
    batches = [sampler.batch(t) for t in range(10)]
    assert all(len(b.unique()) == 20 for b in batches)
    assert len(torch.cat(batches[:2]).unique()) < 40  # no pass over the images
    assert len(torch.stack(batches).unique(dim=0)) == 10


def test_a_per_step_batch_repeats_images_only_when_there_are_too_few():
    n = len(LABELS)
    assert sorted(Counter(make(InstancePerStep, batch_size=2 * n).batch(0).tolist()).values()) == [2] * n


def draws_of(sampler, steps, per_class=4):
    """Rows of `per_class` indices, one row per draw of a class."""
    drawn = stream(sampler, steps)
    return drawn[: len(drawn) // per_class * per_class].view(-1, per_class)


@pytest.mark.parametrize("batch_size", [4, 20, 6, 7, 1])
def test_each_class_is_drawn_once_per_cycle_four_items_at_a_time(batch_size):
    rows = draws_of(make(ClassBalanced, batch_size=batch_size), 400 // batch_size + 1)
    labels = LABELS[rows]
    assert (labels == labels[:, :1]).all()
    cycles = labels[:100, 0].view(-1, 5)
    assert torch.equal(cycles.sort(1).values, torch.arange(5).expand(20, -1))
    assert len(cycles.unique(dim=0)) > 5  # reshuffled


@pytest.mark.parametrize("batch_size", [4, 6])
def test_a_class_is_taken_in_consecutive_items_of_its_own_shuffled_cycle(batch_size):
    rows = draws_of(make(ClassBalanced, batch_size=batch_size), 800 // batch_size)
    labels = LABELS[rows[:, 0]]
    for k in range(5):
        own = torch.where(LABELS.eq(k))[0]
        taken = rows[labels == k].flatten()
        passes = taken[: len(taken) // len(own) * len(own)].view(-1, len(own))
        assert len(passes) > 3
        assert torch.equal(passes.sort(1).values, own.expand(len(passes), -1)), k


def test_a_class_with_fewer_images_than_a_draw_wraps_around():
    rows = draws_of(make(ClassBalanced, batch_size=20), 5)
    labels = LABELS[rows[:, 0]]
    for row in rows[labels == 3]:
        assert sorted(Counter(row.tolist()).values()) == [2, 2]
    assert (rows[labels == 4] == len(LABELS) - 1).all()


def test_the_batch_size_does_not_change_the_stream():
    streams = [stream(make(ClassBalanced, batch_size=b), 60 // b) for b in (4, 5, 6, 12, 60)]
    assert all(torch.equal(s, streams[0]) for s in streams)


def test_absent_classes_are_skipped():
    labels = torch.tensor([0] * 6 + [3] * 2)
    drawn = stream(make(ClassBalanced, labels=labels, num_classes=5), 20)
    assert Counter(labels[drawn].tolist()) == {0: 80, 3: 80}


def test_class_balanced_counts_stay_within_one_draw_of_each_other():
    counts = Counter(LABELS[stream(make(ClassBalanced, batch_size=12), 7)].tolist())
    assert max(counts.values()) - min(counts.values()) <= 4


@pytest.mark.parametrize("kind", [InstanceBalanced, ClassBalanced])
def test_no_images_are_refused(kind):
    with pytest.raises(DataError, match="no training images"):
        make(kind, labels=torch.empty(0, dtype=torch.long))


def test_the_instance_weight_falls_linearly_from_its_start_to_zero():
    """LPT spec 2.6: 0.5 at e = 0, 0.0056 at e = 89 of 90."""
    weights = [instance_weight(0.5, e / 90) for e in range(90)]
    assert weights[0] == 0.5 and weights[45] == pytest.approx(0.25)
    assert weights[89] == pytest.approx(0.5 / 90) and round(weights[89], 4) == 0.0056
    assert all(a - b == pytest.approx(0.5 / 90) for a, b in pairwise(weights))
    assert instance_weight(0.5, 1.0) == 0.0 and instance_weight(0.5, 1.2) == 0.0
    assert instance_weight(0.0, 0.3) == 0.0
