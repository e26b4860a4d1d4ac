import math

import pytest
import torch
import torch.nn.functional as F

from lpt.errors import LptError
from lpt.losses import (
    GCL,
    LDAM,
    CrossEntropy,
    Focal,
    LogitAdjusted,
    Weighted,
    cloud_noise,
    effective_weights,
    identity,
    ldam_margins,
    log_prior,
    loss_by_name,
    tail_margins,
)

# LPT spec 2.4: counts [100, 10, 1], m 0.1, s 20, C 3, smoothing 0.1 in `code`; columns in this order.
COLUMNS = {
    "code 0, 4": dict(form="code", gamma_pos=0.0, gamma_neg=4.0),
    "code 0.5, 8": dict(form="code", gamma_pos=0.5, gamma_neg=8.0),
    "paper 0, 4": dict(form="paper", gamma_pos=0.0, gamma_neg=4.0),
    "paper 0.5, 8": dict(form="paper", gamma_pos=0.5, gamma_neg=8.0),
    "plain CE": dict(asymmetric=False, label_smoothing=0.0),
}
ORACLES = [
    (0.0, 0.0, (1.8777452893, 1.8597110858, 3.8045061836, 3.6435171648, 2.0115314765)),
    (0.5, 0.25, (2.4569908688, 2.4502914731, 4.6619037520, 4.5457110129, 2.6322569658)),
    (0.5, -1.5, (4.3478443459, 4.3464612537, 4.8449562488, 4.7099936795, 4.6566843025)),
]


@pytest.mark.parametrize("column", list(COLUMNS))
@pytest.mark.parametrize(("cloud", "noise", "row"), ORACLES)
def test_gcl_gives_the_oracle_values(cloud, noise, row, column):
    loss = GCL(torch.tensor([100, 10, 1]), cloud=cloud, **COLUMNS[column])
    logits = torch.tensor([[0.5, 0.1, -0.2], [0.0, 0.3, 0.2]], dtype=torch.float64)
    value = loss(logits, torch.tensor([0, 2]), torch.full((2, 3), noise, dtype=torch.float64))
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(row[list(COLUMNS).index(column)], abs=1e-9)


def slow_gcl(loss, logits, labels, noise):
    """LPT spec 2.1 to 2.3, one number at a time."""
    counts = [max(n, 1) for n in loss.counts.tolist()]
    gap = [math.log(max(counts)) - math.log(n) for n in counts]
    margins = [g / max(gap) if max(gap) else 0.0 for g in gap]
    total = 0.0
    for z, y, e in zip(logits.tolist(), labels.tolist(), noise.tolist(), strict=True):
        clouded = []
        for j in range(len(z)):
            push = loss.cloud * min(abs(e[j]), 1.0) * margins[j]
            clouded.append(loss.scale * (z[j] - push - (loss.margin if j == y else 0.0)))
        p = [math.exp(c) / sum(math.exp(d) for d in clouded) for c in clouded]
        for j in range(len(z)):
            weight = (1 - p[j]) ** loss.gamma_pos if j == y else p[j] ** loss.gamma_neg
            if loss.form == "code":
                target = (1 - loss.label_smoothing) * (j == y) + loss.label_smoothing / len(z)
                total -= target * weight * math.log(p[j])
            else:
                total -= weight * math.log(p[j] if j == y else 1 - p[j])
    return total / len(logits)


def random_case(num_classes=6, batch=9, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.rand(batch, num_classes, generator=generator, dtype=dtype) * 1.2 - 0.6
    labels = torch.randint(num_classes, (batch,), generator=generator)
    noise = torch.randn(batch, num_classes, generator=generator, dtype=dtype) * 0.6
    counts = torch.randint(1, 500, (num_classes,), generator=generator)
    return logits, labels, noise, counts


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("gammas", [(0.0, 4.0), (0.5, 8.0), (1.0, 0.0), (2.0, 1.0)])
@pytest.mark.parametrize("seed", range(3))
def test_gcl_equals_its_formula_by_a_slow_loop(form, gammas, seed):
    logits, labels, noise, counts = random_case(seed=seed)
    loss = GCL(counts, scale=7, margin=0.2, cloud=0.4, gamma_pos=gammas[0], gamma_neg=gammas[1], form=form)
    assert loss(logits, labels, noise).item() == pytest.approx(slow_gcl(loss, logits, labels, noise), rel=1e-9)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_gcl_has_the_gradient_of_its_formula(form):
    logits, labels, noise, counts = random_case(seed=5)
    loss = GCL(counts, scale=5, gamma_pos=0.5, gamma_neg=2.0, form=form)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels, noise), logits.requires_grad_())


