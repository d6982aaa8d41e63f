"""Write the stub files beside this one from the wheels that they describe: facts, so that our calls can be checked.

    python -m tests.apis.extract        # all of them, into tests/apis; downloads 8 MB once

TensorRT's bindings are one compiled module whose docstrings hold every signature. They need TensorRT's libraries to be
loaded, which are not there: libraries that are empty but for the names of nine functions let it load, and nothing of
it is called. Torch-TensorRT is Python, and is only parsed.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tests.apis.wheels import WHEELS, Wheel

HERE = Path(__file__).parent

# classes of TensorRT that backends/tensorrt.py and its helpers touch
CLASSES = (
    "Builder",
    "BuilderFlag",
    "DataType",
    "Dims",
    "HardwareCompatibilityLevel",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "ITensor",
    "ITimingCache",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
    "Runtime",
    "TensorIOMode",
)
# members that aren't needed, and would make the file long
SKIPPED = re.compile(r"^(__(?!init__|int__|len__|getitem__).*|_pybind11.*|add_(?!optimization_profile).*)$")

# functions and classes of Torch-TensorRT that backends/torch_tensorrt.py calls: module -> names
TORCH_TENSORRT = {
    "torch_tensorrt": {"_compile.py": ("save", "load"), "_Input.py": ("Input",), "_Device.py": ("Device",)},
    "torch_tensorrt.dynamo": {
        "dynamo/_compiler.py": ("compile", "convert_exported_program_to_serialized_trt_engine"),
    },
    "torch_tensorrt.runtime": {"runtime/_cudagraphs.py": ("enable_cudagraphs",)},
}


def stubs(wheel: Wheel) -> dict[str, str]:
    """The stub files of a wheel: path below its folder, and text."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(wheel.path()) as archive:
            archive.extractall(folder)
        is_python = wheel.package == "torch_tensorrt"
        found = _of_python(folder) if is_python else {"tensorrt.pyi": _of_bindings(folder)}
    head = f"# ruff: noqa\n# Written by tests/apis/extract.py from {wheel.file}\n# sha256 {wheel.sha256}\n"
    return {path: _formatted(head + text) for path, text in found.items()}


def _formatted(text: str) -> str:
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename=stub.pyi", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


# --- compiled bindings ---------------------------------------------------------------------------------------------

