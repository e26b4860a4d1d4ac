"""Whether two checkouts train to the same bits: every method on nano and digits, whole and gone on with after a kill.

    python tests/support/same_bits.py train CHECKOUT FOLDER [--shared DIR] [--jobs N]
    python tests/support/same_bits.py kill CHECKOUT FOLDER
    python tests/support/same_bits.py resume CHECKOUT FOLDER
    python tests/support/same_bits.py compare FOLDER OTHER

`train` runs every case with the `lpt` of CHECKOUT, `kill` some of them until a checkpoint within a phase is there,
`resume` continues with those, perhaps with another checkout, and `compare` names every case whose prompt file,
`report.json` (but for times, memory and versions), or losses in `history.jsonl` differ. Exit code 1 where one does.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

NANO = ["backbone.name=nano", "train.precision=fp32", "train.batch_size=16", "train.device=cpu"]
TUNE = ["method.name=fine_tune", "method.epochs=2", "method.optimizer=adamw", "method.lr=5e-3"]
LPT = ["method.name=lpt", "method.epochs=[2, 2]", "method.optimizer=adamw", "method.lr=[5e-3, 2e-3]"]
SEMI = ["method.steps=12", "method.rounds=3", "method.optimizer=adamw", "method.lr=5e-3", "train.batch_size=8"]
HELD = ["data.val_per_class=3"]
PROBE = "{name: linear_probe, epochs: 3}"

DIGITS = {
    "class_mean": ["method.name=class_mean"],
    "knn": ["method.name=knn"],
    "linear_probe": ["method.name=linear_probe", "method.epochs=4"],
    "linear_probe_la": ["method.name=linear_probe", "method.epochs=4", "method.loss=la", "method.head=cosine"],
    "head": [*TUNE, "method.tuning=head", "method.loss=ldam_drw"],
    "vpt_shallow": [*TUNE, "method.tuning=vpt_shallow", "method.loss=focal", "method.head=linear"],
    "vpt_deep": [*TUNE, "method.tuning=vpt_deep", "method.optimizer=sgd", "method.lr=0.1"],
    "bias": [*TUNE, "method.tuning=bias", "method.loss=cb", "train.precision=bf16"],
    "norm": [*TUNE, "method.tuning=norm", "method.loss=ce", "method.sampler=class"],
    "adaptformer": [*TUNE, "method.tuning=adaptformer", "method.head_init=random"],
    "lora": [*TUNE, "method.tuning=lora", "method.loss=bs", "train.storage=fp32"],
    "full": [*TUNE, "method.tuning=full", "method.loss=ldam_cb", "method.lr=1e-3", *HELD, "train.select=best_val"],
    "lpt": [*LPT, "method.pool_size=6", *HELD, "train.watch_test=1"],
    "lpt_options": [
        *LPT, "method.pool_size=5", "method.head_init=class_mean", "method.query_centering=mean",
        "method.key_init=kmeans", "method.query_head=true", "method.pool_init=shared", "method.loss=la",
        *HELD, "train.select=best_val",
    ],
    "lpt_phase1": [*LPT, "method.epochs=[2, 0]", "method.loss=ce", "method.warmup=first_epoch_1e-6"],
    "lpt_phase2": [*LPT, "method.epochs=[0, 1]", "method.instance_stream=per_step", "method.agcl_form=paper"],
    "two_stage": ["method.name=two_stage", "method.epochs_stage1=2", "method.stage2_loss=la"],
    "two_stage_last_block": [
        "method.name=two_stage", "method.epochs_stage1=1", "method.stage1_train=last_block",
        "method.then={name: fine_tune, tuning: adaptformer, epochs: 1}",
    ],
    "two_stage_lpt": [
        "method.name=two_stage", "method.epochs_stage1=2",
        "method.then={name: lpt, epochs: [1, 1], head_init: class_mean, pool_size: 4, optimizer: adamw, "
        "lr: [5e-3, 5e-3]}",
    ],
    "pre_finetune": ["method.name=pre_finetune", "method.then={name: fine_tune, tuning: vpt_deep, epochs: 1}"],
    "pre_finetune_two_stage": [
        "method.name=pre_finetune", "method.include_original=true", "method.stage1_train=head",
        "method.then={name: two_stage, epochs_stage1: 1, then: {name: fine_tune, tuning: bias, epochs: 1}}",
    ],
    "two_stage_pre_finetune": [
        "method.name=two_stage", "method.epochs_stage1=1",
        "method.then={name: pre_finetune, then: {name: fine_tune, tuning: vpt_deep, epochs: 1}}",
    ],
    "crt": ["method.name=decoupled", "method.adjust=crt", "method.epochs=2", f"method.first={PROBE}"],
    "crt_tuned": [
        "method.name=decoupled", "method.adjust=crt", "method.epochs=2",
        "method.first={name: fine_tune, tuning: vpt_deep, epochs: 1}",
    ],
    "lws": ["method.name=decoupled", "method.adjust=lws", "method.epochs=2", f"method.first={PROBE}"],
    "marc": ["method.name=decoupled", "method.adjust=marc", "method.epochs=2", f"method.first={PROBE}"],
    "tau_norm": ["method.name=decoupled", "method.adjust=tau_norm", f"method.first={PROBE}"],
    "posthoc_la": ["method.name=decoupled", "method.adjust=posthoc_la", "method.first={name: class_mean}"],
    "temperature": ["method.name=decoupled", "method.adjust=temperature", f"method.first={PROBE}", *HELD],
}  # fmt: skip
PHOTOS = {
    "zero_shot": ["method.name=zero_shot"],
    "ulfine": ["method.name=ulfine", "method.tuning=vpt_deep", *SEMI, "method.weight_ema=0.9", *HELD],
    "ulfine_options": [
        "method.name=ulfine", *SEMI, "method.micro_batches=2", "method.orth_on=learnable_text",
        "method.learn_scales=true", "method.fusion=daso", "method.fuse_train=true", "method.la_on=both",
        "method.lambda_sim=1", "method.proto_center=true", "method.pu_estimator=histogram", "method.ratio=2",
    ],
    "ulfine_cached": [
        "method.name=ulfine", "method.tuning=head", *SEMI, "method.cached_views=2", "method.proto_space=features",
        "method.proto_mode=recursive", "method.mu=0.001", "method.strong_views=2", "method.fusion=zscore",
    ],
    "fixmatch": ["method.name=fixmatch", *SEMI, "method.tau=0.3", "method.soft_from=0.1", "train.watch_test=2"],
    "fixmatch_labels_alone": ["method.name=fixmatch", *SEMI, "method.lambda_u=0", "method.tuning=bias"],
    "finessl": ["method.name=finessl", *SEMI, "method.prompt_length=4", "method.tau=0.2"],
    "daso": ["method.name=daso", *SEMI, "method.tau=0.2"],
}  # fmt: skip
REAL = ["method.epochs=[1, 1]"]
KILLED = (
    "linear_probe", "full", "lpt", "lpt_options", "two_stage", "two_stage_lpt", "pre_finetune_two_stage", "marc",
    "ulfine", "ulfine_cached", "fixmatch", "finessl", "daso",
)  # fmt: skip
TIMES = ("seconds", "peak_memory_bytes", "versions")


def write_photos(folder: Path) -> None:
    """Digits as files: train, unlabeled and test, with class prototypes of nano's width beside them."""
    from safetensors.numpy import save_file
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    names = [f"digit {k}" for k in range(10)]
    for k, name in enumerate(names):
        rows = np.flatnonzero(labels == k)
        sizes = {"train": 30 - 2 * k, "unlabeled": 20 + k, "test": 15}
        for part, size in sizes.items():
            (folder / "photos" / part / name).mkdir(parents=True, exist_ok=True)
            for i in rows[:size]:
                grey = (pixels[i].reshape(8, 8) * 15).astype(np.uint8)
                file = folder / "photos" / part / name / f"{i:04d}.png"
                Image.fromarray(grey).resize((24, 24), Image.Resampling.NEAREST).convert("RGB").save(file)
            rows = rows[size:]
    vectors = np.random.default_rng(0).standard_normal((10, 128)).astype(np.float32)
    save_file({"prototypes": vectors}, folder / "prototypes.safetensors", {"classes": json.dumps(names)})


