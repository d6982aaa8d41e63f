"""What TensorRT is asked for, worked out without TensorRT: options, profiles, caches, and whose fault an error is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import digest, origin
from pipeline.errors import BuildError, UsageError, unknown
from pipeline.types import Axis, Dim, Signature, Target

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

    from pipeline.gpu import Gpu

LEVELS = range(6)
HARDWARE = ("none", "same_compute_capability", "ampere_plus")
OPTIONS = frozenset(
    {
        "level",
        "workspace_mb",
        "tf32",
        "version_compatible",
        "hardware",
        "timing_cache",
        "opt_profile",
        "cuda_graph",
    }
)
DTYPES = frozenset({"float32", "float16", "int64", "int32", "int8", "uint8", "bool"})

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Range:
    """The shapes of one input that an engine serves."""

    min: Shape
    opt: Shape
    max: Shape

    def holds(self, shape: Shape) -> bool:
        """Whether `shape` lies in it."""
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


Profile = Mapping[str, Range]
"""Ranges of the inputs that have a dynamic axis."""


@dataclass(frozen=True)
class Settings:
    """Options of a row; docs/targets.md says what each means."""

    level: int = 3
    workspace_mb: int = 0
    tf32: bool = False
    version_compatible: bool = False
    hardware: str = "none"
    timing_cache: bool = True
    opt_profile: bool = False
    cuda_graph: bool = False


def settings_of(target: Target) -> Settings:
    """The options of `target`.

    Raises:
        UsageError: one has a value that doesn't exist.
    """
    where = f"target `{target.name}`"
    level = target.options.get("level", Settings.level)
    if isinstance(level, bool) or level not in LEVELS:
        raise UsageError(f"{where}: level = {level!r}", hint="expected 0 (quick to build) to 5 (fast to run)")
    workspace = target.options.get("workspace_mb", 0)
    if isinstance(workspace, bool) or not isinstance(workspace, int) or workspace < 0:
        raise UsageError(f"{where}: workspace_mb = {workspace!r}", hint="expected whole MiB; 0 is all that there is")
    hardware = str(target.options.get("hardware", "none"))
    if hardware not in HARDWARE:
        raise unknown("value of `hardware`", hardware, HARDWARE, where=where)
    return Settings(
        level=int(level),
        workspace_mb=workspace,
        tf32=flag(target, "tf32"),
        version_compatible=flag(target, "version_compatible"),
        hardware=hardware,
        timing_cache=flag(target, "timing_cache", default=True),
        opt_profile=flag(target, "opt_profile"),
        cuda_graph=flag(target, "cuda_graph"),
    )


def flag(target: Target, option: str, default: bool = False) -> bool:
    """A boolean option.

    Raises:
        UsageError: it is neither true nor false.
    """
    value = target.options.get(option, default)
    if not isinstance(value, bool):
        raise UsageError(f"target `{target.name}`: {option} = {value!r}", hint="expected true or false")
    return value


# --- profiles ------------------------------------------------------------------------------------------------------


def profiles(signature: Signature, opt_profile: bool = False) -> list[Profile]:
    """The ranges that an engine is built for: all sizes of every axis, and on request the opt sizes alone, for which
    it then has kernels of their own; none where nothing is dynamic.

    Raises:
        BuildError: a dimension of an input is no axis.
    """
    dynamic = {spec.name: spec.shape for spec in signature.inputs if any(isinstance(dim, str) for dim in spec.shape)}
    if not dynamic:
        return []
    axes = signature.axes
    whole = {
        name: Range(*(_shape(name, shape, axes, end) for end in ("min", "opt", "max")))
        for name, shape in dynamic.items()
    }
    if not opt_profile:
        return [whole]
    return [whole, {name: Range(one.opt, one.opt, one.opt) for name, one in whole.items()}]


def _shape(name: str, shape: Sequence[Dim], axes: Mapping[str, Axis], end: str) -> Shape:
    for dim in shape:
        if isinstance(dim, str) and dim not in axes:
            raise BuildError(
                f"input `{name}`: `{dim}` is no axis, so that it has no range to build for",
                hint="give that dimension an axis of its own in the recipe",
            )
    return tuple(getattr(axes[dim], end) if isinstance(dim, str) else dim for dim in shape)


def choose(built: Sequence[Profile], shapes: Mapping[str, Shape]) -> int:
    """The profile to run `shapes` with: the narrowest that holds them; 0 where nothing is dynamic.

    Raises:
        BuildError: none does.
    """
    for index in reversed(range(len(built))):
        if all(one.holds(shapes[name]) for name, one in built[index].items()):
            return index
    if not built:
        return 0
    raise BuildError(f"no profile of the engine serves the shapes {dict(shapes)}")


def check_dtypes(signature: Signature, target: Target) -> None:
    """Refuse inputs and outputs of types that TensorRT has not.

    Raises:
        BuildError: names the first.
    """
    for spec in (*signature.inputs, *signature.outputs):
        if spec.dtype not in DTYPES:
            raise BuildError(
                f"tensorrt can't build `{target.name}`: `{spec.name}` is {spec.dtype}, which it doesn't have",
                hint=f"it has {', '.join(sorted(DTYPES))}",
            )


# --- caches --------------------------------------------------------------------------------------------------------


def timing_cache(gpu: Gpu, version: str) -> Path:
    """The file with kernel timings of one kind of GPU, for one version of TensorRT; they mean nothing to another."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = digest.of_bytes(gpu.name.encode())[:8]
    return Path(root) / "exportyard" / "tensorrt" / f"{gpu.arch}-{name}-{version}.timings"


