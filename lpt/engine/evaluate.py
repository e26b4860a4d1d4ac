"""Predictions of a model on a set of images, collected once; metrics are functions of them.

Shapes: logits [N C], labels [N], ids [N k], features [N D'].
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpt.data.loader import Workers, cut_ahead
from lpt.data.longtail import training_counts, usual_group_rule
from lpt.data.preprocess import Preprocess
from lpt.data.task import Files, Images, Task, check_labels
from lpt.engine.processes import GatheredRows, all_agree, all_gather_rows, rank_and_world
from lpt.errors import DataError, TrainingError, check_kind, quoted
from lpt.files import is_intact, read_tensors, to_bytes, write_atomic
from lpt.memory import naming_lack_of_memory
from lpt.metrics import Scores, row_slices, scores, summarize_scores
from lpt.model.classifier import Output, PromptedClassifier
from lpt.model.heads import FusedHead
from lpt.model.matching import key_usage
from lpt.model.predicting import no_answer
from lpt.progress import Bar
from lpt.results import Report
from lpt.settings import Positive, checked_arguments
from lpt.terms import Ensemble

HEAD_METRICS = (
    "accuracy",
    "class_accuracy",
    "many",
    "medium",
    "few",
    "worst_class",
    "geometric_mean",
    "harmonic_mean",
    "ece",
)
"""What is reported about one of two heads by itself."""


class Predictions(NamedTuple):
    """Logits [N C], labels [N], the group prompts [N k] that each image got where there is a pool, the logits [N C] of
    each head by itself where there are two, and what was asked for beside these [N ...]."""

    logits: Tensor
    labels: Tensor
    ids: Tensor | None
    head_logits: Mapping[str, Tensor] = MappingProxyType({})
    beside: Mapping[str, Tensor] = MappingProxyType({})


Beside = Callable[[PromptedClassifier, Tensor, Tensor, Tensor | None, Output], Mapping[str, Tensor]]
"""`(model, rows [B], prefix tokens, query, output) -> {name: [B ...]}`: what else is wanted of each batch, without a
second pass through the prefix."""


OnRows = Callable[[int, int], None]
"""Takes (batches done, batches)."""


class PrefixCache:
    """What the evaluations of one phase share: tokens at the first block with group prompts, and the query.

    Both depend on the test view and on the frozen shared prompt alone, so that every evaluation after the first
    runs one tail. Holds the first batches that fit into `limit` bytes of main memory; the others are computed
    again every time. Nothing is kept while the shared prompt trains.
    """

    def __init__(self, limit: int = 2 * 2**30):
        self.limit, self.bytes = limit, 0
        self._of: tuple[object, object] = (None, None)
        self._state: tuple[object, ...] = ()
        self._cached: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}

    def prefixes(
        self, model: PromptedClassifier, images: Images | Files, batches: Sequence[Tensor], *, workers: Workers = "auto"
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(tokens [B P+N D], query [B D']) of each batch of rows of `images`; no query where nothing is cached, or the
        model needs none."""
        state, device = model.prefix_state, next(model.parameters()).device
        if state is not None:
            self._forget_others(model, images, (*state, model.backbone.preprocess))
        keys = [(int(rows[0]), len(rows)) for rows in batches]
        wanted = [rows for key, rows in zip(keys, batches, strict=True) if state is None or key not in self._cached]
        with views_ahead(model, images, wanted, workers=workers) as views:
            for key in keys:
                if state is not None and key in self._cached:
                    tokens, query = self._cached[key]
                    tokens = tokens.to(device, non_blocking=True)
                    yield tokens, None if query is None else query.to(device, non_blocking=True)
                    continue
                tokens = model.prefix(next(views))
                query = model.query(tokens) if state is not None and model.needs_query else None
                size = tokens.nbytes + (0 if query is None else query.nbytes)
                if state is not None and self.bytes + size <= self.limit:
                    self._cached[key] = (_in_main_memory(tokens), None if query is None else _in_main_memory(query))
                    self.bytes += size
                yield tokens, query

    def _forget_others(self, model: PromptedClassifier, images: Images | Files, state: tuple[object, ...]) -> None:
        """Empties the cache where it is of another model or other images, or of this model in another state."""
        if state == self._state and self._of[0] is model and self._of[1] is images:
            return
        self._of, self._state, self.bytes = (model, images), state, 0
        self._cached.clear()