_LOOK = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("tensorrt", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
found = {}
for name in json.loads(sys.argv[2]):
    kind = getattr(module, name)
    enum = hasattr(kind, "__members__")
    members = {}
    for member in sorted(vars(kind)):
        value = vars(kind)[member]
        what = "value" if enum and member in kind.__members__ else type(value).__name__
        text = value.fget.__doc__ if isinstance(value, property) and value.fget else getattr(value, "__doc__", None)
        settable = isinstance(value, property) and value.fset is not None
        members[member] = [what, text or "", settable]
    found[name] = [[base.__name__ for base in kind.__bases__], enum, members]
print(json.dumps(found))
"""


def _of_bindings(folder: Path) -> str:
    library = folder / "tensorrt_bindings" / "tensorrt.so"
    _empty_libraries(library, folder)
    command = [sys.executable, "-c", _LOOK, str(library), json.dumps(CLASSES)]
    env = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    lines = ["import collections.abc", "import typing", "import typing_extensions", "from typing import Any, overload"]
    lines += ["__version__: str"]
    for name, (_, enum, members) in found.items():
        lines += ["", f"class {name}:", *(f"    {line}" for line in _members(name, enum, members))]
    # made in the package's __init__: the default logger
    lines += ["", "class Logger(ILogger):", "    min_severity: ILogger.Severity"]
    lines += ["    def __init__(self, min_severity: ILogger.Severity = ...) -> None: ..."]
    return "\n".join(lines) + "\n"


def _empty_libraries(library: Path, folder: Path) -> None:
    """Libraries by the names that `library` needs, with the functions whose addresses it takes as it is loaded."""
    said = subprocess.run(["readelf", "--dynamic", library], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(libnv\S+)\]", said)
    said = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    wanted = re.findall(r" U ((?:create|get|init)\w*(?:Infer|NvOnnx|PluginRegistry)\w*)", said)
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in wanted))
    for name in needed:
        subprocess.run(["gcc", "-shared", "-nostdlib", f"-Wl,-soname,{name}", "-o", folder / name, source], check=True)


def _members(name: str, enum: bool, members: dict[str, tuple[str, str, bool]]) -> Iterator[str]:
    if name == "IHostMemory":  # documented; Python 3.11 has no way to ask a type for it
        yield "def __buffer__(self, flags: int, /) -> memoryview: ..."
    levels = [member for member, (what, _, _) in members.items() if what == "Severity"]
    if levels:  # an enum inside the class, whose members are members of the class, too
        yield "class Severity:"
        yield from (f"    {level}: ILogger.Severity" for level in levels)
        yield from (f"{level}: ILogger.Severity" for level in levels)
    written = 0
    for member, (what, text, settable) in members.items():
        if SKIPPED.match(member) or (enum and what != "value" and member != "__int__"):
            continue
        if what == "value":
            yield f"{member}: {name}"
        elif what == "property":
            yield from _property(member, text, settable)
        elif what == "instancemethod":
            yield from _method(member, text)
        else:
            continue
        written += 1
    if not written:
        yield "..."


def _property(name: str, text: str, settable: bool) -> Iterator[str]:
    found = re.search(r"-> (.+)$", text.strip().splitlines()[0]) if text.strip() else None
    kind = ast.unparse(_Known().visit(_parsed(found.group(1)))) if found else "Any"
    yield from ("@property", f"def {name}(self) -> {kind}: ...")
    if settable:
        yield from (f"@{name}.setter", f"def {name}(self, value: {kind}) -> None: ...")


def _method(name: str, text: str) -> Iterator[str]:
    lines = text.strip().splitlines()
    if not lines:
        return
    several = [match.group(1) for line in lines if (match := re.match(rf"\d+\. ({re.escape(name)}\(.*)$", line))]
    for line in several or lines[:1]:
        if several[1:]:
            yield "@overload"
        yield _signature(name, line)


def _signature(name: str, line: str) -> str:
    """A pybind11 docstring's first line as a stub; one that can't be read takes anything."""
    line = re.sub(r"= <[^>]*>", "= ...", line)
    try:
        tree = _parsed(f"def {line}: ...")
    except SyntaxError:
        return f"def {name}(self, *args: Any, **kwargs: Any) -> Any: ..."
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    own = [*function.args.posonlyargs, *function.args.args][:1]
    if not own or own[0].arg != "self":
        return f"def {name}(*args: Any, **kwargs: Any) -> Any: ..."
    own[0].annotation = None
    return ast.unparse(_Known().visit(function)).replace("\n    ...", " ...")


def _parsed(text: str) -> ast.Module:
    """Python from a pybind11 docstring: C++ names that it left as they are become those of Python."""
    text = text.replace("nvonnxparser::IParserError", "ParserError")
    text = re.sub(r"\b\w+(?:::\w+)+", "Any", text)
    return ast.parse(re.sub(r"\btensorrt\.(?:tensorrt\.)?", "", text))


class _Known(ast.NodeTransformer):
    """Types that the stub doesn't have become Any."""

    NAMES = frozenset({*CLASSES, *dir(builtins), "Any", "collections", "typing", "typing_extensions"})

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id == "buffer":
            return ast.parse("typing_extensions.Buffer").body[0].value
        return node if node.id in self.NAMES else ast.Name("Any")

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        root = node
        while isinstance(root, ast.Attribute):
            root = root.value
        return node if isinstance(root, ast.Name) and root.id in self.NAMES else ast.Name("Any")

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        found = self.generic_visit(node)
        return found.value if isinstance(found.value, ast.Name) and found.value.id == "Any" else found


# --- Python --------------------------------------------------------------------------------------------------------


def _of_python(folder: Path) -> dict[str, str]:
    found = {}
    for module, files in TORCH_TENSORRT.items():
        lines = ["from typing import Any"]
        if module == "torch_tensorrt":
            lines += ["from torch_tensorrt import dynamo as dynamo, runtime as runtime", "__version__: str"]
        for file, names in files.items():
            tree = ast.parse((folder / "torch_tensorrt" / file).read_text())
            nodes = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            lines += [line for name in names for line in _python(nodes[name])]
        found[module.replace(".", "/") + "/__init__.pyi"] = "\n".join(lines) + "\n"
    return found


def _python(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    if isinstance(node, ast.FunctionDef):
        return [f"def {node.name}({_parameters(node)}) -> Any: ..."]
    init = next(part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__")
    return [f"class {node.name}:", f"    def __init__({_init_parameters(init)}) -> None: ..."]


def _parameters(node: ast.FunctionDef) -> str:
    """Its parameters by name; one that takes any keyword is left out, so that a misspelt one is seen."""
    plain = [*node.args.posonlyargs, *node.args.args]
    optional = len(plain) - len(node.args.defaults)
    parts = [one.arg + (": Any = ..." if at >= optional else ": Any") for at, one in enumerate(plain)]
    if node.args.kwonlyargs:
        parts.append("*")
    for one, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        parts.append(one.arg + (": Any" if default is None else ": Any = ..."))
    return ", ".join(parts)


def _init_parameters(node: ast.FunctionDef) -> str:
    """The keywords that a constructor of ``*args, **kwargs`` documents or reads."""
    text = ast.unparse(node)
    read = re.findall(r"kwargs(?:\.get\(|\[)'(\w+)'", text) + re.findall(r"'(\w+)'\s+(?:not )?in kwargs", text)
    return ", ".join(["self", "*args: Any", *(f"{name}: Any = ..." for name in dict.fromkeys(read))])


def main() -> None:
    """Write all stubs."""
    for wheel in WHEELS:
        for name, text in stubs(wheel).items():
            path = HERE / wheel.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(path.relative_to(HERE), len(text.splitlines()), "lines")


if __name__ == "__main__":
    main()
