"""What two releases differ in, and what a policy says to it."""

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import pytest

from pipeline import difference
from pipeline.manifest import Latency, LatencyLine
from pipeline.types import FileFact, Regression, Timing
from tests import releases
from tests.releases import TARGETS

NAME, OTHER = TARGETS
FILES = {"golden.safetensors": FileFact(sha256="9" * 64, size_bytes=1)}


def line(ms, *, spread=0.0, size=1, threads=1):
    timing = Timing(median_ms=ms, p25_ms=ms * (1 - spread), p75_ms=ms * (1 + spread), repeats=5)
    return LatencyLine(sizes={"batch": size}, threads=threads, engine=timing)


def release(version="1.0.0", *, value=0.9, ms=1.0, spread=0.0, size=1000, cpu="a cpu", sha=None, metric="accuracy"):
    """A manifest whose engines have these numbers."""
    sha = sha or f"{round(ms * 100) + size:064d}"
    files = {f"engines/{name}/model.bin": FileFact(sha256=sha, size_bytes=size) for name in TARGETS}
    made = releases.manifest_of(FILES | files, version)
    latency = Latency(cpu=cpu, rows=(line(ms, spread=spread), line(2 * ms, spread=spread, size=8)))
    engines = {}
    for name, engine in made.engines.items():
        found = engine.parity.metric.model_copy(update={"engine": value, "name": metric})
        parity = engine.parity.model_copy(update={"metric": found})
        engines[name] = engine.model_copy(update={"latency": latency, "parity": parity})
    return made.model_copy(update={"engines": engines})


def only(found, name=NAME):
    return next(pair for pair in found.pairs if pair.target == name)


def without(made, name):
    kept = {one: engine for one, engine in made.engines.items() if one != name}
    return made.model_copy(update={"engines": kept, "skipped": {name: "failed: it fell"}})


def test_equal_releases_differ_in_nothing():
    found = difference.between(release(), release("1.0.1"), Regression(drop=0, slowdown=0, growth=0))
    assert (found.changes, found.regressions) == ((), [])
    pair = only(found)
    assert (pair.same, pair.fall, pair.slower, pair.larger, pair.changes) == (True, 0, 1, 1, ())
    assert found.verdict() == "toy@1.0.1 is within the policy"
    assert [difference.row(pair)[-1] for pair in found.pairs] == ["[green]same files[/]"] * 2


@pytest.mark.parametrize(
    ("change", "policy", "said"),
    [
        ({"value": 0.88}, {"drop": 0.02}, []),
        ({"value": 0.87}, {"drop": 0.02}, ["accuracy is worse by 0.03, allowed is 0.02"]),
        ({"value": 0.5}, {"slowdown": 0}, []),
        ({"value": 0.5, "metric": "other"}, {"drop": 0}, []),
        ({"ms": 1.09}, {"slowdown": 0.1}, []),
        ({"ms": 1.3}, {"slowdown": 0.1}, ["a call takes 1.30x of the time, allowed is 1.1x"]),
        ({"ms": 1.3, "spread": 0.4}, {"slowdown": 0.1}, []),
        ({"ms": 1.3, "sha": f"{1100:064d}"}, {"slowdown": 0.1}, []),
        ({"ms": 1.3, "cpu": "another cpu"}, {"slowdown": 0.1}, []),
        ({"ms": 0.5}, {"slowdown": 0}, []),
        ({"size": 1100}, {"growth": 0.1}, []),
        ({"size": 1101}, {"growth": 0.1}, ["it has 1.10x of the size, allowed is 1.1x"]),
        ({"size": 2000}, {"drop": 0, "slowdown": 0}, []),
    ],
)
def test_the_policy(change, policy, said):
    found = difference.between(release(), release("1.1.0", **change), Regression(**policy))
    assert [*only(found).regressions] == said
    assert found.verdict().endswith("a regression" if said else "within the policy")


def test_where_less_is_better():
    before, after = release(value=1.0), release("1.1.0", value=1.5)
    policy = Regression(drop=0.1)
    assert not difference.between(before, after, policy).regressions
    assert difference.between(before, after, policy, higher_is_better=False).regressions[0] == (
        f"{NAME}: accuracy is worse by 0.5, allowed is 0.1"
    )