@torch.no_grad()
def predict(
    model: PromptedClassifier,
    images: Images | Files,
    *,
    batch_size: int = 128,
    cache: PrefixCache | None = None,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    workers: Workers = "auto",
    tta: Ensemble = "none",
    beside: Beside | None = None,
    show: OnRows = lambda done, number: None,
) -> Predictions:
    """Clean predictions, in order: the test view, no noise, no margin, no dropout. On several processes each
    predicts its share and all get the whole. Leaves the model in eval mode. Raises DataError for an image file that
    cannot be decoded, TrainingError for an image that the model has no finite prediction for.

    `cache` and `folder` save what earlier calls have computed: prefixes of a model with a pool in memory, `features`
    of one without in files, and `say` is given a warning of those that are damaged. With `tta="five_crop"` logits are
    means over five crops of each image; group prompts and single heads are not returned then, and nothing is kept.
    `beside` is asked for more of each batch, and `show` is given the number of batches that are done, and of all.
    """
    model.eval()
    if tta != "none":
        gathered = GatheredRows(len(images), next(model.parameters()).device)
        batches = _local_rows(images).split(batch_size)
        seen = model.backbone.preprocess.seen_as(tta)
        with _naming_memory(batch_size), views_ahead(model, images, batches, workers=workers, preprocess=seen) as ahead:
            for number, views in enumerate(ahead, start=1):
                gathered.add({"logits": mean_logits(model, views)})
                show(number, len(batches))
        return _checked(Predictions(gathered.whole()["logits"], images.labels, None), model, images)
    if folder and model.pool is None and beside is None:
        cached = features(model, images, folder=folder, batch_size=batch_size, say=say, workers=workers).to(
            next(model.parameters()).device
        )
        each_head = {name: logits.cpu() for name, logits in _head_logits(model, cached).items()}
        logits = model.classify(cached).float().cpu()
        return _checked(Predictions(logits, images.labels, None, each_head), model, images)
    gathered = GatheredRows(len(images), next(model.parameters()).device)
    number = -(-len(_local_rows(images)) // batch_size)
    for batch, (rows, tokens, query, output) in enumerate(_outputs(model, images, batch_size, cache, workers), start=1):
        show(batch, number)
        heads = {f"head/{name}": logits for name, logits in _head_logits(model, output.feature).items()}
        others = beside(model, rows, tokens, query, output) if beside else {}
        ids = {} if output.ids is None else {"ids": output.ids}
        gathered.add({"logits": output.logits.float(), **ids, **heads})
        gathered.add({f"beside/{name}": values for name, values in others.items()})
    whole = gathered.whole()
    heads, others = (
        {name.removeprefix(kind): values for name, values in whole.items() if name.startswith(kind)}
        for kind in ("head/", "beside/")
    )
    return _checked(Predictions(whole["logits"], images.labels, whole.get("ids"), heads, others), model, images)


def mean_logits(model: PromptedClassifier, views: Tensor) -> Tensor:
    """Views [B 3 S S], or several of each image [B V 3 S S] → logits [B C] in fp32, the means over the V, of which one
    runs at a time."""
    if views.dim() == 4:
        return model(views).logits.float()
    return torch.stack([model(one).logits.float() for one in views.unbind(1)]).mean(0)


class TopPredictions(NamedTuple):
    """The `k` most probable classes [N k], the best first, their probabilities [N k], and labels [N]."""

    classes: Tensor
    probabilities: Tensor
    labels: Tensor


@torch.no_grad()
def predict_top(
    model: PromptedClassifier,
    images: Images | Files,
    *,
    topk: Positive = 1,
    batch_size: Positive = 128,
    workers: Workers = "auto",
) -> TopPredictions:
    """As `predict`, for those who ask for the best classes alone: of the others nothing is kept."""
    model.eval()
    topk = min(topk, len(model.classes))
    gathered = GatheredRows(len(images), next(model.parameters()).device)
    for _, _, _, output in _outputs(model, images, batch_size, None, workers):
        best = model.probabilities(output.logits.float()).topk(topk)
        gathered.add({"probabilities": best.values, "classes": best.indices})
    whole = gathered.whole()
    if bad := (~torch.isfinite(whole["probabilities"]).all(1)).nonzero().flatten().tolist():
        raise TrainingError(no_answer(images.ids[bad[0]]))
    return TopPredictions(whole["classes"], whole["probabilities"], images.labels)


def _outputs(
    model: PromptedClassifier, images: Images | Files, batch_size: int, cache: PrefixCache | None, workers: Workers
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Output]]:
    """(rows [B], prefix tokens, query where it is known already, what the model says) of this process's rows."""
    cache = cache or PrefixCache(limit=0)
    with _naming_memory(batch_size):
        batches = _local_rows(images).split(batch_size)
        prefixes = cache.prefixes(model, images, batches, workers=workers)
        for rows, (tokens, query) in zip(batches, prefixes, strict=True):
            yield rows, tokens, query, model.tail(tokens, query=query)


