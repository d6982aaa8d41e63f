"""The ``.ort`` flatbuffer, put into one canonical order.

ONNX Runtime writes the table of kernel argument types in the order of a hash table that is salted anew in each
process, so two builds of one graph differ. That table is the last thing that it writes before the root, and a
flatbuffer grows from its end: the model behind it can stay as it is while table and root are written again, sorted.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import BuildError

IDENTIFIER = b"ORTM"

Argument = tuple[int, int]
Entry = tuple[bytes, list[tuple[bytes, list[Argument]]]]


def make_canonical(path: Path) -> None:
    """Rewrite the file `path` so that equal graphs have equal bytes.

    Raises:
        BuildError: the file isn't laid out as ONNX Runtime's writer does it.
    """
    import flatbuffers

    session: Any = _part("InferenceSession")

    data = path.read_bytes()
    root = session.InferenceSession.GetRootAs(data, 0)
    model, resolver = root.Model(), root.KernelTypeStrResolver()
    if model is None or resolver is None:
        raise BuildError(f"`{path}` holds no model", hint="this version of onnxruntime may write another layout")
    table = model._tab.Pos
    start = min(table, table - struct.unpack_from("<i", data, table)[0])  # its vtable is in front of it
    if resolver._tab.Pos >= start:
        raise BuildError(f"`{path}` has its parts in another order than onnxruntime 1.31 writes them")

    tail = data[start:]
    builder = flatbuffers.Builder(len(data) + 1024)
    builder.Bytes[len(builder.Bytes) - len(tail) :] = tail
    builder.head = len(builder.Bytes) - len(tail)
    builder.minalign = 16  # what the model's own tensors may need
    builder.Prep(16, 0)
    version = builder.CreateString(root.OrtVersion())
    sorted_resolver = _resolver(builder, _entries(resolver))
    session.Start(builder)
    session.AddOrtVersion(builder, version)
    session.AddModel(builder, len(data) - table)  # offsets count from the end, which has not moved
    session.AddKernelTypeStrResolver(builder, sorted_resolver)
    builder.Finish(session.End(builder), file_identifier=IDENTIFIER)
    path.write_bytes(builder.Output())


def _part(table: str) -> Any:
    """The generated reader and writer of one kind of table."""
    return importlib.import_module(f"onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.{table}")


def _entries(resolver: Any) -> list[Entry]:
    """Content of the table, sorted: operator, then argument type, then the places where it is used."""
    found = []
    for number in range(resolver.OpKernelTypeStrArgsLength()):
        entry = resolver.OpKernelTypeStrArgs(number)
        kinds = []
        for position in range(entry.KernelTypeStrArgsLength()):
            kind = entry.KernelTypeStrArgs(position)
            arguments = [(kind.Args(place).ArgType(), kind.Args(place).Index()) for place in range(kind.ArgsLength())]
            kinds.append((kind.KernelTypeStr(), arguments))
        found.append((entry.OpId(), sorted(kinds)))
    return sorted(found)


def _resolver(builder: Any, entries: list[Entry]) -> int:
    kind_entry, op_entry = _part("KernelTypeStrArgsEntry"), _part("OpIdKernelTypeStrArgsEntry")
    resolver = _part("KernelTypeStrResolver")
    operators = []
    for operator, kinds in entries:
        offsets = []
        for kind, arguments in kinds:
            name = builder.CreateString(kind)
            vector = _vector(builder, kind_entry.StartArgsVector, [_argument(builder, one) for one in arguments])
            kind_entry.Start(builder)
            kind_entry.AddKernelTypeStr(builder, name)
            kind_entry.AddArgs(builder, vector)
            offsets.append(kind_entry.End(builder))
        name = builder.CreateString(operator)
        vector = _vector(builder, op_entry.StartKernelTypeStrArgsVector, offsets)
        op_entry.Start(builder)
        op_entry.AddOpId(builder, name)
        op_entry.AddKernelTypeStrArgs(builder, vector)
        operators.append(op_entry.End(builder))
    vector = _vector(builder, resolver.StartOpKernelTypeStrArgsVector, operators)
    resolver.Start(builder)
    resolver.AddOpKernelTypeStrArgs(builder, vector)
    return int(resolver.End(builder))


def _argument(builder: Any, argument: Argument) -> int:
    place = _part("ArgTypeAndIndex")
    place.Start(builder)
    place.AddArgType(builder, argument[0])
    place.AddIndex(builder, argument[1])
    return int(place.End(builder))


def _vector(builder: Any, start: Callable[[Any, int], object], offsets: list[int]) -> int:
    start(builder, len(offsets))
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())
