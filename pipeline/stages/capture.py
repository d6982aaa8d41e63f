"""Capture: from a checkpoint and a recipe to a ``torch.export`` program that is proven to be the same model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic  # torch has no public switch for it

from pipeline import breaks, ranges
from pipeline import checkpoint as checkpoints
from pipeline import program as programs
from pipeline.explain.restoring import restored
from pipeline.store import Stored, write_json
from pipeline.trial import Answer, Flat, compare, dtype_of, tensors
from pipeline.types import Place, Recipe, Signature, TensorSpec


def capture(recipe: Recipe, checkpoint: Stored, out: Path) -> dict[str, JsonValue]:
    """Write ``program.pt2`` and ``signature.json`` into `out`.

    The program takes the recipe's inputs by position and returns a flat tuple in the order of the recipe's outputs.

    Raises:
        CheckpointError: damaged, unsafe, or of another model.
        RecipeError: the factory is missing, raises, or makes something else than a module.
        CaptureError: the model fails, can't be traced, serves fewer sizes, or its trace answers differently.
    """
    path = checkpoints.file_of(checkpoint)
    with programs.quiet():
        called = Path(str(checkpoint.artifact.facts.get("source", path)))  # as the user knows it
        model, facts = restored(recipe, path, called)
        traced = ranges.trace_sizes(recipe)
        reference = [Answer.of(recipe, model, sizes) for sizes in ranges.check_sizes(recipe, traced)]
        flat = Flat(model, [spec.name for spec in recipe.outputs], copies=any(one.changed for one in reference))
        flat.training = model.training  # not .train(): the module of a saved program refuses it
        program, mode, lines = _trace(recipe, flat, traced)
        doubts = _check(recipe, program, model, reference, lines)
    signature = _signature(recipe, program)
    programs.save(program, out / programs.FILE, recipe.root)
    write_json(out / "signature.json", signature.plain())
    spans: dict[str, JsonValue] = {name: [axis.min, axis.max] for name, axis in recipe.axes.items()}
    facts |= {"mode": mode, "ranges": spans, "nodes": len(program.graph.nodes), **checkpoints.count(model)}
    facts["operators"] = [*programs.custom_operators(program)]
    facts["guards"] = [_guard(doubt, recipe.root).plain() for doubt in doubts]
    return facts


class _Echo(torch.nn.Module):
    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(one.clone() for one in inputs)


def _trace(recipe: Recipe, flat: Flat, sizes: Mapping[str, int]) -> tuple[ExportedProgram, str, dict[str, str]]:
    """The traced program, how it was traced (``non-strict`` where that works, else ``strict``), and `Lines.found`."""
    try:
        with ranges.Lines(recipe.root) as lines:
            return _export(recipe, flat, sizes, strict=False), "non-strict", lines.found
    except Exception as first:
        try:
            with ranges.Lines(recipe.root) as lines:
                return _export(recipe, flat, sizes, strict=True), "strict", lines.found
        except Exception as second:

            def draft() -> Any:
                inputs, dynamic = tensors(recipe, sizes), _dynamic(recipe)
                with breaks.tidy_traces():
                    found = torch.export.draft_export(flat, inputs, dynamic_shapes=(dynamic,))
                return getattr(found, "_report")  # noqa: B009  a private attribute, the only way to the report

            nothing = _export(recipe, Flat(_Echo(), [], copies=False), sizes, strict=False)  # has the same symbols
            symbols = programs.axis_symbols(nothing, recipe)
            raise breaks.explain(recipe, first, second, draft, symbols) from first


def _export(recipe: Recipe, flat: Flat, sizes: Mapping[str, int], *, strict: bool) -> ExportedProgram:
    # without size-oblivious tracing, an axis with min 1 comes back as 2 and more, and convolutions and pools
    # exclude further sizes at which they work
    with symbolic.patch(backed_size_oblivious=True), torch.no_grad():  # type: ignore[attr-defined]
        return torch.export.export(flat, tensors(recipe, sizes), dynamic_shapes=(_dynamic(recipe),), strict=strict)


def _dynamic(recipe: Recipe) -> tuple[dict[int, Any], ...]:
    """Each dynamic dimension as a symbol of its own within its range.

    AUTO, not a named Dim: a Dim makes the whole trace fail without a line, while AUTO lets us read what it became.
    """
    return tuple(
        {
            place: Dim.AUTO(min=recipe.axes[dim].min, max=recipe.axes[dim].max)
            for place, dim in enumerate(spec.shape)
            if isinstance(dim, str) and ranges.is_dynamic(recipe.axes[dim])
        }
        for spec in recipe.inputs
    )


def _check(
    recipe: Recipe,
    program: ExportedProgram,
    model: torch.nn.Module,
    reference: list[Answer],
    lines: Mapping[str, str],
) -> list[ranges.Doubt]:
    """Compare program and model at small sizes and wherever tracing has left a doubt; then widen its ranges.

    Returns the doubts, which are none any more.

    Raises:
        CaptureError: an axis is a constant, the two differ, or one of them fails.
    """
    ranges.check_axes(program, recipe, lines)
    run = programs.runnable(program)
    doubts = {str(doubt.sizes): doubt for doubt in ranges.assumed(program, recipe, lines)}
    doubts |= {str(doubt.sizes): doubt for doubt in ranges.narrowed(program, recipe, lines)}
    known = {str(answer.sizes) for answer in reference}
    for answer in reference:
        compare(recipe, run, model, answer, doubts.get(str(answer.sizes)))
    for doubt in (doubt for sizes, doubt in doubts.items() if sizes not in known):
        compare(recipe, run, model, Answer.of(recipe, model, doubt.sizes), doubt)
    ranges.widen(program, recipe)
    return list(doubts.values())


def _guard(doubt: ranges.Doubt, root: Path) -> Place:
    """What a trace took for granted about sizes, after the program was found to be right there all the same."""
    file, _, rest = doubt.where.partition(":")
    line = f"{programs.short_path(file, root)}:{rest}" if rest else ""
    return Place(line=line, reason=doubt.reason, advice="none needed: program and model agree there", sizes=doubt.sizes)


def _signature(recipe: Recipe, program: ExportedProgram) -> Signature:
    symbols = programs.axis_symbols(program, recipe)

    def shape(value: torch.Tensor) -> tuple[int | str, ...]:
        return tuple(programs.in_axes(size, symbols) for size in programs.shape_of(value))

    return Signature(
        inputs=tuple(
            TensorSpec(name=spec.name, dtype=spec.dtype, shape=shape(value))
            for spec, value in zip(recipe.inputs, programs.user_inputs(program), strict=True)
        ),
        outputs=tuple(
            TensorSpec.model_validate(
                {"name": spec.name, "dtype": dtype_of(value), "shape": shape(value), "kind": spec.kind}
            )
            for spec, value in zip(recipe.outputs, programs.user_outputs(program), strict=True)
        ),
        axes=recipe.axes,
    )
