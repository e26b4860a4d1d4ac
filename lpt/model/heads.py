"""Classifiers on the pooled feature.

Shapes: feature [B D'], joint [B J] (the space of images and texts), weight [C D'] or [C J], logits [B C].
"""

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpt.terms import Fusion as Fusion


class CosineHead(nn.Module):
    """cos(f, w_j) in [-1, 1], no bias. Training losses bring their own scale; `scale` is for probabilities.

    Start: uniform in (-1, 1), then rows of length one (LPT's code); callers may overwrite `weight` with class means or
    texts. `project` takes the feature to the joint space first, where `width` is J.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        width: int,
        scale: float,
        generator: torch.Generator | None = None,
        project: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.project = project
        weight = torch.empty(num_classes, width).uniform_(-1, 1, generator=generator)
        self.weight = nn.Parameter(F.normalize(weight, dim=1))
        self.scale = scale

    def forward(self, feature: Tensor) -> Tensor:
        return cosines(self.project(feature) if self.project else feature, self.weight)


class LinearHead(nn.Module):
    """f Wᵀ + b on the raw feature; its logits carry their own scale. Start: zero, the same logits for every class."""

    scale = 1.0

    def __init__(self, *, num_classes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, width))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, feature: Tensor) -> Tensor:
        return F.linear(feature.float(), self.weight.float(), self.bias.float())


class NeighbourHead(nn.Module):
    """k nearest neighbours by cosine in a bank of training features, found by FAISS.

    `bank` [N D'] holds unit rows sorted by class, and `counts` [C] says how many belong to each class. The logit of a
    class is the log of its share of exp(cos / `temperature`) among the k nearest (Wu 2018). A class that is not among
    them gets log(1e-6).
    """

    scale = 1.0

    def __init__(self, *, bank: Tensor, counts: Tensor, k: int, temperature: float = 0.07) -> None:
        super().__init__()
        self.k, self.temperature = k, temperature
        self.register_buffer("bank", bank)
        self.bank: Tensor
        self.register_buffer("labels", torch.arange(len(counts)).repeat_interleave(counts), persistent=False)
        self.labels: Tensor
        self.num_classes = len(counts)

    def forward(self, feature: Tensor) -> Tensor:
        cosines, nearest = self._nearest(F.normalize(feature.float(), dim=1, eps=1e-12))
        votes = (cosines / self.temperature).softmax(dim=1)
        shares = torch.zeros(feature.shape[0], self.num_classes, device=feature.device)
        shares = shares.scatter_add(1, self.labels[nearest], votes)
        return shares.clamp(min=1e-6).log()

    def _nearest(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """(cosines, rows of the bank) [B k] of unit features [B D'], the nearest first."""
        if torch.compiler.is_compiling():  # an exported model has tensors alone
            return torch.topk(unit @ self.bank.float().T, self.k, dim=1)
        import faiss

        index = faiss.IndexFlatIP(self.bank.shape[1])
        index.add(self.bank.float().cpu().numpy())
        cosines, ids = index.search(unit.cpu().numpy(), self.k)
        return torch.from_numpy(cosines).to(unit.device), torch.from_numpy(ids).to(unit.device)


class FusedHead(nn.Module):
    """Two logits for each class and their fusion: of a cosine head on the feature, and of the projected feature's
    similarity to class prototypes (Zhang 2025, ULFine: dual-logit fusion; the forms of `fused` are ours).

    `fuse=False` answers with the first alone. State:

    - `weight` [C D'], of the cosine head, and `scales` [2], of both cosines;
    - `prototypes` [C J], that features are compared with, and `texts` [C J], where they started;
    - `visual` [C J], running class means, and `seen` [C], which is 1 once a class has been in a batch;
    - `frequency` [C], a running distribution of pseudo-labels.

    `weight` trains by gradient, and of the rest what `learned` names.
    """

    scale = 1.0

    def __init__(
        self,
        *,
        num_classes: int,
        width: int,
        joint_width: int,
        project: Callable[[Tensor], Tensor] | None = None,
        scales: tuple[float, float] = (25.0, 25.0),
        fusion: Fusion = "scale",
        eta: float = 0.5,
        temperature: float = 1.0,
        fuse: bool = True,
        learned: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.project, self.fusion, self.eta, self.temperature, self.fuse = project, fusion, eta, temperature, fuse
        self.weight = nn.Parameter(torch.zeros(num_classes, width))
        self.scales: Tensor
        self.prototypes: Tensor
        self.texts: Tensor
        self.visual: Tensor
        self.seen: Tensor
        self.frequency: Tensor
        state = {  # in the order of an optimizer's parameters
            "prototypes": torch.zeros(num_classes, joint_width),
            "texts": torch.zeros(num_classes, joint_width),
            "visual": torch.zeros(num_classes, joint_width),
            "scales": torch.tensor(scales),
            "seen": torch.zeros(num_classes),
            "frequency": torch.full((num_classes,), 1 / num_classes),
        }
        for name, value in state.items():
            if name in learned:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, feature: Tensor) -> Tensor:
        linear, similarity = self.both(feature)
        return self.fused(linear, similarity) if self.fuse else linear

    def both(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """(linear, similarity) [B C]: scaled cosines with `weight`, and of the projected feature with `prototypes`."""
        joint = self.joint(feature)
        linear = self.scales[0] * cosines(feature, self.weight)
        return linear, self.scales[1] * cosines(joint, self.prototypes)

    def joint(self, feature: Tensor) -> Tensor:
        """The feature in the space of the prototypes. [B D'] → [B J]."""
        return self.project(feature) if self.project else feature

    def fused(self, linear: Tensor, similarity: Tensor) -> Tensor:
        """η linear + (1 - η) similarity [B C], both brought to one scale by `fusion`:

        - `scale`: as they are;
        - `zscore`: both standardized over an image's classes, then times the deviation of `linear`;
        - `prob`: the log of the mixed probabilities;
        - `daso` (Oh 2022): as `prob`, but the weight of the similarity is h_k'^(1/T) / max h^(1/T), where h is
          `frequency` and k' the class that `linear` prefers: what is predicted often counts less.
        """
        if self.fusion == "scale":
            return self.eta * linear + (1 - self.eta) * similarity
        if self.fusion == "zscore":
            deviation = linear.std(1, keepdim=True)
            return deviation * (self.eta * _standardized(linear) + (1 - self.eta) * _standardized(similarity))
        share: float | Tensor = 1 - self.eta  # of the similarity
        if self.fusion == "daso":
            frequency = self.frequency.clamp(min=1e-12)
            class_shares = (frequency / frequency.max()) ** (1 / self.temperature)
            share = class_shares[linear.argmax(1)][:, None]
        return ((1 - share) * linear.softmax(1) + share * similarity.softmax(1)).clamp(min=1e-12).log()


def cosines(feature: Tensor, rows: Tensor) -> Tensor:
    """Cosine of every feature with every row, in fp32. [B D], [C D] → [B C]."""
    return F.normalize(feature.float(), dim=1, eps=1e-12) @ F.normalize(rows.float(), dim=1, eps=1e-12).T


def _standardized(logits: Tensor) -> Tensor:
    return (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True).clamp(min=1e-12)


Head = CosineHead | LinearHead | NeighbourHead | FusedHead


class Calibration(nn.Module):
    """z' = scale · z + offset · unit, with a number for each class [C]; the identity at the start.

    `unit` is 1, except while MARC trains: its offsets are in units of ‖w_j‖. `fold` makes it 1 again.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_classes))
        self.offset = nn.Parameter(torch.zeros(num_classes))
        self.register_buffer("unit", torch.ones(num_classes), persistent=False)
        self.unit: Tensor

    def forward(self, logits: Tensor) -> Tensor:
        return self.scale * logits + self.offset * self.unit

    @torch.no_grad()
    def fold(self) -> None:
        """Takes `unit` into `offset`, which alone is stored; the same answers."""
        self.offset.mul_(self.unit)
        self.unit.fill_(1)


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Unit means of the unit features of each class; a class without images gets the mean of all.

    [N D], [N] → [C D]. Balanced by construction: a row has length one, however many images its class has.
    """
    unit = F.normalize(features.float(), dim=1, eps=1e-12)
    means = torch.zeros(num_classes, unit.shape[1], dtype=unit.dtype, device=unit.device)
    means.index_add_(0, labels, unit)  # sums, which differ from means in length only
    absent = torch.bincount(labels, minlength=num_classes) == 0
    means[absent] = unit.mean(0)
    return F.normalize(means, dim=1, eps=1e-12)
