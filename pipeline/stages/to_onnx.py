"""To ONNX: from the captured program to a checked graph with the recipe's names, opset and axes."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import onnxscript.optimizer
import torch
from onnx_ir.passes import common as passes
from pydantic import JsonValue
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline import pins, recipes
from pipeline import program as programs
from pipeline.errors import ConversionError, NotApplicable, RecipeError, nearest
from pipeline.store import Stored, write_json
from pipeline.types import Recipe

FILE = "model.onnx"
INLINE_BYTES = 1_900_000_000  # protobuf holds no more than 2 GiB in one message
_RUNTIME_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
_OTHER_LAYOUT = "Cannot view a tensor with shape"
_OPERATOR = re.compile(r"OpOverload\(op='([\w.:]+)'")


def to_onnx(recipe: Recipe, program: Stored, out: Path, inline_bytes: int = INLINE_BYTES) -> dict[str, JsonValue]:
    """Write ``model.onnx`` and ``signature.json`` into `out`; weights of `inline_bytes` or more go to a file beside.

    Raises:
        NotApplicable: an operator has no ONNX form.
        ConversionError: the exporter fails, or the result is not a valid model.
        RecipeError: `translations` is wrong.
    """
    source = programs.load_program(program, recipe)
    signature = program.signature()
    symbols = programs.axis_symbols(source, recipe)
    with programs.quiet():
        model = _converted(recipe, source, program).model
        onnxscript.optimizer.optimize_ir(model)
        passes.RemoveUnusedOpsetsPass()(model)
        pins.pin(model, signature, symbols, recipe.root)
        passes.ShapeInferencePass()(model)
    facts = pins.facts(model)
    if facts["opset"] != recipe.opset:
        raise ConversionError(
            f"recipe `{recipe.name}`: asked for opset {recipe.opset}, the exporter gives {facts['opset']}",
            hint=f"set opset = {facts['opset']} in recipe.toml",
        )
    external = FILE + ".data" if int(str(facts["parameter_bytes"])) >= inline_bytes else None
    ir.save(model, out / FILE, external_data=external, size_threshold_bytes=1024)
    facts["checked"] = _check(recipe, out / FILE, model)
    write_json(out / "signature.json", signature.plain())
    return facts


def decomposed(recipe: Recipe, program: Stored) -> ExportedProgram:
    """The program as the exporter breaks it down before it writes operators: most tensors of the graph have the names
    of its nodes.

    Raises:
        NotApplicable, ConversionError, RecipeError: as `to_onnx`.
    """
    source = programs.load_program(program, recipe)
    with programs.quiet():
        found = _converted(recipe, source, program).exported_program
    assert found is not None, "it was exported from one"
    return found


def _converted(recipe: Recipe, source: ExportedProgram, stored: Stored) -> torch.onnx.ONNXProgram:
    """The graph of `source`, which conversion changes, and which `stored` holds."""
    translations = _translations(recipe)
    try:
        try:
            return _exported(recipe, source, translations)
        except torch.onnx.errors.OnnxExporterError as error:
            if _OTHER_LAYOUT not in "\n".join(str(one) for one in _chain(error)):
                raise
        # torch lays the result of an attention out for one of its kernels, and then writes another one down, whose
        # result can't be viewed alike; the plainest kernel is laid out as it is written down
        with sdpa_kernel(SDPBackend.MATH):
            return _exported(recipe, programs.load_program(stored, recipe), translations)
    except torch.onnx.errors.OnnxExporterError as error:
        raise _explained(recipe, source, error) from error


def _exported(
    recipe: Recipe, program: ExportedProgram, translations: dict[Callable[..., Any], Any] | None
) -> torch.onnx.ONNXProgram:
    made = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=recipe.opset,
        optimize=False,
        verbose=False,
        custom_translation_table=translations,
    )
    assert made is not None
    return made


def _translations(recipe: Recipe) -> dict[Callable[..., Any], Any] | None:
    """What the recipe's `translations` returns, its keys (``mine::twice``) resolved to torch's operators."""
    if recipe.translations is None:
        return None
    table = recipes.call(recipe, recipe.translations, "translations")
    if not isinstance(table, Mapping) or not table:
        raise RecipeError(
            f'recipe `{recipe.name}`: `translations = "{recipe.translations}"` returned a {type(table).__name__}',
            hint='return {"mine::twice": onnxscript_function}',
        )
    return {_operator(recipe, key): function for key, function in table.items()}


def _operator(recipe: Recipe, key: Any) -> Any:
    if not isinstance(key, str):
        return key
    space, _, rest = key.replace("::", ".", 1).partition(".")
    name, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, space), name, None)
    found = getattr(packet, overload or "default", None)
    if found is None:
        known = [
            one.removeprefix(f"{space}::")
            for one in torch._C._dispatch_get_all_op_names()
            if one.startswith(f"{space}::")
        ]
        close = nearest(name, known)
        raise RecipeError(
            f"recipe `{recipe.name}`: `translations` names the operator `{key}`, which torch doesn't know",
            hint=f"did you mean `{space}::{close}`?" if close else "define it with `@torch.library.custom_op` first",
        )
    return found


def _explained(recipe: Recipe, program: ExportedProgram, error: BaseException) -> ConversionError:
    chain = _chain(error)
    text = "\n".join(str(one) for one in chain[::-1])
    found = _OPERATOR.search(text)
    if found is None:
        last = chain[-1]
        frames = traceback.extract_tb(last.__traceback__)
        where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        first = (str(last).strip().splitlines() or [""])[0]
        return ConversionError(
            f"recipe `{recipe.name}`: the ONNX exporter failed: {type(last).__name__}: {first[:200]}{where}",
            hint="another `opset` in recipe.toml may help; else write that part of the model with other operators",
        )
    name = found.group(1).replace(".", "::", 1)
    line = _user_line(program, found.group(1))
    return NotApplicable(
        f"recipe `{recipe.name}`: operator `{name}` has no ONNX form in opset {recipe.opset}"
        + (f"\n  at {line}" if line else ""),
        hint=f'use other operators there, or give one: `translations = "model:translations"` that returns '
        f'{{"{name}": an onnxscript function}}',
    )


def _chain(error: BaseException) -> list[BaseException]:
    """The error, what it was raised from, and so on."""
    found = [error]
    while found[-1].__cause__ is not None:
        found.append(found[-1].__cause__)
    return found


def _user_line(program: ExportedProgram, operator: str) -> str | None:
    """Where the user's code calls `operator` (``aten.sort``), directly or through one that is made of it.

    The exporter decomposes further than the program does, into operators that keep the name (``aten.special_zeta``
    becomes ``prims.zeta``): so a name that ends alike is looked for when there is no equal one.
    """
    nodes = [*program.graph.nodes, *program.run_decompositions().graph.nodes]
    leaf = operator.rpartition(".")[2]
    equal = [node for node in nodes if str(node.target).rpartition(".")[0] == operator]
    alike = [node for node in nodes if str(node.target).rpartition(".")[0].endswith(leaf)]
    for node in equal or alike:
        if node.meta.get("stack_trace"):
            frames = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s*(.*)', node.meta["stack_trace"])
            mine = [frame for frame in frames if not frame[0].startswith(("torch/", "pipeline/"))] or frames
            return "{}:{}: {}".format(*mine[-1]) if mine else None
    return None


def _check(recipe: Recipe, path: Path, model: ir.Model) -> str:
    """Refuse an invalid file; says by which means it was checked."""
    foreign = sorted(set(model.opset_imports) - _RUNTIME_DOMAINS)
    try:
        onnx.checker.check_model(str(path), full_check=True)
        if foreign:
            return f"onnx.checker; ONNX Runtime does not know {', '.join(foreign)}"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # both libraries raise many types of their own
        first = (str(error).strip().splitlines() or [""])[0]
        raise ConversionError(
            f"recipe `{recipe.name}`: the exported graph is not valid: {type(error).__name__}: {first[:300]}",
            hint="this is a fault of the exporter: another `opset`, or other operators in the model, go around it",
        ) from error
    return "onnx.checker, ONNX Runtime"
