"""What holds of pure functions for every input: hypothesis looks for one where it does not."""

import json
import tempfile
from pathlib import Path

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lpt.config import nested
from lpt.data.lists import read_list, read_unlabeled
from lpt.data.longtail import count_fingerprint, long_tail, shot_groups
from lpt.data.samplers import ClassBalanced, InstanceBalanced, InstancePerStep
from lpt.engine.batches import Progress
from lpt.errors import ConfigError, quoted

SEEDS = st.integers(0, 2**32)
KINDS = st.sampled_from([InstanceBalanced, InstancePerStep, ClassBalanced])
LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=40).map(torch.tensor)

# Samplers.


@given(KINDS, LABELS, st.integers(1, 50), SEEDS, st.data())
def test_a_batch_is_a_pure_function_of_seed_and_step(kind, labels, batch_size, seed, data):
    used, fresh = (kind(labels, batch_size=batch_size, seed=seed) for _ in range(2))
    steps = data.draw(st.lists(st.integers(0, 500), min_size=1, max_size=5))
    batches = {step: used.batch(step) for step in steps}
    for step in reversed(steps):
        assert torch.equal(fresh.batch(step), batches[step]) and torch.equal(used.batch(step), batches[step])
        assert len(batches[step]) == batch_size and batches[step].min() >= 0 and batches[step].max() < len(labels)


