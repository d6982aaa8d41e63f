"""The nouns of exportyard, as frozen models: all that is read from or written to a file.

Shapes are written with axis names where a dimension is dynamic: ``["batch", 3, 224, 224]``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.store import Stored

    Tensors = Mapping[str, NDArray[np.generic]]

Scheme = Literal["fp32", "fp16", "bf16", "int8-dynamic", "int8-u8s8", "int8-s8s8", "int8-u8u8"]
"""A numeric form of the ONNX graph; for static INT8 activations come first, weights second."""

DType = Literal["float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
Kind = Literal[
    "checkpoint",
    "data",
    "program",
    "onnx",
    "statistics",
    "tuning",
    "engine",
    "parity",
    "explanation",
    "audit",
    "latency",
    "compilation",
    "release",
    "report",
]
OutputKind = Literal["logits", "probabilities", "embedding", "scores", "indices", "boxes", "other"]
RangeMethod = Literal["minmax", "entropy", "percentile", "mse"]
Sizes = Mapping[str, int]
"""One size for each axis: ``{"batch": 8, "seq": 128}``."""

# what a git tag, a DVC stage and a file name all take
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9_-]*[a-z0-9])?$")]
Dim = int | str
LARGEST = 2**31 - 1  # of sizes and counts: what every engine's index takes
_LIMITS: Mapping[DType, tuple[float, float]] = {
    "float32": (-3.4e38, 3.4e38),
    "float64": (-1e308, 1e308),
    "float16": (-65504, 65504),
    "int64": (-(2**63), 2**63 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "int16": (-(2**15), 2**15 - 1),
    "int8": (-128, 127),
    "uint8": (0, 255),
    "bool": (0, 1),
}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


CHECKPOINT_KINDS = (".safetensors", ".pt", ".pth", ".pt2")
"""Suffixes of the files that may be checkpoints."""


class Frozen(BaseModel):
    """Base of everything that lives in a file: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", protected_namespaces=())

    def plain(self) -> dict[str, JsonValue]:
        """This as plain JSON data; an infinity is the string ``"Infinity"``, since JSON has no number for it."""
        found: dict[str, JsonValue] = json.loads(self.model_dump_json())
        return found


class Axis(Frozen):
    """A dynamic dimension: sizes that engines must serve, and the one they are tuned for."""

    min: int = Field(ge=1, le=LARGEST)
    opt: int = Field(ge=1, le=LARGEST)
    max: int = Field(ge=1, le=LARGEST)

    @model_validator(mode="after")
    def _ordered(self) -> Axis:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"expected min <= opt <= max, got {self.min}, {self.opt}, {self.max}")
        return self


class InputSpec(Frozen):
    """One input tensor.

    Attributes:
        shape: a size or an axis name for each dimension; ``[]`` is a scalar.
        range: lowest and highest value that the model meets in use, both included.
    """

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    dtype: DType
    shape: tuple[Dim, ...]
    range: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _possible(self) -> InputSpec:
        for size in self.shape:
            if isinstance(size, int) and not 1 <= size <= LARGEST:
                raise ValueError(f"input `{self.name}`: {size} is no size; expected 1 or more, or an axis name")
        lowest, highest = _LIMITS[self.dtype]
        if self.range is not None and not lowest <= self.range[0] <= self.range[1] <= highest:
            low, high = self.range
            raise ValueError(
                f"input `{self.name}`: range [{low:g}, {high:g}] must be lowest, highest, within {self.dtype}"
            )
        return self


class OutputSpec(Frozen):
    """One output: its published name, and what its numbers are (this decides which distances mean something)."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    kind: OutputKind = "other"


class TensorSpec(Frozen):
    """A tensor as the captured program has it; a dynamic dimension is an axis name or an expression of them."""

    name: str
    dtype: DType
    shape: tuple[Dim, ...]
    kind: OutputKind = "other"


class Signature(Frozen):
    """The calling convention that every artifact of a model shares: order, names, dtypes, shapes, axes."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: Mapping[str, Axis]


class Tolerance(Frozen):
    """Bounds on the distance between two tensors; a bound that is absent isn't checked, but one must be there.

    Attributes:
        max_abs: largest absolute difference.
        max_over_peak: largest absolute difference over the reference's largest magnitude.
        rmse: root of the mean squared difference.
        sqnr_db: least signal to quantization-noise ratio, in dB.
        cosine: least cosine of the flattened tensors.
        argmax_agreement: least share of rows whose largest element is the same one.
    """

    max_abs: float | None = Field(default=None, ge=0)
    max_over_peak: float | None = Field(default=None, ge=0)
    rmse: float | None = Field(default=None, ge=0)
    sqnr_db: float | None = None
    cosine: float | None = Field(default=None, ge=-1, le=1)
    argmax_agreement: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _bounded(self) -> Tolerance:
        if not self.model_fields_set:
            raise ValueError("a tolerance needs at least one bound, such as `cosine = 0.999`")
        if self.sqnr_db is not None and math.isnan(self.sqnr_db):
            raise ValueError("`sqnr_db` is nan, which bounds nothing")
        return self


