import math

import pytest
import torch
import torch.nn.functional as F

from lpt.model.heads import CosineHead, FusedHead, class_means


def head(*, num_classes=5, width=16, seed=0):
    return CosineHead(num_classes=num_classes, width=width, scale=20, generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_logits_are_cosines_by_a_slow_loop():
    classifier, features = head(), normal(7, 16)
    logits = classifier(features)
    assert logits.shape == (7, 5) and logits.abs().max() <= 1
    for b, f in enumerate(features.double()):
        for j, w in enumerate(classifier.weight.detach().double()):
            assert logits[b, j].item() == pytest.approx((f @ w / (f.norm() * w.norm())).item(), abs=1e-6)


def test_lengths_of_features_and_weights_do_not_matter():
    classifier, features = head(), normal(7, 16)
    logits = classifier(features).detach()
    torch.testing.assert_close(classifier(1e3 * features).detach(), logits)
    with torch.no_grad():
        classifier.weight.mul_(torch.linspace(0.1, 9, 5)[:, None])
    torch.testing.assert_close(classifier(features).detach(), logits)


def test_the_scale_is_left_to_the_loss():
    features = normal(2, 16)
    one, other = head(), head()
    other.scale = 1.0
    assert one.scale == 20 and torch.equal(one(features), other(features))


def test_the_start_is_unit_rows_and_a_pure_function_of_the_generator():
    torch.testing.assert_close(head().weight.norm(dim=1), torch.ones(5))
    assert torch.equal(head().weight, head().weight)
    assert not torch.equal(head().weight, head(seed=1).weight)
    # Uniform in (-1, 1) before the rows were normalised: the largest entry is √3 times the root mean square.
    wide = head(num_classes=3, width=5000).weight
    assert wide.min() < 0 < wide.max()
    assert (wide.abs().amax(1) * 5000**0.5).tolist() == pytest.approx([3**0.5] * 3, rel=0.02)


def test_a_zero_feature_gives_zero_logits_and_finite_gradients():
    classifier = head()
    features = torch.zeros(2, 16, requires_grad=True)
    logits = classifier(features)
    logits.sum().backward()
    assert not logits.any()
    assert features.grad.isfinite().all() and classifier.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_give_fp32_logits(dtype):
    classifier, features = head(), normal(3, 16).to(dtype)
    assert classifier(features).dtype == torch.float32
    assert torch.equal(classifier(features), classifier(features.float()))


def test_class_means_are_unit_means_of_unit_features():
    labels = torch.tensor([2, 0, 0, 2, 0, 3])
    features = normal(6, 16) * torch.linspace(0.1, 9, 6)[:, None]
    means = class_means(features, labels, 5)
    assert means.shape == (5, 16)
    torch.testing.assert_close(means.norm(dim=1), torch.ones(5))
    unit = features / features.norm(dim=1, keepdim=True)
    for k in (0, 2, 3):
        total = sum(unit[i] for i in range(6) if labels[i] == k)
        torch.testing.assert_close(means[k], total / total.norm())
    overall = unit.mean(0)
    for k in (1, 4):  # absent
        torch.testing.assert_close(means[k], overall / overall.norm())


def test_class_means_do_not_change_when_a_class_gets_more_of_the_same_images():
    labels, features = torch.tensor([0, 1, 1]), normal(3, 16)
    more = class_means(torch.cat([features, features[:1]]), torch.tensor([0, 1, 1, 0]), 2)
    torch.testing.assert_close(class_means(features, labels, 2), more)


def test_class_means_make_a_head_that_knows_separated_classes():
    centres = F.normalize(normal(4, 32), dim=1)
    labels = torch.arange(4).repeat_interleave(20)
    features = centres[labels] + 0.05 * normal(80, 32, seed=1)
    classifier = head(num_classes=4, width=32)
    with torch.no_grad():
        classifier.weight.copy_(class_means(features, labels, 4))
    assert torch.equal(classifier(features).argmax(1), labels)


# Two heads and their fusion.


def fused(fusion="scale", *, num_classes=6, **more):
    made = FusedHead(num_classes=num_classes, width=16, joint_width=5, fusion=fusion, **more)
    with torch.no_grad():
        made.weight.copy_(normal(num_classes, 16, seed=4))
        made.prototypes.copy_(normal(num_classes, 5, seed=5))
    turn = normal(16, 5, seed=6)
    made.project = lambda feature: feature.float() @ turn
    return made


def test_both_logits_are_scaled_cosines_in_their_spaces():
    head, features = fused(scales=(7.0, 30.0)), normal(3, 16)
    linear, similarity = head.both(features)
    for b, feature in enumerate(features):
        joint = head.project(feature)
        for k in range(6):
            assert linear[b, k].item() == pytest.approx(7 * cosine(feature, head.weight[k]), rel=1e-4)
            assert similarity[b, k].item() == pytest.approx(30 * cosine(joint, head.prototypes[k]), rel=1e-4, abs=1e-4)
    assert torch.equal(head(features), 0.5 * linear + 0.5 * similarity)
    head.fuse = False
    assert torch.equal(head(features), linear)


def cosine(a, b):
    return (a @ b / a.norm() / b.norm()).item()


def test_a_fused_head_starts_knowing_nothing_and_learns_only_what_it_is_told():
    head = fused()
    assert (
        head.seen.tolist() == [0] * 6
        and not head.visual.any()
        and head.frequency.tolist() == [pytest.approx(1 / 6)] * 6
    )
    assert {name for name, _ in head.named_parameters()} == {"weight"}
    learned = fused(learned=("scales", "texts"))
    assert {name for name, _ in learned.named_parameters()} == {"weight", "scales", "texts"}
    assert learned.state_dict().keys() == head.state_dict().keys()


@pytest.mark.parametrize("fusion", ["scale", "zscore", "prob"])
def test_the_ends_of_eta_are_the_single_heads(fusion):
    linear, similarity = 4 * normal(9, 6), 9 * normal(9, 6, seed=1)
    one, none = fused(fusion, eta=1.0), fused(fusion, eta=0.0)
    torch.testing.assert_close(one.fused(linear, similarity).softmax(1), linear.softmax(1))
    other = none.fused(linear, similarity)
    assert torch.equal(other.argmax(1), similarity.argmax(1))
    if fusion == "zscore":  # at the temperature of the linear head
        rescaled = similarity * (linear.std(1) / similarity.std(1))[:, None]
        torch.testing.assert_close(other.softmax(1), rescaled.softmax(1))
    else:
        torch.testing.assert_close(other.softmax(1), similarity.softmax(1))
    assert torch.equal(fused("scale", eta=1.0).fused(linear, similarity), linear)


def test_zscore_does_not_know_the_scale_of_similarities_and_follows_that_of_the_linear_head():
    head, linear, similarity = fused("zscore", eta=0.3), 4 * normal(9, 6), normal(9, 6, seed=1)
    value = head.fused(linear, similarity)
    shift, factor = normal(9, 1, seed=2), normal(9, 1, seed=3).exp()
    torch.testing.assert_close(head.fused(linear, factor * similarity + shift), value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.fused(factor * linear + shift, similarity), factor * value, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(fused("scale", eta=0.3).fused(linear, 3 * similarity), value)


def softmax(row):
    total = sum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.5])
def test_mixed_probabilities_by_a_slow_loop(temperature):
    linear, similarity = 3 * normal(9, 6), 2 * normal(9, 6, seed=1)
    often = [0.4, 0.3, 0.2, 0.05, 0.05, 0.0]
    prob, daso = fused("prob", eta=0.3), fused("daso", temperature=temperature, eta=0.3)
    daso.frequency.copy_(torch.tensor(often))
    found = [head.fused(linear, similarity).exp() for head in (prob, daso)]
    shares = set()
    for b in range(9):
        p, q = softmax(linear[b].tolist()), softmax(similarity[b].tolist())
        preferred = max(range(6), key=p.__getitem__)
        share = (often[preferred] / max(often)) ** (1 / temperature)
        shares.add(preferred)
        for k in range(6):
            assert found[0][b, k].item() == pytest.approx(0.3 * p[k] + 0.7 * q[k], rel=1e-4)
            assert found[1][b, k].item() == pytest.approx((1 - share) * p[k] + share * q[k], rel=1e-3, abs=1e-7)
    assert len(shares) > 2
    torch.testing.assert_close(found[1].sum(1), torch.ones(9))
