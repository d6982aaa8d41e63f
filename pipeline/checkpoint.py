"""Checkpoints: a file of trained weights read without running any code in it, and put into a model."""

from __future__ import annotations

import pickletools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from pydantic import JsonValue
from safetensors.torch import load_file

from pipeline.errors import CheckpointError, nearest
from pipeline.store import Stored

NAMES = ("model.safetensors", "model.pt", "model.pth", "model.pt2")
WRAPPERS = ("state_dict", "model_state_dict", "model")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_SHOWN = 3

State = dict[str, torch.Tensor]


def file_of(checkpoint: Stored) -> Path:
    """The one file of a checkpoint artifact.

    Raises:
        CheckpointError: it has none that we can read.
    """
    for name in NAMES:
        if name in checkpoint.artifact.files:
            return checkpoint.file(name)
    raise CheckpointError(
        f"`{checkpoint.path}` holds no checkpoint; it has {', '.join(sorted(checkpoint.artifact.files))}",
        hint=f"expected one of {', '.join(NAMES)}",
    )


def read(path: Path) -> tuple[State, dict[str, JsonValue]]:
    """The tensors in a ``.safetensors``, ``.pt`` or ``.pth`` file by name, on the CPU; and facts about the file.

    Raises:
        CheckpointError: empty, truncated, not a checkpoint, a pickle that wants to run code, or NaN in it.
    """
    if path.stat().st_size == 0:
        raise CheckpointError(f"the checkpoint `{path}` is empty", hint="copy or train it again")
    if path.suffix == ".safetensors":
        try:
            state: State = load_file(path)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise _damaged(path, "a safetensors file", error) from error
        facts: dict[str, JsonValue] = {}
    else:
        state, facts = _tensors(path, _unpickled(path))
    for name, value in state.items():
        if value.is_floating_point() and bool(torch.isnan(value).any()):
            raise CheckpointError(
                f"the checkpoint `{path}` has NaN among the numbers of `{name}`",
                hint="training has diverged there: give an earlier checkpoint",
            )
    return state, facts


def _unpickled(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        wanted = _GLOBAL.search(str(error))
        code = wanted.group(1) if wanted is not None else _code_in(path)
        if code is not None:
            raise CheckpointError(
                f"the checkpoint `{path}` is a pickle that wants to run `{code}`; refused, since it could run anything",
                hint="save only weights: `torch.save(model.state_dict(), path)`, or a .safetensors file",
            ) from None
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"the checkpoint `{path}` is a TorchScript archive, not weights",
                hint="save `model.state_dict()`, or a program with `torch.export.save`",
            ) from None
        raise _damaged(path, "a file that torch.save wrote", error) from error


def _code_in(path: Path) -> str | None:
    """What a plain pickle (not torch.save's) wants to import first; its instructions are read, never run."""
    strings: list[str] = []
    try:
        with path.open("rb") as stream:
            for instruction, argument, _ in pickletools.genops(stream):
                if instruction.name == "GLOBAL":
                    return str(argument).replace(" ", ".")
                if instruction.name == "STACK_GLOBAL":
                    return ".".join(strings[-2:])
                if isinstance(argument, str):
                    strings.append(argument)
    except ValueError:
        return None  # no pickle at all
    return None


def _damaged(path: Path, what: str, error: Exception) -> CheckpointError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    said = "" if first.startswith("Weights only") or isinstance(error, KeyError) else f": {first[:160]}"
    return CheckpointError(
        f"the checkpoint `{path}` is truncated, or not {what}{said}",
        hint="copy or train it again; its size should be what it was when it was written",
    )


