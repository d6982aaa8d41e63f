"""The choice among numeric forms: by measurement, with its reason."""

from pipeline.choice import choose
from pipeline.types import LatencyReport, LatencyRow, MetricResult, ParityReport, Ratio, Target, Timing, Tolerance

TARGET = Target(
    name="linux-x86_64-x",
    backend="x",
    platform="linux",
    machine="x86_64",
    arch="any",
    schemes=("int8-u8s8", "int8-dynamic", "fp32"),
    vs_onnx={scheme: Tolerance(sqnr_db=30) for scheme in ("int8-u8s8", "int8-dynamic", "fp32")},
)


def parity(scheme, passed=True):
    metric = MetricResult(name="accuracy", eager=0.99, engine=0.9, drop=0.09, budget=0.01, samples=3)
    reasons = () if passed else ("accuracy falls by 0.09",)
    return ParityReport(recipe="m", target="t", scheme=scheme, sizes=(), metric=metric, passed=passed, reasons=reasons)


TIMING = Timing(median_ms=1, p25_ms=1, p75_ms=1, repeats=5)


def ratio(value, spread=0.01):
    return Ratio(median=value, p25=value - spread, p75=value + spread)


def row(threads=1, **versus):
    named = {name.replace("_", "-"): value for name, value in versus.items()}
    return LatencyRow(
        sizes={},
        threads=threads,
        eager=TIMING,
        engines=dict.fromkeys(named, TIMING),
        versus_eager={name: ratio(value) for name, value in named.items()},
        versus_fp32={name: ratio(value / named["fp32"]) for name, value in named.items()},
    )


def latency(**versus):
    return LatencyReport(recipe="m", target="t", cpu="c", rows=(row(**versus),))


def all_of(*schemes):
    return {scheme: parity(scheme) for scheme in schemes}


def test_the_fastest_within_budget_wins():
    found = choose(TARGET, all_of("int8-u8s8", "fp32"), latency(int8_u8s8=4, fp32=2), {})
    assert found == ("int8-u8s8", "fastest form within budget; fp32 has 0.50x of its speed")


def test_int8_that_is_no_faster_than_fp32_does_not_ship():
    found = choose(TARGET, all_of("int8-u8s8", "fp32"), latency(int8_u8s8=2.08, fp32=2), {})
    assert found == ("fp32", "fastest form within budget; int8-u8s8 is not faster than fp32 (1.04x)")


def test_int8_that_is_slower_at_one_size_does_not_ship():
    found = LatencyReport(
        recipe="m", target="t", cpu="c", rows=(row(int8_u8s8=4, fp32=1), row(threads=2, int8_u8s8=0.9, fp32=1))
    )
    assert choose(TARGET, all_of("int8-u8s8", "fp32"), found, {}) == (
        "fp32",
        "fastest form within budget; int8-u8s8 is slower than fp32 at 2 threads (0.90x)",
    )


def test_on_one_thread_a_little_slower_at_one_size_is_slower():
    rows = (row(int8_u8s8=4, fp32=1), row(int8_u8s8=0.98, fp32=1))
    found = LatencyReport(recipe="m", target="t", cpu="c", rows=rows)
    scheme, reason = choose(TARGET, all_of("int8-u8s8", "fp32"), found, {})
    assert (scheme, "is slower than fp32 at 1 thread (0.98x)" in reason) == ("fp32", True)


def test_a_row_that_noise_has_spread_decides_nothing():
    noisy = row(threads=2, int8_u8s8=0.9, fp32=1).model_copy(
        update={"versus_fp32": {"int8-u8s8": ratio(0.9, spread=0.5)}}
    )
    found = LatencyReport(recipe="m", target="t", cpu="c", rows=(row(int8_u8s8=4, fp32=1), noisy))
    assert choose(TARGET, all_of("int8-u8s8", "fp32"), found, {})[0] == "int8-u8s8"


def test_a_form_outside_the_budget_never_ships_and_is_named():
    parities = all_of("fp32", "int8-dynamic") | {"int8-u8s8": parity("int8-u8s8", passed=False)}
    scheme, reason = choose(TARGET, parities, latency(int8_dynamic=3, fp32=2), {})
    assert scheme == "int8-dynamic"
    assert "int8-u8s8 accuracy falls by 0.09" in reason


def test_without_an_fp32_to_compare_with_nothing_ships():
    parities = {"int8-u8s8": parity("int8-u8s8"), "fp32": parity("fp32", passed=False)}
    scheme, reason = choose(TARGET, parities, latency(int8_u8s8=4, fp32=2), {})
    assert scheme is None
    assert "fp32 itself failed" in reason


def test_none_passed():
    found = choose(TARGET, {"fp32": parity("fp32", passed=False)}, None, {"int8-u8s8": "does not apply: no operator"})
    assert found == (None, "fp32 accuracy falls by 0.09; int8-u8s8 does not apply: no operator")
