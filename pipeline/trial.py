"""Trials: the user's model run as it is, and a captured program held against its answers."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch

from pipeline import program as programs
from pipeline import ranges, samples
from pipeline.errors import CaptureError, first_line
from pipeline.types import Recipe

SEED = 20


class Flat(torch.nn.Module):
    """A model whose outputs are a plain tuple of tensors, by the recipe's names where it returns a dict of them.

    Args:
        copies: hand over copies of the inputs, for a model that writes into them.
    """

    def __init__(self, model: torch.nn.Module, names: list[str], *, copies: bool) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.copies = copies

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs in the order of `names`."""
        if self.copies:
            inputs = tuple(one.clone() for one in inputs)
        return tuple(_ordered(self.model(*inputs), self.names))


def _ordered(value: Any, names: list[str]) -> list[Any]:
    if isinstance(value, Mapping) and set(value) == set(names):
        return [value[name] for name in names]
    return list(_leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    """Tensors in tuples, lists, dicts and dataclasses, depth first; None counts as absent."""
    if value is None:
        return
    if isinstance(value, Mapping):
        value = tuple(value.values())
    elif is_dataclass(value):
        value = tuple(getattr(value, field.name) for field in fields(value))
    if isinstance(value, tuple | list):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


@dataclass(frozen=True)
class Answer:
    """What the eager model returns at some sizes."""

    sizes: dict[str, int]
    inputs: tuple[torch.Tensor, ...]
    outputs: list[torch.Tensor]
    changed: bool

    @classmethod
    def of(cls, recipe: Recipe, model: torch.nn.Module, sizes: dict[str, int]) -> Answer:
        """Run `model` once.

        Raises:
            CaptureError: it raises, or returns something else than the recipe says.
        """
        inputs = tensors(recipe, sizes)
        given = tuple(one.clone() for one in inputs)
        state = {name: value.clone() for name, value in model.named_buffers()}
        try:
            with torch.no_grad():
                returned = model(*given)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # `sys.exit()` too
            raise _failure(recipe, "the model itself", sizes, error) from error
        for name, value in model.named_buffers():
            if name in state and not torch.equal(torch.nan_to_num(state[name]), torch.nan_to_num(value)):
                raise CaptureError(
                    f"recipe `{recipe.name}`: the model writes its buffer `{name}` when it runs; engines keep no state",
                    hint="take the state as an input and return the new one, or don't write it in evaluation mode",
                )
        outputs = _ordered(returned, [spec.name for spec in recipe.outputs])
        _check_outputs(recipe, outputs)
        changed = any(not _same(one, two) for one, two in zip(inputs, given, strict=True))
        return cls(sizes, inputs, [one.detach().clone() for one in outputs], changed)


def _same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.shape == two.shape and bool(torch.equal(one, two))


def tensors(recipe: Recipe, sizes: Mapping[str, int]) -> tuple[torch.Tensor, ...]:
    """Inputs in the recipe's order; contiguous, since NumPy's strides of one-channel images look channels-last."""
    arrays = samples.feeds(recipe, sizes, SEED)
    return tuple(
        torch.from_numpy(np.array(arrays[spec.name], order="C")).clone(memory_format=torch.contiguous_format)
        for spec in recipe.inputs
    )


def _failure(recipe: Recipe, what: str, sizes: Mapping[str, int], error: BaseException) -> CaptureError:
    line = ranges.user_line(list(traceback.extract_tb(error.__traceback__)), recipe.root)
    return CaptureError(
        f"recipe `{recipe.name}`: {what} fails{_at(sizes)}: {type(error).__name__}: {first_line(error)}"
        + (f"\n  at {line}" if line else ""),
        hint="see whether [[inputs]] (order, dtype, shape, range) and [axes] in recipe.toml fit the model",
    )


def _at(sizes: Mapping[str, int]) -> str:
    return " at " + ", ".join(f"{name} = {size}" for name, size in sizes.items()) if sizes else ""


def _check_outputs(recipe: Recipe, outputs: list[Any]) -> None:
    for value in outputs:
        if not isinstance(value, torch.Tensor):
            raise CaptureError(
                f"recipe `{recipe.name}`: the model returns a {type(value).__name__} ({value!r:.60}) among its outputs",
                hint="return only tensors, in tuples, lists, dicts or dataclasses",
            )
        if dtype_of(value) not in programs.DTYPES:
            raise CaptureError(
                f"recipe `{recipe.name}`: the model returns a tensor of {dtype_of(value)}, which no engine can",
                hint="convert it in `forward`, for example with `.float()`; complex numbers as two real ones",
            )
    if len(outputs) != len(recipe.outputs):
        shapes = ", ".join(f"{dtype_of(value)} {list(value.shape)}" for value in outputs) or "nothing"
        names = ", ".join(spec.name for spec in recipe.outputs)
        raise CaptureError(
            f"recipe `{recipe.name}`: the model returns {len(outputs)} outputs ({shapes}), the recipe names"
            f" {len(recipe.outputs)} ({names})",
            hint="list every tensor that `forward` returns in [[outputs]], in its order",
        )


def compare(
    recipe: Recipe,
    run: Callable[..., Any],
    model: torch.nn.Module,
    expected: Answer,
    doubt: ranges.Doubt | None,
) -> None:
    """Hold the program `run` against what `model` has answered; `doubt` is why they may differ.

    Raises:
        CaptureError: they differ, the program fails, or the model doesn't answer the same twice.
    """
    try:
        with torch.no_grad():
            found = run(*(one.clone() for one in expected.inputs))
    except Exception as error:
        raise _explained(_failure(recipe, "the captured program", expected.sizes, error), doubt) from error
    for spec, one, two in zip(recipe.outputs, expected.outputs, found, strict=True):
        if _close(one, two):
            continue
        again = Answer.of(recipe, model, expected.sizes)
        if any(not _close(a, b) for a, b in zip(expected.outputs, again.outputs, strict=True)):
            raise CaptureError(
                f"recipe `{recipe.name}`: the model answers differently each time it is asked (see `{spec.name}`)",
                hint="switch off dropout and other random operations in evaluation mode",
            )
        wrong = CaptureError(
            f"recipe `{recipe.name}`: the captured program is not the model{_at(expected.sizes)}: output"
            f" `{spec.name}` is {_difference(one, two)}",
            hint="write the code so that it does the same at all sizes, or narrow [axes] in recipe.toml",
        )
        raise _explained(wrong, doubt)


def _explained(error: CaptureError, doubt: ranges.Doubt | None) -> CaptureError:
    if doubt is None:
        return error
    where = f"\n  at {doubt.where}" if doubt.where else ""
    return CaptureError(f"{error.message}\n  {doubt.reason}{where}", hint=doubt.hint)


def _difference(one: torch.Tensor, two: torch.Tensor) -> str:
    if one.shape != two.shape or one.dtype != two.dtype:
        return f"{dtype_of(two)} {list(two.shape)}, expected {dtype_of(one)} {list(one.shape)}"
    return f"off by {(one.double() - two.double()).abs().max().item():.3g}"


def _close(one: torch.Tensor, two: torch.Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if not one.is_floating_point() or not one.numel():
        return bool(torch.equal(one, two))
    finite = one[torch.isfinite(one)].double()
    peak = float(finite.abs().max()) if finite.numel() else 1.0
    slack = 1e-2 if one.dtype == torch.float16 else 1e-4
    return bool(torch.allclose(one.double(), two.double(), rtol=slack, atol=slack * peak, equal_nan=True))


def dtype_of(value: torch.Tensor) -> str:
    """Its dtype by the name that recipes use, such as ``float32``."""
    return str(value.dtype).removeprefix("torch.")
