"""The plan of a search: what each candidate costs, by a few timed images and steps, and how long it may train.

It is made once, at the start, and written down: from then on no clock decides anything, so that a search that is killed
and resumed, or repeated with the same plan, comes to the same choice.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lpt.data.preprocess import decoded
from lpt.data.task import Files, Images
from lpt.engine.evaluate import features
from lpt.errors import LptError
from lpt.memory import patch_of
from lpt.methods import build_recipe
from lpt.plan import MemoryProbe, plan_phase
from lpt.search.bench import Bench, check_fits
from lpt.search.candidates import REFERENCE, Candidate

SAFETY = 0.85
"""Of the time that is left, what may be planned with: machines have other things to do at times."""
SHORT = 0.25
"""The share of its schedule that every candidate gets before the worse ones are dropped."""
KEPT = 3
"""One of so many is kept then (Hyperband's η; Li 2018)."""
LARGER = 1.5
"""Images of the larger probe, in backbone's own sizes, where the images have at least `WORTH` of these pixels."""
WORTH = 1.25
SIZES = (1.0, 0.75, 0.5)
"""Image sizes, as shares of the backbone's own, from which the largest is taken that the budget bears."""
FEWEST_STEPS, MOST_EPOCHS = 600, (10, 60)
"""A schedule has at most 10 epochs, or 60 where the steps would be fewer than that."""
PASSES = 4.0
"""Forwards that a step costs for each image, about: what cannot be borne by that is not timed."""
TIMED_IMAGES = 24
TIMED_STEPS = 2
TIMING_SHARE = 0.01
"""Of the budget, that the timed steps of one candidate may take."""
LEAST_STEPS = 100
"""Steps of a schedule below which a candidate is not tried."""
LAST_TO_GO = ("lora", "vpt", "lpt")
"""Which candidates are left out where time is short: the last first. LoRA is ahead at equal images seen
(benchmarks/accuracy)."""


@dataclass(frozen=True)
class SearchPlan:
    """What is tried and for how long. `identity` is of everything that moves a number, `left_out` says why each other
    candidate is not tried, `seconds` all of it takes, with the training of the dearest on all images."""

    identity: str
    candidates: tuple[Candidate, ...]
    left_out: tuple[tuple[str, str], ...]
    folds: int
    seconds: float
    ms: dict[str, float]
    """Milliseconds of an image through the bare backbone, by image size."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(stored: dict[str, Any]) -> "SearchPlan":
        """Raises KeyError or TypeError for what is no plan."""
        found = tuple(Candidate(**one) for one in stored["candidates"])
        left_out = tuple((str(label), str(why)) for label, why in stored["left_out"])
        return SearchPlan(**{**stored, "candidates": found, "left_out": left_out})


class Planner:
    """Candidates, a budget in seconds, and what was spent of it before: loading the data, which the final run does
    again."""

    def __init__(self, bench: Bench, found: Sequence[Candidate], budget: float, *, spent: float) -> None:
        self.bench, self.found, self.budget = bench, list(found), budget
        self.began, self.spent = time.perf_counter(), spent
        self.forward: dict[int, float] = {}
        self.left_out: list[tuple[str, str]] = []
        self.images = len(bench.task.train)
        self.native = bench.backbone().preprocess.size
        self.is_given = bench.sections["backbone"].get("image_size") is not None

    def plan(self, identity: str) -> SearchPlan:
        on_features, feature_folds, planned = self._on_features()
        tuned, folds, seconds = self._tuned([one for one in self.found if not one.on_features], planned)
        folds = folds if tuned else feature_folds  # all are asked about the same images
        return SearchPlan(
            identity=identity,
            candidates=(*on_features, *tuned),
            left_out=tuple(self.left_out),
            folds=folds,
            seconds=round(planned + seconds + 2 * self.spent, 1),
            ms={str(size): round(1000 * seconds, 3) for size, seconds in self.forward.items()},
        )

    def left(self, planned: float) -> float:
        """Seconds that can still be planned with."""
        return SAFETY * (self.budget - 2 * self.spent - (time.perf_counter() - self.began)) - planned

    # Candidates on cached features.

    def _on_features(self) -> tuple[list[Candidate], int, float]:
        """(those that are tried, with size and seconds; their folds; the seconds that all of them take)."""
        wanted = [one for one in self.found if one.on_features]
        if not wanted:
            return [], 1, 0.0
        size = self._size_for_features()
        planned, heads, found = self.images * self.forward_seconds(size), 0.0, []
        for one in wanted:
            side = self._rounded(LARGER * self.native) if one.larger else size
            if one.larger and (why := self._no_larger(side, planned)):
                self.left_out.append((one.label, why))
                continue
            passes = self.images * self.forward_seconds(side)
            sized = replace(one, image_size=side)
            head = self._steps_seconds(sized) * self._steps_per_epoch(one) * one.epochs
            heads += head
            planned += passes if one.larger else 0
            found.append(replace(sized, seconds=round(passes + head, 1)))
        most = max(1, len(self.bench.folds.held_out))
        folds = min(most, max(1, int((self.left(planned) - heads) / 2 / heads))) if heads else most
        return found, folds, planned + (folds + 1) * heads

    def _size_for_features(self) -> int:
        """The largest that the budget bears; where it bears none, one that would fit but for loading the data."""
        sizes = self._sizes()
        for limit in (self.left(0), self.budget / 2):
            for size in sizes:
                if self.images * self.forward_seconds(size) <= limit:
                    if size < self.native:
                        self.bench.log(f"note: images are made {size} px wide, {self._native_needs()}")
                    return size
        needed = self.images * self.forward_seconds(sizes[-1])
        self.bench.log(
            f"warning: the budget of {self.budget:.0f} s cannot be kept: {self.images} images at {sizes[-1]} px take "
            f"about {needed:.0f} s to look at once, {self._native_needs()}"
        )
        return sizes[-1]

    def _native_needs(self) -> str:
        """What a budget would have to be for the backbone's own image size."""
        needed = self.images * self.forward_seconds(self.native) / SAFETY + 2 * self.spent
        return f"the backbone's own {self.native} px need a budget of about {max(1, -(-needed // 60)):.0f}m"

    def _no_larger(self, size: int, planned: float) -> str:
        """Why images of `size` are not tried, if they are not."""
        if self.is_given or shorter_side(self.bench.task.train) < WORTH * self.native:
            return f"the images are not larger than the backbone's {self.native} px"
        needed = self.images * self.forward_seconds(size)
        if needed > self.left(planned) / 3:
            return f"{self.images} images at {size} px would take {needed:.0f} s"
        return ""

    # Candidates whose steps need the backbone.

    def _tuned(self, wanted: list[Candidate], planned: float) -> tuple[list[Candidate], int, float]:
        """(those that are tried, with size, epochs and seconds; their folds; the seconds that all of them take)."""
        if not wanted:
            return [], 1, 0.0
        left_out = list(self.left_out)
        for size in self._sizes():
            least = (2 + SHORT * len(wanted)) * PASSES * self.images * self.forward_seconds(size)
            if least > self.left(planned) and len(self.found) > 1:
                continue
            self.left_out = list(left_out)
            timed = self._timed([replace(one, image_size=size) for one in wanted])
            scheduled = self._scheduled(timed, planned)
            if scheduled[0]:
                return scheduled
        if planned:
            self.left_out = [*left_out, *((one.label, self._no_time()) for one in wanted)]
            return [], 1, 0.0
        self.bench.log(f"warning: the budget of {self.budget:.0f} s cannot be kept: an epoch takes longer")
        return [replace(wanted[0], image_size=self._sizes()[-1], epochs=1)], 1, 0.0

    def _no_time(self) -> str:
        return f"{self.budget:.0f} s are too short for it"

    def _timed(self, wanted: Sequence[Candidate]) -> list[tuple[Candidate, float]]:
        """(candidate, seconds of a step); those that need too much memory are left out."""
        timed: list[tuple[Candidate, float]] = []
        for one in (replace(one, epochs=1) for one in wanted):
            try:
                check_fits(self.bench, one)
            except LptError as error:
                self.left_out.append((one.label, str(error)))
                continue
            timed.append((one, self._steps_seconds(one)))
        return timed

    def _scheduled(self, timed: list[tuple[Candidate, float]], planned: float) -> tuple[list[Candidate], int, float]:
        """The largest set of candidates, then the most folds, for which there is time."""
        if not timed:
            return [], 1, 0.0
        passes = self.images * self.forward_seconds(timed[0][0].image_size)  # of the features that heads start from
        ordered = sorted(timed, key=lambda pair: LAST_TO_GO.index(pair[0].name) if pair[0].name in LAST_TO_GO else 0)
        names = [one.name for one, _ in timed]
        while ordered:
            for folds in range(len(self.bench.folds.held_out) or 1, 0, -1):
                found, seconds = self._schedule(ordered, self.left(planned) - passes, folds, passes)
                if all(one.epochs >= self._least_epochs(one, folds) for one in found):
                    found.sort(key=lambda one: names.index(one.name))
                    return found, folds, seconds + passes
            self.left_out.append((ordered.pop()[0].label, self._no_time()))
        return [], 1, 0.0

    def _schedule(
        self, timed: Sequence[tuple[Candidate, float]], left: float, folds: int, passes: float
    ) -> tuple[list[Candidate], float]:
        """(the candidates with epochs and seconds, the seconds that their trials and the longest training take): each
        has about the same time, which is what the budget leaves for a whole schedule. `passes` are the seconds of one
        pass of all images through the bare backbone."""
        kept, number = kept_of(len(timed)), len(timed)
        trials = (number if number > kept else 0) + kept if len(self.found) > 1 else 0
        held_out = len(self.bench.labels) / (len(self.bench.folds.held_out) or 1)
        asking = 1.3 * folds * trials * held_out / self.images * passes
        schedules = 1 + (folds * (kept + (SHORT * number if number > kept else 0)) if trials else 0)
        # LPT makes such a pass of its own before phase 1.
        own = {one.name: passes if one.method["name"] == "lpt" else 0.0 for one, _ in timed}
        whole = (left - asking - max(own.values())) / schedules
        found: list[Candidate] = []
        longest = 0.0
        for one, step in timed:
            epoch = step * self._steps_per_epoch(one)
            epochs = max(0, min(int(whole / epoch), self._most_epochs(one)))
            longest = max(longest, epochs * epoch)
            found.append(replace(one, epochs=epochs, seconds=round(passes + own[one.name] + epochs * epoch, 1)))
        return found, longest * schedules + max(own.values()) + asking

    def _least_epochs(self, one: Candidate, folds: int) -> float:
        """Below which a candidate is not tried, or not in so many folds: a whole schedule comes before a second one."""
        least = max(1, -(-LEAST_STEPS // self._steps_per_epoch(one)))
        return least if folds == 1 else max(least, self._most_epochs(one) / 2)

    def _most_epochs(self, one: Candidate) -> int:
        steps = self._steps_per_epoch(one)
        return min(max(MOST_EPOCHS[0], -(-FEWEST_STEPS // steps)), MOST_EPOCHS[1])

    # Timing.

    def _sizes(self) -> list[int]:
        """Image sides from the backbone's own down; only that where it is given, or nothing is known of patches."""
        if self.is_given or not patch_of(self.bench.backbone()):
            return [self.native]
        return sorted({self._rounded(share * self.native) for share in SIZES}, reverse=True)

    def _rounded(self, side: float) -> int:
        patch = patch_of(self.bench.backbone()) or 1
        return max(1, int(side / patch)) * patch

    def _steps_per_epoch(self, one: Candidate) -> int:
        return max(1, self.images // one.batch_size)

    def forward_seconds(self, size: int) -> float:
        """Of an image through the bare backbone, with all that it takes to make its view."""
        if size not in self.forward:
            model = self.bench.bare(self.bench.backbone(size))
            few = self.bench.task.train.subset(range(min(TIMED_IMAGES, self.images)))
            features(model, few.subset(range(min(4, len(few)))))  # the first time, caches and kernels are made
            began = time.perf_counter()
            features(model, few)
            self.forward[size] = (time.perf_counter() - began) / len(few)
        return self.forward[size]

    def _steps_seconds(self, one: Candidate) -> float:
        """Of a step of its first phase; 0 where nothing trains."""
        width = self.bench.backbone(one.image_size).feature_width
        known = torch.randn(self.images, width, generator=torch.Generator().manual_seed(0))
        session = self.bench.session(one, self.bench.task, known)
        recipe = build_recipe(one.settings, self.bench.task, self.bench.backbone(one.image_size), session)
        for phase in recipe.phases or ():
            probe = MemoryProbe(self.bench.device)
            # Steps on features cost nearly the same for any part of a batch.
            most = None if one.on_features else TIMING_SHARE * self.budget
            planned = plan_phase(phase, recipe.model, session, probe, TIMED_STEPS, most_seconds=most)
            return (planned.seconds or 0.0) / phase.steps
        return 0.0


def kept_of(number: int) -> int:
    """How many of `number` candidates have a whole schedule, after all had a short one."""
    return -(-number // KEPT)


def shorter_side(images: Images | Files) -> float:
    """The median of the shorter sides of a few images, in pixels."""
    if isinstance(images, Images):
        return float(min(images.pixels.shape[2:]))
    rows = torch.linspace(0, len(images) - 1, min(9, len(images))).long()
    return statistics.median(min(decoded(file).size) for file in images.take(rows))


def reference_of(found: Sequence[Candidate]) -> str:
    """The name of the candidate that the others have to beat: the probe, or the first that there is."""
    names = [one.name for one in found]
    return REFERENCE if REFERENCE in names else names[0]