@given(LABELS, st.integers(1, 50), SEEDS)
def test_every_image_comes_once_per_pass(labels, batch_size, seed):
    sampler, images = InstanceBalanced(labels, batch_size=batch_size, seed=seed), len(labels)
    rows = torch.cat([sampler.batch(step) for step in range(3 * images // batch_size + 1)])
    for one_pass in rows[: 3 * images].view(3, images):
        assert one_pass.sort().values.tolist() == list(range(images))


@given(LABELS, st.integers(1, 30), st.integers(1, 5), SEEDS)
def test_every_class_comes_once_per_cycle_and_its_images_once_per_pass(labels, batch_size, per_class, seed):
    sampler = ClassBalanced(labels, batch_size=batch_size, per_class=per_class, seed=seed)
    present = labels.unique()
    length = 6 * len(present) * per_class
    rows = torch.cat([sampler.batch(step) for step in range(length // batch_size + 1)])[:length]
    for cycle in labels[rows].view(6, len(present), per_class):
        assert (cycle == cycle[:, :1]).all() and torch.equal(cycle[:, 0].sort().values, present)
    for k in present.tolist():
        own, drawn = (labels == k).nonzero().flatten(), rows[labels[rows] == k]
        for one_pass in drawn[: len(drawn) // len(own) * len(own)].view(-1, len(own)):
            assert torch.equal(one_pass.sort().values, own)


@given(st.integers(1, 4), st.integers(1, 6), st.text(max_size=9), SEEDS, st.integers(0, 10**6))
def test_any_number_of_processes_draws_the_same_numbers(rows, world, name, seed, step):
    def draws(rank, world, rows):
        progress = Progress("phase1", step, 10**6 + 1, 100, seed, rank, world)
        return progress.uniform(name, rows, 2), progress.normal(name, rows)

    for alone, *shares in zip(draws(0, 1, rows * world), *(draws(r, world, rows) for r in range(world)), strict=True):
        assert torch.equal(torch.stack(shares, dim=1).flatten(0, 1), alone)


# The long tail.


@given(st.integers(1, 300), st.integers(1, 10**5), st.floats(1e-3, 1e3), st.sampled_from(["exponential", "step"]))
def test_a_long_tail_falls_from_the_largest_class_to_the_factor_below_it(num_classes, largest, factor, profile):
    counts = long_tail(num_classes, largest, factor, profile)
    assert len(counts) == num_classes and counts[0] == largest
    assert counts == sorted(counts, reverse=True)
    if num_classes > 1:
        assert counts[-1] == int(largest * min(factor, 1 / factor))


@given(st.lists(st.integers(0, 300), min_size=2, max_size=60), st.sampled_from(["lt20", "le20", "thirds"]))
def test_groups_are_a_partition_of_the_classes_ordered_by_count(counts, rule):
    groups = shot_groups(counts, rule)
    assert sorted(torch.cat(list(groups.values())).tolist()) == list(range(len(counts)))
    many, medium, few = ([counts[k] for k in classes.tolist()] for classes in groups.values())
    for larger, smaller in ((many, medium), (medium, few), (many, few)):
        assert not larger or not smaller or min(larger) >= max(smaller)


@given(st.lists(st.integers(0, 10**6), max_size=30), st.randoms())
def test_a_fingerprint_is_of_counts_in_any_order(counts, random):
    shuffled = random.sample(counts, len(counts))
    assert count_fingerprint(shuffled) == count_fingerprint(counts)


# Lists, overrides, sentences.

# A path ends with no space, which is stripped, and with no mark that may stand before a label; it holds none of the
# letters that end a line.
LETTERS = st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"])
PATHS = st.text(LETTERS, min_size=1).filter(lambda path: path == path.rstrip(" \t,;").rstrip())


@given(st.lists(st.tuples(PATHS, st.integers(0, 10**9 - 1)), min_size=1))
def test_a_list_is_read_as_it_was_written(lines):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.txt"
        file.write_text("\n".join(f"{path} {label}" for path, label in lines), encoding="utf-8")
        paths, labels = read_list(file)
    assert list(zip(paths, labels.tolist(), strict=True)) == lines


@given(st.lists(st.tuples(PATHS, st.none() | st.integers(-1, 9)), min_size=1))
def test_a_list_without_labels_is_read_as_it_was_written(lines):
    for path, label in lines:  # the last word of a path may be a number, and then is one
        last = path.rpartition(" ")[2]
        assume(label is not None or " " not in path or not (last == "-1" or last.isdigit()))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "unlabeled.txt"
        text = "\n".join(path if label is None else f"{path} {label}" for path, label in lines)
        file.write_text(text, encoding="utf-8")
        paths, labels = read_unlabeled(file, 10)
    assert list(zip(paths, labels.tolist(), strict=True)) == [(p, -1 if k is None else k) for p, k in lines]


WORDS = st.text(st.characters(categories=["Ll", "Lu"]), min_size=1, max_size=8)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
FLOATS |= st.integers(-30, 30).map(lambda exponent: 10.0**exponent)  # 1e-07 has no dot, which YAML 1.1 reads as text
TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | WORDS,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(WORDS, inside, max_size=3),
    max_leaves=5,
)
VALUES = TREES | FLOATS | st.lists(FLOATS | st.lists(FLOATS), max_size=3)


@given(st.dictionaries(WORDS, st.dictionaries(WORDS, VALUES, min_size=1, max_size=3), max_size=3))
def test_overrides_say_what_a_config_says(tree):
    texts = [
        f"{section}.{key}={json.dumps(value, ensure_ascii=False)}"
        for section, settings in tree.items()
        for key, value in settings.items()
    ]
    assert nested(texts) == tree


@given(st.text(max_size=60) | st.from_regex(r"\w{1,5}(\.\w{1,5}){0,2}=.{0,40}", fullmatch=True))
def test_an_override_is_read_or_refused_in_one_line(text):
    try:
        assert isinstance(nested([text]), dict)
    except ConfigError as error:
        (sentence,) = error.mistakes
        assert sentence.isprintable()


@given(st.text(st.characters()) | st.binary(max_size=99), st.integers(4, 300))
def test_what_a_stranger_says_is_printable_on_one_line_and_short(words, limit):
    text = quoted(words, limit)
    assert text.isprintable() and len(text) <= limit
    assert quoted(text, limit) == text  # what is fit for a sentence stays as it is
