"""Augmented images: functions of the image and its own seed, and what a strong view is."""

import pytest
import torch
from torchvision.transforms import v2

from benchmarks.data.photos import photo
from lpt.data.augment import augmented
from lpt.data.preprocess import File, Preprocess
from tests.support.toy import toy_images

PIXELS = toy_images(torch.arange(3).repeat(4)).pixels
SEEDS = list(range(12))


@pytest.mark.parametrize("augmenter", ["trivial", "rand", "weak", "strong"])
def test_each_image_is_changed_as_its_own_seed_says(augmenter):
    found = augmented(PIXELS, SEEDS, augmenter)
    assert found.shape == PIXELS.shape and found.dtype == torch.uint8
    order = torch.tensor([7, 2, 11, 0])
    assert torch.equal(augmented(PIXELS[order], order.tolist(), augmenter), found[order])
    others = augmented(PIXELS, [seed + 100 for seed in SEEDS], augmenter)
    assert sum(not torch.equal(a, b) for a, b in zip(found, others, strict=True)) >= 8
    assert sum(not torch.equal(a, b) for a, b in zip(found, PIXELS, strict=True)) >= 8


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    augmented(PIXELS, SEEDS, "strong")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("size", [(16, 16), (20, 32)])
def test_a_strong_view_is_randaugment_with_a_grey_square_of_up_to_a_quarter_of_the_area(size):
    pixels = torch.full((40, 3, *size), 1, dtype=torch.uint8)
    seeds = list(range(40))
    strong, plain = (augmented(pixels, seeds, name) for name in ("strong", "rand"))
    areas = []
    for with_square, without in zip(strong, plain, strict=True):
        different = (with_square != without).any(0)
        assert (with_square[:, different] == 127).all(), "RandAugment itself has another draw"
        rows, columns = different.any(1).nonzero().flatten(), different.any(0).nonzero().flatten()
        height, width = (int(line.max() - line.min()) + 1 for line in (rows, columns))
        assert height == width and different.sum() == height * width
        areas.append(height * width / (size[0] * size[1]))
    assert min(areas) < 0.06 < 0.2 < max(areas) <= 0.28  # a side is rounded to whole pixels


@pytest.mark.parametrize("name", ["rand", "trivial"])
def test_views_stay_near_those_of_torchvisions_operations_on_tensors(name):
    """In 1/255, as docs/data.md says: a nearest pixel can be another one."""
    pixels = torch.stack([Preprocess(size=64).cut_one(File(str(i), photo(i)), None) for i in range(48)])
    found = augmented(pixels, range(48), name)
    operation = v2.RandAugment(num_ops=2, magnitude=10) if name == "rand" else v2.TrivialAugmentWide()
    expected = []
    with torch.random.fork_rng(devices=[]):
        for seed, image in enumerate(pixels):
            torch.manual_seed(seed)
            expected.append(operation(image))
    difference = (found.float() - torch.stack(expected).float()).abs()
    assert difference.mean() <= 0.1 and difference.max() <= 255
    assert (difference.flatten(1).max(1).values <= 1).float().mean() >= 0.7
