"""Reports of what nobody hopes for: odd names, many targets, none that passed, numbers that aren't any."""

import math

import pytest

from pipeline import store
from pipeline.candidates import Candidate, LeftInFloat
from pipeline.report import markdown as report_markdown
from pipeline.report import page as report_page
from pipeline.report.data import (
    Cell,
    FailureLine,
    LastRelease,
    ModuleShare,
    Numbers,
    Parity,
    Provenance,
    Report,
    SensitiveOperator,
    Sensitivity,
    Share,
    Speed,
    StepLine,
    TargetLine,
    Tensor,
    Timeline,
    Use,
    Verdict,
)
from pipeline.types import Distance, MetricResult, Ratio, StressCheck, Timing
from tests import browser
from tests.stage.test_report import check_looks, check_numbers, opened

INF, NAN = math.inf, math.nan
ODD = "<script>alert('x')</script> & \"quoted\" `code` | --> $\\frac{a}{b}$ {{ 7 * 7 }}"
LONG = "encoder." + "a_rather_long_module_name." * 6 + "projection"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.browser(tmp_path_factory.mktemp("chromium"), 1280, 900) as tab:
        yield tab


def name(place):
    return f"linux-x86_64-a-very-long-name-of-hardware-that-somebody-has-chosen-{place}-onnxruntime"


def distance(value):
    return Distance(
        output=ODD, kind="logits", max_abs=value, max_over_peak=value, rmse=value, sqnr_db=-value, cosine=value
    )


def speed(place, scheme):
    time = Timing(median_ms=0.01 * 1.5**place, p25_ms=0.005, p75_ms=1e6, repeats=5)
    ratio = Ratio(median=1e4, p25=1e-9, p75=INF)
    return Speed(
        target=name(place), scheme=scheme, sizes={"batch": 1, "seq": 64}, threads=2, time=time, eager=time,
        versus_eager=ratio, versus_fp32=ratio,
    )  # fmt: skip


def target(place, status="passed", metric=0.5):
    if status != "passed":
        return TargetLine(target=name(place), backend="tvm", status=status, reason=f"{ODD} {LONG}" * 3, required=False)
    result = MetricResult(name=ODD, eager=0.5, engine=metric, drop=0.5 - metric, budget=0.01, samples=3)
    uses = (
        Use(against="budget", bound="drop", value=result.drop, limit=0.01, share=INF),
        Use(against="form", bound="sqnr_db", output=ODD, value=-INF, limit=25, share=None),
    )
    return TargetLine(
        target=name(place), backend="tvm", status="passed", reason=ODD, required=True, scheme="fp32",
        size_bytes=10**13, metric=result, onnx_db=-INF, eager_db=INF, speed=speed(place, "fp32"), uses=uses, tightest=0,
    )  # fmt: skip


def candidate(place, scheme, metric):
    left = tuple(LeftInFloat(node=ODD, module=LONG, why=ODD) for _ in range(2))
    return Candidate(
        target=name(place), scheme=scheme, outcome=ODD * 4, chosen=scheme == "fp32", method="mse", size_bytes=1,
        metric=metric, eager_metric=0.5, drop=0, budget=0, sqnr_db=INF, cosine=NAN, int8_share=0.5, left_in_float=left,
    )  # fmt: skip


def parity(place, axes):
    sizes = [dict.fromkeys(axes, size) for size in (1, 7, 4096)]
    cells = [Cell(sizes=at, onnx_db=value, eager_db=-value, vs_onnx=(distance(value),), vs_eager=(distance(-value),))
             for at, value in zip(sizes, (INF, 12.3, NAN), strict=True)]  # fmt: skip
    cells[1] = cells[1].model_copy(update={"broken": (ODD,)})
    cells.append(Cell(sizes=dict.fromkeys(axes, 5), error=f"{ODD} {LONG}"))
    stress = (
        StressCheck(name="nan_rows", verdict="failed", why=f"{ODD} {LONG}", found=(distance(NAN),)),
        StressCheck(name=f"vector:{LONG}", sizes=sizes[0], verdict="noted", compared=ODD),
    )
    return Parity(
        target=name(place), scheme="fp32", passed=False, reasons=(ODD,), cells=tuple(cells), stress=stress, bound_db=INF
    )


