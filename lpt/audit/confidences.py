"""How much the rest of the training images agree with each label: probabilities of images that were held out.

Shapes: features [N D], labels [N], logits and probabilities [N C]; K folds.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lpt.data.task import rows_by_class

FOLDS = 10
"""A class of five images keeps four of them in each, or five."""
REPEATS = 3
"""Other folds, whose probabilities are averaged: with few images it matters which are held out together."""
SHRINKAGE = 0.8
"""Share of the identity in the covariance (Friedman 1989)."""
TEMPERATURES = tuple(2 ** (exponent / 2) for exponent in range(-10, 7))
EPOCHS, FEWEST_STEPS, BATCH, RATE, DECAY = 15, 150, 128, 3e-3, 1.0
"""Of the linear probe: AdamW whose rate falls to 0."""


def held_out_probabilities(features: Tensor, labels: Tensor, num_classes: int, *, seed: int = 0) -> Tensor:
    """p(class | image) [N C], each by models that have not seen the image: the geometric mean of a linear probe, which
    knows frequent classes best, and of linear discriminants, which know rare ones best, normalized.

    A class whose images are all held out together, one image for example, has 0 there.
    """
    first, second = (ask(features, labels, num_classes, seed=seed) for ask in (probe, discriminants))
    return agreed(first, second)


def agreed(first: Tensor, second: Tensor) -> Tensor:
    """The geometric mean of two probabilities [N C], normalized."""
    return F.normalize((first * second).sqrt(), p=1, dim=1)


def folds(labels: Tensor, number: int, *, seed: int) -> Tensor:
    """The fold of each image [N]: a class's images are dealt out one by one, from a fold on that is drawn by `seed`."""
    rng = np.random.default_rng((seed, 31))
    fold_of = np.zeros(len(labels), dtype=np.int64)
    for rows in rows_by_class(np.arange(len(labels)), labels.numpy()).values():
        fold_of[rng.permutation(rows)] = (np.arange(len(rows)) + rng.integers(number)) % number
    return torch.from_numpy(fold_of)


def probe(features: Tensor, labels: Tensor, num_classes: int, *, seed: int, number: int = 5) -> Tensor:
    """Of a linear probe with cross-entropy on standardized features, in `number` folds that are trained side by side:
    what is usually meant by cross-validated confidences."""
    x = (features - features.mean(0)) / features.std(0).clamp(min=1e-6)
    fold_of, generator = folds(labels, number, seed=seed), torch.Generator().manual_seed(seed)
    training = [(fold_of != fold).nonzero().flatten() for fold in range(number)]
    rows = min(map(len, training))
    batch = max(1, min(BATCH, rows))
    epochs = max(EPOCHS, -(-FEWEST_STEPS // max(1, rows // batch)))
    weight = torch.zeros(number, x.shape[1], num_classes, requires_grad=True)
    bias = torch.zeros(number, 1, num_classes, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=RATE, weight_decay=DECAY)
    steps = epochs * (rows // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        shuffled = [one[torch.randperm(len(one), generator=generator)[:rows]] for one in training]
        for drawn in torch.stack(shuffled)[:, : rows // batch * batch].split(batch, dim=1):
            optimizer.zero_grad()
            logits = torch.baddbmm(bias, x[drawn], weight)
            (number * F.cross_entropy(logits.flatten(0, 1), labels[drawn].flatten())).backward()
            optimizer.step()
            schedule.step()
    answers = torch.empty(len(labels), num_classes)
    for fold in range(number):
        here = fold_of == fold
        answers[here] = (x[here] @ weight[fold] + bias[fold]).detach().softmax(1)
    return answers


def discriminants(features: Tensor, labels: Tensor, num_classes: int, *, seed: int) -> Tensor:
    """Of linear discriminants (Fisher 1936), p_k ∝ exp(t (w_kᵀx - w_kᵀμ_k/2)) with w_k = Σ⁻¹μ_k: the means μ_k of the
    other folds' centered unit features and their common covariance Σ, shrunk to the identity; means of REPEATS.

    Every class counts alike, whatever its number of images: with their frequencies as a prior, each image of a rare
    class looks mislabeled. All that is common to classes, Σ, comes from all images; of a class only its mean is needed,
    which five images give. The temperature 1/t is the one by which the given labels are likeliest (Guo 2017).
    """
    unit = F.normalize((features - features.mean(0)).float(), dim=1)
    every = [_discriminant_logits(unit, labels, num_classes, seed=seed + repeat) for repeat in range(REPEATS)]
    t = min(TEMPERATURES, key=lambda t: F.cross_entropy(every[0].clamp(min=-1e4) * t, labels).item())
    return torch.stack([(t * logits).softmax(1) for logits in every]).mean(0)


def _discriminant_logits(unit: Tensor, labels: Tensor, num_classes: int, *, seed: int) -> Tensor:
    fold_of, logits = folds(labels, FOLDS, seed=seed), torch.empty(len(labels), num_classes)
    for fold in range(FOLDS):
        here = fold_of == fold
        train, its_labels = unit[~here], labels[~here]
        counts = torch.bincount(its_labels, minlength=num_classes)
        means = torch.zeros(num_classes, unit.shape[1]).index_add_(0, its_labels, train) / counts.clamp(min=1)[:, None]
        within = (train - means[its_labels]).double()
        covariance = within.T @ within / max(1, len(train) - int((counts > 0).sum()))
        spread = covariance.diagonal().mean().clamp(min=1e-12) * torch.eye(len(covariance), dtype=torch.double)
        shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * spread
        weights = torch.linalg.solve(shrunk, means.double().T).T.float()
        answers = unit[here] @ weights.T - (weights * means).sum(1) / 2
        logits[here] = answers.masked_fill(counts == 0, -torch.inf)
    return logits
