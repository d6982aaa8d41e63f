"""The table of candidates, from what stages leave behind."""

import json

import pytest

from pipeline import summary
from pipeline.candidates import Candidate, LeftInFloat, Speed, ranking, versus_fp32
from pipeline.store import Key, make

ROWS = [
    {"node": "node_conv2d", "operator": "Conv", "module": "stem.0", "sqnr_db": 21.25, "macs_share": 0.125},
    {"node": "node_linear", "operator": "Gemm", "module": "head", "sqnr_db": 40.0, "macs_share": 0.875},
]


@pytest.mark.parametrize(
    "data",
    [{"sensitivity": {"rows": ROWS}, "tried": [[], ["node_conv2d"]]}, ROWS, {"evaluations": [1.5], "rows": ROWS}],
)
def test_the_ranking_of_a_search_is_found(tmp_path, data):
    def work(out):
        (out / "search.json").write_text(json.dumps(data))
        return {}

    found = ranking(make(tmp_path / "graph", Key("onnx"), work).stored)
    assert [(one.module, one.sqnr_db) for one in found] == [("stem.0", 21.25), ("head", 40.0)]
    one = Candidate(target="t", scheme="int8-u8s8", outcome="chosen", chosen=True, sensitive=found)
    assert summary.sensitive_rows([one])[0] == ["t", "int8-u8s8", "1", "Conv", "stem.0", "21.2 dB", "12.5%"]


def test_without_a_search_there_is_no_ranking(tmp_path):
    def empty(out):
        (out / "model.onnx").touch()
        return {}

    assert ranking(make(tmp_path / "graph", Key("onnx"), empty).stored) == ()


def test_the_speed_beside_fp32_is_that_of_one_thread():
    speeds = tuple(
        Speed(sizes={}, threads=threads, median_ms=1, versus_fp32=ratio)
        for threads, ratio in ((1, 2.0), (1, 8.0), (2, 0.1))
    )
    found = Candidate(target="t", scheme="int8-u8s8", outcome="chosen", speeds=speeds)
    assert versus_fp32(found) == pytest.approx(4)


def test_what_was_not_found_out_stays_empty():
    line = summary.candidate_row(Candidate(target="t", scheme="int8-dynamic", outcome="does not apply: no products"))
    assert line == ["t", "int8-dynamic", *[""] * 10, "[dim]does not apply: no products[/]"]


def test_operators_in_float_are_named_by_their_module():
    fell = LeftInFloat(node="node_conv2d", module="body.0", why="the engine runs it as Conv in fp32")
    kept = LeftInFloat(node="node_MatMul_3", module="", why="excluded")
    one = Candidate(target="t", scheme="int8-u8s8", outcome="", left_in_float=(kept,), fell_back=(fell,), size_bytes=1)
    assert summary.candidate_row(one)[3] == "2"
    assert summary.float_rows([one]) == [
        ["t", "int8-u8s8", "body.0 (node_conv2d)", "the engine runs it as Conv in fp32"],
        ["t", "int8-u8s8", "node_MatMul_3", "excluded"],
    ]


def test_the_ratio_is_the_geometric_mean_over_what_was_timed():
    def at(ratio):
        return Speed(sizes={"batch": 1}, threads=1, median_ms=1, versus_fp32=ratio)

    def of(*ratios):
        return Candidate(target="t", scheme="fp32", outcome="", speeds=tuple(map(at, ratios)))

    assert versus_fp32(of(2.0, 8.0)) == pytest.approx(4)
    assert versus_fp32(of(None)) is None