# --- errors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One complaint of the ONNX parser.

    Attributes:
        node: name of the graph's node; empty where the whole graph is at fault.
        operator: its type.
        text: what is wrong.
    """

    node: str
    operator: str
    text: str


def parse_error(faults: Sequence[Fault], source: Path, target: Target) -> BuildError:
    """What the parser refuses, by the user's own module."""
    first = faults[0] if faults else Fault("", "", "no reason given")
    place = origin.of_error(source, f"{first.node} {first.operator}") if first.node or first.operator else ""
    more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
    return BuildError(
        f"tensorrt can't import the model for `{target.name}`: {one_line(first.text)}{place}{more}",
        hint="change that part of the model, or leave out the target in the recipe's `targets`",
    )


def build_error(log: Sequence[str], source: Path, target: Target) -> BuildError:
    """Why there is no engine, by what TensorRT's log says; a layer has the name of the node that it came from."""
    text = log[-1] if log else "it gives no reason"
    place = next((found for line in reversed(log) if (found := origin.of_error(source, line))), "")
    return BuildError(
        f"tensorrt can't build `{target.name}`: {one_line(text)}{place}",
        hint="change that part of the model, or give the row more memory (`workspace_mb`)",
    )


def load_error(log: Sequence[str], path: Path) -> BuildError:
    """Why an engine file can't be used."""
    text = log[-1] if log else "it is broken"
    return BuildError(
        f"tensorrt can't load the engine `{path}`: {one_line(text)}", hint="`exportyard export` builds it again"
    )


def fallen_back(compiled: GraphModule) -> list[str]:
    """What a module that Torch-TensorRT compiled leaves to PyTorch: operators, and the user's modules; sorted.

    It keeps such parts as submodules ``_run_on_gpu_*``; those that became engines are ``_run_on_acc_*``.
    """
    found: set[str] = set()
    for name, part in compiled.named_children():
        graph = None if "_run_on_acc" in name else getattr(part, "graph", None)
        if graph is not None:
            found |= {_spell_call(node) for node in graph.nodes if _is_operator(node)}
    return sorted(found)


def _is_operator(node: Node) -> bool:
    return node.op == "call_function" and not str(node.target).startswith("<built-in")  # which take outputs apart


def _spell_call(node: Node) -> str:
    module = origin.module_of_call(node)
    return f"{node.target} (in `{module}`)" if module else f"{node.target}"


def one_line(text: str) -> str:
    """A message on one line, at most 300 characters."""
    return " ".join(text.split())[:300]
