"""What is selected at the end of a run, and what a run says before it starts."""

import json

import pytest

from lpt import run
from lpt.config import resolve
from lpt.engine import phase_state, session
from lpt.engine.history import History
from lpt.errors import LptError
from lpt.serve.evaluating import evaluate_prompt

CONFIG = {
    "backbone": {"name": "untrained:vit_tiny_patch16_224", "image_size": 32},
    "data": {"name": "digits-lt", "val_per_class": 6},
    "method": {"name": "linear_probe", "epochs": 6, "lr": 0.05},
    "train": {"batch_size": 16, "precision": "fp32", "select": "best_val"},
}


def test_the_best_epoch_on_held_out_images_is_evaluated_and_stored(tmp_path):
    report = run.train(resolve(CONFIG), tmp_path / "best")
    lines = History(tmp_path / "best" / "history.jsonl").lines
    scores = [line["val"]["class_accuracy"] for line in lines]
    best = max(range(6), key=scores.__getitem__)
    assert report["selection"] == f"best on held-out images: step {lines[best]['step']} of head"
    # The run that ends there has those weights, if its schedule were the same: compare what is stored instead.
    stored = json.loads((tmp_path / "best" / "report.json").read_text())
    assert stored["selection"] == report["selection"]
    last = run.train(resolve(CONFIG, ["train.select=last"]), tmp_path / "last")
    assert last["selection"] == "last"
    assert (last["class_accuracy"] == report["class_accuracy"]) == (best == 5)


def test_a_resumed_run_selects_the_same(tmp_path):
    whole = run.train(resolve(CONFIG), tmp_path / "run")
    for name in ("report.json", "prompt.safetensors"):
        (tmp_path / "run" / name).unlink()
    again = run.train(resolve(CONFIG), tmp_path / "run", resume=True)
    assert again["selection"] == whole["selection"] and again["per_class"] == whole["per_class"]


def test_a_run_resumed_between_its_phases_cost_what_an_undisturbed_one_does(tmp_path):
    """The shared prompt's constant keys and values are no work of a step of phase 2, whoever computes them."""
    settings = {"name": "lpt", "epochs": [1, 1], "prompt_length": 2, "pool_size": 4, "topk": 2, "prefix_blocks": 3}
    config = resolve({**CONFIG, "method": settings}, ["train.select=last"])
    whole = run.train(config, tmp_path / "run")
    for name in ("report.json", "prompt.safetensors", "checkpoints/phase2.safetensors"):
        (tmp_path / "run" / name).unlink()
    again = run.train(config, tmp_path / "run", resume=True)
    assert whole["cost"]["flops"] > 0 and again["cost"] == whole["cost"]


def test_rows_say_what_sets_a_run_apart(tmp_path):
    settings = {"name": "lpt", "epochs": [1, 0], "prompt_length": 2}
    config = resolve({**CONFIG, "method": settings}, ["train.select=last", "data.imbalance_factor=100"])
    report = run.train(config, tmp_path / "run")
    assert (report["method"], report["described"]) == ("lpt", "lpt phase 1")
    text = (tmp_path / "run" / "report.md").read_text()
    assert text.startswith("# lpt phase 1 on digits-lt") and "\n| lpt phase 1 |" in text
    assert "lpt phase 1 on digits-lt" in (tmp_path / "run" / "report.html").read_text()
    assert (
        evaluate_prompt(tmp_path / "run" / "prompt.safetensors", {"backbone": {"name": CONFIG["backbone"]["name"]}})[
            "described"
        ]
        == "lpt phase 1"
    )


def test_seconds_go_on_where_a_killed_run_was(tmp_path, monkeypatch):
    """They are those of the checkpoint and of what came after it, in the history and in what is left."""
    config = resolve(CONFIG, ["train.select=last", "train.checkpoint_seconds=0", "data.imbalance_factor=100"])

    def dies(phase, step, steps, rates):
        if step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.train(config, tmp_path / "run", show=dies)
    real = phase_state.load_checkpoint

    def an_hour_ago(path, **settings):
        checkpoint = real(path, **settings)
        return checkpoint and checkpoint._replace(seconds=3600.0)

    monkeypatch.setattr(phase_state, "load_checkpoint", an_hour_ago)
    left, said = [], []
    run.train(
        config, tmp_path / "run", resume=True, say=said.append, show=lambda *progress: left.append(progress[3].split())
    )
    lines = History(tmp_path / "run" / "history.jsonl").lines
    late = [line for line in lines if line["step"] > 20]
    assert late and all(3600 <= line["seconds"] < 3700 and line["compute_seconds"] > 0 for line in late)
    assert [line["compute_seconds"] for line in lines] == sorted(line["compute_seconds"] for line in lines)
    assert float(left[-2][4]) > 30 and float(left[-1][4]) == 0
    assert any("3600 s" in line or "3601 s" in line for line in said)


def test_checkpoints_are_as_frequent_as_the_config_says(tmp_path, monkeypatch):
    written = []
    for module in (phase_state, session):
        monkeypatch.setattr(module, "save_checkpoint", lambda path, state, run_hash: written.append(state.step))
    for seconds, steps in ((0, [1, 2, 3]), (3600, [3])):
        settings = ["data.imbalance_factor=200", "method.epochs=1", "train.select=last", "train.batch_size=80"]
        run.train(resolve(CONFIG, [*settings, f"train.checkpoint_seconds={seconds}"]), tmp_path / str(seconds))
        assert [step for step in written if step] == steps  # 0 is of features
        written.clear()


