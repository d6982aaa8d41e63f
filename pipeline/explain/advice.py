"""What to do about a departure: one sentence, which names only settings that exist."""

from __future__ import annotations

from pipeline.explain.faults import Fault

AGAIN = "remove this engine's folder below artifacts/ and export again"
LESS = 'set `optimization = "basic"` in the row\'s options'
_STORED = (
    "bias",
    "weights differ",
    "layout",
    "scale",
    "zero point",
    "epsilon",
    "axis",
    "constant",
    "attribute",
    "resize",
)


def of_engine(fault: Fault, operator: str | None) -> str:
    """For an operator of an engine that isn't what the form says.

    Args:
        fault: what is wrong.
        operator: the engine's type of operator.
    """
    fused = f"ONNX Runtime's `{operator}`" if operator else "the engine"
    if fault.kind in _STORED:
        return f"the engine's file holds something else than its form: {AGAIN}; if it is so again, report {fused}"
    if fault.kind in ("mask", "input dropped", "left out"):
        return f"the engine lost an operator: {AGAIN}; if it is so again, {LESS}"
    if fault.kind == "overflow":
        return "float16 ends at 65,504: take `fp16` out of the row's `schemes`, or bound what this operator reads"
    if fault.kind == "range saturates":
        return f"the range of this tensor is too narrow in the engine: {AGAIN}"
    return f"{fused} computes something else on this processor: {LESS}, or take the scheme out of the row's `schemes`"


def of_form(fault: Fault) -> str:
    """For an operator that is worse than its numeric form explains.

    Args:
        fault: what is wrong.
    """
    if fault.kind == "overflow":
        return (
            "float16 ends at 65,504: take `fp16` out of the row's `schemes` (`bf16`, where the row's backend has it, "
            "reaches as far as float32), or scale what this operator makes down in the model"
        )
    if fault.kind in ("range saturates", "scale", "zero point"):
        return (
            'set another range method (`[calibration] method`, or `"auto"`, which measures), see that the calibration '
            "data reach as far as what is met in use, and export again"
        )
    if fault.kind in ("weights differ", "bias", "layout"):
        return "the form holds other numbers than fp32: remove its folder below artifacts/onnx/ and export again"
    return "take the scheme out of the row's `schemes`; a stricter `[budget]` makes the search leave it in float"
