"""Stage compilation: what torch.compile would make of the user's model, over the sizes of its axes."""

from __future__ import annotations

from pathlib import Path

from pydantic import JsonValue, TypeAdapter

from pipeline import checkpoint as checkpoints
from pipeline import program as programs
from pipeline.explain import following
from pipeline.explain.restoring import restored
from pipeline.store import Stored, write_json
from pipeline.trial import Flat, tensors
from pipeline.types import Place, Recipe

FILE = "compilation.json"


def compilation(recipe: Recipe, checkpoint: Stored, program: Stored, out: Path) -> dict[str, JsonValue]:
    """Write ``compilation.json``; a model that torch.compile can't follow is a fact, not a failure.

    Args:
        recipe: gives the model's factory, its inputs and axes.
        checkpoint: its weights.
        program: captured from it; knows what its trace took for granted.
        out: empty folder.
    """
    path = checkpoints.file_of(checkpoint)
    with programs.quiet():
        model, _ = restored(recipe, path, path)
        flat = Flat(model, [spec.name for spec in recipe.outputs], copies=False)
        flat.training = model.training
    found = following.followed(recipe, flat, lambda sizes: tensors(recipe, sizes))
    guards = TypeAdapter(tuple[Place, ...]).validate_python(program.artifact.facts.get("guards", ()))
    found = found.model_copy(update={"guards": guards})
    write_json(out / FILE, found.plain())
    return {
        "graphs": found.graphs,
        "graph_breaks": len(found.graph_breaks),
        "recompilations": len(found.recompilations),
        "not_followed": found.not_followed,
    }
