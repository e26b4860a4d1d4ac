"""The settings of a method as a table: name, type, default, description: `lpt list methods NAME` and the docs."""

import json
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from lpt.methods import find
from lpt.settings import settings_of

DESCRIPTIONS = {
    "adapter_dim": "width of AdaptFormer; auto: LIFT's rule, at least 4; auto_lift: LIFT's rule",
    "adjust": "how the classifier is adjusted after `first`",
    "agcl_form": "asymmetric GCL as in the authors' code, or as in the paper",
    "augmenter": "augmenter: TrivialAugment, RandAugment, crop, flip and color (weak), RandAugment and cutout (strong)",
    "beta": "β of class-balanced weights by effective numbers (Cui 2019)",
    "bottleneck": "width of AdaptFormer; 0: LIFT's rule, from the number of classes",
    "cached_views": "if above 0: cache features of this many strong views per image; only for tuning=head",
    "cue_from": "class rows of the zero-shot model: the backbone's prototypes, or class means",
    "cue_near": "neighbors per class in the CUE term",
    "cue_neighbors": "weight λ_nb of the CUE term on neighboring classes; 0: none",
    "cue_random": "control: random neighbors in place of the nearest ones",
    "cue_tau": "strength of logit adjustment inside the CUE terms",
    "cue_top": "classes per view that the zero-shot model contributes to the CUE target",
    "cue_zero_shot": "weight λ_zs of the CUE term on the zero-shot model's classes; 0: none",
    "daso_temperature": "temperature of the class frequencies, with fusion=daso",
    "distill": "control: weight of distillation from the zero-shot model; 0: none",
    "distill_scale": "scale of the zero-shot model's cosines in distillation",
    "epochs": "training epochs",
    "epochs_stage1": "epochs of the first stage; 0 skips it",
    "eta": "weight η of the linear logits in the fusion, 1 - η of the similarities",
    "eta0": "initial weight of the instance-balanced stream; it falls to 0 over the epochs",
    "first": "the method that runs before the adjustment: its name and settings",
    "fuse_inference": "fused logits at inference",
    "fuse_pseudo_labels": "pseudo-labels from fused logits",
    "fuse_train": "training losses on fused logits",
    "fusion": "how linear and similarity logits are fused",
    "gamma": "γ of the focal loss",
    "gammas_bal": "(γ+, γ-) of the asymmetric loss on the class-balanced stream",
    "gammas_ins": "(γ+, γ-) of the asymmetric loss on the instance-balanced stream",
    "head": "classifier: linear, or cosine with `scale`",
    "head_dropout": "dropout before the head",
    "head_init": "initial rows of the head",
    "histogram_ema": "momentum of the histogram of predicted classes",
    "include_original": "add the original images to the balanced set",
    "instance_stream": "instance-balanced batches: an epoch's permutation, or drawn anew at each step",
    "k": "number of neighbors",
    "key_init": "initial keys: truncated normal, or k-means of the training queries",
    "la_on": "where logit adjustment applies: labeled images, or both losses",
    "la_tau": "strength τ of logit adjustment; 0: cross-entropy",
    "label_smoothing": "label smoothing",
    "lambda_align": "weight of the semantic alignment loss",
    "lambda_sim": "weight of the same losses on the similarity logits",
    "lambda_u": "weight of the loss on unlabeled images; 0: labeled images only",
    "learn_scales": "train the scales of both heads",
    "loss": "training loss (`lpt list losses`)",
    "lr": "learning rate; SGD's is per 256 images",
    "ulfine.lr": "learning rate, not scaled with the batch",
    "fixmatch.lr": "learning rate, not scaled with the batch",
    "finessl.lr": "learning rate, not scaled with the batch",
    "daso.lr": "learning rate, not scaled with the batch",
    "decoupled.lr": "AdamW's learning rate of the adjustment",
    "lpt.lr": "learning rates of (phase 1, phase 2); SGD's are per 256 images",
    "lpt.epochs": "epochs of (phase 1, phase 2); (E, 0): no group prompts, (0, E): phase 2 alone",
    "lpt.beta": "weight β of the cosines between query and chosen keys in the loss",
    "lpt.tuning": "trainable parameters of phase 1, beside the head",
    "lpt.margin": "margin of the (A)GCL losses",
    "margin": "largest margin of the LDAM losses",
    "micro_batches": "exact gradient accumulation over this many parts of a batch",
    "mu": "largest step α of a prototype from its text towards its class mean",
    "noise": "scale of the Gaussian noise of the GCL losses",
    "optimizer": "optimizer",
    "orth_on": "vectors of the orthogonality term",
    "orth_weight": "weight of the orthogonality term",
    "per_class": "images per class in the balanced set: a number, or the min, median or max of the class counts",
    "pool_init": "initial group prompts: truncated normal, or the shared prompt",
    "pool_size": "number of group prompts",
    "prefix_blocks": "first block that gets group prompts; the blocks below are shared with the query",
    "prompt_init": "initial prompt tokens",
    "prompt_length": "tokens per prompt",
    "proto_center": "subtract the mean over classes before prototypes are mixed",
    "proto_mode": "prototypes move from their texts (anchored), or from the step before (recursive)",
    "proto_space": "space of the prototypes: joint image-text space, or features",
    "pu_ema": "momentum of the class frequencies P",
    "pu_estimator": "class frequencies P: probabilities, those of kept labels, or counts",
    "query": "how an image's query is computed: full pass, linear map of early tokens, or none",
    "query_centering": "subtract the mean query of the training images",
    "query_head": "keep phase 1's head on the query and average both predictions",
    "rank": "rank of LoRA",
    "ratio": "unlabeled images per labeled one in a batch",
    "rho": "exponent of the class weights of MARC",
    "rounds": "number of reports on the pseudo-labels, equally spaced",
    "sampler": "instance- or class-balanced batches",
    "scale": "scale of the cosine head",
    "scale_lin": "scale of the linear (cosine) head",
    "scale_sim": "scale of the similarities with the prototypes",
    "smooth_targets": "control: label smoothing of the targets; 0: none",
    "smoothing": "label smoothing of pseudo-labels for the second head",
    "soft_from": "confidence from which pseudo-labels below `tau` are used as soft targets; null: none",
    "stage1_loss": "loss of the first stage",
    "stage1_lr": "AdamW's learning rate of the first stage",
    "stage1_train": "trainable parameters of the first stage",
    "stage2_loss": "loss of the second stage in place of its own; null: its own",
    "steps": "training steps",
    "steps_per_epoch": "N/B rounded down, or one more",
    "strong_views": "strongly augmented views per unlabeled image",
    "tau": "strength τ of logit adjustment in loss=la",
    "ulfine.tau": "confidence from which a pseudo-label is used",
    "fixmatch.tau": "confidence from which a pseudo-label is used",
    "finessl.tau": "confidence from which a pseudo-label trains the second head",
    "daso.tau": "confidence from which a pseudo-label is used",
    "decoupled.tau": "τ of tau_norm and posthoc_la",
    "temperature": "temperature of the softmax votes",
    "daso.temperature": "temperature of the class frequencies",
    "then": "the method of the second stage: its name and settings",
    "topk": "group prompts per image",
    "tuning": "trainable parameters beside the head",
    "views": "augmented views per image of the balanced set",
    "visual_ema": "momentum of the class means of labeled features",
    "warmup": "learning-rate warm-up",
    "weight_decay": "weight decay",
    "weight_ema": "momentum of the running mean of the trained weights; 0: none",
}
"""By the name of a setting, or `method.setting` where a method gives it another meaning."""


