"""The search for the best static INT8 form, on small graphs made without torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline import calibrate, evaluations, integer, samples, sensitivity, tricks
from pipeline.compare import distance
from pipeline.errors import NotApplicable, RecipeError
from pipeline.graph import Graph
from pipeline.origin import SCOPES
from pipeline.reference import written
from pipeline.stages import quantize
from pipeline.stages.search import search
from pipeline.store import Key, Stored, make
from pipeline.types import Recipe, no_report

WIDTH = 32


def weight(rng: np.random.Generator, name: str, *shape: int, scale: float = 0.2) -> TensorProto:
    return numpy_helper.from_array((rng.normal(size=shape) * scale).astype(np.float32), name)


def node(operator: str, inputs: list[str], output: str, module: str, **attributes) -> onnx.NodeProto:
    made = helper.make_node(operator, inputs, [output], name=f"node_{output}", **attributes)
    made.metadata_props.add(key=SCOPES, value=str(["", "model", f"model.{module}", output]))
    return made


def model(nodes, weights) -> onnx.ModelProto:
    vectors = ["batch", WIDTH]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, vectors)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, vectors)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def layers(planted: int | None = 2) -> onnx.ModelProto:
    """Five linear layers. What the planted one reads has a huge channel, whose weights there are small in turn."""
    rng = np.random.default_rng(0)
    nodes, weights, read = [], [], "x"
    for place in range(5):
        module = f"blocks.{place}.dense"
        matrix, bias = weight(rng, f"w{place}", WIDTH, WIDTH), weight(rng, f"b{place}", WIDTH)
        if planted is not None and place in (planted - 1, planted):
            values = numpy_helper.to_array(matrix).copy()
            if place < planted:
                values[:, 3] *= 500
            else:
                values[3] /= 500
            matrix.CopyFrom(numpy_helper.from_array(values, f"w{place}"))
        nodes += [
            node("MatMul", [read, f"w{place}"], f"product{place}", module),
            node("Add", [f"product{place}", f"b{place}"], f"sum{place}", module),
            node("Tanh" if place != 1 else "Identity", [f"sum{place}"], "y" if place == 4 else f"r{place}", module),
        ]
        weights += [matrix, bias]
        read = f"r{place}"
    return model(nodes, weights)


def norms(shared: bool = True) -> onnx.ModelProto:
    """Two products read a layer normalisation whose one large channel says no more than the rest.

    With `shared` a residual reads it, too.
    """
    rng = np.random.default_rng(0)
    gain, even = np.ones(WIDTH, np.float32), np.ones((WIDTH, 1), np.float32)
    gain[5], even[5] = 60, 1 / 60
    nodes = [
        node("LayerNormalization", ["x", "gain", "shift"], "n", "norm"),
        node("MatMul", ["n", "wa"], "a", "mlp.a"),
        node("MatMul", ["n", "wb"], "b", "mlp.b"),
        node("Add", ["a", "b"], "ab", "mlp"),
        node("Add", ["ab", "n"], "y", "") if shared else node("Identity", ["ab"], "y", ""),
    ]
    weights = [
        *(numpy_helper.from_array(gain, "gain"), weight(rng, "shift", WIDTH)),
        *(
            numpy_helper.from_array(numpy_helper.to_array(weight(rng, name, WIDTH, WIDTH)) * even, name)
            for name in ("wa", "wb")
        ),
    ]
    return model(nodes, weights)


def recipe(folder: Path, method: str = "auto", metric: str = "cosine", **budget) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "net",
            "checkpoint": "none.pt",
            "axes": {"batch": {"min": 1, "opt": 8, "max": 64}},
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", WIDTH]}],
            "outputs": [{"name": "y", "kind": "embedding"}],
            "calibration": {"data": "calibration.npz", "method": method},
            "evaluation": {"data": "evaluation.npz", "metric": metric},
            "budget": {"drop": 1.0, **budget},
            "folder": folder,
            "root": folder,
        }
    )


class Truth:
    """Stands in for `reference.Answers`: the float graph itself answers, so that no torch program is needed."""

    def __init__(self, one: Recipe, fp32: Stored, data: Stored) -> None:
        self.program, self.data = fp32, data
        run = written(fp32.file("model.onnx"))
        found = samples.samples(one, data, "evaluation")
        self._evaluated = [(sample, run(sample.feeds)) for sample in found]

    def evaluation(self):
        return self._evaluated


class Case:
    """A model with its data and calibration statistics."""

    def __init__(self, folder: Path, proto: onnx.ModelProto, calls: int = 6, **settings) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.recipe = folder, recipe(folder, **settings)
        rng = np.random.default_rng(1)
        for which in ("calibration", "evaluation"):
            np.savez(folder / f"{which}.npz", x=rng.normal(size=(calls, 16, WIDTH)).astype(np.float32))

        def graph(out: Path):
            onnx.save(proto, out / "model.onnx")
            (out / "signature.json").write_text("{}")
            return {}

        def data(out: Path):
            return {which: samples.write(self.recipe, which, out) for which in ("calibration", "evaluation")}

        def seen(out: Path):
            return quantize.statistics(self.recipe, self.fp32, self.data, out, no_report)

        self.fp32 = make(folder / "fp32", Key("onnx"), graph).stored
        self.data = make(folder / "data", Key("data"), data).stored
        self.statistics = make(folder / "statistics", Key("statistics"), seen).stored

    def search(self, name: str = "found", journal: str = "journal", scheme="int8-u8s8") -> Stored:
        answers = Truth(self.recipe, self.fp32, self.data)

        def work(out: Path):
            lines = self.folder / f"{journal}.jsonl"
            return search(self.recipe, self.fp32, scheme, self.statistics, answers, out, lines, no_report)

        return make(self.folder / name, Key("onnx"), work).stored

    def feeds(self):
        return next(samples.samples(self.recipe, self.data, "evaluation")).feeds


def told(found: Stored) -> dict:
    return json.loads(found.file("search.json").read_text())


BUDGET = {"vs_eager": {"sqnr_db": 30.0}}


def test_the_planted_layer_and_nothing_else_stays_in_float(tmp_path):
    case = Case(tmp_path, layers(), **BUDGET)
    found = case.search()
    facts, page = found.artifact.facts, told(found)
    assert facts["excluded"] == page["chosen"]["floats"] == ["node_product2"]
    assert facts["within_budget"] is True
    assert facts["quantized"] == {"MatMul": 4}
    assert facts["float_because"]["node_product2"].startswith("kept for the budget: ")
    worst = page["sensitivity"]["rows"][0]
    assert (worst["node"], worst["module"], worst["macs_share"]) == ("node_product2", "blocks.2.dense", 0.2)
    last = page["trials"][-1]
    assert last["choice"] == page["chosen"]
    assert last["vs_eager"][0]["sqnr_db"] > 30 > page["trials"][0]["vs_eager"][0]["sqnr_db"]
    one, two = (written(each.file("model.onnx"))(case.feeds())["y"] for each in (case.fp32, found))
    assert distance("y", one, two).sqnr_db > 28


def test_a_form_that_holds_the_budget_keeps_everything_in_integers(tmp_path):
    found = Case(tmp_path, layers(None), **BUDGET).search()
    facts, page = found.artifact.facts, told(found)
    assert facts["excluded"] == []
    assert facts["quantized"] == {"MatMul": 5}
    assert facts["evaluations"] == len(page["trials"]) <= 6
    tried = [trial["choice"]["method"] for trial in page["trials"] if not trial["choice"]["correct"]]
    assert tried == ["minmax", "percentile", "mse", "entropy"]


def test_a_method_that_the_recipe_names_is_the_only_one(tmp_path):
    found = Case(tmp_path, layers(None), method="mse").search()
    assert {trial["choice"]["method"] for trial in told(found)["trials"]} == {"mse"}
    assert found.artifact.facts["method"] == "mse"


def test_where_nothing_holds_the_closest_form_is_written(tmp_path):
    found = Case(tmp_path, layers(), vs_eager={"sqnr_db": 150.0}).search()
    page = told(found)
    assert page["within_budget"] is False
    assert len(page["chosen"]["floats"]) == 4
    assert found.artifact.facts["quantized"] == {"MatMul": 1}


def test_a_model_with_nothing_to_quantise_is_told_apart(tmp_path):
    proto = model([node("Tanh", ["x"], "y", "act")], [])
    with pytest.raises(NotApplicable, match="`int8-u8s8` changes nothing"):
        Case(tmp_path, proto).search()


@pytest.mark.parametrize("scheme", ["int8-u8s8", "int8-s8s8", "int8-u8u8"])
def test_the_same_search_gives_the_same_bytes(tmp_path, scheme):
    case = Case(tmp_path, layers(), **BUDGET)
    assert case.search("one", "first", scheme).digest == case.search("two", "second", scheme).digest


def test_what_the_journal_holds_is_not_measured_again(tmp_path, monkeypatch):
    case = Case(tmp_path, layers(), **BUDGET)
    first = case.search("one")
    measured = []
    monkeypatch.setattr(evaluations.Evaluations, "_measure", lambda *_: measured.append(1))
    assert case.search("two").digest == first.digest
    assert measured == []


def test_another_budget_uses_the_same_measurements(tmp_path):
    case = Case(tmp_path, layers(), **BUDGET)
    before = len(told(case.search("one"))["trials"])
    lines = len((tmp_path / "journal.jsonl").read_text().splitlines())
    assert lines == before
    case.recipe = recipe(tmp_path, vs_eager={"sqnr_db": 0.0})
    assert case.search("two").artifact.facts["excluded"] == []
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == lines


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline import evaluations
from tests.stage import test_search as here
kept, count = evaluations._append, 0
def append(journal, key, trial):
    global count
    kept(journal, key, trial)
    count += 1
    if count == 3:
        with journal.open("a") as stream:
            stream.write('{"key": "cut sho')
        os.kill(os.getpid(), signal.SIGKILL)
evaluations._append = append
here.Case(Path(sys.argv[1]), here.layers(), **here.BUDGET).search()
"""


