"""What goes beside a ``.ort`` file: which operators its runtime must have, and where that runtime comes from."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from pipeline import host
from pipeline.store import write_json
from pipeline.types import Target

OPERATORS = "required_operators.config"
RUNTIME = "runtime.json"
PACKAGES: Mapping[str, Mapping[str, JsonValue]] = {
    "android": {"package": "com.microsoft.onnxruntime:onnxruntime-android", "registry": "Maven Central"},
    "ios": {"package": "onnxruntime-objc", "registry": "CocoaPods"},
    "web": {
        "package": "onnxruntime-web",
        "registry": "npm",
        "files": ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"],
        "headers_for_threads": {
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Embedder-Policy": "require-corp",
        },
    },
}


def write(path: Path, target: Target) -> None:
    """Write ``required_operators.config`` and ``runtime.json`` beside the ``.ort`` file `path`.

    The first is what ONNX Runtime's build script takes as ``--include_ops_by_config`` (with
    ``--enable_reduced_operator_type_support``) to make a runtime of a few hundred kilobytes.
    """
    create_config_from_models = _quietly_imported()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves the file open for the garbage collector
        made = Path(folder) / OPERATORS
        create_config_from_models([path], made, enable_type_reduction=True)
        lines = [line for line in made.read_text().splitlines() if not line.startswith("#")]  # paths of this machine
    (path.parent / OPERATORS).write_text("\n".join(lines) + "\n")
    (version,) = host.versions(["onnxruntime", "onnxruntime-gpu"]).values()
    known = PACKAGES.get(target.platform, {})
    write_json(
        path.parent / RUNTIME,
        {"runtime": "onnxruntime", "written_by": version, "required_operators": OPERATORS, **known},
    )


def _quietly_imported() -> Callable[..., Any]:
    """Their function, without what importing it does to everybody's log: a handler, and lines about files of ours."""
    everybodys = logging.getLogger()
    before = [*everybodys.handlers]
    from onnxruntime.tools.ort_format_model import create_config_from_models

    everybodys.handlers[:] = before
    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    found: Callable[..., Any] = create_config_from_models
    return found