def plain(loss):
    """Without noise, margin, asymmetry and smoothing."""
    return GCL(loss.counts, scale=loss.scale, margin=0, cloud=0, asymmetric=False, label_smoothing=0)


COUNTS = torch.tensor([500, 120, 30, 7, 1, 1])
EVEN = torch.full((6,), 40)
IDENTITIES = {
    "LA, tau 0, is CE": (LogitAdjusted(COUNTS, tau=0), CrossEntropy()),
    "LA, tau 0, keeps scale and smoothing": (
        LogitAdjusted(COUNTS, tau=0, scale=3, label_smoothing=0.2),
        CrossEntropy(scale=3, label_smoothing=0.2),
    ),
    "LA, uniform counts, is CE": (LogitAdjusted(EVEN, tau=1.7, scale=20), CrossEntropy(scale=20)),
    "LA, tau 1, is balanced softmax": (
        LogitAdjusted(COUNTS, tau=1, scale=4),
        lambda z, y, e: F.cross_entropy(4 * z + COUNTS.log(), y),
    ),
    "focal, gamma 0, is CE": (Focal(0, scale=7), CrossEntropy(scale=7)),
    "LDAM, margin 0 and beta 0, is CE": (LDAM(COUNTS, margin=0, beta=0, scale=5), CrossEntropy(scale=5)),
    "LDAM, uniform counts, is CE less one margin": (
        LDAM(EVEN, margin=0.5, beta=0.999, scale=5),
        lambda z, y, e: F.cross_entropy(5 * (z - 0.5 * F.one_hot(y, 6)), y),
    ),
    "class-balanced, beta 0, is CE": (loss_by_name("cb", COUNTS, scale=3, beta=0), CrossEntropy(scale=3)),
    "equal weights are none": (Weighted(torch.full((6,), 2.5), scale=3), CrossEntropy(scale=3)),
    "bs is la at tau 1": (loss_by_name("bs", COUNTS, scale=3, tau=9), loss_by_name("la", COUNTS, scale=3)),
    "la, tau 0, is ce": (loss_by_name("la", COUNTS, scale=3, tau=0), loss_by_name("ce", COUNTS, scale=3)),
    "ldam_drw starts as ldam": (loss_by_name("ldam_drw", COUNTS, scale=3), loss_by_name("ldam", COUNTS, scale=3)),
    "ldam_cb without weights is ldam": (
        loss_by_name("ldam_cb", COUNTS, scale=3, beta=0),
        loss_by_name("ldam", COUNTS, scale=3),
    ),
    "CE ignores the noise": (CrossEntropy(scale=2), lambda z, y, e: F.cross_entropy(2 * z, y)),
    "GCL without its parts is CE": (plain(GCL(COUNTS)), CrossEntropy(scale=20)),
    "GCL, gammas 0, no margin or cloud, is smoothed CE": (
        GCL(COUNTS, scale=9, margin=0, cloud=0, gamma_neg=0),
        CrossEntropy(scale=9, label_smoothing=0.1),
    ),
    "GCL, balanced counts, ignores the noise": (GCL(EVEN), lambda z, y, e: GCL(EVEN)(z, y)),
    "GCL, no cloud, ignores the noise": (GCL(COUNTS, cloud=0), lambda z, y, e: GCL(COUNTS)(z, y)),
    "GCL, no margin, is its margin form on shifted logits": (
        GCL(COUNTS, margin=0.3),
        lambda z, y, e: GCL(COUNTS, margin=0)(z - 0.3 * F.one_hot(y, 6), y, e),
    ),
    "GCL, form paper, does not smooth": (
        GCL(COUNTS, form="paper", label_smoothing=0.3),
        GCL(COUNTS, form="paper", label_smoothing=0.0),
    ),
}


@pytest.mark.parametrize("identity", list(IDENTITIES))
def test_limit_identities(identity):
    loss, limit = IDENTITIES[identity]
    logits, labels, noise, _ = random_case(seed=11, dtype=torch.float32)
    values, grads = [], []
    for f in (loss, limit):
        z = logits.clone().requires_grad_()
        value = f(z, labels, noise)
        value.backward()
        values.append(value.detach())
        grads.append(z.grad)
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("gap", [1.0, 1.5, 2.0])
def test_the_gradient_is_finite_where_p_rounds_to_one(form, gap):
    """LPT spec 2.5: with γ+ = 0.5 a naive power has the derivative 0.5 · 0^-0.5 there."""
    logits = torch.full((2, 10), -gap / 2)
    logits[0, 3], logits[1, 4] = gap / 2, gap / 2  # the first is right, the second wrong, both with certainty
    logits.requires_grad_()
    loss = GCL(torch.full((10,), 5), margin=0, gamma_pos=0.5, gamma_neg=8, form=form)(logits, torch.tensor([3, 7]))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    assert logits.grad[0].abs().max() < 1e-3 and logits.grad[1].abs().max() > 1


