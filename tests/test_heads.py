import pytest
import torch
import torch.nn.functional as F

from lpt.heads import CosineHead, class_means


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