def test_a_killed_search_goes_on_from_what_was_measured(tmp_path, monkeypatch):
    killed = subprocess.run([sys.executable, "-W", "error", "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -9
    case = Case(tmp_path, layers(), **BUDGET)
    measured = []
    kept = evaluations.Evaluations._measure

    def count(self, choice, places):
        measured.append(choice)
        return kept(self, choice, places)

    monkeypatch.setattr(evaluations.Evaluations, "_measure", count)
    found = case.search()
    assert len(measured) == len(told(found)["trials"]) - 3
    assert found.digest == case.search("fresh", "other").digest
    assert not list(tmp_path.glob(".found.*.tmp"))


def test_many_samples_are_looked_at_in_part_first_and_confirmed_on_all(tmp_path):
    found = Case(tmp_path, layers(), calls=12, **BUDGET).search()
    page = told(found)
    assert [trial["rows"] for trial in page["trials"][:5]] == [64] * 5
    assert (page["trials"][-1]["choice"], page["trials"][-1]["rows"]) == (page["chosen"], 192)


def test_a_metric_that_needs_all_samples_gets_them(tmp_path):
    (tmp_path / "whole.py").write_text(
        "def metric(outputs, labels):\n    assert len(outputs) == 12\n    return float(outputs[0]['y'].mean())\n"
    )
    found = Case(tmp_path, layers(None), calls=12, metric="whole:metric").search()
    assert {trial["calls"] for trial in told(found)["trials"]} == {12}


def test_a_metric_that_always_raises_is_the_recipes_fault(tmp_path):
    (tmp_path / "broken.py").write_text("def metric(outputs, labels):\n    return outputs[0]['z']\n")
    with pytest.raises(RecipeError, match="KeyError"):
        Case(tmp_path, layers(None), metric="broken:metric").search()


# --- tricks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_smoothing_computes_the_same_and_loses_less(tmp_path, shared):
    case = Case(tmp_path, norms(shared))
    before = case.fp32.file("model.onnx")
    graph = Graph(onnx.load(before))
    plan = integer.plan(graph)
    assert list(tricks.smoothable(graph, plan)) == ["n"]
    feeds = [sample.feeds for sample in samples.samples(case.recipe, case.data, "calibration")]
    fresh = tricks.smooth(graph, plan, tricks.peaks(before, feeds, ["n"]))
    assert fresh == (["n:smooth"] if shared else ["n"])
    assert [one.op_type for one in graph.model.graph.node].count("Mul") == int(shared)
    onnx.save(graph.model, tmp_path / "smooth.onnx")
    one, two = (written(path)(case.feeds())["y"] for path in (before, tmp_path / "smooth.onnx"))
    assert distance("y", one, two).sqnr_db > 100

    smoothing = told(case.search())["tricks"][-1]
    assert smoothing["name"] == "smooth"
    assert smoothing["kept"] is True
    assert smoothing["after_db"] > smoothing["before_db"] + 3


def test_mean_errors_are_taken_off_biases_old_and_new():
    rng = np.random.default_rng(0)
    graph = Graph(
        model(
            [
                node("Gemm", ["x", "w0"], "g", "a"),
                node("MatMul", ["g", "w1"], "m", "b"),
                node("Add", ["shared", "m"], "s", "b"),
                node("MatMul", ["s", "w2"], "p", "c"),
                node("Add", ["p", "shared"], "y", "d"),
            ],
            [*(weight(rng, f"w{place}", WIDTH, WIDTH) for place in range(3)), weight(rng, "shared", WIDTH)],
        )
    )
    shared = graph.value("shared").copy()
    shift = {f"node_{name}": np.full(WIDTH, value) for name, value in (("g", 1.0), ("m", 2.0), ("p", 3.0))}
    plan = integer.plan(graph, exclude=["node_p"])
    assert tricks.correct_bias(graph, plan, shift) == ["node_g", "node_m"]
    after = Graph(graph.model)
    by_name = {one.name: one for one in after.model.graph.node}
    assert after.value(by_name["node_g"].input[2]) == pytest.approx(np.full(WIDTH, -1.0))
    assert after.value(by_name["node_s"].input[0]) == pytest.approx(shared - 2)
    assert after.value(by_name["node_y"].input[1]) == pytest.approx(shared)


# --- local errors --------------------------------------------------------------------------------------------------


def test_local_errors_are_those_of_the_operator_alone(tmp_path):
    rng = np.random.default_rng(0)
    kernel, bias = weight(rng, "k", 4, 2, 3, 3), weight(rng, "b", 4)
    nodes = [
        node("Conv", ["image", "k", "b"], "c", "stem", pads=[1, 1, 1, 1]),
        node("Relu", ["c"], "r", "stem"),
        node("GlobalAveragePool", ["r"], "y", "pool"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 2, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 1, 1])],
        [kernel, bias],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    feeds = [{"image": rng.normal(size=(3, 2, 8, 8)).astype(np.float32)} for _ in range(2)]
    index = Graph(onnx.load(path))
    plan = integer.plan(index)
    ranges = calibrate.ranges(calibrate.collect(path, feeds), "minmax")
    found = sensitivity.measure(path, feeds, plan, ranges, "u8s8")
    # the Relu is fused into its convolution, and isn't looked at by itself; nor is a pool that nothing integer reads
    assert set(found) == {"node_c"}
    error = found["node_c"]
    assert error.macs == 2 * 3 * 4 * 64 * 2 * 9
    assert error.mean is not None
    assert error.mean.shape == (4,)
    assert 30 < error.sqnr_db < 60

    coarse = {name: (10 * low, 10 * high) for name, (low, high) in ranges.items()}
    worse = sensitivity.measure(path, feeds, plan, coarse, "u8s8")["node_c"]
    assert error.sqnr_db - worse.sqnr_db == pytest.approx(20, abs=8)
    assert worse.signal == error.signal

    table = sensitivity.rank(index, found)
    row = table.rows[0]
    assert (row.operator, row.module, row.macs_share) == ("Conv", "stem", 1.0)


def test_the_ranking_starts_with_the_worst_and_keeps_the_graphs_order_among_equals():
    graph = Graph(layers(None))
    noise = {"node_product0": 1.0, "node_product1": 8.0, "node_product2": 1.0, "node_product3": 0.0}
    errors = {name: sensitivity.Error(100.0, value, 10, None) for name, value in noise.items()}
    found = sensitivity.rank(graph, errors)
    assert [row.node[-1] for row in found.rows] == ["1", "0", "2", "3"]
    assert [row.sqnr_db for row in found.rows] == [10.97, 20.0, 20.0, 200.0]
    assert [row.macs_share for row in found.rows] == [0.25] * 4
