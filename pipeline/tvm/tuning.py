"""Tuning: which of the schedules that a rule allows is the fastest one, found out by running them.

The rules of `tvm_schedules` leave a few dozen choices to a nest (the tile's height and width, the order of the tiles).
That is few enough to try them all, so nothing is searched at random and nothing has to be guessed by a model of cost:
each is compiled and timed in this process, and the best of them are timed again in turn with the rule's own choice.

What was found is a record. It is named by the workload in words, not by a hash of TVM's, so that models share records,
a nest with dynamic axes finds that of its opt sizes, and a record outlives a version of TVM and can be reviewed.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax, s_tir, sym, tirx

from pipeline.tvm.nests import Choice, Registers, as_the_rule
from pipeline.tvm.records import Record
from pipeline.tvm.schedules import schedule_of
from pipeline.types import Reporter, no_report

FINALISTS = 6  # choices that are timed again, in turn
TURNS = 7
WORTH = 0.98  # of the rule's time; a choice that gains less is noise, and the rule stays
SHORTEST = 0.005  # seconds of one measurement


# --- what a nest is called -----------------------------------------------------------------------------------------


def workload(schedule: Any, block: Any, sizes: Mapping[str, int]) -> str | None:
    """The nest around a contraction in words, such as ``float32 s4 s56 s56 s64 r64: [a,b,c,e] [e,d]``.

    ``s`` are the lengths of axes of the result, ``r`` of those that are summed, both in order of their letters; in
    brackets stands where the operands are read.

    Args:
        schedule: TVM's, of the nest.
        block: the one that sums.
        sizes: of dynamic axes, by name.

    Returns:
        None where the length of an axis doesn't follow from `sizes`.
    """
    found = schedule.get(block)
    lengths = [_length(axis.dom.extent, sizes) for axis in found.iter_vars]
    if None in lengths:
        return None
    letters = {axis.var.name: chr(ord("a") + place) for place, axis in enumerate(found.iter_vars)}
    kinds = ["s" if axis.iter_type == tirx.IterVar.DataPar else "r" for axis in found.iter_vars]
    axes = " ".join(f"{kind}{length}" for kind, length in zip(kinds, lengths, strict=True))
    reads = " ".join(
        "[" + ",".join(_in_letters(str(place.min), letters) for place in read.region) + "]" for read in found.reads
    )
    packed = " packed" if _has_constants(schedule) else ""
    return f"{found.reads[0].source.dtype} {axes}: {reads}{packed}"


def _length(extent: Any, sizes: Mapping[str, int]) -> int | None:
    if isinstance(extent, tirx.IntImm):
        return int(extent)
    known = sym.Analyzer()
    for variable in _variables(extent):
        if variable.name not in sizes:
            return None
        known.bind(variable, tirx.IntImm("int64", sizes[variable.name]))
    found = known.simplify(extent)
    return int(found) if isinstance(found, tirx.IntImm) else None


def _variables(expression: Any) -> Iterator[Any]:
    if isinstance(expression, tirx.Var):
        yield expression
    for part in ("a", "b"):
        if hasattr(expression, part):
            yield from _variables(getattr(expression, part))


def _in_letters(index: str, letters: Mapping[str, str]) -> str:
    plain = re.sub(r"T\.int(?:32|64)\((-?\d+)\)", r"\1", index).replace(" ", "")
    return re.sub(r"[A-Za-z_]\w*", lambda name: letters.get(name[0], name[0]), plain)


def _has_constants(schedule: Any) -> bool:
    attributes = schedule.mod["main"].attrs
    return bool(attributes) and bool(attributes.get("layout_free_buffers"))


# --- records in use ------------------------------------------------------------------------------------------------


@dataclass
class Known:
    """The `Chooser` that takes what was measured; the rule's choice where nothing was.

    Attributes:
        choices: by workload.
        sizes: at which dynamic axes were tuned.
        used: workloads that had a choice.
        lacking: those that had none.
    """

    choices: Mapping[str, Choice]
    sizes: Mapping[str, int]
    used: set[str] = field(default_factory=set)
    lacking: set[str] = field(default_factory=set)

    def __call__(self, schedule: Any, block: Any, choices: Sequence[Choice], rule: Choice, /) -> Choice:
        """See `tvm_nests.Chooser`."""
        name = workload(schedule, block, self.sizes)
        if name is None or len(choices) < 2:
            return rule
        if name not in self.choices:
            self.lacking.add(name)
            return rule
        self.used.add(name)
        found = self.choices[name]
        return found if found in choices else rule


def known(module: tvm.IRModule, registers: Registers, records: Mapping[str, Record]) -> Known:
    """Which workloads of a lowered module have a record, and which have none."""
    found = Known({name: record.choice for name, record in records.items()}, {})
    for function in module.functions.values():
        if isinstance(function, tirx.PrimFunc):
            schedule_of(function, registers, found)
    return found


# --- finding out ---------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """A workload that has no record yet.

    Attributes:
        function: the nest that is measured.
        calls: of all nests with this workload, in one run of the model; `most` of them are of `function`.
    """

    name: str
    function: tirx.PrimFunc
    choices: list[Choice]
    rule: Choice
    calls: int
    most: int = 0
    rule_ms: float = 0.0


def tune(
    module: tvm.IRModule,
    where: Any,
    registers: Registers,
    records: Mapping[str, Record],
    until: float,
    keep: Callable[[str, Record], None],
    report: Reporter = no_report,
) -> None:
    """Measure what `records` lacks, most time first, until the clock says `until`.

    Args:
        module: lowered, not scheduled, and without dynamic axes.
        where: TVM's target.
        registers: of its CPU.
        records: those that exist.
        until: by `time.monotonic`; the workload that is being measured then is left out.
        keep: called with each new record as soon as it is known.
        report: told of each workload.
    """
    tasks = _tasks(module, registers, records)
    with where:
        for task in tasks:
            task.rule_ms = _Timed(task, task.rule, where, registers).milliseconds(3)
        tasks.sort(key=lambda task: -task.calls * task.rule_ms)
        for place, task in enumerate(tasks):
            report(place, len(tasks), "workloads tuned")
            found = _best(task, where, registers, until)
            if found is None:
                return
            keep(task.name, found)
        report(len(tasks), len(tasks), "workloads tuned")


def _tasks(module: tvm.IRModule, registers: Registers, records: Mapping[str, Record]) -> list[Task]:
    calls = _calls(module)
    tasks: dict[str, Task] = {}
    for variable, function in module.functions.items():
        if not isinstance(function, tirx.PrimFunc):
            continue
        noted: list[tuple[str, list[Choice], Choice]] = []

        def note(schedule: Any, block: Any, choices: Sequence[Choice], rule: Choice, /) -> Choice:
            name = workload(schedule, block, {})
            if name is not None:
                noted.append((name, list(choices), rule))  # noqa: B023  called in this round only
            return rule

        schedule_of(function, registers, note)
        for name, choices, rule in noted[-1:]:  # of the rule that did it
            if name in records or len(choices) < 2:
                continue
            own = calls.get(variable.name_hint, 0)
            before = tasks.get(name, Task(name, function, choices, rule, 0))
            # nests may differ in what is done behind the sums: the one that runs most often speaks for all
            spokesman = function if own > before.most else before.function
            most, total = max(own, before.most), own + before.calls
            tasks[name] = Task(name, spokesman, choices, rule, total, most)
    return list(tasks.values())


def _calls(module: tvm.IRModule) -> dict[str, int]:
    counts: dict[str, int] = {}

    def note(expression: Any) -> None:
        if isinstance(expression, relax.Call) and expression.args and isinstance(expression.args[0], tvm.ir.GlobalVar):
            counts[expression.args[0].name_hint] = counts.get(expression.args[0].name_hint, 0) + 1

    for function in module.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, note)
    return counts


def _best(task: Task, where: Any, registers: Registers, until: float) -> Record | None:
    """The record of one workload; None if time runs out before it is known."""
    base = _Timed(task, task.rule, where, registers)
    tried: list[tuple[float, _Timed]] = []
    for choice in task.choices:
        if time.monotonic() > until:
            return None
        if choice != task.rule:
            one = _Timed(task, choice, where, registers)
            tried.append((one.milliseconds(2), one))
            tried = sorted(tried, key=lambda pair: pair[0])[:FINALISTS]  # the code of all others can go
    finalists = [one for _, one in tried]
    spent: dict[Choice, list[float]] = {one.choice: [] for one in (base, *finalists)}
    for _ in range(TURNS):
        for one in (base, *finalists):
            spent[one.choice].append(one.milliseconds(1))
    middle = {choice: statistics.median(own) for choice, own in spent.items()}
    fastest = min(middle, key=lambda choice: middle[choice])
    if middle[fastest] > WORTH * middle[task.rule]:
        fastest = task.rule
    return Record(choice=fastest, ms=round(middle[fastest], 4), rule_ms=round(middle[task.rule], 4))


class _Timed:
    """A nest in machine code, with operands to run it on."""

    def __init__(self, task: Task, choice: Choice, where: Any, registers: Registers) -> None:
        self.choice = choice
        chooser = as_the_rule if choice == task.rule else lambda *_: choice
        scheduled = schedule_of(task.function, registers, chooser)
        assert scheduled is not None  # the same rule did it before
        module = tvm.IRModule({"main": scheduled.with_attr("global_symbol", "main")})
        # constants come in the layout that the schedule wants, as they will in the engine
        module = s_tir.transform.RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(module)
        self._operands = [_operand(parameter) for parameter in module["main"].params]
        with tvm.transform.PassContext(opt_level=3):
            self._code = tvm.compile(module, target=where).mod

    def milliseconds(self, repeat: int) -> float:
        """See the function of this name."""
        return milliseconds(self._code["main"], self._operands, repeat)


def milliseconds(nest: Callable[..., object], operands: Sequence[Any], repeat: int) -> float:
    """The time of one call, by this thread's processor time; the fastest of `repeat` measurements.

    What else runs on this machine may take the processor away, which isn't counted, or slow down what shares a
    core or a cache, which can only make a measurement longer.
    """
    found = []
    for _ in range(repeat):
        begun, calls = time.thread_time(), 0
        while calls == 0 or time.thread_time() - begun < SHORTEST:
            nest(*operands)
            calls += 1
        found.append((time.thread_time() - begun) / calls)
    return min(found) * 1e3


def _operand(parameter: Any) -> Any:
    shape = [int(length) for length in parameter.shape]
    dtype = str(parameter.dtype)
    values = np.random.default_rng(0).standard_normal(shape) if dtype.startswith("float") else np.ones(shape)
    return tvm.runtime.tensor(values.astype(dtype))
