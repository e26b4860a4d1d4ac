"""The fair test of LPT's phase 2: arms that `lpt train` has no settings for, told pass by pass, with masked logits too.

    python -m benchmarks.accuracy --suite phase2-fair --seeds 0,1,2 data.root=DIR backbone.weights=FILE
    python -m benchmarks.accuracy.fair --compare

The first runs each row of the suite through `train_arm`, in a process of its own. The second prints the difference of
every arm to (a), phase 1 alone for as many steps: class mean in points, the interval of a paired bootstrap over test
images within their classes, and whether 90 % of it lie within ±0.5 (two one-sided tests at 5 %: no difference that
matters). Arms, by the row's `arm`:

- `plain`: as the config has it;
- `again:E`: phase 1, then E epochs of phase 1 with a fresh schedule and other batches (the config has no phase 2);
- `random`: each image has a fixed pair of group prompts by chance, in training and in tests;
- `superclass`: it has the one of its superclass of CIFAR-100, which leaks that: read it with masked logits alone;
- `frozen_head`: phase 2 trains the pool, and the head stays.

Passes: `head` of a run without a pool; else `query`, phase 1's head on the query, `prompted`, phase 2's on the prompted
feature, and `mean` of both. `masked` has the logits of all classes outside the true superclass taken out.

Shapes: logits [N C], ids [N k].
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from lpt.config import Config, load_config
from lpt.data.task import Images, Task
from lpt.engine.evaluate import views_ahead
from lpt.engine.loop import follow
from lpt.engine.phase import Phase, Recipe, Step
from lpt.engine.stopping import Stop
from lpt.files import to_bytes, write_atomic
from lpt.methods import build_recipe
from lpt.methods.lpt import dual_streams
from lpt.metrics import summarize
from lpt.model.classifier import PromptedClassifier
from lpt.run import bind, measure_run, open_run, write_results
from lpt.setup import Setup

METRICS = ("accuracy", "class_accuracy", "many", "medium", "few")
MARGIN = 0.5
"""Points of class mean below which a difference is none."""

SUPERCLASSES = """
beaver dolphin otter seal whale
aquarium_fish flatfish ray shark trout
orchid poppy rose sunflower tulip
bottle bowl can cup plate
apple mushroom orange pear sweet_pepper
clock keyboard lamp telephone television
bed chair couch table wardrobe
bee beetle butterfly caterpillar cockroach
bear leopard lion tiger wolf
bridge castle house road skyscraper
cloud forest mountain plain sea
camel cattle chimpanzee elephant kangaroo
fox porcupine possum raccoon skunk
crab lobster snail spider worm
baby boy girl man woman
crocodile dinosaur lizard snake turtle
hamster mouse rabbit shrew squirrel
maple_tree oak_tree palm_tree pine_tree willow_tree
bicycle bus motorcycle pickup_truck train
lawn_mower rocket streetcar tank tractor
"""
"""A line for each of CIFAR-100's 20 (Krizhevsky 2009)."""


def superclass_of(classes: tuple[str, ...]) -> Tensor:
    """The superclass of each class [C]. Raises KeyError for a class that CIFAR-100 does not have."""
    lines = SUPERCLASSES.split("\n")[1:-1]
    number = {name: k for k, line in enumerate(lines) for name in line.split()}
    return torch.tensor([number[name.replace(" ", "_")] for name in classes])


