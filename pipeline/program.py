"""Programs: reading, writing and running ``torch.export`` programs, without noise and without paths of this machine."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import re
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from pipeline import dims, recipes
from pipeline.errors import StoreError
from pipeline.store import Stored
from pipeline.types import Recipe, Runner, Signature, Sizes

if TYPE_CHECKING:
    from pipeline.types import Tensors

FILE = "program.pt2"
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_FILE_IN_TRACE = re.compile(r'File "([^"]+)"')
_SYMBOL = re.compile(r"\b[su]\d+\b")
_OF_TORCH = frozenset({"aten", "prim", "prims", "higher_order"})
_exporter = threading.RLock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing of what torch logs, warns or prints gets out. One thread at a time: torch's tracer is global, too."""
    with _exporter:
        kept = [(log, log.handlers, log.propagate) for log in _torch_loggers()]
        for log, _, _ in kept:
            log.handlers, log.propagate = [logging.NullHandler()], False
        try:
            with (
                warnings.catch_warnings(),
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                warnings.simplefilter("ignore")
                yield
        finally:
            for log, handlers, propagate in kept:
                log.handlers, log.propagate = handlers, propagate


def _torch_loggers() -> list[logging.Logger]:
    """torch's root logger, and every one below it with an outlet of its own."""
    known = [log for name, log in logging.root.manager.loggerDict.items() if name.startswith("torch.")]
    return [logging.getLogger("torch"), *(log for log in known if isinstance(log, logging.Logger) and log.handlers)]


def load(path: Path) -> ExportedProgram:
    """The program in the file `path`; custom operators that it uses must be registered already (PT2E's are, here).

    Raises:
        StoreError: it can't be read.
    """
    try:
        with quiet():
            importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers what PT2E writes
            return torch.export.load(path)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise StoreError(
            f"can't load the program `{path}`: {type(error).__name__}: {first}",
            hint="`exportyard export` makes it again; custom operators must be defined in the recipe's module",
        ) from error


def load_program(stored: Stored, recipe: Recipe) -> ExportedProgram:
    """The captured program; the factory's module is imported first, since it may register custom operators.

    Raises:
        RecipeError: the recipe's module can't be imported.
        StoreError: the program can't be read.
    """
    if recipe.factory is not None:
        with quiet():  # as at capture: what libraries say of each other is nothing to the user
            recipes.resolve(recipe, recipe.factory, "factory")
    return load(stored.file(FILE))


def runnable(program: ExportedProgram) -> Callable[..., Any]:
    """The program as a function of its inputs, in order, that returns a tuple.

    torch's own guards stay off: they refuse sizes (often 1) at which capture has found the program to be right.
    """
    return program.module(check_guards=False)


def examples(signature: Signature, sizes: Sizes | None = None) -> tuple[torch.Tensor, ...]:
    """Zeros in the place of each input, at these sizes; without any, every axis is at its opt."""
    sizes = sizes or {name: axis.opt for name, axis in signature.axes.items()}
    return tuple(
        torch.zeros([dims.size_of(dim, sizes) for dim in spec.shape], dtype=DTYPES[spec.dtype])
        for spec in signature.inputs
    )


def runner(call: Callable[..., Any], signature: Signature, device: str = "cpu") -> Runner:
    """A function of torch tensors, by position, as a runner: arrays by name in, arrays of the caller's own out."""

    def run(feeds: Tensors) -> dict[str, NDArray[Any]]:
        # copies: a program may write into its inputs, and may return them or its own constants
        arguments = [torch.from_numpy(np.array(feeds[spec.name], order="C")).to(device) for spec in signature.inputs]
        with torch.inference_mode():
            found = call(*arguments)
        return {spec.name: value.numpy(force=True).copy() for spec, value in zip(signature.outputs, found, strict=True)}

    return run


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Inside, torch runs an operator with `count` threads; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def save(program: ExportedProgram, path: Path, root: Path) -> None:
    """Write `program` with the same bytes on every machine: no example inputs, and source paths relative to `root`.

    Raises:
        OSError: the disk is full, or something else with the file.
    """
    program.example_inputs = None
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("from_node", None)  # of a program that was traced again: it has addresses of this process
                if node.meta.get("stack_trace"):
                    node.meta["stack_trace"] = without_paths(node.meta["stack_trace"], root)
    with opened(path) as file, quiet():
        torch.export.save(program, file)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A new file for torch's writer to write; what goes wrong with it is raised at the end.

    Raises:
        OSError: the disk is full, or something else with the file.
    """
    with path.open("wb") as file:
        patient = _Patient(file)
        yield cast("IO[bytes]", patient)
        if patient.failure is not None:
            raise patient.failure


class _Patient(io.RawIOBase):
    """Takes all that is written to `file`, and keeps what went wrong for later.

    torch's writer must never see a write fail: its destructor writes once more, and then ends the whole process.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.file = file
        self.failure: OSError | None = None

    def writable(self) -> bool:
        """As of a file."""
        return True

    def seekable(self) -> bool:
        """Torch asks, and goes to the start when it is done."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Torch reads nothing back, so there is nothing to go to."""
        del offset, whence
        return 0

    def write(self, data: Any) -> int:
        """The length of `data`, whether or not it could be written."""
        if self.failure is None:
            try:
                self.file.write(data)
                self.file.flush()
            except OSError as error:
                self.failure = error
        return len(data)


def without_paths(trace: str, root: Path) -> str:
    """A stack trace whose file names don't depend on where the workspace and the packages are."""
    return _FILE_IN_TRACE.sub(lambda found: f'File "{short_path(found.group(1), root)}"', trace)


@functools.lru_cache(maxsize=4096)  # a program names few files, many times
def short_path(path: str, root: Path) -> str:
    """`path` relative to the workspace or to where packages are installed; else its last part."""
    if not Path(path).is_absolute():
        return path
    # packages come first, since an environment may lie inside the workspace
    packages = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib")]
    for base in (*packages, Path(__file__).parents[1], root):
        with contextlib.suppress(ValueError):
            return Path(path).relative_to(base).as_posix()
    return Path(path).name


def custom_operators(program: ExportedProgram) -> list[str]:
    """Operators of the program that torch hasn't, as ``mine::twice``: whoever reads it must define them first."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    called = {node.target for graph in graphs for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    names = {target._schema.name for target in called}
    return sorted(name for name in names if name.partition("::")[0] not in _OF_TORCH)


def axis_symbols(program: ExportedProgram, recipe: Recipe) -> dict[str, str]:
    """Axis name for each of the program's symbols (``s43``), read from the shapes of its inputs."""
    found: dict[str, str] = {}
    for value, spec in zip(user_inputs(program), recipe.inputs, strict=True):
        for size, dim in zip(shape_of(value), spec.shape, strict=True):
            if isinstance(dim, str) and not isinstance(size, int) and size.is_Symbol:
                found.setdefault(str(size), dim)
    return found


def shape_of(value: torch.Tensor) -> list[Any]:
    """The dimensions of a fake tensor: an int, or a sympy expression where the size may vary."""
    plain = [getattr(getattr(size, "node", None), "expr", size) for size in value.shape]
    return [int(size) if isinstance(size, int) or size.is_Integer else size for size in plain]


def user_inputs(program: ExportedProgram) -> list[torch.Tensor]:
    """The fake tensors of the program's own inputs (no parameters, buffers or constants), in order."""
    wanted = program.graph_signature.user_inputs
    found = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    return [found[name] for name in wanted if isinstance(name, str)]


def user_outputs(program: ExportedProgram) -> list[Any]:
    """The fake tensors of the program's outputs, in order."""
    (node,) = program.graph.find_nodes(op="output")
    count = len(program.graph_signature.user_outputs)
    results = list(node.args[0])
    return [getattr(one, "meta", {}).get("val") for one in results[len(results) - count :]]


def in_axes(size: object, symbols: Mapping[str, str]) -> int | str:
    """A dimension in terms of axes: ``8``, ``"batch"``, ``"2*batch"``.

    A size that only the data decides (as of ``nonzero``) becomes ``data_0``, ``data_1`` ...
    """
    text = str(size)
    if text.isdigit():
        return int(text)
    return _SYMBOL.sub(lambda found: symbols.get(found.group(), found.group().replace("u", "data_")), text)
