"""The table of pseudo-labels, and a round's diagnosis by counting."""

import math
import random

import pyarrow.parquet as pq
import pytest
import torch

from lpt.errors import TrainingError
from lpt.report.pseudo_labels import diagnose, read_last_round, write_round

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox")
COUNTS = torch.tensor([5, 90, 40, 2, 30, 8])  # head: bee and cat, tail: ant and dog


def a_round(rows=60, *, seed=0, first=0, images=25, unknown=False):
    draw = random.Random(seed)
    noted = {
        "rows": torch.tensor([draw.randrange(images) for _ in range(rows)]),
        "step": torch.tensor([first + i // 10 for i in range(rows)]),
        "label": torch.tensor([draw.choice((0, 3, 1, 1, 2, 3, 4)) for _ in range(rows)]),
        "confidence": torch.tensor([draw.random() for _ in range(rows)]),
    }
    noted["kept"] = noted["confidence"] > 0.4
    for name in ("linear", "similarity"):
        noted[f"{name}_label"] = torch.tensor([draw.randrange(6) for _ in range(rows)])
        noted[f"{name}_confidence"] = torch.tensor([draw.random() for _ in range(rows)])
    truth = torch.tensor([-1 if unknown and i % 4 == 0 else draw.choice((0, 1, 2, 3, 3, 5)) for i in range(images)])
    return noted, truth


def share(of):
    of = list(of)
    return sum(of) / len(of) if of else None


@pytest.mark.parametrize("unknown", [False, True])
def test_a_diagnosis_is_what_counting_gives(unknown):
    noted, truth_of = a_round(unknown=unknown)
    truth = truth_of[noted["rows"]]
    there = torch.bincount(truth_of[truth_of >= 0], minlength=6)
    found = diagnose(noted, truth, COUNTS, None if unknown else there)
    columns = (truth, noted["label"], noted["confidence"].double(), noted["kept"])
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    kept = [row for row in rows if row[3]]
    known = [row for row in rows if row[0] >= 0]
    believed = [row for row in kept if row[0] >= 0]
    false = [c for t, y, c, _ in believed if t != y]
    predicted = [sum(y == k for _, y, _, _ in kept) for k in range(6)]
    expected = {
        "images": 60,
        "kept": len(kept),
        "coverage": len(kept) / 60,
        "predicted": predicted,
        "precision": share(t == y for t, y, _, _ in believed),
        "false_kept": len(false),
        "false_confidence": pytest.approx(sum(false) / len(false)),
        "false_histogram": [sum(int(min(c * 10, 9)) == b for c in false) for b in range(10)],
        "tail_taken_for_head": share(y in (1, 2) for t, y, _, _ in believed if t in (0, 3)),
        "head_taken_for_tail": share(y in (0, 3) for t, y, _, _ in believed if t in (1, 2)),
        "per_class_precision": [share(t == k for t, y, _, _ in believed if y == k) for k in range(6)],
        "per_class_recall": [share(y == k and keep for t, y, _, keep in known if t == k) for k in range(6)],
    }
    gap = 0.0
    for b in range(15):
        inside = [(t == y, c) for t, y, c, _ in known if b / 15 < c <= (b + 1) / 15]
        gap += abs(sum(r for r, _ in inside) - sum(c for _, c in inside))
    expected["ece"] = pytest.approx(gap / len(known))
    for name in ("linear", "similarity"):
        said = noted[f"{name}_label"].tolist()
        right = [y == t for y, t in zip(said, truth.tolist(), strict=True) if t >= 0]
        expected[f"{name}_accuracy"] = pytest.approx(share(right))
    if not unknown:
        p = [(n + 1e-6) / sum(n + 1e-6 for n in predicted) for n in predicted]
        q = [(n + 1e-6) / sum(n + 1e-6 for n in there.tolist()) for n in there.tolist()]
        expected |= {"kl": pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))}
        expected |= {"true": there.tolist()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        wanted = [None if v is None else pytest.approx(v) for v in value] if isinstance(value, list) else value
        assert found[name] == (pytest.approx(wanted) if isinstance(wanted, float) else wanted), name
    assert len(known) == (60 if not unknown else sum(truth >= 0)) and None in found["per_class_precision"]
    assert found["tail_taken_for_head"] not in (None, 0, 1) and found["head_taken_for_tail"] not in (None, 0, 1)


def test_without_truth_only_coverage_is_told_and_without_kept_images_no_number_is_invented():
    noted, truth = a_round()
    found = diagnose(noted, torch.full_like(noted["label"], -1), COUNTS, None)
    assert found.keys() == {"images", "kept", "coverage", "predicted"}
    noted["kept"][:] = False
    found = diagnose(noted, truth[noted["rows"]], COUNTS, torch.ones(6))
    assert found["coverage"] == found["false_kept"] == 0 and found["per_class_precision"] == [None] * 6
    assert found["precision"] is found["false_confidence"] is found["tail_taken_for_head"] is None
    assert math.isfinite(found["kl"]) and found["per_class_recall"][0] == 0


def write(path, noted, truth, number):
    ids = [f"photos/{i}.png" for i in range(len(truth))]
    write_round(path, noted, number=number, ids=ids, truth=truth, classes=CLASSES)


def test_a_table_holds_what_was_noted_and_gives_the_last_round_back(tmp_path, monkeypatch):
    path = tmp_path / "run" / "pseudo_labels"
    assert read_last_round(path, CLASSES) is None
    monkeypatch.setattr("lpt.report.pseudo_labels.ROWS_AT_ONCE", 7)
    (first, truth), (second, _) = a_round(unknown=True), a_round(30, seed=1, first=6)
    write(path, first, truth, 1)
    write(path, second, truth, 2)
    table = pq.read_table(path)
    assert table.column_names[:7] == ["image", "truth", "round", "step", "label", "confidence", "kept"]
    assert len(table) == 90 and table["round"].to_pylist() == 60 * [1] + 30 * [2]
    for i, row in enumerate(table.to_pylist()[:60]):
        image = first["rows"][i].item()
        assert row["image"] == f"photos/{image}.png"
        assert row["truth"] == (None if truth[image] < 0 else CLASSES[truth[image]])
        assert row["label"] == CLASSES[first["label"][i]] and row["step"] == i // 10
        assert row["kept"] == bool(first["kept"][i]) and row["confidence"] == first["confidence"][i].item()
        assert row["similarity_label"] == CLASSES[first["similarity_label"][i]]
        assert row["linear_confidence"] == first["linear_confidence"][i].item()
    found, number = read_last_round(path, CLASSES)
    assert number == 2 and torch.equal(found.pop("truth"), truth[second["rows"]])
    assert found.keys() == second.keys() - {"rows"}
    assert all(torch.equal(value, second[name]) for name, value in found.items())
    assert sorted(file.name for file in path.iterdir()) == ["round-00001.parquet", "round-00002.parquet"]
    with pytest.raises(TrainingError, match="none of the 2"):
        read_last_round(path, CLASSES[:2])


def test_a_round_takes_the_place_of_what_is_there_of_it_and_of_later_ones(tmp_path):
    rounds = [a_round(30, seed=k, first=3 * k) for k in range(4)]
    for k, (noted, truth) in enumerate(rounds):
        write(tmp_path / "whole", noted, truth, k + 1)
    for k in (0, 1, 2, 1, 2, 3):  # after the third round it continued from the first
        noted = rounds[k][0]
        again = {name: noted[name] for name in sorted(noted)}  # as a checkpoint gives them
        write(tmp_path / "again", again if k else noted, rounds[k][1], k + 1)
        assert max(pq.read_table(tmp_path / "again")["round"].to_pylist()) == k + 1
    tables = [pq.read_table(tmp_path / name) for name in ("whole", "again")]
    assert tables[0].equals(tables[1])


def test_the_one_file_of_older_runs_is_read_and_gone_on_with(tmp_path):
    rounds = [a_round(30, seed=k, first=3 * k) for k in range(4)]
    for k, (noted, truth) in enumerate(rounds):
        write(tmp_path / "whole", noted, truth, k + 1)
    old = tmp_path / "run.parquet"
    pq.write_table(pq.read_table(tmp_path / "whole").slice(0, 90), old)
    found, number = read_last_round(tmp_path / "run", CLASSES)
    assert number == 3 and torch.equal(found["label"], rounds[2][0]["label"])
    for k in (2, 3):  # its last round is taken again
        write(tmp_path / "run", *rounds[k], k + 1)
        assert not old.exists() and read_last_round(tmp_path / "run", CLASSES)[1] == k + 1
    assert pq.read_table(tmp_path / "run").equals(pq.read_table(tmp_path / "whole"))


def test_memory_does_not_grow_with_the_rounds(tmp_path):
    """Of a round before nothing is read."""
    noted, truth = a_round()
    write(tmp_path / "run", noted, truth, 1)
    (tmp_path / "run" / "round-00001.parquet").write_bytes(b"cannot be read")
    write(tmp_path / "run", noted, truth, 2)
    assert read_last_round(tmp_path / "run", CLASSES)[1] == 2


def test_duckdb_reads_a_run_in_one_query(tmp_path):
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    for k in range(3):
        write(tmp_path / "run", *a_round(30, seed=k, first=3 * k), k + 1)
    rows = duckdb.sql(
        f"""select round, count(*) filter (kept and label = truth) / count(*) filter (kept and truth is not null)
        from '{tmp_path}/run/*.parquet' group by round order by round"""
    ).fetchall()
    for k, (number, precision) in enumerate(rows):
        noted, truth = a_round(30, seed=k, first=3 * k)
        assert number == k + 1
        assert precision == pytest.approx(diagnose(noted, truth[noted["rows"]], COUNTS, None)["precision"])