def _tensors(path: Path, loaded: object) -> tuple[State, dict[str, JsonValue]]:
    facts: dict[str, JsonValue] = {}
    if isinstance(loaded, Mapping):
        for key in WRAPPERS:
            inner = loaded.get(key)
            if isinstance(inner, Mapping) and inner:
                loaded, facts = inner, {"unwrapped": key}
                break
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"the checkpoint `{path}` holds a {type(loaded).__name__}, expected a dict of tensors by name",
            hint="save it with `torch.save(model.state_dict(), path)`",
        )
    for name, value in loaded.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"the checkpoint `{path}` has a {type(value).__name__} at `{name}`, expected only tensors",
                hint="save `model.state_dict()` alone, or under the key `state_dict`",
            )
        odd = _oddity(value)
        if odd is not None:
            raise CheckpointError(
                f"the checkpoint `{path}` has {odd} tensor at `{name}`, expected plain ones",
                hint="save the float weights that the model was trained with, on the CPU and `.to_dense()`",
            )
    return {str(name): value for name, value in loaded.items()}, facts


def _oddity(value: torch.Tensor) -> str | None:
    """What keeps a tensor's numbers from being copied, or None."""
    if value.is_meta:
        return "an empty (meta)"
    if value.is_quantized:
        return "a quantized"
    return None if value.layout == torch.strided else "a sparse"


def fill(model: torch.nn.Module, state: State, path: Path) -> dict[str, JsonValue]:
    """Copy `state` into `model`; names and shapes must be exactly the model's.

    A name may be missing when its tensor is shared with one that is there. Returns facts.

    Raises:
        CheckpointError: lists what is missing, unexpected, or of another shape.
    """
    own = model.state_dict()
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    missing = [name for name in own if name not in state and not _shared(own, name, state)]
    unexpected = [name for name in state if name not in own]
    if wrong or missing or unexpected:
        raise _mismatch(path, own, state, wrong, missing, unexpected)
    imaginary = [name for name in own if name in state and state[name].is_complex() and not own[name].is_complex()]
    if imaginary:
        raise CheckpointError(
            f"the checkpoint `{path}` has complex numbers at {_few(imaginary)}, the model real ones",
            hint="give the checkpoint of this model, or make the factory's parameters complex",
        )
    model.load_state_dict(state, strict=False)
    cast = sorted({str(state[name].dtype) for name in state if state[name].dtype != own[name].dtype})
    return {"cast_from": [name.removeprefix("torch.") for name in cast]} if cast else {}


def _shared(own: Mapping[str, torch.Tensor], name: str, state: State) -> bool:
    tensor = own[name]
    return any(
        other in state and value.data_ptr() == tensor.data_ptr() and value.shape == tensor.shape
        for other, value in own.items()
        if tensor.numel()
    )


def _mismatch(
    path: Path, own: Mapping[str, torch.Tensor], state: State, wrong: list[str], missing: list[str], extra: list[str]
) -> CheckpointError:
    lines = [f"the checkpoint `{path}` belongs to another model than the recipe's factory makes"]
    if missing:
        lines.append(f"  missing ({len(missing)}): {_few(missing)}")
    if extra:
        lines.append(f"  unexpected ({len(extra)}): {_few(extra)}")
    if wrong:
        shapes = [f"{name} {list(state[name].shape)}, expected {list(own[name].shape)}" for name in wrong]
        lines.append(f"  of another shape ({len(wrong)}): {_few(shapes, quoted=False)}")
    return CheckpointError("\n".join(lines), hint=_advice(missing, extra))


def _few(names: Iterable[str], *, quoted: bool = True) -> str:
    every = list(names)
    shown = ", ".join(f"`{name}`" if quoted else name for name in every[:_SHOWN])
    return shown + (f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else "")


def _advice(missing: list[str], extra: list[str]) -> str:
    for prefix in ("module.", "_orig_mod.", "model."):
        if extra and missing and all(name.startswith(prefix) for name in extra):
            return f"the names begin with `{prefix}`: save the state of the model inside the wrapper"
    close = nearest(extra[0], missing) if extra else None
    if close is not None:
        return f"is `{extra[0]}` what the factory calls `{close}`? Rename it in the factory or in the checkpoint"
    return "give the checkpoint of this model, or change the factory's sizes"


def count(model: Any) -> dict[str, JsonValue]:
    """Number and bytes of the parameters of a module; shared ones count once."""
    every = list(model.parameters())
    return {
        "parameters": sum(one.numel() for one in every),
        "parameter_bytes": sum(one.numel() * one.element_size() for one in every),
    }
