"""fit, predict and score, as scikit-learn has them.

Shapes: labels [N], probabilities [N C].
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from lpt.data.given import labeled_images
from lpt.data.longtail import usual_group_rule
from lpt.data.task import Task
from lpt.errors import LptError
from lpt.model.backbones import load_backbone
from lpt.model.backbones.base import Backbone
from lpt.model.classifier import PromptedClassifier
from lpt.tuning import tune


class Estimator:
    """A classifier of images with scikit-learn's methods, for its cross-validation, searches and pipelines.

    `backbone` is a name (`weights` a file for it) or what `lpt.load_backbone` returns; `method`, `seed`, `batch_size`
    and `settings` are those of `lpt.tune`. Images are what `lpt.task_from` takes, labels numbers or names.

    >>> import lpt
    >>> digits = lpt.load_task("digits-lt")
    >>> images = [pixels for pixels in digits.train.pixels]
    >>> estimator = lpt.Estimator("nano", method="class_mean").fit(images, digits.train.labels)
    >>> estimator.predict(images[:3]).shape, estimator.predict_proba(images[:3]).shape
    ((3,), (3, 10))
    """

    _estimator_type = "classifier"

    def __init__(
        self,
        backbone: str | Backbone = "nano",
        *,
        weights: str | None = None,
        method: str = "lpt",
        seed: int = 0,
        batch_size: int = 256,
        **settings: Any,
    ) -> None:
        self.backbone, self.weights, self.method = backbone, weights, method
        self.seed, self.batch_size, self.settings = seed, batch_size, settings

    def fit(self, images: Any, labels: Sequence[Any]) -> Self:
        """Tunes a model on N images with N labels; `model_` is it, `classes_` are the labels that it tells apart, in
        order. Raises what `lpt.task_from` and `lpt.tune` do."""
        self.classes_, numbers = np.unique(np.asarray(labels), return_inverse=True)
        names = tuple(str(name) for name in self.classes_)
        train = labeled_images(images, numbers.tolist(), names)
        backbone = self.backbone
        if not isinstance(backbone, Backbone):
            backbone = load_backbone(backbone, weights=self.weights)
        # A task has a test part, and nothing here looks at it.
        rule = usual_group_rule(np.bincount(numbers, minlength=len(names)).tolist())
        task = Task(name="estimator", classes=names, train=train, test=train, group_rule=rule)
        self.model_ = tune(
            task, backbone, method=self.method, seed=self.seed, batch_size=self.batch_size, **self.settings
        )
        return self

    def predict_proba(self, images: Any) -> np.ndarray:
        """The probabilities [N C] of `classes_`. Raises DataError for what is no image, LptError before `fit`."""
        return self._fitted().predict(images).probabilities.numpy()

    def predict(self, images: Any) -> np.ndarray:
        """The most probable label of each image [N], of those that `fit` was given."""
        labels = self._fitted().predict(images).labels
        return self.classes_[labels.numpy()]

    def score(self, images: Any, labels: Sequence[Any]) -> float:
        """The share of images whose label is predicted."""
        return float((self.predict(images) == np.asarray(labels)).mean())

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """All arguments of the constructor, by name."""
        own = ("backbone", "weights", "method", "seed", "batch_size")
        return {**{name: getattr(self, name) for name in own}, **self.settings}

    def set_params(self, **params: Any) -> Self:
        """Other arguments; the model stays until `fit`."""
        self.__init__(**{**self.get_params(), **params})
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(two_d_array=False),
        )

    def _fitted(self) -> PromptedClassifier:
        if not hasattr(self, "model_"):
            raise LptError("Estimator: it has no model yet: call fit first")
        return self.model_