class Calibration(Frozen):
    """Where activation ranges come from.

    Attributes:
        data: a ``.npz`` or ``.safetensors`` file beside the recipe, or ``module:callable`` that yields feeds.
        samples: how many feeds to use at most.
        method: how a range is read from the observed values; ``auto`` measures which way is best.
    """

    data: str
    samples: int = Field(default=256, ge=1, le=LARGEST)
    method: RangeMethod | Literal["auto"] = "auto"


class Evaluation(Frozen):
    """How good the model is, by the recipe's own measure.

    Attributes:
        data: as for calibration; arrays that aren't inputs are labels and go to the metric.
        metric: ``module:callable``, or ``accuracy``, ``agreement`` or ``cosine`` (the last two against eager fp32).
    """

    data: str
    metric: str
    samples: int = Field(default=1024, ge=1, le=LARGEST)
    higher_is_better: bool = True


class Budget(Frozen):
    """How much worse than eager fp32 a released engine may be.

    Attributes:
        drop: how far the evaluation metric may fall (absolute, in the metric's unit).
        vs_eager: bounds on every output against eager fp32, on the evaluation data.
        min_int8_share: least share of an INT8 engine's compute that must run in INT8; see `Audit`.
    """

    drop: float = Field(ge=0, allow_inf_nan=False)
    vs_eager: Tolerance | None = None
    min_int8_share: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _finite(self) -> Budget:
        if self.vs_eager is not None and math.inf in self.vs_eager.model_dump().values():
            raise ValueError("a bound in `vs_eager` must be finite; one that is left out isn't checked")
        return self


class Worsening(Frozen):
    """How much worse an engine may be than in the release before; what is None isn't judged.

    Attributes:
        drop: how far the evaluation metric may get worse (absolute, in the metric's unit).
        slowdown: by which share a call may take longer: 0.1 is ten percent.
        growth: by which share the engine's files may get larger.
    """

    drop: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    slowdown: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    growth: float | None = Field(default=None, ge=0, allow_inf_nan=False)


class Regression(Worsening):
    """What a release may lose against the one before; `exportyard publish` refuses more.

    Attributes:
        keep_targets: whether a release needs an engine for each target that the one before has one for.
        targets: other bounds for some targets; those left out there are as for all.
    """

    keep_targets: bool = False
    targets: Mapping[Name, Worsening] = {}

    def of(self, target: str) -> Worsening:
        """The bounds of one target."""
        common = self.model_dump(include=set(Worsening.model_fields))
        own = self.targets.get(target, Worsening()).model_dump(exclude_none=True)
        return Worsening(**common | own)


Policy = Literal["fail", "note", "skip"]
"""What a stress check may do: fail the target, only be told, or not be asked at all."""


class Stress(Frozen):
    """What engines are asked beyond usual inputs, and what each answer may do to a target (`pipeline.stress`).

    Attributes:
        mask: for each input that is a mask, the axis along which a 0 in it says that there is nothing to look at.
        free: inputs that may hold any value of their range, whatever the others hold. By default those of floats, and
            the others, too, where no `feeds` makes them.
        sizes: odd sizes of all axes at once.
        rows: rows of a batch, each alone and all together.
        padding: longer inputs, of which a mask says that the end is padding.
        zeros: all values 0, or as near to it as the range goes.
        ends: all values at the ends of their range.
        denormals: floats so small that they have lost digits.
        nan: NaN that goes in where the model lets it come out.
        nan_rows: NaN in one row of a batch, and the other rows.
        vectors: the inputs that `exportyard stress` has kept.
    """

    mask: Mapping[str, str] = {}
    free: Annotated[tuple[str, ...] | None, BeforeValidator(_tuple)] = None
    sizes: Policy = "fail"
    rows: Policy = "fail"
    padding: Policy = "fail"
    zeros: Policy = "fail"
    ends: Policy = "fail"
    denormals: Policy = "note"
    nan: Policy = "note"
    nan_rows: Policy = "fail"
    vectors: Policy = "fail"


class Tolerances(Frozen):
    """How far an engine may be from its form, in the recipe's words; what isn't said here, the target's row says.

    In the file the table is flat: ``[tolerance]`` has a key for each scheme, beside `outputs`.

    Attributes:
        schemes: bounds on every output.
        outputs: for some outputs, other bounds instead of these.
    """

    schemes: Mapping[Scheme, Tolerance] = {}
    outputs: Mapping[str, Mapping[Scheme, Tolerance]] = {}

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "schemes" in value:
            return value
        strange = [key for key in value if key not in (*get_args(Scheme), "outputs")]
        if strange:
            raise ValueError(
                f"`{strange[0]}` is neither a scheme nor `outputs`; schemes: {', '.join(get_args(Scheme))}"
            )
        return {"schemes": {key: one for key, one in value.items() if key != "outputs"}} | {
            key: one for key, one in value.items() if key == "outputs"
        }


