import inspect
from pathlib import Path

import pytest
import yaml

from lpt.config import load_config, nested, resolve
from lpt.errors import ConfigError
from lpt.methods import METHODS

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

RAW = {
    "backbone": {"name": "untrained:vit_tiny_patch16_224", "image_size": 32},
    "data": {"name": "digits-lt"},
    "method": {"name": "lpt"},
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_config_resolves_and_says_how_it_was_run(path):
    config = load_config(path)
    assert config.method["name"] in METHODS
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"lpt train {path.relative_to(ROOT)}" in header
    assert "hardware" in header and "result" in header
    resolved = yaml.safe_load(config.to_yaml())
    assert resolve(resolved).model_dump() == config.model_dump()  # what a run writes can be run again


def test_defaults_are_those_of_the_signature():
    settings = resolve(RAW).method
    for name, parameter in inspect.signature(METHODS["lpt"].build).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            assert settings[name] == default


def test_overrides_are_read_as_yaml_and_numbers_without_a_dot_too():
    config = resolve(
        RAW, ["method.epochs=[1, 2]", "method.lr=[5e-3, 1e-3]", "train.seed=3", "data.imbalance_factor=20"]
    )
    assert config.method["epochs"] == [1, 2] and config.method["lr"] == [5e-3, 1e-3]
    assert config.train.seed == 3 and config.data["imbalance_factor"] == 20
    assert resolve(RAW, ["prototypes.template=a drawing of a {}"]).prototypes.template == "a drawing of a {}"


def test_every_mistake_is_told_at_once_with_its_path_and_a_suggestion():
    wrong = [
        "method.epocs=[1, 1]",
        "method.topk=many",
        "train.precision=fp8",
        "train.batchsize=3",
        "data.imbalance=3",
        "backbone.image_size=0",
        "optimizer.lr=3",
        "nonsense",
    ]
    with pytest.raises(ConfigError) as error:
        resolve(RAW, wrong)
    said = "\n".join(error.value.mistakes)
    assert len(error.value.mistakes) == len(wrong)
    for part in (
        "method.epocs: there is no such setting; did you mean epochs?",
        "method.topk: got 'many'",
        "train.precision: got 'fp8'",
        "train.batchsize: there is no such setting; did you mean batch_size?",
        "data.imbalance: there is no such setting; did you mean imbalance_factor?",
        "backbone.image_size: got 0",
        "optimizer: there is no such section",
        "'nonsense' is not of the form section.key=value",
    ):
        assert part in said, part


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({**RAW, "method": {"name": "ltp"}}, "did you mean lpt"),
        ({**RAW, "data": {"name": "cifar100_lt"}}, "did you mean cifar100-lt"),
        ({**RAW, "data": {}}, r"data\.name is missing"),
        ({**RAW, "method": 3}, r"method\.name is missing"),
        ({**RAW, "backbone": {}}, r"backbone\.name is missing"),
        ({**RAW, "train": 3}, "train: expected settings, got 3"),
    ],
)
def test_names_and_sections_that_are_wrong_are_told(raw, says):
    with pytest.raises(ConfigError, match=says):
        resolve(raw)


@pytest.mark.parametrize("text", ["a: [", "just words", "- 1", ""])
def test_a_file_that_is_no_config_is_told(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load_config(path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "other.yaml")


def test_the_run_hash_sees_settings_but_not_places():
    base = resolve(RAW)
    assert base.run_hash("s", "f") == resolve(RAW, ["train.device=cpu"]).run_hash("s", "f")
    assert base.run_hash("s", "f") == resolve(RAW, ["train.checkpoint_seconds=0"]).run_hash("s", "f")
    others = [resolve(RAW, [o]).run_hash("s", "f") for o in ("train.seed=1", "method.beta=0.1", "data.seed=1")]
    hashes = {base.run_hash("s", "f"), base.run_hash("t", "f"), base.run_hash("s", "g"), *others}
    assert len(hashes) == 6
    data = {"name": "lists", "train": "a", "test": "b"}
    there = [{**RAW, "data": {**data, "unlabeled": place}} for place in (None, "c", "d")]
    assert len({resolve(raw).run_hash("s", "f") for raw in there}) == 1


def test_another_dataset_or_method_leaves_out_what_the_config_says_of_the_first():
    path = ROOT / "configs/cifar100_lt/lpt_deit_tiny.yaml"
    config = load_config(path, ["data.root=photos", "data.name=folder", "method.epochs=3", "method.name=linear_probe"])
    assert config.data["name"] == "folder" and config.data["root"] == "photos"
    assert config.method["epochs"] == 3 and config.method["head"] == "linear"
    assert load_config(path, ["data.name=cifar100-lt"]).data["imbalance_factor"] == 100
    assert load_config(path, ["data.name=cifar10-lt"]).data["imbalance_factor"] == 100  # its own default
    with pytest.raises(ConfigError, match=r"data\.imbalance_factor"):
        load_config(path, ["data.name=folder", "data.imbalance_factor=10"])


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        *(
            BOMB,
            "a: &a [*a]",
            "[" * 5000,
            "[" * 99 + "]" * 99,
            "{[a]: 1",
            "\0",
            "a: !!python/object/apply:os.system ['id']",
        ),
        *("a: 2026-99-99", "a: 0x" + "f" * 9999, "a: " + "9" * 9999, "a: !!int ''"),
    ],
)
def test_yaml_that_is_made_to_harm_is_refused_in_one_sentence(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match="is not YAML") as error:
        load_config(tmp_path / "c.yaml")
    assert len(error.value.mistakes) == 1 and len(str(error.value)) < 500 and str(error.value).isprintable()


