"""A folder of photographs with natural counts, made of CIFAR-100 where no natural long tail is at hand.

What it is: CIFAR-100's training images, with five superclasses kept whole as people keep what they do not tell apart
(fish, flowers, people, trees, vehicles: 25 of the fine classes) and the other 75 fine classes as they are: 80 classes,
some of them varied inside. How many images a class has is drawn from a log-normal law, as the abundance of species is
(Preston 1948), with median 30 and σ 1.2, from 3 to 500; ranks have nothing to do with labels. The test part holds 40
official test images of each class. The images are CIFAR's, 32 pixels wide. It is no set of photographs from the wild.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from lpt.data.cifar import open_cifar
from lpt.data.task import Images

MERGED = {
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "people": "baby boy girl man woman",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles": "bicycle bus motorcycle pickup_truck train",
}
MEDIAN, SIGMA, FEWEST, MOST = 30, 1.2, 3, 500
TEST_IMAGES = 40
"""Of each class."""


def natural_counts(number: int, *, seed: int) -> list[int]:
    """Images of each of `number` classes."""
    drawn = np.random.default_rng((seed, 23)).lognormal(np.log(MEDIAN), SIGMA, number)
    return np.clip(drawn.round(), FEWEST, MOST).astype(int).tolist()


def class_of(fine: str) -> str:
    """The class of this folder that a fine class of CIFAR-100 belongs to."""
    return next((name for name, inside in MERGED.items() if fine in inside.split()), fine)


def make(out: Path, cifar_root: str, *, seed: int = 0) -> None:
    """Writes `out/train/CLASS/*.png` and `out/test/CLASS/*.png` from CIFAR-100 in `cifar_root`."""
    cifar = open_cifar("natural", 100, cifar_root, False)
    classes = sorted({class_of(name) for name in cifar.classes})
    of_fine = np.array([classes.index(class_of(name)) for name in cifar.classes])
    every = {"train": of_fine[cifar.train_labels], "test": of_fine[cifar.test.labels.numpy()]}
    counts = {"train": natural_counts(len(classes), seed=seed), "test": [TEST_IMAGES] * len(classes)}
    for part, of_row in every.items():
        for k, (name, count) in enumerate(zip(classes, counts[part], strict=True)):
            rows = np.random.default_rng((seed, 29, k)).permutation(np.flatnonzero(of_row == k))[:count].tolist()
            write(out / part / name, cifar.train_images(rows) if part == "train" else cifar.test.subset(rows))


def write(folder: Path, images: Images) -> None:
    """Each image as a PNG under its id."""
    folder.mkdir(parents=True, exist_ok=True)
    for pixels, name in zip(images.pixels, images.ids, strict=True):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{Path(name).name}.png")
