"""Where the time of an engine's calls goes: its operators, as the runtime's profiler saw them."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from pipeline import backends, buckets, host, samples, targets
from pipeline.attribution import attributed
from pipeline.errors import NotApplicable
from pipeline.store import Stored
from pipeline.types import Profile, Profiler, ProfileReport, Recipe, Scheme, Target

if TYPE_CHECKING:
    from pipeline.types import OperatorTime, ProfiledRunner, Runner, Tensors

FILE = "profile.json"
LEAST_CALLS, MOST_CALLS = 8, 200
THREADS = 1  # of which an operator's time says most: what several do, they do at once


def profiles(
    recipe: Recipe, target: Target, engines: Mapping[Scheme, Stored], forms: Mapping[Scheme, Stored]
) -> ProfileReport | None:
    """A profile of each engine at the axes' opt sizes; None if the row's backend has no profiler, or can't run here.

    Args:
        recipe: gives axes and inputs.
        target: the row of all `engines`.
        engines: to be profiled, which takes about a second each.
        forms: what each was built from; operators of an engine whose form isn't an ONNX graph have no modules.

    Raises:
        BuildError: an engine can't be loaded.
    """
    here = targets.not_measured(target) is None and target.device is None
    if not (here and backends.can_profile(target)):
        return None
    found = [_profile(recipe, target, scheme, engine, forms[scheme]) for scheme, engine in engines.items()]
    return ProfileReport(recipe=recipe.name, target=target.name, cpu=host.cpu_name(), profiles=tuple(found))


def _profile(recipe: Recipe, target: Target, scheme: Scheme, engine: Stored, form: Stored) -> Profile:
    sizes = {name: axis.opt for name, axis in buckets.axes_of(recipe, engine).items()}
    if buckets.of(engine):
        return Profile(scheme=scheme, sizes=sizes, not_profiled="an engine with buckets is several engines")
    profiler = cast("Profiler", backends.find(target.backend))
    feeds = samples.feeds(recipe, sizes, seed=1)
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(backends.loaded(engine, target, THREADS))
        try:
            profiled = stack.enter_context(profiler.load_profiled(engine, target, THREADS))
        except NotApplicable as error:
            return Profile(scheme=scheme, sizes=sizes, not_profiled=error.message)
        plain_s, profiled_s = _calls(plain, profiled, feeds)
        operators = profiled.operators()
    kept = undisturbed(profiled_s)
    graph = form.file("model.onnx") if "model.onnx" in form.artifact.files else None
    times = {operator.name: of_calls(operator, kept, len(profiled_s)) for operator in operators}
    return Profile(
        scheme=scheme,
        sizes=sizes,
        threads=THREADS,
        calls=len(kept),
        call_ms=1e3 * statistics.fmean(profiled_s[call] for call in kept),
        plain_ms=1e3 * statistics.fmean(plain_s[call] for call in undisturbed(plain_s)),
        rows=tuple(attributed(operators, times, graph)),
    )


def _calls(plain: Runner, profiled: ProfiledRunner, feeds: Tensors) -> tuple[list[float], list[float]]:
    """Seconds of calls without and with the profiler, in turn; the first of each isn't kept apart, but will be slow."""
    plain_s: list[float] = []
    profiled_s: list[float] = []
    late = time.perf_counter() + host.measure_s()
    while len(plain_s) < LEAST_CALLS or (len(plain_s) < MOST_CALLS and time.perf_counter() < late):
        for run, found in ((plain, plain_s), (profiled, profiled_s)):
            begun = time.perf_counter()
            run(feeds)
            found.append(time.perf_counter() - begun)
    return plain_s, profiled_s


def undisturbed(seconds: Sequence[float]) -> list[int]:
    """Positions of the faster half of calls: those that other work on the machine disturbed least."""
    order = sorted(range(len(seconds)), key=lambda call: seconds[call])
    return sorted(order[: max(1, len(order) // 2)])


def of_calls(operator: OperatorTime, kept: Sequence[int], calls: int) -> float:
    """Mean milliseconds of an operator over the calls `kept` of all `calls`, so that all operators add up to a call.

    One that didn't run in every call (it is in a branch) can't be told call by call: its part of all calls is taken.
    """
    if len(operator.ms) == calls:
        return statistics.fmean(operator.ms[call] for call in kept)
    return sum(operator.ms) / calls