class Row(NamedTuple):
    """A setting: its type and default as a config writes them; the description is empty for methods of one's own."""

    name: str
    type: str
    default: str
    description: str


def settings_table(method: str) -> list[Row]:
    """The settings of a method, by its name or `module:function`, in the order of its signature. Raises LptError for
    an unknown method."""
    rows = []
    for name, field in settings_of(find(method).build).model_fields.items():
        description = DESCRIPTIONS.get(f"{method}.{name}", DESCRIPTIONS.get(name, "")) if ":" not in method else ""
        default = "(required)" if field.is_required() else _written(field.default)
        rows.append(Row(name, type_text(field.annotation, field.metadata), default, description))
    return rows


def _written(value: Any) -> str:
    """As YAML has it on one line.

    >>> _written(("a", 0.07)), _written(1 / 0.07), _written(None), _written("la")
    ('["a", 0.07]', '14.2857', 'null', 'la')
    """
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def type_text(annotation: Any, constraints: Sequence[Any] = ()) -> str:
    """A type as people write it.

    >>> type_text(Annotated[int, Ge(1)] | None), type_text(tuple[float, float]), type_text(Literal["a", "b"])
    ('int ≥ 1 | null', '[float, float]', 'a | b')
    >>> type_text(Annotated[float, Ge(0), Lt(1)]), type_text(Mapping[str, Any])
    ('float ≥ 0, < 1', 'settings')
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [one for mark in arguments[1:] for one in (mark.metadata if isinstance(mark, FieldInfo) else [mark])]
        return type_text(arguments[0], [*inner, *constraints])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " | ".join(type_text(one) for one in arguments)
    if origin is tuple:
        return "[" + ", ".join(type_text(one) for one in arguments) + "]"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "settings"
    name = "null" if annotation is NoneType else getattr(annotation, "__name__", str(annotation))
    return " ".join([name, ", ".join(filter(None, map(_constraint, constraints)))]).rstrip()


def _constraint(mark: Any) -> str:
    for kind, sign, field in ((Ge, "≥", "ge"), (Gt, ">", "gt"), (Le, "≤", "le"), (Lt, "<", "lt")):
        if isinstance(mark, kind):
            return f"{sign} {getattr(mark, field):g}"
    return ""