def test_a_certain_mistake_pushes_as_hard_in_form_paper_in_fp32_as_in_fp64():
    """d log(1 - p_j)/dl_j = -p_j, so the negative branch must not fade where p_j rounds to 1."""
    grads = []
    for dtype in (torch.float32, torch.float64):
        logits = torch.full((1, 10), -0.6, dtype=dtype)
        logits[0, 0] = 0.6
        logits.requires_grad_()
        GCL(torch.full((10,), 5), margin=0, form="paper")(logits, torch.tensor([1])).backward()
        grads.append(logits.grad.double())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_balanced_counts_have_no_tail(form):
    logits, labels, noise, _ = random_case(dtype=torch.float32)
    assert tail_margins(EVEN).tolist() == [0.0] * 6
    noisy, quiet = (GCL(EVEN, form=form)(logits, labels, e) for e in (noise, None))
    assert noisy.isfinite() and torch.equal(noisy, quiet)


@pytest.mark.parametrize("make", [GCL, LogitAdjusted], ids=["gcl", "la"])
def test_an_absent_class_keeps_the_loss_finite(make):
    counts = torch.tensor([500, 0, 30, 7, 0, 1])
    logits, labels, noise, _ = random_case(dtype=torch.float32)
    logits.requires_grad_()
    loss = make(counts)(logits, labels, noise)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    assert torch.equal(tail_margins(counts), tail_margins(counts.clamp(min=1)))
    assert torch.equal(log_prior(counts), log_prior(counts.clamp(min=1)))


def test_tail_margins_run_from_the_largest_class_to_the_rarest():
    margins = tail_margins(torch.tensor([10, 100, 1]))
    torch.testing.assert_close(margins.float(), torch.tensor([0.5, 0.0, 1.0]))


def test_log_prior_is_the_log_of_the_frequencies():
    torch.testing.assert_close(log_prior(torch.tensor([6, 3, 1])).float().exp(), torch.tensor([0.6, 0.3, 0.1]))


def test_one_class_is_refused():
    with pytest.raises(LptError, match="at least 2 classes"):
        GCL(torch.tensor([5]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [GCL, LogitAdjusted, lambda counts: CrossEntropy(scale=20)], ids=["gcl", "la", "ce"])
def test_half_precision_logits_give_an_fp32_loss(make, dtype):
    logits, labels, noise, counts = random_case(dtype=torch.float32)
    half = logits.to(dtype)
    loss = make(counts)(half, labels, noise)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, make(counts)(half.float(), labels, noise))


@pytest.mark.parametrize("wrong", [None, 0.6, 0.9, 0.99])
def test_the_negative_branch_is_inert(wrong):
    """LPT spec 2.2: with γ (0, 4) and C = 100 the loss is t_y ≈ 0.9 times cross-entropy."""
    num_classes = 100
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(8, num_classes, generator=generator, dtype=torch.float64) * 0.2 - 0.1
    labels = torch.arange(8)
    if wrong is not None:  # one wrong class has about this probability
        rest = (20 * logits[:, :-1]).logsumexp(1)
        logits[:, -1] = (rest + math.log(wrong / (1 - wrong))) / 20
    counts = torch.ones(num_classes).cumsum(0)
    grads = []
    for loss in (GCL(counts, margin=0), plain(GCL(counts))):
        z = logits.clone().requires_grad_()
        loss(z, labels).backward()
        grads.append(z.grad)
    expected = (0.9 + 0.1 / num_classes) * grads[1]
    assert ((grads[0] - expected).norm() / expected.norm()).item() <= 1e-4


def test_form_paper_is_not_inert_with_a_confident_mistake():
    """LPT spec 2.3: at p = 0.99 of a wrong class its gradient is about 1.96 times that of `code`."""
    logits = torch.zeros(1, 100, dtype=torch.float64)
    logits[0, -1] = math.log(99 * 0.99 / 0.01) / 20
    norms = []
    for form in ("paper", "code"):
        z = logits.clone().requires_grad_()
        GCL(torch.ones(100), margin=0, form=form)(z, torch.tensor([0])).backward()
        norms.append(z.grad.norm().item())
    assert norms[0] / norms[1] == pytest.approx(1.96, rel=0.1)


