"""``report.json``: all that the report's page shows, as one document. Every number on the page is one of these.

SQNRs are in dB, times in milliseconds where a name ends in ``_ms`` and in seconds where it ends in ``_s``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pipeline.candidates import Candidate
from pipeline.types import (
    Bench,
    Compilation,
    Distance,
    Explanation,
    Frozen,
    MetricResult,
    Ratio,
    Scheme,
    StressCheck,
    Timing,
)

Status = Literal["passed", "failed", "not built here", "not verified"]


class Blocking(Frozen):
    """A target that keeps a release back."""

    target: str
    reason: str


class Verdict(Frozen):
    """Whether there can be a release, and what to do.

    Attributes:
        state: ``worse``: every target that is required passed, and `publish` refuses all the same, since the recipe's
            policy admits no such regression.
        told: why, in one sentence.
        next: what to do, one command or sentence each.
        passed: how many of the `targets` passed.
    """

    state: Literal["ready", "worse", "not ready", "nothing"]
    told: str
    next: tuple[str, ...]
    passed: int
    targets: int
    blocking: tuple[Blocking, ...] = ()


class FailureLine(Frozen):
    """A target that failed; see `failures.Failure`."""

    target: str
    stage: str
    reason: str
    command: str
    inputs: str
    explain: str = ""


class Use(Frozen):
    """How much of one bound is used.

    Attributes:
        against: ``budget`` (the recipe's, against eager fp32) or ``form`` (the row's, against what it was built from).
        bound: ``drop``, or a field of `Tolerance`.
        output: empty for the metric.
        share: 1 is all of it; None where the bound leaves nothing to use, as cosine 1.
    """

    against: Literal["budget", "form"]
    bound: str
    output: str = ""
    value: float
    limit: float
    share: float | None = None


class Speed(Frozen):
    """One timing of one form.

    Attributes:
        versus_eager: how many times faster than eager PyTorch; None where that has no time, as on a device.
        versus_fp32: likewise than the same target's fp32 form.
    """

    target: str
    scheme: Scheme
    sizes: Mapping[str, int]
    threads: int
    time: Timing
    eager: Timing | None = None
    versus_eager: Ratio | None = None
    versus_fp32: Ratio | None = None


class TargetLine(Frozen):
    """One row of the table of targets: the form that it ships, or why there is none.

    Attributes:
        built_for: the row whose engine it is, where it only chooses.
        onnx_db: worst SQNR against the form that it was built from, over all sizes and outputs that aren't indices.
        eager_db: likewise against eager fp32.
        speed: the first timing: least batch, one thread.
        not_timed: why there is none.
        uses: of every bound that applies; `tightest` is the place of the one that is used most.
    """

    target: str
    backend: str
    status: Status
    reason: str
    required: bool
    scheme: Scheme | None = None
    built_for: str | None = None
    engine: str | None = None
    size_bytes: int | None = None
    metric: MetricResult | None = None
    onnx_db: float | None = None
    eager_db: float | None = None
    speed: Speed | None = None
    not_timed: str | None = None
    uses: tuple[Use, ...] = ()
    tightest: int | None = None


class Cell(Frozen):
    """One combination of axis sizes; `vs_onnx` is empty where the engine failed, which `error` then says.

    Attributes:
        onnx_db: worst SQNR over the outputs that aren't indices; None where there is none of these.
        broken: bounds of the row that don't hold, in words.
    """

    sizes: Mapping[str, int]
    onnx_db: float | None = None
    eager_db: float | None = None
    vs_onnx: tuple[Distance, ...] = ()
    vs_eager: tuple[Distance, ...] = ()
    broken: tuple[str, ...] = ()
    error: str | None = None


class Parity(Frozen):
    """One form of one target at every combination of axis sizes; `bound_db` is the row's, where it bounds SQNR."""

    target: str
    scheme: Scheme
    passed: bool
    reasons: tuple[str, ...]
    bound_db: float | None = None
    cells: tuple[Cell, ...]
    stress: tuple[StressCheck, ...] = ()


class Share(Frozen):
    """How many of the multiply-accumulates of one call run in one kind of number."""

    runs_in: str
    macs: int
    share: float


class ModuleShare(Frozen):
    """A module of the model: its part of all multiply-accumulates, and how much of that part runs in INT8."""

    module: str
    operators: int
    macs: int
    share: float
    int8_share: float


class Numbers(Frozen):
    """What one engine really runs in which numbers; `not_audited` where nobody can tell.

    Attributes:
        form: place in `Report.tried`, which says what stays in float and why.
    """

    form: int | None
    target: str
    scheme: Scheme
    macs: int
    int8_share: float | None
    shares: tuple[Share, ...]
    modules: tuple[ModuleShare, ...]
    not_audited: str | None = None