def cases(folder: Path, shared: Path | None) -> dict[str, list[str]]:
    base = folder.parent / "inputs"
    if not base.exists():
        fresh = folder.parent / f".inputs-{os.getpid()}"
        write_photos(fresh)
        fresh.rename(base)
    photos = [
        "data.name=folder",
        f"data.root={base / 'photos'}",
        f"prototypes.weights={base / 'prototypes.safetensors'}",
    ]
    found = {name: ["configs/digits_lt/lpt.yaml", *NANO, *settings] for name, settings in DIGITS.items()}
    found |= {name: ["configs/digits_lt/lpt.yaml", *NANO, *photos, *settings] for name, settings in PHOTOS.items()}
    if shared:
        weights = shared / "weights/deit_tiny_patch16_224.fp16.safetensors"
        where = [f"data.root={shared / 'data/cifar100'}", f"backbone.weights={weights}"]
        found["main_run"] = ["configs/cifar100_lt/lpt_deit_tiny.yaml", *where, *REAL]
    return found


def command(checkout: Path, settings: list[str], out: Path, *more: str) -> tuple[list[str], dict[str, str]]:
    env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    return [sys.executable, "-m", "lpt", "train", *settings, "--out", str(out), *more], env


def train(checkout: Path, folder: Path, shared: Path | None, jobs: int, only: list[str]) -> int:
    def one(item: tuple[str, list[str]]) -> int:
        name, settings = item
        out = folder / name
        if (out / "report.json").exists():
            return 0
        shutil.rmtree(out, ignore_errors=True)
        words, env = command(checkout, settings, out)
        done = subprocess.run(words, env=env, cwd=checkout, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: exit code {done.returncode}: {done.stderr[-500:]}", flush=True)
        return int(done.returncode != 0)

    chosen = {name: settings for name, settings in cases(folder, shared).items() if not only or name in only}
    with ThreadPoolExecutor(jobs) as pool:
        return int(any(list(pool.map(one, chosen.items()))))


def kill(checkout: Path, folder: Path) -> int:
    """Ends each of KILLED within its last phase, with a checkpoint after every step."""
    failed = 0
    for name in KILLED:
        out = folder / name
        if out.exists():
            continue
        words, env = command(checkout, [*cases(folder, None)[name], "train.checkpoint_seconds=0"], out)
        process = subprocess.Popen(words, env=env, cwd=checkout, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen: dict[str, int] = {}
        # Phases that the loop has written; the last of a case differs, so any within which a step was saved will do.
        wanted = {"two_stage": "tune", "two_stage_lpt": "phase2", "pre_finetune_two_stage": "reweighted"}.get(name)
        while process.poll() is None:
            for file in out.glob("checkpoints/*.safetensors"):
                if "features" in file.name or (wanted and file.stem != wanted):
                    continue
                if wanted is None and name.startswith("lpt") and file.stem != "phase2":
                    continue
                seen[file.name] = file.stat().st_mtime_ns
                if len({*seen.values()}) and _step(file) >= 2:
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.002)
        over = (out / "report.json").exists()
        print(f"{name}: {'was over before it could be killed' if over else 'killed'}", flush=True)
        failed |= over
    return int(failed)


def _step(file: Path) -> int:
    try:
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        state = json.loads(header["__metadata__"]["lpt_checkpoint"])
        return 0 if state["finished"] else state["step"]
    except (OSError, ValueError, KeyError):
        return 0


def resume(checkout: Path, folder: Path) -> int:
    failed = 0
    for name in KILLED:
        settings = [*cases(folder, None)[name], "train.checkpoint_seconds=0"]
        words, env = command(checkout, settings, folder / name, "--resume")
        done = subprocess.run(words, env=env, cwd=checkout, capture_output=True, text=True)
        if done.returncode or "continues at step" not in done.stdout:
            print(f"{name}: exit code {done.returncode}: {done.stdout[-300:]} {done.stderr[-500:]}", flush=True)
            failed = 1
    return failed


def compare(one: Path, other: Path) -> int:
    names = sorted(path.parent.name for path in other.glob("*/report.json"))
    different = 0
    for name in names:
        wrong = list(differences(one / name, other / name))
        different += bool(wrong)
        print(f"{name}: {'; '.join(wrong) if wrong else 'same bits'}")
    print(f"{len(names) - different} of {len(names)} cases have the same bits")
    return int(different > 0 or not names)


def differences(one: Path, other: Path):
    if not (one / "report.json").exists():
        yield "not there"
        return
    reports = [json.loads((place / "report.json").read_text()) for place in (one, other)]
    for key in sorted({*reports[0], *reports[1]} - set(TIMES)):
        if reports[0].get(key) != reports[1].get(key):
            yield f"report.json differs in {key}: {str(reports[0].get(key))[:80]} / {str(reports[1].get(key))[:80]}"
    prompts = [(place / "prompt.safetensors").read_bytes() for place in (one, other)]
    if prompts[0] != prompts[1]:
        yield f"prompt files differ ({_prompt_difference(one, other)})"
    if _history(one) != _history(other):
        yield "history.jsonl differs"


def _history(run: Path) -> list[dict]:
    """Every line but its times; a method that trains nothing leaves none."""
    file = run / "history.jsonl"
    lines = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines]


def _prompt_difference(one: Path, other: Path) -> str:
    from safetensors import safe_open

    headers, tensors = [], []
    for place in (one, other):
        with safe_open(place / "prompt.safetensors", framework="np") as file:
            headers.append(json.loads(file.metadata()["lpt"]))
            tensors.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    keys = [k for k in sorted({*headers[0], *headers[1]}) if headers[0].get(k) != headers[1].get(k)]
    names = [k for k in {*tensors[0], *tensors[1]} if not np.array_equal(tensors[0].get(k), tensors[1].get(k))]
    return f"header: {', '.join(keys)}; tensors: {', '.join(names)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "kill", "resume", "compare"))
    parser.add_argument("first", type=Path, help="a checkout, or a folder to compare")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--shared", type=Path, help="real data and weights: adds an epoch of each phase of the main run"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    first, folder = args.first.resolve(), args.folder.resolve()
    if args.what == "compare":
        return compare(first, folder)
    folder.mkdir(parents=True, exist_ok=True)
    if args.what == "train":
        return train(first, folder, args.shared, args.jobs, args.only)
    return kill(first, folder) if args.what == "kill" else resume(first, folder)


if __name__ == "__main__":
    sys.exit(main())