def _is_callable(source: str) -> bool:
    module, colon, name = source.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _require(value: Any) -> Any:
    names = isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value)
    if value == "all" or names:
        return value if value == "all" else tuple(value)
    raise ValueError('expected "all", or a list of targets')


class Recipe(Frozen):
    """One model: ``recipes/<name>/recipe.toml``. Callables are ``module:name``, looked up beside the file first.

    Attributes:
        checkpoint: file with the trained weights, beside the recipe: ``.pt``, ``.pth``, ``.safetensors``, ``.pt2``.
        train: ``module:callable(path)`` that writes the checkpoint when there is no file; its suffix is `train_suffix`.
        factory: ``module:callable() -> torch.nn.Module``; not needed for a ``.pt2`` checkpoint.
        feeds: ``module:callable(sizes, seed) -> {input: array}``, for inputs that a value range can't describe.
        translations: ``module:callable() -> {operator: onnxscript function}`` for custom operators.
        require: targets that must have passed for a release; ``all`` stands for all that could be built.
        regression: how much worse a release may be than the one before; None judges nothing.
        tolerance: instead of a row's `vs_onnx`, for this model.
    """

    name: Name
    summary: str = ""
    checkpoint: str | None = None
    train: str | None = None
    train_suffix: Literal[".pt", ".safetensors"] = ".safetensors"
    factory: str | None = None
    axes: Mapping[str, Axis] = {}
    inputs: Annotated[tuple[InputSpec, ...], BeforeValidator(_tuple)] = Field(min_length=1)
    outputs: Annotated[tuple[OutputSpec, ...], BeforeValidator(_tuple)] = Field(min_length=1)
    feeds: str | None = None
    translations: str | None = None
    opset: int = Field(default=20, ge=18, le=23)
    calibration: Calibration | None = None
    evaluation: Evaluation
    budget: Budget
    regression: Regression | None = None
    tolerance: Tolerances = Tolerances()
    stress: Stress = Stress()
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    require: Annotated[Literal["all"] | tuple[str, ...], BeforeValidator(_require)] = "all"
    folder: Path = Field(exclude=True, repr=False)
    root: Path = Field(exclude=True, repr=False)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.checkpoint is None and self.train is None:
            raise ValueError("needs `checkpoint` (a file) or `train` (a callable that writes one)")
        for setting in ("train", "factory", "feeds", "translations"):
            source = getattr(self, setting)
            if source is not None and not _is_callable(source):
                raise ValueError(f'`{setting} = "{source}"` is not `module:name`, such as `model:build`')
        for what, names in (
            ("input", [spec.name for spec in self.inputs]),
            ("output", [spec.name for spec in self.outputs]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{what} name `{min(twice)}` appears twice")
        shared = {spec.name for spec in self.inputs} & {spec.name for spec in self.outputs}
        if shared:
            raise ValueError(f"`{min(shared)}` names both an input and an output")
        used = {dim for spec in self.inputs for dim in spec.shape if isinstance(dim, str)}
        if used - set(self.axes):
            raise ValueError(f"axis `{min(used - set(self.axes))}` is used by an input but not described in [axes]")
        if set(self.axes) - used:
            raise ValueError(f"axis `{min(set(self.axes) - used)}` is described in [axes] but no input has it")
        return self

    @model_validator(mode="after")
    def _named(self) -> Recipe:
        """What `[stress]` and `[tolerance]` name is there."""
        inputs = {spec.name: spec for spec in self.inputs}
        for setting, names in (("mask", self.stress.mask), ("free", self.stress.free or ())):
            for name in names:
                if name not in inputs:
                    raise ValueError(f"`[stress] {setting}` names `{name}`, which is no input of {sorted(inputs)}")
        for name, axis in self.stress.mask.items():
            if axis not in inputs[name].shape or axis not in self.axes:
                raise ValueError(f"`[stress] mask`: input `{name}` has no axis `{axis}`; it is {[*inputs[name].shape]}")
        strange = set(self.tolerance.outputs) - {spec.name for spec in self.outputs}
        if strange:
            known = sorted(spec.name for spec in self.outputs)
            raise ValueError(f"`[tolerance.outputs]` names `{min(strange)}`, which is no output of {known}")
        return self


class Device(Frozen):
    """A board on which engines of a row are run.

    Attributes:
        rpc: ``host:port`` of a TVM RPC server there.
    """

    rpc: str = Field(pattern=r"^[^:\s]+:[0-9]{1,5}$")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        name, _, port = self.rpc.rpartition(":")
        return name, int(port)


def _buckets(value: Any) -> Any:
    """``"auto"`` as a table that leaves every axis to us; sizes in ascending order."""
    if value == "auto":
        return {}
    if value is None or isinstance(value, Mapping):
        return value and {axis: _bucket_sizes(axis, sizes) for axis, sizes in value.items()}
    raise ValueError('expected "auto", or a table of sizes for each axis such as { batch = [1, 8] }')


def _bucket_sizes(axis: str, value: Any) -> tuple[int, ...]:
    sizes = list(value) if isinstance(value, list | tuple) else []
    whole = all(isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= LARGEST for size in sizes)
    if not sizes or not whole or len(set(sizes)) < len(sizes):
        raise ValueError(f"axis `{axis}` is {value!r}: expected different sizes from 1 on, such as [1, 8]")
    return tuple(sorted(sizes))


Buckets = Annotated[Mapping[str, tuple[int, ...]] | None, BeforeValidator(_buckets)]
"""Sizes of each axis that engines are built for; an axis that isn't there has its opt and its max."""


Minutes = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Limits(Frozen):
    """What the builder of one engine may take.

    Attributes:
        minutes: on the clock.
        memory_gb: resident memory of all its processes together, in 10^9 bytes.
    """

    minutes: Minutes | None = None
    memory_gb: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _limited(self) -> Limits:
        if self.minutes is None and self.memory_gb is None:
            raise ValueError("limits nothing; expected `minutes`, `memory_gb` or both")
        return self


class Target(Frozen):
    """One row of ``targets/targets.toml``: hardware, backend and precision policy.

    Attributes:
        name: spells platform-arch-backend.
        arch: the backend's word for the hardware; only the backend reads it.
        requires: CPU features that the device must have (Linux's names, as in /proc/cpuinfo).
        schemes: candidate numeric forms, best expected first; measurement decides.
        vs_onnx: for each scheme, how far an engine may be from the ONNX graph that it was built from.
        pool: Prefect work pool whose workers can build and run it.
        device: where its engines are run; without it, on this host or under an emulator.
        candidates: for a row of the backend ``auto``: the rows among which it chooses; it has no schemes of its own.
        buckets: fixed sizes, one engine for each combination (`pipeline.buckets`); None is one engine for all sizes.
            In the file ``"auto"`` stands for an empty table.
        limits: what its builders may take, each of which then runs in a process of its own. They decide no bytes.
    """

    name: Name
    backend: str
    platform: Literal["linux", "android", "ios", "macos", "windows", "web", "any"]
    machine: Literal["x86_64", "aarch64", "armv7l", "riscv64", "wasm32", "any"]
    arch: str
    summary: str = ""
    requires: tuple[str, ...] = ()
    schemes: Annotated[tuple[Scheme, ...], BeforeValidator(_tuple)] = ()
    vs_onnx: Mapping[Scheme, Tolerance] = {}
    candidates: Annotated[tuple[Name, ...], BeforeValidator(_tuple)] = ()
    pool: str = "cpu"
    options: Mapping[str, str | int | bool] = {}
    device: Device | None = None
    buckets: Buckets = None
    limits: Limits | None = None

    @model_validator(mode="after")
    def _covered(self) -> Target:
        if bool(self.candidates) != (self.backend == "auto"):
            raise ValueError("a row of the backend `auto` names the rows of `candidates`, and no other row does")
        if bool(self.candidates) == bool(self.schemes):
            raise ValueError(
                "`schemes` is for rows that are built, and this one only chooses" if self.schemes else "needs `schemes`"
            )
        for scheme in self.schemes:
            if scheme not in self.vs_onnx:
                raise ValueError(f"scheme `{scheme}` has no tolerance in `vs_onnx`")
        return self


class FileFact(Frozen):
    """Identity of one file of an artifact."""

    sha256: str
    size_bytes: int


class Artifact(Frozen):
    """``artifact.json``: all that decided the bytes of a folder, and what the bytes are. No clock, no host name.

    Attributes:
        inputs: content digests of what it was made from, by role.
        config: settings that decided the bytes.
        tools: versions of the libraries that decided the bytes.
        files: each file below the folder, by relative POSIX path.
        facts: what the stage found out while it worked (ranges read back, operators left in float ...).
    """

    kind: Kind
    key: str
    inputs: Mapping[str, str]
    config: Mapping[str, JsonValue]
    tools: Mapping[str, str]
    files: Mapping[str, FileFact]
    facts: Mapping[str, JsonValue] = {}


class Distance(Frozen):
    """How far one output is from its reference; the numbers are those that `Tolerance` bounds.

    For ``indices`` only `argmax_agreement` (the share of equal elements) says anything.
    """

    output: str
    kind: OutputKind = "other"
    max_abs: float
    max_over_peak: float
    rmse: float
    sqnr_db: float
    cosine: float
    argmax_agreement: float | None = None


class SizeParity(Frozen):
    """Distances at one combination of axis sizes; none where the engine failed, which `error` then says."""

    sizes: Mapping[str, int]
    vs_onnx: tuple[Distance, ...] = ()
    vs_eager: tuple[Distance, ...] = ()
    error: str | None = None


class MetricResult(Frozen):
    """The recipe's own metric on its evaluation data, for eager fp32 and for the engine."""

    name: str
    eager: float
    engine: float
    drop: float
    budget: float
    samples: int
    vs_eager: tuple[Distance, ...] = ()


class StressCheck(Frozen):
    """What one question beyond usual inputs found out about an engine (`pipeline.stress`).

    Attributes:
        name: of the check, a key of the recipe's `[stress]`; of a kept input it is ``vector:<file>``.
        sizes: of the axes; none where nothing was run.
        compared: what with what, in words: ``engine with its form``, ``engine with itself, 1 row at a time``.
        found: the distances of the engine.
        own: for an invariance, the distances of the form to itself, which has no need to be invariant.
        verdict: ``noted`` is for what the form itself does, and for what the recipe doesn't fail a target for.
        why: what is wrong, or why it wasn't looked at; empty where it passed.
    """

    name: str
    sizes: Mapping[str, int] = {}
    compared: str = ""
    found: tuple[Distance, ...] = ()
    own: tuple[Distance, ...] = ()
    verdict: Literal["passed", "failed", "noted", "not applicable"]
    why: str = ""


class ParityReport(Frozen):
    """``parity.json``: whether an engine is still the model, and how that is known.

    Attributes:
        stress: what was asked beyond usual inputs; a check that failed is among `reasons`, too.
    """

    recipe: str
    target: str
    scheme: Scheme
    sizes: tuple[SizeParity, ...]
    metric: MetricResult
    passed: bool
    reasons: tuple[str, ...] = ()
    stress: tuple[StressCheck, ...] = ()


class Departure(Frozen):
    """An operator whose output isn't what the reference says, though its inputs are.

    SQNRs are in dB: ``inf`` where nothing differs, ``-inf`` where one side isn't finite.

    Attributes:
        level: where it came in: ``engine`` (the engine against the form it was built from), ``form`` (that form against
            the fp32 graph), ``conversion`` (the fp32 graph against the program).
        operator: its type, such as ``Conv``, or what the engine calls it.
        node: its name in the reference graph.
        engine_node: the operator of the engine that stands for it, where that is known.
        module: path as ``named_modules`` spells it; ``""`` if unknown.
        line: ``file:line`` of the user's source; ``""`` if unknown.
        output: the tensor that departs, by its name in the reference graph.
        before: worst SQNR of its inputs, when the whole model runs freely.
        after: SQNR of its output, likewise.
        own: SQNR of its output when it is given the reference's inputs.
        allowed: the least `own` that rounding explains.
        because: how `allowed` is known, in words.
        kind: what is wrong with it, in two or three words, where that can be told: ``bias``, ``range saturates``.
        suggestion: what to do, in one sentence.
    """

    level: Literal["engine", "form", "conversion"]
    operator: str
    node: str
    engine_node: str | None = None
    module: str = ""
    line: str = ""
    output: str
    before: float
    after: float
    own: float
    allowed: float
    because: str
    kind: str = "operator differs"
    suggestion: str


class Layer(Frozen):
    """One line of the error of each layer, in the graph's order; SQNRs are in dB.

    Attributes:
        after_db: of its output, when the whole model runs freely.
        own_db: likewise, when it is given the reference's inputs; None where that isn't known.
    """

    node: str
    operator: str
    module: str = ""
    line: str = ""
    output: str
    after_db: float
    own_db: float | None = None


class Explanation(Frozen):
    """``explanation.json``: where an engine stops being its model, if it does.

    Attributes:
        sizes: of the axes, at which the model was looked at.
        departures: the first is the answer; none where all is as it should be.
        layers: of the engine against the form it was built from; of that form against fp32 where it has other numbers.
        compared: tensors that were compared.
        not_compared: why some levels could not be looked into; None if all were.
    """

    recipe: str
    target: str
    scheme: Scheme
    sizes: tuple[Mapping[str, int], ...] = ()
    departures: tuple[Departure, ...] = ()
    layers: tuple[Layer, ...] = ()
    compared: int = 0
    not_compared: str | None = None


class AuditRow(Frozen):
    """One operator of the ONNX graph that does compute, and what became of it in the engine.

    Attributes:
        node: its name in the graph that the engine was built from.
        module: path of the PyTorch module that it came from; empty where the graph doesn't say.
        operator: of the engine; one that holds several nodes appears with each of them.
        runs_in: what its products are made of.
        macs: multiply-accumulates of one call, all axes at their opt sizes.
        fell_back: the graph wanted it in INT8, and the engine runs it in something else.
    """

    node: str
    module: str
    operator: str
    runs_in: Literal["int8", "fp16", "bf16", "fp32", "fp64"]
    macs: int
    fell_back: bool = False


class Audit(Frozen):
    """``audit.json``: what an engine really runs in INT8, read from its optimised graph.

    Attributes:
        sizes: of the axes.
        rows: in the engine's order.
        int8_share: share of all multiply-accumulates that run in INT8; None where it wasn't audited.
        not_audited: why not.
    """

    target: str
    scheme: Scheme
    sizes: Mapping[str, int] = {}
    rows: tuple[AuditRow, ...] = ()
    int8_share: float | None = None
    not_audited: str | None = None


class Timing(Frozen):
    """Wall time of one call, in milliseconds, over `repeats` interleaved calls."""

    median_ms: float
    p25_ms: float
    p75_ms: float
    repeats: int


class Ratio(Frozen):
    """How many times faster one runner is than another: quartiles of the ratios paired within each round.

    On one thread the ratio is of processor time, which a busy machine hardly disturbs; on more, of time on the clock.
    """

    median: float
    p25: float
    p75: float


class LatencyRow(Frozen):
    """All runners at one combination of axis sizes, measured turn by turn in one run.

    Attributes:
        threads: how many threads each of them had.
        eager: PyTorch's time; None on a device, which has none.
        versus_eager: for each scheme, eager PyTorch's time over its own in the same round; empty on a device.
        versus_fp32: likewise against the target's fp32 form; empty if that isn't among the candidates.
    """

    sizes: Mapping[str, int]
    threads: int
    eager: Timing | None = None
    engines: Mapping[Scheme, Timing]
    versus_eager: Mapping[Scheme, Ratio] = {}
    versus_fp32: Mapping[Scheme, Ratio] = {}


class LatencyReport(Frozen):
    """``latency.json``: how fast each candidate is; and on what it was measured.

    Attributes:
        not_measured: why there are no rows: an emulator's time is no time.
    """

    recipe: str
    target: str
    cpu: str
    rows: tuple[LatencyRow, ...]
    not_measured: str | None = None


class Comparison(Frozen):
    """``comparison.json``: how fast engines of several rows are on one thread, measured turn by turn in one run.

    Attributes:
        sizes: of the axes, one entry a measurement.
        versus_eager: for each of `sizes`, by row, eager PyTorch's processor time over the engine's in the same round.
    """

    sizes: tuple[Mapping[str, int], ...]
    versus_eager: tuple[Mapping[str, Ratio], ...]


class Machine(Frozen):
    """The machine that something was timed on, and what else it did meanwhile.

    Attributes:
        cores: that this process may use.
        governor: of the clock of the first of them; None where the kernel doesn't tell.
        turbo: whether the clock may rise above its nominal rate; likewise.
        load_before: the system's load average over the minute before; None where it has none.
        load_after: likewise, over the last minute of the timing, which is then part of it.
        others: how many cores other work used on average while timing; None where the kernel doesn't tell.
    """

    cpu: str
    cores: int
    governor: str | None = None
    turbo: bool | None = None
    load_before: float | None = None
    load_after: float | None = None
    others: float | None = None


class WarmUp(Frozen):
    """What a runner of a bench took before it was timed, with some number of threads.

    Attributes:
        build_s: seconds to load it, or to compile what is compiled ahead of the first call.
        first_s: seconds of its first call at each of the sizes together; compilers that compile as they run do it here.
        graphs: that torch.compile compiled; None for other runners, as are the next two.
        graph_breaks: places at which it went back to Python.
        recompilations: that other sizes than the first made necessary.
        sqnr_db: of a baseline's answer at opt sizes against eager PyTorch's, the worst output: one that is wrong is no
            baseline. None for engines, which parity has judged.
    """

    runner: str
    threads: int
    build_s: float
    first_s: float
    graphs: int | None = None
    graph_breaks: int | None = None
    recompilations: int | None = None
    sqnr_db: float | None = None


class BenchRow(Frozen):
    """All runners at one combination of axis sizes, measured turn by turn in one run.

    Attributes:
        threads: how many threads each had.
        pinned: the numbers of the cores that they were kept on; empty where they could run on all.
        times: by runner; those that aren't there are in `Bench.left_out`.
        versus_eager: eager PyTorch's time over the runner's in the same round; empty without eager.
        versus_compile: likewise, against torch.compile in its default mode.
    """

    sizes: Mapping[str, int]
    threads: int
    pinned: tuple[int, ...] = ()
    times: Mapping[str, Timing]
    versus_eager: Mapping[str, Ratio] = {}
    versus_compile: Mapping[str, Ratio] = {}


class Bench(Frozen):
    """``bench.json``: engines of a recipe and baselines of PyTorch, timed in one run.

    Attributes:
        seconds: of timing for each runner at each sizes and threads.
        engines: content digest of each engine, by runner.
        tools: versions of what the baselines are made with.
        left_out: runners that weren't timed, at all or at some sizes, and why.
        warnings: what a reader of the numbers should know.
    """

    recipe: str
    machine: Machine
    seconds: float
    engines: Mapping[str, str] = {}
    tools: Mapping[str, str] = {}
    warm_ups: tuple[WarmUp, ...] = ()
    rows: tuple[BenchRow, ...] = ()
    left_out: Mapping[str, str] = {}
    warnings: tuple[str, ...] = ()


class ProfileRow(Frozen):
    """One operator of an engine, and what of a call's time goes into it.

    Attributes:
        operator: its kind, as the engine calls it: ``Conv``, ``FusedMatMul``, ``ReorderOutput``.
        name: of this one, in the engine.
        node: of the form's graph for which it stands; empty if that isn't known, as are the next two then.
        module: path of the PyTorch module that it came from, as ``named_modules`` spells it.
        line: ``file:line`` of the user's source.
        ms: on the clock within one call, the median over the calls.
    """

    operator: str
    name: str
    node: str = ""
    module: str = ""
    line: str = ""
    ms: float


class Profile(Frozen):
    """Where the time of an engine's calls goes, by the runtime's own profiler.

    Attributes:
        sizes: of the axes.
        threads: that ran one operator.
        calls: how many were profiled.
        call_ms: one profiled call, from outside, the median.
        plain_ms: one call without the profiler, measured in turn with the profiled ones; the profiler costs the
            difference.
        rows: in the order they run in; what they leave of `call_ms` is the runtime's own work between operators.
        not_profiled: why there are no rows.
    """

    scheme: Scheme
    sizes: Mapping[str, int] = {}
    threads: int = 1
    calls: int = 0
    call_ms: float = 0
    plain_ms: float = 0
    rows: tuple[ProfileRow, ...] = ()
    not_profiled: str | None = None

    @property
    def operators_ms(self) -> float:
        """What all operators of one call take together."""
        return sum(row.ms for row in self.rows)


class ProfileReport(Frozen):
    """``profile.json``, beside ``latency.json``: a profile of each candidate that was timed."""

    recipe: str
    target: str
    cpu: str
    profiles: tuple[Profile, ...]


class Place(Frozen):
    """A place in the user's code at which a compiler stops, starts again or takes something for granted.

    Attributes:
        line: ``file:line: code``, empty if it isn't known.
        reason: what happens there.
        advice: what to do about it; empty if nothing need be done.
        sizes: of the axes at which it happened, where that matters.
    """

    line: str = ""
    reason: str
    advice: str = ""
    sizes: Mapping[str, int] = {}


class Compilation(Frozen):
    """``compilation.json``: what ``torch.compile`` makes of the user's model over the sizes of its axes.

    Attributes:
        sizes: that it was called with, in this order.
        graphs: that the first call was cut into.
        graph_breaks: where it was cut.
        recompilations: what made it compile again at later sizes.
        guards: what the captured program took for granted about sizes; each was compared with the model there.
        not_followed: why torch.compile could not follow the model at all.
    """

    recipe: str
    sizes: tuple[Mapping[str, int], ...] = ()
    graphs: int = 0
    graph_breaks: tuple[Place, ...] = ()
    recompilations: tuple[Place, ...] = ()
    guards: tuple[Place, ...] = ()
    not_followed: str | None = None


Runner = Callable[["Tensors"], "dict[str, NDArray[np.generic]]"]
"""A loaded engine: feeds by input name in, outputs by name out; the arrays returned belong to the caller."""


class DeviceRunner(Protocol):
    """A `Runner` whose engine is on a row's `device`. It can tell the engine's time from the network's."""

    def __call__(self, feeds: Tensors, /) -> dict[str, NDArray[np.generic]]:
        """As any runner."""
        ...

    def cores(self) -> int:
        """Threads that the device runs an operator with when nothing else is asked for."""
        ...

    def seconds(self, feeds: Tensors, calls: int, /) -> float:
        """Mean wall time of one of `calls` calls, by the device's own clock."""
        ...


class Backend(Protocol):
    """How one kind of engine is built and run. A plug-in registers an instance under ``exportyard.backends``.

    Importing its module must be cheap: heavy libraries are imported inside `build` and `load`.

    Attributes:
        name: what `Target.backend` says.
        option_names: keys of `Target.options` that it understands; with ``device.rpc`` if it can run engines on a
            row's `device`, its `load` then yields a `DeviceRunner`.
        schemes: numeric forms that it can carry.
        static_only: optional; True if it can only build models without dynamic axes, so that its rows need `buckets`
            for any other model. Where only some models are such, its `build` raises `pipeline.buckets.needed`.
        quantizer: optional; for a backend that reads programs, which of `pipeline.quantizers` makes their INT8 forms.
    """

    name: str
    option_names: frozenset[str]
    schemes: frozenset[Scheme]

    def source(self, target: Target) -> Literal["onnx", "program"]:
        """Which artifact `build` wants."""
        ...

    def missing(self, target: Target) -> str | None:
        """Why this host can't build `target`, or None if it can. Cheap, and never raises."""
        ...

    def not_runnable(self, target: Target) -> str | None:
        """Why this host can't run an engine of `target`, or None if it can. Cheap, and never raises."""
        ...

    def tools(self, target: Target) -> Mapping[str, str]:
        """Versions, and host facts, that decide the bytes of an engine. Imports nothing heavy."""
        ...

    def build(self, model: Stored, target: Target, out: Path) -> Mapping[str, JsonValue]:
        """Write the engine of `model` into the empty folder `out`; return facts about it.

        Raises:
            BuildError: the model can't be built for the target; names the operator where it can.
            UnavailableError: this host lacks something, as `missing` says.
        """
        ...

    def load(self, engine: Stored, target: Target, threads: int | None = None) -> AbstractContextManager[Runner]:
        """The engine, ready to run; freed when the context ends.

        Args:
            engine: what `build` wrote.
            target: its row.
            threads: that run one operator; None leaves it to the row.

        Raises:
            BuildError: the engine's files are broken or made by another version.
            UnavailableError: this host can't run it.
        """
        ...


class Tuner(Backend, Protocol):
    """A backend that can measure which of several schedules is the fastest, and build with what was found out."""

    def records(self, target: Target) -> str | None:
        """Name of the file below ``targets/tuning/`` with records for this row; None if the row asks for no tuning."""
        ...

    def tune(self, model: Stored, target: Target, shared: Path, out: Path, report: Reporter) -> Mapping[str, JsonValue]:
        """Write what is known about `model` into the empty folder `out`; return facts about it.

        Args:
            model: as for `build`.
            target: its row; it says whether anything may be measured, and for how long.
            shared: the file of records: read, and extended at once by each one that is new.
            out: gets ``choices.json``, which `build_tuned` reads.
            report: told how far the measuring is.

        Raises:
            UsageError: `shared` isn't a file of records.
            UnavailableError: the row wants measurements, and this host can't run its engines.
        """
        ...

    def build_tuned(self, model: Stored, target: Target, tuning: Path, out: Path) -> Mapping[str, JsonValue]:
        """As `build`, with the folder that `tune` wrote."""
        ...


@dataclass(frozen=True)
class OperatorTime:
    """One operator of an engine, as its runtime's profiler saw it.

    Attributes:
        name: in the engine.
        kind: as the engine calls it.
        ms: of one call, one entry for each call that was profiled.
        reads: names of the tensors that it reads, weights included; empty if the runtime doesn't tell.
        makes: names of the tensors that it makes; likewise.
        stands_for: names of the form's nodes, if the runtime itself says for which it stands.
    """

    name: str
    kind: str
    ms: tuple[float, ...]
    reads: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    stands_for: tuple[str, ...] = ()


class ProfiledRunner(Protocol):
    """A `Runner` whose calls are profiled."""

    def __call__(self, feeds: Tensors, /) -> dict[str, NDArray[np.generic]]:
        """As any runner."""
        ...

    def operators(self) -> Sequence[OperatorTime]:
        """What each operator took in the calls so far, in the order they run in; there are no calls after it."""
        ...


class Profiler(Backend, Protocol):
    """A backend whose runtime can tell how long each operator takes."""

    def load_profiled(self, engine: Stored, target: Target, threads: int) -> AbstractContextManager[ProfiledRunner]:
        """As `load`.

        Raises:
            NotApplicable: an engine of this kind can't be profiled; the message says why.
            BuildError, UnavailableError: as `load`.
        """
        ...


class Speed(Frozen):
    """One timing of a candidate; the ratio says how many times faster than fp32 it is, in the same rounds."""

    sizes: Mapping[str, int]
    threads: int
    median_ms: float
    versus_fp32: float | None = None


class Tried(Frozen):
    """One numeric form that was tried for a target, and what was found out about it.

    Attributes:
        target: the row that it was built for, where the release's own only chooses among rows.
        outcome: ``chosen``, or why not.
        method: how activation ranges were read; None where there are none to read.
        size_bytes: of the engine's files.
        metric: of the engine on the evaluation data, and of eager fp32.
        drop: how far the metric falls below that of eager fp32; negative where it rises.
        sqnr_db: the worst over all outputs, on the evaluation data, against eager fp32; likewise `cosine`.
        int8_share: share of the engine's compute that runs in INT8; `not_audited` says why it isn't known.
    """

    target: str | None = None
    scheme: Scheme
    outcome: str
    chosen: bool = False
    method: str | None = None
    size_bytes: int | None = None
    metric: float | None = None
    eager_metric: float | None = None
    drop: float | None = None
    budget: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    speeds: tuple[Speed, ...] = ()
    int8_share: float | None = None
    not_audited: str | None = None


@dataclass(frozen=True)
class Chosen:
    """What a release ships for one target: the engine that won, and the evidence.

    Attributes:
        built_for: the row whose engine it is, where `target` is one that chose it.
    """

    target: Target
    scheme: Scheme
    engine: Stored
    parity: ParityReport
    latency: LatencyReport
    reason: str
    built_for: str | None = None


class Reporter(Protocol):
    """Where long work says how far it is. The command line draws a bar, a Prefect task updates an artifact."""

    def __call__(self, done: int, total: int, what: str, /) -> None:
        """`done` of `total` steps of `what` are finished; `total` is 0 where it isn't known."""
        ...


def no_report(done: int, total: int, what: str, /) -> None:
    """A reporter that says nothing."""


AXIS = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def axis_names(shape: tuple[Dim, ...]) -> Iterator[str]:
    """Axis names in `shape`, expressions included, in order of appearance."""
    for dim in shape:
        if isinstance(dim, str):
            yield from AXIS.findall(dim)
