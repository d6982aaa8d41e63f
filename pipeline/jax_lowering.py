"""From a captured program to StableHLO: torchax's operators, in an interpreter of our own that JAX traces."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import export
from torch._ops import OpOverload, OpOverloadPacket
from torch.export import ExportedProgram

from pipeline import program as programs
from pipeline.types import Signature


class UnloweredError(Exception):
    """An operator has no form in JAX; the message is its name."""


def exported(
    program: ExportedProgram, signature: Signature, platforms: Sequence[str], narrower: Mapping[str, str]
) -> bytes:
    """The program for `platforms`, its axes symbols within their ranges; weights are constants in it.

    Args:
        program: of torch.
        signature: of the program.
        platforms: as JAX names them.
        narrower: what inputs of some types are inside.

    Raises:
        UnloweredError: an operator has no form in JAX.
        Exception: whatever else tracing raises; `is_about_sizes` knows one kind.
    """
    with programs.quiet(), _no_places():
        flat = _decomposed(program)
        run = _Interpreter(flat.graph_module)
        states = [jnp.asarray(value.detach().numpy()) for value in _states(flat)]

        def call(*inputs: Any) -> Any:
            return run.run(*states, *inputs, enable_io_processing=False)

        found = export.export(jax.jit(call), platforms=platforms)(*_shapes(signature, narrower))
        return bytes(found.serialize())


def is_about_sizes(error: Exception) -> bool:
    """Whether tracing failed at a size that JAX can't write down for all sizes of the axes."""
    return isinstance(error, jax.errors.InconclusiveDimensionOperation)


def _shapes(signature: Signature, narrower: Mapping[str, str]) -> list[Any]:
    bounds = [f"{name} >= {axis.min}" for name, axis in signature.axes.items()]
    bounds += [f"{name} <= {axis.max}" for name, axis in signature.axes.items()]
    names = list(signature.axes)
    symbols = dict(zip(names, export.symbolic_shape(",".join(names), constraints=bounds), strict=True)) if names else {}
    return [
        jax.ShapeDtypeStruct(
            [symbols[dim] if isinstance(dim, str) else dim for dim in spec.shape], narrower.get(spec.dtype, spec.dtype)
        )
        for spec in signature.inputs
    ]


@contextlib.contextmanager
def _no_places() -> Iterator[None]:
    """Names of source files on this machine stay out of what JAX writes."""
    setting = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, setting)
    jax.config.update(setting, 0)
    try:
        yield
    finally:
        jax.config.update(setting, before)


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    found: ExportedProgram = program.run_decompositions().run_decompositions(_torchax()[1])
    return found


def _states(program: ExportedProgram) -> list[torch.Tensor]:
    """Parameters, buffers and constants, in the order in which the graph takes them before its inputs."""
    signature = program.graph_signature
    known = {**program.state_dict, **program.constants}
    names = (*signature.parameters, *signature.buffers, *signature.lifted_tensor_constants)
    return [known[name] for name in names]


class _Interpreter(torch.fx.Interpreter):
    """Runs a graph of torch's operators on arrays of JAX."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call; see `torch.fx.Interpreter`."""
        if target is torch.ops.higher_order.cond:
            flag, yes, no, operands = args
            sides = [functools.partial(_Interpreter(side).run, enable_io_processing=False) for side in (yes, no)]
            return jax.lax.cond(flag.reshape(()), *sides, *operands)
        if target is torch.ops.aten.arange.start_step:
            return _arange(*args, dtype=kwargs.get("dtype"))
        if not isinstance(target, OpOverload):
            if isinstance(target, torch._ops.HigherOrderOperator):
                raise UnloweredError(str(target))
            return super().call_function(target, args, kwargs)
        known, _ = _torchax()
        found = known.get(target) or known.get(target.overloadpacket)
        if found is None or not found.is_jax_function:
            raise UnloweredError(str(target))
        if target is torch.ops.aten.convolution.default:
            return _convolution(found.func, *args)
        return found.func(*args, **kwargs)


def _convolution(whole: Callable[..., Any], x: Any, weight: Any, bias: Any, *settings: Any) -> Any:
    """torchax takes the groups of a transposed convolution for those of a plain one: here each is one by itself."""
    *others, transposed, padding, groups = settings
    if not transposed or groups == 1:
        return whole(x, weight, bias, *settings)
    parts = zip(
        jnp.split(x, groups, 1),
        jnp.split(weight, groups, 0),
        [None] * groups if bias is None else jnp.split(bias, groups),
        strict=True,
    )
    return jnp.concatenate([whole(*part, *others, transposed, padding, 1) for part in parts], 1)


def _arange(start: Any, end: Any, step: Any = 1, *, dtype: torch.dtype | None = None) -> Any:
    """Numbers up to a size that is a symbol, too, which torchax's own can't have."""
    if all(isinstance(one, int | float) for one in (start, end, step)):
        values = np.arange(start, end, step)
        return jnp.asarray(values if dtype is None else values.astype(str(dtype).removeprefix("torch.")))
    count = -((start - end) // step)
    values = jax.lax.iota(jnp.int32, count) * step + start
    return values.astype(jnp.float32) if dtype is not None and dtype.is_floating_point else values


@functools.cache
def _torchax() -> tuple[Mapping[Any, Any], Any]:
    """torchax's table of operators, and of how others are made of them."""
    with programs.quiet(), _torchax_without_effects():
        from torchax import decompositions
        from torchax.ops import jaten, ops_registry  # noqa: F401  the first fills the second
    return ops_registry.all_aten_ops, decompositions.DECOMPOSITIONS


@contextlib.contextmanager
def _torchax_without_effects() -> Iterator[None]:
    """Inside, torchax can be imported with torch 2.13, and leaves the rest of this process as it is.

    It asks torch for forms with named dimensions, which are no more: they get a name that nothing calls. It makes
    itself a device of torch, after which torch.compile fails; switches a kernel of attention off; and tells XLA its
    name.
    """
    original = OpOverloadPacket.__getattr__

    def lenient(self: OpOverloadPacket, name: str) -> Any:
        try:
            return original(self, name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return object()

    def nothing(*_: Any) -> None:
        pass

    changed: tuple[tuple[Any, str, Any], ...] = (
        (OpOverloadPacket, "__getattr__", lenient),
        (torch.utils, "rename_privateuse1_backend", nothing),
        (torch, "_register_device_module", nothing),
        (torch.backends.mha, "set_fastpath_enabled", nothing),
        (jax.config, "update", nothing),
    )
    kept = [(place, name, getattr(place, name)) for place, name, _ in changed]
    for place, name, value in changed:
        setattr(place, name, value)
    try:
        yield
    finally:
        for place, name, value in kept:
            setattr(place, name, value)
