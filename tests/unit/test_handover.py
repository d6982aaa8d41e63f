"""What a worker tells the leader of a target, on its way through a file of JSON."""

import json
import math

from pipeline import handover
from pipeline.store import json_text
from pipeline.types import Distance, MetricResult, ParityReport, SizeParity


def test_an_engine_that_is_exactly_the_model_can_be_told_of():
    same = Distance(output="y", max_abs=0, max_over_peak=0, rmse=0, sqnr_db=math.inf, cosine=1)
    size = SizeParity(sizes={"batch": 1}, vs_onnx=(same,))
    metric = MetricResult(name="accuracy", eager=1, engine=1, drop=0, budget=0.01, samples=3)
    parity = ParityReport(recipe="m", target="t", scheme="fp32", sizes=(size,), metric=metric, passed=True)
    verdict = {
        "target": "t",
        "status": "passed",
        "reason": "",
        "scheme": "fp32",
        "built": "engine/t/fp32",
        "parity": parity.plain(),
        "latency": None,
        "candidates": {"fp32": parity.plain()},
        "left_out": {},
        "audits": {},
        "exit_code": 0,
        "rows": [],
        "built_for": None,
    }
    time = {"step": "engine/t/fp32", "key": "k", "start": 1.5, "seconds": 2.25, "where": "board"}
    told = {"verdict": verdict, "steps": {"engine/t/fp32": "0" * 64}, "worker": "w", "times": [time]}
    found = handover.read(told)
    assert [one.plain() for one in found.times] == [time]
    assert found.verdict.parity == parity
    assert handover.read(json.loads(json_text(found.plain()))) == found
