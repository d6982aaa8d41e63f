"""How far an engine may be from the form that it was built from: what the recipe says, else what the row says."""

from __future__ import annotations

from pipeline.types import Recipe, Scheme, Target, Tolerance


def of(recipe: Recipe, target: Target, scheme: Scheme) -> dict[str, Tolerance]:
    """The bounds of each output: those that the recipe has for it, those for all outputs, or the row's."""
    stated = recipe.tolerance
    common = stated.schemes.get(scheme, target.vs_onnx[scheme])
    return {spec.name: stated.outputs.get(spec.name, {}).get(scheme, common) for spec in recipe.outputs}


def source(recipe: Recipe, target: Target, scheme: Scheme, output: str) -> str:
    """Where that is said: a table of the recipe, or the row."""
    if scheme in recipe.tolerance.outputs.get(output, {}):
        return f"[tolerance.outputs.{output}]"
    return "[tolerance]" if scheme in recipe.tolerance.schemes else f"vs_onnx of {target.name}"
