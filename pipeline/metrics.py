"""Evaluation metrics: how good a model is, as one number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import compare, recipes
from pipeline.errors import RecipeError, unknown
from pipeline.types import Recipe

Outputs = Sequence[Mapping[str, NDArray[Any]]]
BUILT_IN = ("accuracy", "agreement", "cosine")


def evaluate(recipe: Recipe, outputs: Outputs, labels: Outputs, reference: Outputs) -> float:
    """The recipe's metric over all evaluation samples.

    Args:
        recipe: says which metric.
        outputs: what the engine returned, a dict for each sample.
        labels: the arrays of each sample that aren't inputs.
        reference: what eager fp32 returned, a dict for each sample.

    Raises:
        RecipeError: the metric raised, doesn't exist, has no labels to work with, or isn't a number.
    """
    metric = recipe.evaluation.metric
    if recipes.is_code(metric):
        value = recipes.call(recipe, metric, "evaluation.metric", list(outputs), list(labels))
    elif metric in BUILT_IN:
        try:
            value = _built_in(recipe, metric, outputs, labels, reference)
        except (ValueError, TypeError) as error:  # numpy's, about shapes: no class to choose from, other labels
            raise RecipeError(
                f"recipe `{recipe.name}`: metric `{metric}` can't be told from output `{recipe.outputs[0].name}`"
                f" and these evaluation data: {error}",
                hint="see whether output and labels fit together, or give a `module:callable` of your own",
            ) from error
    else:
        found = unknown("metric", metric, BUILT_IN)
        raise RecipeError(found.message, hint=f"{found.hint}; or give `module:callable`")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise RecipeError(f"metric `{metric}` returned {value!r:.100}", hint="return one number") from None
    if not np.isfinite(number):
        raise RecipeError(f"metric `{metric}` is {number}", hint="see whether the evaluation data fit the model")
    return number


def _built_in(recipe: Recipe, metric: str, outputs: Outputs, labels: Outputs, reference: Outputs) -> float:
    if metric == "accuracy":
        return _accuracy(recipe, outputs, labels)
    if metric == "agreement":
        return _agreement(recipe, outputs, reference)
    name = recipe.outputs[0].name
    return float(compare.row_cosine([one[name] for one in reference], [one[name] for one in outputs]))


def _accuracy(recipe: Recipe, outputs: Outputs, labels: Outputs) -> float:
    name = recipe.outputs[0].name
    if not all("label" in label for label in labels):
        raise RecipeError(
            f"recipe `{recipe.name}`: metric `accuracy` needs an array `label` in the evaluation data",
            hint="yield {'label': class indices, ...} beside the inputs",
        )
    right = [one[name].argmax(axis=-1) == label["label"] for one, label in zip(outputs, labels, strict=True)]
    return float(np.mean(np.concatenate([np.atleast_1d(item).reshape(-1) for item in right])))


def _agreement(recipe: Recipe, outputs: Outputs, reference: Outputs) -> float:
    name = recipe.outputs[0].name
    same = [one[name].argmax(axis=-1) == two[name].argmax(axis=-1) for one, two in zip(outputs, reference, strict=True)]
    return float(np.mean(np.concatenate([np.atleast_1d(item).reshape(-1) for item in same])))