def made_up(axes=("batch", "seq"), count=30, state="not ready", status=None, metric=0.5):
    targets = [target(place, status or ("passed", "failed")[place % 5 == 4], metric) for place in range(count)]
    operators = tuple(
        SensitiveOperator(
            node=ODD, operator="Conv", module=f"{LONG}.{at}", sqnr_db=20 + at % 7, macs_share=None, rank=at
        )
        for at in range(1, 80)
    )
    numbers = Numbers(
        form=0, target=name(0), scheme="int8-u8s8", macs=10**12, int8_share=0.5,
        shares=(Share(runs_in="int8", macs=5, share=0.5), Share(runs_in="fp16", macs=5, share=0.5)),
        modules=(ModuleShare(module=LONG, operators=3, macs=1, share=1, int8_share=0),),
    )  # fmt: skip
    counts = tuple(10**place for place in range(15))
    tensors = [
        Tensor(name=f"{LONG}{ODD}", low=-1e30, high=3e-30, stray=7, values=1, first=0, width=1, counts=counts, kept=())
    ]
    tensors.append(Tensor(name="empty", low=0, high=0, stray=0, values=0, first=0, width=0, counts=(), kept=()))
    steps = [StepLine(step=f"engine/{name(at)}/fp32", stage="engine", start_s=at * 9e3, seconds=at / 3, where=ODD)
             for at in range(40)]  # fmt: skip
    passed = sum(line.status == "passed" for line in targets)
    return Report(
        recipe="tiny", summary=ODD, metric=ODD, higher_is_better=False,
        verdict=Verdict(state=state, told=ODD, next=(ODD, f"`{LONG}` odd"), passed=passed, targets=count),
        failures=(FailureLine(target=name(4), stage="parity", reason=LONG * 5, command=ODD, inputs=ODD, explain=ODD),),
        warnings=(ODD, LONG), targets=tuple(targets),
        tried=tuple(candidate(at, scheme, metric) for at in range(count) for scheme in ("fp32", "int8-u8s8")),
        speeds=tuple(speed(at, "fp32") for at in range(count)),
        parity=tuple(parity(at, axes) for at in range(min(count, 3))), numbers=(numbers,),
        sensitivity=(Sensitivity(scheme="int8-u8s8", targets=(name(0),), operators=operators, worst=(0, 78)),),
        tensors=tuple(tensors), timeline=Timeline(begun_s=1.8e9, busy_s=1, steps=tuple(steps), unknown=(ODD,)),
        release=LastRelease(told=ODD),
        provenance=Provenance(
            commit=None, dirty=True, checkpoint={"model.pt": "0" * 64}, made=(), host=ODD, cpu=ODD, threads=1,
            system="linux x86_64", python="3", exportyard="1",
        ),
    )  # fmt: skip


def written(folder, found):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(store.json_text(found.plain()))
    (folder / "index.html").write_text(report_page.page(found))
    return folder / "index.html"


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(made_up(), id="thirty targets"),
        pytest.param(made_up(axes=("batch",), count=2, metric=NAN), id="a metric that is no number"),
        pytest.param(made_up(axes=(), count=1, metric=INF), id="an endless metric at one size"),
        pytest.param(made_up(axes=("a", "b", "c"), count=3, status="failed"), id="all failed, three axes"),
        pytest.param(made_up(count=3, status="not built here", state="nothing"), id="none for this host"),
    ],
)
def test_the_page_bears_it(tmp_path, chromium, found):
    page = written(tmp_path, found)
    assert check_numbers(chromium, page)["numbers"] > 50
    tab = opened(chromium, page)
    assert tab.value("document.scripts.length") == 1, "a name has become a script"
    assert ODD in tab.value("document.querySelector('[data-path=\"summary\"]').textContent")
    assert "49" not in tab.value("document.querySelector('[data-path=\"summary\"]').textContent")
    check_looks(chromium, page)
    assert len(page.read_bytes()) < 3_000_000
    lines = report_markdown.markdown(found).splitlines()
    columns = {line.replace("\\|", "").count("|") for line in lines if line.startswith("| ")}
    assert columns == {9}, "a name ends a cell"


def test_nothing_at_all(tmp_path, chromium):
    empty = dict.fromkeys(("failures", "warnings", "targets", "tried", "speeds", "parity", "numbers", "tensors"), ())
    found = made_up(count=1).model_copy(update={**empty, "sensitivity": (), "timeline": None})
    page = written(tmp_path, found)
    check_numbers(chromium, page)
    check_looks(chromium, page)
    titles = opened(chromium, page).value("[...document.querySelectorAll('h2')].map((one) => one.textContent)")
    assert titles == ["Targets", "Since the last release", "Provenance"]