def test_long_values_are_not_repeated_in_full(tmp_path):
    (tmp_path / "c.yaml").write_text("backbone: {name: [" + "xyz, " * 5000 + "]}\n? " + "k" * 900 + "\n: 1")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "c.yaml", ["train.seed=2026-99-99"])
    assert any("train.seed: the value '2026-99-99' is not YAML" in one for one in error.value.mistakes)
    with pytest.raises(ConfigError) as error:
        resolve(RAW, ["train.seed=2147483648", "data.seed=4294967296"])
    assert [one.partition(":")[0] for one in error.value.mistakes] == ["data.seed", "train.seed"]
    assert max(map(len, error.value.mistakes)) < 500


def test_merge_keys_and_long_texts_are_no_config(tmp_path):
    bomb = "a: &a {x: 1}\n" + "".join(f"b{i}: &b{i} {{<<: [{', '.join(['*a'] * 9)}]}}\n" for i in range(3))
    for text, said in ((bomb, "merge keys"), ("a: b\n" * 20_000, "100000 letters, 65536 are the most")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError, match=f"is not YAML: .*{said}"):
            load_config(tmp_path / "c.yaml")


def test_a_number_without_a_dot_is_one_inside_other_values_too():
    """YAML 1.1 reads 5e-3 as text."""
    given = nested(["method.lr=[5e-3, 2e-3]", "method.then={name: fine_tune, lr: 1e-2, inside: [{a: 1e3}]}"])
    assert given["method"] == {"lr": [5e-3, 2e-3], "then": {"name": "fine_tune", "lr": 1e-2, "inside": [{"a": 1e3}]}}


@pytest.mark.parametrize("word", ["x" * 70_000, "no\x1b[2Jsection", "backbone\x07.name.deep=1"])
def test_an_override_that_makes_no_sense_is_repeated_short_and_printable(word):
    with pytest.raises(ConfigError) as error:
        resolve(RAW, [word])
    assert all(len(one) < 500 and one.isprintable() for one in error.value.mistakes)


def test_a_value_in_its_old_spelling_is_read_with_a_warning_and_hashed_as_it_was():
    """Run folders of lpt 0.1 say `labelled`: they are resumed, since the hash has the old spelling."""
    method = {"name": "ulfine", "la_on": "labelled"}
    inside = {"name": "two_stage", "then": method}
    for given, setting in ((method, lambda c: c.method), (inside, lambda c: c.method["then"])):
        with pytest.warns(FutureWarning, match="la_on=labelled is spelled labeled now"):
            old = resolve({**RAW, "method": given})
        new = resolve(yaml.safe_load(old.to_yaml()))
        assert setting(old)["la_on"] == setting(new)["la_on"] == "labeled"
        assert "labeled" in str(old.stored_method_settings()) and "labelled" not in str(old.stored_method_settings())
        assert old.run_hash("split", "weights") == new.run_hash("split", "weights")
    assert (
        resolve({**RAW, "method": method | {"la_on": "labeled"}}).run_hash("s", "w") == "ae642f1d540ad443"
    )  # of 6d4ee50


def test_a_group_of_settings_is_flat_in_a_config():
    """The schedule of the semi-supervised methods is one value for them, and settings of the method in a config."""
    method = resolve({**RAW, "method": {"name": "finessl", "steps": 7, "rounds": 1}}).method
    assert method["steps"] == 7 and method["lr"] == 0.03 and method["strong_views"] == 2
    assert "schedule" not in method and "micro_batches" not in method  # not offered by this one
    with pytest.raises(ConfigError, match=r"method\.micro_batches: there is no such setting"):
        resolve({**RAW, "method": {"name": "finessl", "micro_batches": 2}})
    assert resolve({**RAW, "method": {"name": "ulfine", "micro_batches": 2}}).method["micro_batches"] == 2


def test_settings_that_came_later_leave_the_hash_of_a_run_as_it_was():
    raw = {
        "backbone": {"name": "nano"},
        "data": {"name": "folder", "root": "x", "label_column": "kind"},
        "method": {"name": "class_mean"},
    }
    before = ["data.split_by=position"]  # a run of before has split by position
    # The hash is that of the version before `table`, `split_column` and `split_by`.
    assert resolve(raw, before).run_hash("s", "b") == "fb83d89a3ba1856d"
    assert resolve(raw, [*before, "data.table=a.csv"]).run_hash("s", "b") == "fb83d89a3ba1856d"  # a place
    assert resolve(raw, [*before, "data.split_column=part"]).run_hash("s", "b") != "fb83d89a3ba1856d"
    assert resolve(raw).run_hash("s", "b") != "fb83d89a3ba1856d"