def test_a_target_may_have_bounds_of_its_own():
    policy = Regression(drop=0.0, growth=0.5, targets={NAME: {"drop": 0.5}})
    found = difference.between(release(), release("1.1.0", value=0.8, size=2000), policy)
    assert [len(only(found, name).regressions) for name in (NAME, OTHER)] == [1, 2]


@pytest.mark.parametrize("keep", [True, False])
def test_a_target_that_is_gone(keep):
    found = difference.between(release(), without(release("1.1.0"), NAME), Regression(keep_targets=keep))
    assert found.regressions == ([f"{NAME}: has no engine any more: failed: it fell"] if keep else [])
    assert "gone" in difference.row(only(found))[-1]
    back = difference.between(without(release(), NAME), release("1.1.0"), Regression(keep_targets=keep))
    assert back.regressions == []
    assert difference.row(only(back))[-1] == "[green]new[/]"


def test_without_a_policy_nothing_is_judged():
    found = difference.between(release(), release("1.1.0", value=0, ms=9, size=9999), None)
    assert (found.judged, found.regressions) == (False, [])
    assert "not judged" in found.verdict()


def test_what_was_changed():
    before, after = release(), release("1.1.0", ms=1.5)
    engine = after.engines[NAME]
    row = engine.target.model_copy(update={"arch": "avx2"})
    engines = {**after.engines, NAME: engine.model_copy(update={"tools": {"onnx": "2"}, "target": row})}
    source = after.source.model_copy(update={"commit": "f" * 40, "dirty": True})
    update = {"engines": engines, "source": source, "checkpoint": {"model.pt": "a"}, "data": "b", "tools": {"t": "1"}}
    found = difference.between(before, after.model_copy(update=update), None, code=["recipes/toy/model.py"])
    assert [(one.what, one.before, one.after) for one in found.changes] == [
        ("checkpoint model.pt", None, "a"),
        ("code\n  recipes/toy/model.py", "0000000000", "ffffffffff (uncommitted changes)"),
        ("calibration and evaluation data", "", "b"),
        ("tool t", None, "1"),
    ]
    changes = [(one.what, one.before, one.after) for one in only(found).changes]
    assert changes == [("tool onnx", None, "2"), ("row: arch", "none", "avx2")]


def test_it_is_plain_json():
    found = difference.between(release(), release("1.1.0", value=0.5), Regression(drop=0))
    told = json.loads(json.dumps(found.plain()))
    assert told["before"] == "1.0.0"
    assert told["targets"][0]["metric_fall"] == pytest.approx(0.4)
    assert len(told["regressions"]) == 2


def test_a_change_in_the_table_has_short_digests():
    change = difference.Change("checkpoint x", "0123456789" + "a" * 54, None)
    assert difference.change_row(change, "T") == ["checkpoint x", "T", "0123456789", "-"]


def test_times_in_the_table_are_means_that_fit_their_ratio():
    assert difference.row(only(difference.between(release(), release(ms=1.5), None)))[4] == "1.41 -> 2.12 ms (1.50x)"


def test_rows_of_what_was_not_measured():
    before, after = release(), release("1.1.0")
    engine = after.engines[NAME]
    bare = engine.model_copy(update={"latency": Latency(cpu="a cpu", rows=(), not_measured="no board")})
    found = difference.between(before, after.model_copy(update={"engines": {NAME: bare}}), Regression(slowdown=0))
    assert only(found).regressions == ()
    assert difference.row(only(found))[4] == "not measured"
    other = difference.between(before, release("1.1.0", cpu="another"), None)
    assert difference.row(only(other))[4] == "not comparable"
    assert dataclasses.replace(only(other), before=None).same is False


def test_the_policy_in_the_docs_is_one():
    text = (Path(__file__).parents[2] / "docs/releases.md").read_text()
    policy = next(block for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL) if "[regression]" in block)
    found = Regression(**tomllib.loads(policy)["regression"])
    assert (found.of("any").slowdown, found.of("linux-x86_64-tvm").slowdown, found.of("x").drop) == (0.1, 0.3, 0.005)
