"""What a run would do, told without training: every shipped config has a plan, and a run then does what it says."""

import json

import pytest

from lpt import plan
from lpt.cli import main
from lpt.config import load_config, resolve
from lpt.engine.batches import Stream
from lpt.plan import FirstRows, plan_run, table
from tests.support.cifar import parquet_folder
from tests.support.shared import ROOT
from tests.support.small_fit import phase

LISTED = ("imagenet_lt", "places_lt", "inat2018")
"""Folders of configs on list files, each of which `test_listed_configs.py` runs."""
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in LISTED)
SHORT = ["method.epochs=[2, 1]", "method.pool_size=5", "data.val_per_class=2", "train.precision=fp32"]


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Folders with as many images as CIFAR has, tiny ones."""
    folders = {}
    for name, num_classes in (("cifar10", 10), ("cifar100", 100)):
        folder = tmp_path_factory.mktemp(name)
        folders[name] = parquet_folder(folder, num_classes=num_classes)
    return folders


def marks(path):
    """FLOPs of a ViT-B/16, or at 224 pixels, take a minute to count."""
    return [pytest.mark.slow] * any(part in path.stem for part in ("b16", "in21k", "224"))


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=f"{path.parent.name}/{path.stem}", marks=marks(path)) for path in CONFIGS]
)
def test_every_shipped_config_has_a_plan(path, roots):
    """Weights and prototypes need not be at hand: those of the configs are downloads, or files of somebody else."""
    data = load_config(path).data["name"]
    where = ["train.batch_size=16"]  # so small that memory suffices in every precision
    if data != "digits-lt":
        where += [f"data.root={roots[data.partition('-')[0]]}"]
    config = load_config(path, where)
    planned = plan_run(config, timed_steps=0)
    assert planned.method == config.method["name"] and planned.backbone == config.backbone.name
    assert planned.phases and planned.seconds is None
    for one in planned.phases:
        assert one.steps > 0 and one.images % one.steps == 0 and one.flops > 0
        assert 0 < sum(one.parameters.values()) <= planned.trainable_parameters
        assert all(f"{name} " in table(planned) for name in one.parameters)


def test_a_plan_is_what_the_run_then_does(finished):
    """Steps, images and FLOPs of a real run, exactly; a part of a batch was enough to count them."""
    report = json.loads((finished / "report.json").read_text())
    planned = plan_run(load_config(finished / "config.yaml"), timed_steps=1)
    assert [one.name for one in planned.phases] == ["phase1", "phase2"]
    for key in ("steps", "images", "flops"):
        assert sum(getattr(one, key) for one in planned.phases) == report["cost"][key], key
    assert planned.trainable_parameters == report["trainable_parameters"]
    assert planned.seconds is not None and planned.seconds > 0 and planned.memory_bytes > 2**20
    assert planned.other_seconds.keys() >= {"start-up", "features", "between phases", "evaluation"}


def test_nothing_is_written_and_nothing_read_of_the_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"name": "digits-lt"}
    backbone = {"name": "timm:vit_tiny_patch16_224.augreg_in21k", "image_size": 32, "weights": "nowhere.safetensors"}
    method = {"name": "zero_shot"}
    planned = plan_run(resolve({"backbone": backbone, "data": data, "method": method}))
    assert planned.phases == [] and "nothing trains" in table(planned) and not list(tmp_path.iterdir())


def test_stages_of_methods_inside_one_another_are_told_apart():
    then = {"name": "two_stage", "then": {"name": "fine_tune", "tuning": "bias", "epochs": 2}}
    config = {
        "backbone": {"name": "nano"},
        "data": {"name": "digits-lt"},
        "method": {"name": "pre_finetune", "then": then},
        "train": {"batch_size": 16},
    }
    planned = plan_run(resolve(config), timed_steps=0)
    assert [one.name for one in planned.phases] == ["augmented", "reweighted", "tune"]
    augmented, reweighted, tune = planned.phases
    assert list(reweighted.parameters) == ["head.weight"] and augmented.parameters == tune.parameters
    assert any("*" in name for name in tune.parameters)  # blocks are added up


def test_large_steps_are_timed_on_a_part_of_their_batch(monkeypatch):
    config = load_config(ROOT / "configs/digits_lt/lpt.yaml", [*SHORT, "train.batch_size=64"])
    monkeypatch.setattr(plan, "PHASE_SECONDS", 0.0)
    assert [one.timed_share for one in plan_run(config, timed_steps=1).phases] == [1 / 16, 1 / 16]
    monkeypatch.setattr(plan, "PHASE_SECONDS", 1e9)
    assert [one.timed_share for one in plan_run(config, timed_steps=1).phases] == [1, 1]


def test_a_part_of_a_batch_is_its_first_rows_and_a_multiple_of_the_micro_batches():
    sampler = phase().streams["all"].sampler
    assert FirstRows(sampler, 0.5).batch(3).tolist() == sampler.batch(3).tolist()[:2]

    class Rows:
        def batch(self, step):
            return sampler.batch(step).repeat(12)  # 48 rows

    streams = {"all": Stream(Rows())}
    assert plan._shares(phase(streams=streams)) == [1 / 8, 1 / 4, 1 / 2, 1]  # 6 rows: 3 are too few
    assert plan._shares(phase(streams=streams, row_multiple=16)) == [1]


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys, monkeypatch):
    words = [
        "plan",
        str(ROOT / "configs/digits_lt/linear_probe.yaml"),
        "--steps",
        "1",
        "--json",
        str(tmp_path / "p.json"),
    ]
    monkeypatch.setattr("sys.argv", ["lpt", *words])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().out
    assert (
        not end.value.code and "head trains head.weight 1,280, head.bias 10; adamw" in said and "in all about" in said
    )
    written = json.loads((tmp_path / "p.json").read_text())
    assert written["phases"][0]["steps"] == 100 * (305 // 16) and written["seconds"] > 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["configs/nothing.yaml"], "does not exist"),
        (["configs/digits_lt/lpt.yaml", "method.epochs=[0, 0]"], "trains nothing"),
        (["configs/cifar100_lt/lpt_deit_tiny.yaml", "data.root=/nowhere"], "data.root /nowhere"),
        (["configs/digits_lt/lpt.yaml", "backbone.name=timm:vit_tini"], "is not a model of timm"),
    ],
)
def test_what_cannot_run_is_refused_as_train_refuses_it(words, reason, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lpt", "plan", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and reason in capsys.readouterr().err