def best_class(model: PromptedClassifier, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(the largest probability [N], its class [N]) of logits [N C], whose probabilities are never there at once."""
    tops = [model.probabilities(logits[rows]).max(1) for rows in row_slices(*logits.shape)]
    return torch.cat([top.values for top in tops]).float(), torch.cat([top.indices for top in tops])


def _naming_memory(batch_size: int) -> contextlib.AbstractContextManager[None]:
    return naming_lack_of_memory(lambda: f"in a prediction of {batch_size} images")


def _checked(predictions: Predictions, model: PromptedClassifier, images: Images | Files) -> Predictions:
    """The same. Raises TrainingError with the first image whose probabilities are not finite, and the number of them,
    those of each head by itself too."""
    finite = torch.ones(len(predictions.logits), dtype=torch.bool)
    for rows in row_slices(*predictions.logits.shape):
        finite[rows] &= torch.isfinite(model.probabilities(predictions.logits[rows]).sum(1))
        for logits in predictions.head_logits.values():
            finite[rows] &= torch.isfinite(logits[rows].softmax(1).sum(1))
    if bad := (~finite).nonzero().flatten().tolist():
        others = f" (one of {len(bad)} of {len(images)})" if len(bad) > 1 else ""
        raise TrainingError(no_answer(f"{images.ids[bad[0]]}{others}"))
    return predictions


def _head_logits(model: PromptedClassifier, feature: Tensor) -> dict[str, Tensor]:
    """The logits [B C] of each head by itself; none where there is only one."""
    if not isinstance(model.head, FusedHead):
        return {}
    return dict(zip(("linear", "similarity"), model.head.both(feature), strict=True))


@torch.no_grad()
def features(
    model: PromptedClassifier,
    images: Images | Files,
    *,
    folder: Path | None = None,
    batch_size: int = 128,
    say: Callable[[str], None] = lambda text: None,
    workers: Workers = "auto",
) -> Tensor:
    """The features [N D'] of the test views under the shared prompt, if there is one (LPT's queries).

    What trains a head alone, its class means, and the start of the keys need them once. With a `folder` they are
    kept there, in a file named by a hash over all they depend on: the backbone's weights, precision and device,
    torch's version, the view, the prompt and the images (pixels; of files sizes and times of writing; of those in lists
    nothing but their paths). Others have another name: a stale file is never read. One of another shape, or without the
    checksum that it was written with, is computed and written anew, with a warning to `say`.
    """
    file = folder / f"features-{_identity(model, images)}.safetensors" if folder else None
    cached = _read_features(file, (len(images), model.backbone.feature_width), say) if file else None
    if file and all_agree(cached is not None):
        assert cached is not None
        return cached
    batches = _local_rows(images).split(batch_size)
    with _naming_memory(batch_size), views_ahead(model, images, batches, workers=workers) as ahead:
        parts = [model.query(model.prefix(views)) for views in ahead]
    computed = all_gather_rows(torch.cat(parts), len(images)).cpu()
    if file and rank_and_world()[0] == 0:
        write_atomic(file, to_bytes({"features": computed}, lpt_features={"shape": list(computed.shape)}))
    return computed


def _read_features(file: Path, shape: tuple[int, int], say: Callable[[str], None]) -> Tensor | None:
    """The features in a file, None where there is none, or one that is not what was written."""
    if not file.exists():
        return None
    try:
        metadata, tensors = read_tensors(file)
        cached = tensors["features"]
        problem = feature_problem(cached, *shape)
        if problem is None and is_intact(json.loads(metadata["lpt_features"]), tensors):
            return cached
        problem = problem or "it does not hold what was written (SHA-256)"
    except KeyError as error:
        problem = f"it has no {error}"
    except (ValueError, RecursionError, AttributeError) as error:
        problem = quoted(error)
    say(f"feature cache {file} is not used, {problem}: its features are computed and written anew")
    return None


def feature_problem(value: Tensor, rows: int, width: int) -> str | None:
    """What is wrong with the type or shape of stored features [N D'] of `rows` images, if anything."""
    if value.dtype == torch.float32 and value.shape == (rows, width):
        return None
    return f"it holds {list(value.shape)} of {value.dtype}, not {rows} rows of {width} fp32 numbers"


def evaluate(
    model: PromptedClassifier,
    data: Task | Images | Files,
    counts: Tensor | None = None,
    *,
    group_rule: str | None = None,
    batch_size: Positive = 128,
    cache: PrefixCache | None = None,
    workers: Workers = "auto",
    tta: Ensemble = "none",
    progress: bool | None = None,
) -> Report:
    """The metrics of `report.json` on the test set of a task, or on images of its classes, as fractions by name.

    many, medium and few are groups by the training counts [C] and the group rule of the task; with images give the
    `counts`, and the rule is that of the task which the model was tuned for, unless `group_rule` names another; `tta`
    five_crop answers by the mean of five crops; `progress` is that of `lpt.tune`. Raises DataError for a file that is
    no image, for images without counts, and for a task of other classes.

    >>> import lpt
    >>> task = lpt.load_task("digits-lt")
    >>> model = lpt.model(task, lpt.load_backbone("nano"))  # as it is before training
    >>> report = lpt.evaluate(model, task.test.subset(range(40)), task.counts)
    >>> sorted(report)[:4], len(report["per_class"])
    (['accuracy', 'brier', 'class_accuracy', 'ece'], 10)
    """
    batch_size, tta = checked_arguments(evaluate, batch_size=batch_size, tta=tta)
    check_kind("evaluate: model", model, PromptedClassifier, "give what lpt.tune or lpt.load_prompt returns")
    check_kind("evaluate: data", data, (Task, Images, Files), "give a task, or images and task.counts")
    if isinstance(data, Task):
        images, counts, rule = data.test, data.counts if counts is None else counts, data.group_rule
        if tuple(data.classes) != tuple(model.classes):
            raise DataError(
                f"{quoted(data.name)} and the model have other classes, or another order of them: `lpt evaluate` "
                "matches them by name"
            )
    elif counts is None:
        raise DataError("evaluate needs the training counts of the classes beside images: give a task, or task.counts")
    else:
        images = data
        rule = model.group_rule or usual_group_rule(training_counts(counts, len(model.classes)))
        check_labels("evaluate: images", images, len(model.classes))
    counts = training_counts(counts, len(model.classes))
    with Bar(progress) as bar:
        predictions = predict(
            model,
            images,
            batch_size=batch_size,
            cache=cache,
            workers=workers,
            tta=tta,
            show=lambda done, number: bar.show("evaluate", done, number),
        )
    metrics = measure(model, predictions, counts, group_rule=group_rule or rule)
    return Report(metrics, classes=model.classes, counts=counts.tolist())


def measure(
    model: PromptedClassifier, predictions: Predictions, counts: Tensor, *, group_rule: str = "lt20"
) -> dict[str, Any]:
    """The metrics of predictions that `model` has made."""
    labels, each_head = predictions.labels, predictions.head_logits
    scored = _scores(model.probabilities, predictions.logits, labels)
    metrics = summarize_scores(scored, labels, counts, group_rule=group_rule)
    if each_head:  # the ablation of their fusion
        metrics["heads"] = {}
        for name, logits in each_head.items():
            scored = _scores(lambda rows: rows.softmax(1), logits, labels)
            alone = summarize_scores(scored, labels, counts, group_rule=group_rule)
            metrics["heads"][name] = {key: alone[key] for key in HEAD_METRICS}
    if predictions.ids is not None and model.pool is not None:
        metrics["key_usage"] = key_usage(predictions.ids, len(model.pool.keys))
    return metrics


def _scores(probabilities: Callable[[Tensor], Tensor], logits: Tensor, labels: Tensor) -> Scores:
    """Each image's scores; the probabilities of all [N C] are never there at once."""
    parts = [scores(probabilities(logits[rows]), labels[rows]) for rows in row_slices(*logits.shape)]
    return Scores.joined(parts or [scores(logits, labels)])


def _in_main_memory(tensor: Tensor) -> Tensor:
    """A copy from where a GPU takes it back while it works."""
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor


@contextlib.contextmanager
def views_ahead(
    model: PromptedClassifier,
    images: Images | Files,
    batches: Sequence[Tensor],
    *,
    workers: Workers = "auto",
    preprocess: Preprocess | None = None,
) -> Iterator[Iterator[Tensor]]:
    """Test views [B 3 S S] of each batch of rows of `images`, or what `preprocess` makes of them in place of the
    backbone's own, on the model's device and in its precision. Files are decoded while the device works on the batches
    before. Raises DataError for one that cannot be."""
    device, backbone = next(model.parameters()).device, model.backbone
    preprocess = preprocess or backbone.preprocess
    if isinstance(images, Images):
        pixels = (images.take(rows).to(device, non_blocking=True) for rows in batches)
        yield (preprocess.test(content, dtype=backbone.dtype) for content in pixels)
        return
    files, number, pinned = (images.take(rows) for rows in batches), sum(map(len, batches)), device.type == "cuda"
    with cut_ahead(files, preprocess, images=number, workers=workers, pinned=pinned) as made:
        cut = (one.checked().to(device, non_blocking=True) for one in made)
        yield (preprocess.normalized(views, dtype=backbone.dtype) for views in cut)


def _identity(model: PromptedClassifier, images: Images | Files) -> str:
    """A hash over all that the features of `images` depend on."""
    digest = hashlib.sha256(images.digest.encode())
    backbone = model.backbone
    device = next(model.parameters()).device.type
    facts = (backbone.fingerprint, backbone.dtype, device, torch.__version__, backbone.preprocess.test_view)
    if isinstance(images, Files):
        facts = (*facts, backbone.preprocess.cutter)
    if model.pool is not None and model.pool.query == "early":
        facts = (*facts, model.pool.prefix_blocks)
    digest.update(repr(facts).encode())
    digest.update(f"{backbone.name} {type(model.shared).__name__}".encode())
    for name, value in sorted(model.learned_state().items()):
        if name.startswith(("shared.", "backbone.", "pool.query_map")):
            digest.update(f"{name}{tuple(value.shape)}".encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:20]


def _local_rows(images: Images | Files) -> Tensor:
    """The rows that this process predicts; the first where there are fewer than processes, which nobody gathers."""
    rank, world = rank_and_world()
    rows = torch.arange(len(images))[rank::world]
    return rows if len(rows) else torch.zeros(1, dtype=torch.long)