def test_cloud_noise_is_a_clamped_narrow_normal():
    e = cloud_noise(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    assert e.abs().max() == 1
    assert e.abs().mean().item() == pytest.approx(0.266, abs=2e-3)  # LPT spec 2.1
    assert cloud_noise(torch.tensor([0.3, -6.0])).tolist() == pytest.approx([0.1, -1.0])


def slow_ldam(counts, margin, beta, scale, logits, labels):
    n = [max(c, 1) for c in counts]
    weights = [1.0 if beta == 0 else (1 - beta) / (1 - beta**c) for c in n]
    total = sum(weights)
    weights = [w * len(n) / total for w in weights]
    top = bottom = 0.0
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        lowered = [scale * (v - (margin * (min(n) / n[j]) ** 0.25 if j == y else 0.0)) for j, v in enumerate(z)]
        top += weights[y] * (math.log(sum(math.exp(v) for v in lowered)) - lowered[y])
        bottom += weights[y]
    return top / bottom


@pytest.mark.parametrize(("name", "margin", "beta"), [("ldam", 0.5, 0), ("cb", 0, 0.999), ("ldam_cb", 0.3, 0.9999)])
def test_ldam_and_class_balance_equal_their_formulas_by_a_slow_loop(name, margin, beta):
    logits, labels, _, _ = random_case(seed=3, dtype=torch.float32)
    loss = loss_by_name(name, COUNTS, scale=8, margin=margin or 0.5, beta=beta)
    wanted = slow_ldam(COUNTS.tolist(), margin, beta, 8, logits, labels)
    assert loss(logits, labels).item() == pytest.approx(wanted, rel=1e-5)


def test_focal_equals_its_formula_by_a_slow_loop():
    logits, labels, _, _ = random_case(seed=4)
    wanted = 0.0
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        p = math.exp(3 * z[y]) / sum(math.exp(3 * v) for v in z)
        wanted -= (1 - p) ** 2 * math.log(p) / len(logits)
    assert Focal(2.0, scale=3)(logits, labels).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("smallest", "largest", "ratio", "margin"),
    [
        (3756, 37569, 3.12, 0.28),
        (7513, 37569, 1.85, 0.33),
        (26298, 37569, 1.05, 0.46),
        (1250, 12500, 6.07, 0.28),
        (5, 500, 97.6, 0.16),
        (5, 1280, 240, 0.13),
    ],
)
def test_weights_and_margins_of_the_specification(smallest, largest, ratio, margin):
    counts = torch.tensor([largest, smallest])
    weights = effective_weights(counts, 0.9999)
    assert weights.sum().item() == pytest.approx(2) and (weights[1] / weights[0]).item() == pytest.approx(
        ratio, rel=5e-3
    )
    margins = ldam_margins(counts, 0.5)
    assert margins[1].item() == 0.5 and margins[0].item() == pytest.approx(margin, abs=6e-3)


@pytest.mark.parametrize("name", ["ce", "focal", "cb", "ldam", "ldam_cb", "bs", "la"])
def test_every_named_loss_is_finite_for_an_absent_class_and_a_certain_answer(name):
    counts = torch.tensor([50, 3, 0])
    logits = torch.tensor([[40.0, -40.0, 0.0], [-40.0, 40.0, 0.0]], requires_grad=True)
    loss = loss_by_name(name, counts, scale=20)(logits, torch.tensor([0, 0]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", ["cb", "ldam_cb", "weighted"])
def test_a_weighted_loss_over_processes_is_that_of_the_global_batch(name):
    generator = torch.Generator().manual_seed(4)
    logits, labels = torch.randn(12, 4, generator=generator), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 3, 0, 1, 0])
    counts, weights = torch.tensor([60, 20, 5, 1]), torch.tensor([0.2, 0.6, 2.0, 5.0])

    def loss(mean):
        return Weighted(weights, mean=mean) if name == "weighted" else loss_by_name(name, counts, scale=3.0, mean=mean)

    shares = [slice(rank, None, 3) for rank in range(3)]  # very unlike: one has most of the rare ones
    sums: list[torch.Tensor] = []
    for rows in shares:
        loss(lambda mine: sums.append(mine) or mine)(logits[rows], labels[rows])
    parts = [loss(lambda mine: sum(sums) / 3)(logits[rows], labels[rows]) for rows in shares]
    torch.testing.assert_close(sum(parts) / 3, loss(identity)(logits, labels))
    assert abs(sum(loss(identity)(logits[rows], labels[rows]) for rows in shares) / 3 - sum(parts) / 3) > 0.01