@pytest.mark.parametrize("name", ["two_stage", "pre_finetune"])
def test_a_method_that_runs_another_takes_its_folder_once(tmp_path, name):
    method = {"name": name, "then": {"name": "linear_probe", "epochs": 1}}
    config = resolve({**CONFIG, "method": method}, ["train.select=last"])
    report = run.train(config, tmp_path / "run")
    assert report["method"] == name and not (tmp_path / "run" / "running.json").exists()


def test_selecting_needs_held_out_images_and_epochs(tmp_path):
    with pytest.raises(LptError, match=r"set data\.val_per_class"):
        run.train(resolve(CONFIG, ["data.val_per_class=0"]), tmp_path / "run")
    for method in ({"name": "knn"}, {"name": "pre_finetune", "then": {"name": "knn"}}):
        with pytest.raises(LptError, match="knn does not end with epochs"):
            run.train(resolve({**CONFIG, "method": method}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_evaluations_on_the_way_see_the_average_weights(tmp_path):
    """What is watched last is what is reported, and what is chosen is what was seen."""
    method = {"name": "fixmatch", "tuning": "vpt_deep", "lambda_u": 0, "head_init": "class_mean", "lr": 0.2}
    method |= {"steps": 12, "rounds": 3, "weight_ema": 0.8}
    train = {**CONFIG["train"], "storage": "fp32", "watch_test": 2}
    config = {**CONFIG, "method": method, "train": train}
    last = run.train(resolve(config, ["train.select=last"]), tmp_path / "last")
    assert last["watched"]["last"] == last["class_accuracy"] and last["watched"]["evaluations"] == 2
    plain = run.train(resolve(config, ["train.select=last", "method.weight_ema=0"]), tmp_path / "plain")
    assert plain["nll"] != last["nll"]
    chosen = run.train(resolve(config), tmp_path / "best")
    lines = History(tmp_path / "best" / "history.jsonl").lines
    best = max(lines, key=lambda line: line["val"]["class_accuracy"])
    assert chosen["selection"] == f"best on held-out images: step {best['step']} of semi"
    if "test" in best:
        assert chosen["class_accuracy"] == best["test"]["class_accuracy"]


def photos(folder, numbers):
    from PIL import Image

    for k, (name, number) in enumerate(numbers.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            Image.new("RGB", (32, 32), (80 * k, 10 * i, 0)).save(folder / name / f"{i}.png")


def test_a_run_on_images_that_have_changed_is_not_gone_on_with(tmp_path):
    photos(tmp_path / "photos", {"ant": 5, "bee": 4})
    data = {"name": "folder", "root": str(tmp_path / "photos")}
    config = resolve({"backbone": {"name": "nano"}, "data": data, "method": {"name": "class_mean"}})
    run.train(config, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    photos(tmp_path / "photos", {"ant": 5, "bee": 5})
    with pytest.raises(LptError, match="holds a run on other images than there are now: give another --out"):
        run.train(config, tmp_path / "run", resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


def test_what_another_run_did_until_the_folder_was_locked_is_seen(tmp_path, monkeypatch):
    """It wrote a line and ended while this one was loading; or began and ended where there was nothing."""
    config, real = resolve(CONFIG, ["train.select=last"]), run.locked

    def late(then):
        def locked(out):
            then()
            return real(out)

        monkeypatch.setattr(run, "locked", locked)

    run.train(config, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    history = tmp_path / "run" / "history.jsonl"
    whole = history.read_text()
    history.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    late(lambda: history.write_text(whole))
    run.train(config, tmp_path / "run", resume=True)
    assert history.read_text() == whole
    late(lambda: ((tmp_path / "new").mkdir(), (tmp_path / "new" / "history.jsonl").write_text("{}")))
    with pytest.raises(LptError, match="already holds a run"):
        run.train(config, tmp_path / "new")


def test_labels_that_the_backbone_has_seen_are_warned_about(tmp_path):
    photos(tmp_path / "photos", {"apple": 4, "bicycle": 4, "digit": 4})
    said = []
    config = {
        "backbone": {"name": "nano"},
        "data": {"name": "folder", "root": str(tmp_path / "photos")},
        "method": {"name": "class_mean"},
    }
    report = run.train(resolve(config), tmp_path / "run", say=said.append)
    assert any("nano has seen 2 of these 3 classes as labels of CIFAR-100" in line for line in said)
    assert report["labels_seen"] == {"CIFAR-100": 2}


def test_zero_shot_trains_nothing_and_leaves_a_whole_run(tmp_path):
    import torch
    from safetensors.torch import save_file

    from lpt.data import load_task
    from lpt.model.backbones import load_backbone

    names = list(load_task("digits-lt").classes)
    rows = torch.randn(10, load_backbone("nano").feature_width, generator=torch.Generator().manual_seed(0))
    save_file({"prototypes": rows}, tmp_path / "p.safetensors", {"classes": json.dumps(names[::-1])})
    config = {
        "backbone": {"name": "nano"},
        "data": {"name": "digits-lt"},
        "method": {"name": "zero_shot"},
        "prototypes": {"weights": str(tmp_path / "p.safetensors")},
    }
    report = run.train(resolve(config), tmp_path / "run")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left >= {"config.yaml", "split.json", "report.json", "report.html", "prompt.safetensors"}
    assert report["method"] == "zero_shot" and report["seconds"] >= 0
    (tmp_path / "p.safetensors").rename(tmp_path / "q.safetensors")  # the place of a file does not matter
    moved = {**config, "prototypes": {"weights": str(tmp_path / "q.safetensors")}}
    assert run.train(resolve(moved), tmp_path / "run", resume=True)["per_class"] == report["per_class"]
    save_file({"prototypes": -rows}, tmp_path / "q.safetensors", {"classes": json.dumps(names)})
    assert run.train(resolve(moved), tmp_path / "run", resume=True)["per_class"] != report["per_class"]