class SensitiveOperator(Frozen):
    """What 8 bits cost one operator by itself; `rank` 1 is the worst."""

    node: str
    operator: str
    module: str
    sqnr_db: float
    macs_share: float | None
    rank: int


class Sensitivity(Frozen):
    """All operators of one INT8 form, in the order of the graph; `worst` are places in it."""

    scheme: Scheme
    targets: tuple[str, ...]
    operators: tuple[SensitiveOperator, ...]
    worst: tuple[int, ...]


class Kept(Frozen):
    """What a range method keeps of a tensor's values."""

    method: str
    low: float
    high: float


class Tensor(Frozen):
    """What calibration saw of one tensor.

    Attributes:
        stray: values that were NaN or infinite.
        first: lower edge of the first of `counts`; they are of equal `width`.
        kept: by the methods that this recipe's forms use.
    """

    name: str
    low: float
    high: float
    stray: int
    values: int
    first: float
    width: float
    counts: tuple[int, ...]
    kept: tuple[Kept, ...]


class StepLine(Frozen):
    """When one step was made: seconds after `Timeline.begun_s`."""

    step: str
    stage: str
    start_s: float
    seconds: float
    where: str


class Timeline(Frozen):
    """All steps whose making was noted; `begun_s` is seconds since 1970, `busy_s` the time in which any was made.

    Attributes:
        unknown: steps that were made elsewhere, or before there was a log.
    """

    begun_s: float
    busy_s: float
    steps: tuple[StepLine, ...]
    unknown: tuple[str, ...] = ()


class Made(Frozen):
    """An artifact: digest of its content, and what decided it."""

    step: str
    digest: str
    tools: Mapping[str, str]


class Provenance(Frozen):
    """Where all of this comes from.

    Attributes:
        commit: of the workspace; None without git.
        dirty: whether files that decide the result differ from it.
        checkpoint: sha256 of each of its files.
    """

    commit: str | None
    dirty: bool
    checkpoint: Mapping[str, str]
    made: tuple[Made, ...]
    host: str
    cpu: str
    threads: int
    system: str
    python: str
    exportyard: str


class Changed(Frozen):
    """Something that went into the engines and is another one than in the last release."""

    what: str
    before: str | None
    after: str | None


class Side(Frozen):
    """An engine in the last release, or now; `median_ms` at the sizes and threads that both were timed at."""

    scheme: Scheme
    metric: float
    size_bytes: int
    median_ms: float | None = None


class Since(Frozen):
    """One target in the last release and now; `fall` of the metric is what got worse, ratios are now over then.

    Attributes:
        same: the very same files.
        not_compared: why there is no ratio of times.
    """

    target: str
    before: Side | None
    after: Side | None
    same: bool
    fall: float | None = None
    time_ratio: float | None = None
    size_ratio: float | None = None
    not_compared: str | None = None
    regressions: tuple[str, ...] = ()


class LastRelease(Frozen):
    """The newest release, and what has changed since; `told` says it in one line, or why there is none."""

    tag: str | None = None
    version: str | None = None
    date: str | None = None
    told: str
    judged: bool = False
    changes: tuple[Changed, ...] = ()
    targets: tuple[Since, ...] = ()


class ModuleTime(Frozen):
    """Operators of one module, and their part of what all operators of a call take; ``(Conv)`` are of no known one."""

    module: str
    operators: int
    ms: float
    share: float


class WhereTime(Frozen):
    """A profile (see `types.Profile`), summed by module, the slowest first."""

    target: str
    scheme: Scheme
    sizes: Mapping[str, int]
    threads: int
    call_ms: float
    plain_ms: float
    operators_ms: float
    modules: tuple[ModuleTime, ...]
    not_profiled: str | None = None


class Report(Frozen):
    """All of ``report.json``.

    Attributes:
        format: raised when a reader of the last one would be misled.
        metric: the recipe's, and whether more is better.
        tried: every numeric form of every target.
        explanations: that `exportyard explain` has left of the engines that are here now.
        bench: what `exportyard bench` has left.
    """

    format: Literal[1] = 1
    recipe: str
    summary: str
    metric: str
    higher_is_better: bool
    verdict: Verdict
    failures: tuple[FailureLine, ...]
    warnings: tuple[str, ...]
    targets: tuple[TargetLine, ...]
    tried: tuple[Candidate, ...]
    speeds: tuple[Speed, ...]
    parity: tuple[Parity, ...]
    numbers: tuple[Numbers, ...]
    sensitivity: tuple[Sensitivity, ...] = ()
    explanations: tuple[Explanation, ...] = ()
    profiles: tuple[WhereTime, ...] = ()
    compilation: Compilation | None = None
    bench: Bench | None = None
    tensors: tuple[Tensor, ...] = ()
    timeline: Timeline | None = None
    release: LastRelease
    provenance: Provenance
