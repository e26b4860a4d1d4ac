"""Fixtures that several test modules use; what is no fixture is in `tests/support`."""

import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # both before anything imports `datasets`
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="lpt-tests-")

import pytest
from hypothesis import settings

from lpt.config import load_config
from lpt.run import train
from tests.support.shared import ROOT, real

# The same examples every time, and no file beside the tests: a machine under load must not fail a test.
settings.register_profile("tests", max_examples=50, deadline=None, derandomize=True, database=None)
settings.load_profile("tests")


@pytest.fixture
def cifar100_root() -> Path:
    return real("data/cifar100/train.parquet").parent


@pytest.fixture
def deit_tiny_weights() -> Path:
    return real("weights/deit_tiny_patch16_224.fp16.safetensors")


@pytest.fixture(scope="session")
def tower(tmp_path_factory):
    """(open_clip's own small model, the same as a backbone, its name and its weights); its texts are made once."""
    from lpt.model.backbones import load_backbone
    from tests.support.towers import stored

    model, name, path = stored(tmp_path_factory.mktemp("tower"), name="tower")
    backbone = load_backbone(f"open_clip:{name}", weights=path)
    backbone.class_prototypes([f"class {k}" for k in range(4)])
    return model, backbone, f"open_clip:{name}", path


@pytest.fixture
def clip(tower):
    return tower[1]


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of a short finished run on digits; to be copied where a test changes it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    small = ["method.epochs=[2, 1]", "method.pool_size=5", "data.val_per_class=2", "train.precision=fp32"]
    train(load_config(ROOT / "configs/digits_lt/lpt.yaml", small), out)
    return out