@dataclass
class Routing:
    """Group prompts as they are told, in place of a model's matching: `waiting` are the ids of the coming queries."""

    waiting: list[Tensor] = field(default_factory=list)

    def expect(self, ids: Tensor) -> None:
        """The ids [N k] of the next N queries, however they are split into batches."""
        self.waiting = [ids]

    def __call__(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """(similarity of nothing, ids), as `PromptedClassifier.match` has it."""
        here = torch.cat(self.waiting)
        ids, rest = here[: len(query)], here[len(query) :]
        assert len(ids) == len(query), "more queries than images were told"
        self.waiting = [rest]
        return torch.zeros(ids.shape, device=query.device), ids.to(query.device)


def told_ids(arm: str, task: Task, images: Images, *, pool_size: int, topk: int, seed: int) -> Tensor:
    """The ids [N k] of each image of a part of the task."""
    if arm == "superclass":
        return superclass_of(task.classes)[images.labels][:, None]
    part = 0 if images is task.train else 1
    generator = torch.Generator().manual_seed(2 * seed + part)
    return torch.rand(len(images), pool_size, generator=generator).topk(topk, dim=1).indices


def arm_recipe(arm: str, recipe: Recipe, config: Config, task: Task, routing: Routing | None = None) -> Recipe:
    """`recipe` of LPT, changed as the arm has it."""
    phases = recipe.phases or ()

    def changed() -> Iterator[Phase]:
        for phase in phases:
            if phase.name == "phase2" and arm == "frozen_head":
                phase = replace(phase, trains=("pool.",))
            elif phase.name == "phase2" and routing is not None:
                recipe.model.match = routing  # type: ignore[method-assign]
                ids = told_ids(arm, task, task.train, **_sizes(config))  # type: ignore[arg-type]
                phase = replace(phase, step=_routed(phase.step, routing, ids))
            yield phase
            if arm.startswith("again:"):
                streams = dual_streams(
                    task.train.labels,
                    config.train.batch_size,
                    2 * config.train.seed + 1,  # the batches of phase 2
                    config.method["instance_stream"],
                )
                steps = int(arm.partition(":")[2]) * phase.steps_per_epoch
                yield replace(phase, name="phase1-again", streams=streams, steps=steps)

    return Recipe(recipe.model, changed())


def _sizes(config: Config) -> dict[str, int]:
    return {"pool_size": config.method["pool_size"], "topk": config.method["topk"], "seed": config.train.seed}


def _routed(step: Step, routing: Routing, ids: Tensor) -> Step:
    """The same step, in which every image gets the prompts of its row."""

    def routed(model: Any, batches: dict[str, Any], progress: Any) -> Iterator[Any]:
        routing.expect(torch.cat([ids[batch.rows] for batch in batches.values()]))
        yield from step(model, batches, progress)

    return routed


def train_arm(config: Config, out: Path, arm: str, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """As `lpt.run.train` with `resume`, of an arm. Prompt files hold no routing: a routed arm's is of no use."""
    began, stop, setup = time.perf_counter(), Stop(), Setup(config)
    task, routing = setup.task, Routing() if arm in ("random", "superclass") else None
    with open_run(setup, out, resume=True) as folder:
        session = bind(setup, folder, stop, say, lambda phase, step, steps, rates: None)
        recipe = build_recipe(config.method, task, setup.backbone, session)
        model = follow(arm_recipe(arm, recipe, config, task, routing), session)
        if routing:
            del model.match  # the run is measured with its keys, as any other one, and then as the arm has it
        results = measure_run(setup, folder, session, model)
        if routing:
            model.match = routing  # type: ignore[method-assign]
            routing.expect(told_ids(arm, task, task.test, **_sizes(config)))  # type: ignore[arg-type]
        told, predicted = measured_passes(model, task)
        if routing:
            results.report.pop("retrieval")
            results.report.update(told["mean"])
        results.report["passes"] = told
        results.report["losses"] = [line["loss"] for line in session.history.lines if "loss" in line]
        write_results(setup, folder, session, results, began)
    write_atomic(out / "passes.safetensors", to_bytes({**predicted, "labels": task.test.labels}))
    return results.report


def measured_passes(model: PromptedClassifier, task: Task) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(metrics by pass, predicted classes [N] by pass) on the test set, with all classes and masked."""
    superclass, labels = superclass_of(task.classes), task.test.labels
    outside = superclass[None] != superclass[labels][:, None]
    told, predicted = {}, {}
    for name, logits in passes(model, task.test).items():
        for suffix, seen in (("", logits), (" masked", logits.masked_fill(outside, -torch.inf))):
            metrics = summarize((model.head.scale * seen).softmax(1), labels, task.counts, group_rule=task.group_rule)
            told[name + suffix] = {key: metrics[key] for key in METRICS}
            predicted[name + suffix] = seen.argmax(1)
    return told, predicted


@torch.no_grad()
def passes(model: PromptedClassifier, images: Images) -> dict[str, Tensor]:
    """Logits [N C] by pass."""
    model.eval()
    found: dict[str, list[Tensor]] = {}
    with views_ahead(model, images, torch.arange(len(images)).split(128)) as ahead:
        for views in ahead:
            tokens = model.prefix(views)
            if model.pool is None:
                found.setdefault("head", []).append(model.tail(tokens).logits.float().cpu())
                continue
            query = model.query(tokens)
            prompted = model.head(model.tail(tokens, query=query).feature).float().cpu()
            found.setdefault("prompted", []).append(prompted)
            if model.query_head is not None:
                of_query = model.query_head(query).float().cpu()
                found.setdefault("query", []).append(of_query)
                found.setdefault("mean", []).append((prompted + of_query) / 2)
    return {name: torch.cat(parts) for name, parts in found.items()}


# Differences.


def compared(folders: dict[tuple[str, int], Path], base: str = "a") -> list[str]:
    """A line of a Markdown table for every arm and pass against `base`. `folders` are finished runs by (row, seed)."""
    lines = ["| row, pass | minus | seeds | points | 95 % | within ±0.5 |", "|---|---|---:|---:|---:|---|"]
    for row in dict.fromkeys(name for name, _ in folders):
        if row == base:
            continue
        seeds = sorted(seed for name, seed in folders if name == row and (base, seed) in folders)
        pairs = [[load_file(folders[name, seed] / "passes.safetensors") for name in (row, base)] for seed in seeds]
        for one in [name for name in (pairs[0][0] if pairs else ()) if name != "labels"]:
            other = "head masked" if one.endswith(" masked") else "head"
            lines.append(difference_line(f"{row}, {one}", f"{base}, {other}", one, other, pairs))
    return lines


def difference_line(name: str, base: str, one: str, other: str, pairs: list[list[dict[str, np.ndarray]]]) -> str:
    """`pairs` are, seed by seed, the predicted classes by pass of the two runs, with the labels."""
    labels = pairs[0][0]["labels"]
    right = [(mine[one] == labels).astype(float) - (theirs[other] == labels) for mine, theirs in pairs]
    means = 100 * redrawn_means(np.mean(right, axis=0), labels)
    points = 100 * float(np.mean([np.mean(right, axis=0)[labels == k].mean() for k in np.unique(labels)]))
    low, high = np.quantile(means, [0.025, 0.975])
    inside = np.quantile(means, [0.05, 0.95])
    verdict = "yes" if inside[0] > -MARGIN and inside[1] < MARGIN else "no"
    return f"| {name} | {base} | {len(pairs)} | {points:+.2f} | {low:+.2f} to {high:+.2f} | {verdict} |"


def redrawn_means(difference: np.ndarray, labels: np.ndarray, *, draws: int = 10_000, seed: int = 0) -> np.ndarray:
    """Class means of `difference` [N] with its images drawn anew within their classes [draws]."""
    rng = np.random.default_rng(seed)
    classes = [difference[labels == k] for k in np.unique(labels)]
    return np.mean([rng.choice(c, (draws, len(c))).mean(1) for c in classes], axis=0)


def main() -> None:
    from benchmarks.accuracy.__main__ import HERE
    from lpt.sweep import load_suite

    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.fair", description=__doc__.splitlines()[0])
    parser.add_argument("--compare", action="store_true", help="the arms that have been run, against (a)")
    parser.add_argument("--suite", default="phase2-fair")
    parser.add_argument("--arm", default="plain")
    parser.add_argument("--out", type=Path)
    parser.add_argument("words", nargs="*", metavar="CONFIG [KEY=VALUE ...]")
    given = parser.parse_args()
    if given.compare:
        suite = load_suite(
            HERE / "suites" / f"{given.suite}.yaml",
            results=HERE / "results" / f"{given.suite}.json",
            runs=Path("runs/accuracy") / given.suite,
        )
        rows = [row.method for row in suite.rows]
        found = {
            (r["method"], r["seed"]): suite.folder(r["method"], r["seed"], r["config_hash"], r["commit"])
            for r in sorted(suite.results(), key=lambda result: rows.index(result["method"]))
        }
        print("\n".join(compared(found)))
        return
    if not given.words or given.out is None:
        sys.exit("give a config and --out")
    train_arm(load_config(given.words[0], given.words[1:]), given.out, given.arm)


if __name__ == "__main__":
    main()
