"""Twelve faults planted in engines and forms of real models: is the very operator named? And none where all is right?

    python benchmarks/explain.py -C WORKSPACE [--only RECIPE ...]

Needs a workspace where the recipes digits, minilm, resnet50 and arr_coc were exported for the rows below. Prints a
table of the plants and one of the engines as they are; the exit status is 1 if a plant is missed or misnamed, or if an
operator of an engine that is right is accused.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this folder is on it

import numpy as np
import onnx

from pipeline import calibrate, half, run, workspace
from pipeline.explain import engine as explain_engine
from pipeline.explain import explanation
from pipeline.explain import form as explain_form
from pipeline.explain.explanation import SEARCH
from pipeline.graph import Graph
from pipeline.job import Job
from pipeline.stages.quantize import FORMS, STATISTICS
from pipeline.types import Departure, Layer, Scheme, Target
from tests import faults

X86, ARM = "linux-x86_64-{}-onnxruntime", "linux-aarch64-onnxruntime"
ROWS = (X86.format("vnni"), X86.format("avx2"), ARM)
PLANTED = ("digits", "minilm", "resnet50")
RECIPES = (*PLANTED, "arr_coc")
STATIC: Scheme = "int8-u8s8"
INTEGER = ("scale off by 2", "wrong zero point", "saturating range")

Found = tuple[tuple[Departure, ...], tuple[Layer, ...], int]


@dataclass(frozen=True)
class Row:
    """One line of the table: what was planted, and what was named."""

    fault: str
    recipe: str
    scheme: str
    level: str
    named: str
    right: bool
    extra: int
    seconds: float


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-C", dest="root", type=Path, default=Path(), help="workspace with exported recipes")
    parser.add_argument("--only", nargs="*", default=RECIPES, help="recipes")
    arguments = parser.parse_args()
    place = workspace.find(arguments.root)
    rows: list[Row] = []
    print(
        "| fault | recipe | form | level | named | right | others accused | CPU s |\n|---|---|---|---|---|---|---|---|"
    )
    for recipe in arguments.only:
        job = run.prepare(place, recipe, targets=list(ROWS))
        if recipe in PLANTED:
            for row in planted(job):
                rows.append(row)
                print(_line(row), flush=True)
    wrong = sum(not row.right for row in rows)
    print(
        f"\n{len(rows) - wrong} of {len(rows)} named\n\n"
        "| recipe | target | form | departs | compared | CPU s |\n|---|---|---|---|---|---|"
    )
    accused = count = 0
    for recipe in arguments.only:
        job = run.prepare(place, recipe, targets=list(ROWS))
        for target in job.targets:
            for scheme in target.schemes:
                if job.left_out(target, scheme) is not None:
                    continue
                begun = time.process_time()
                found, compared = healthy(job, target, scheme)
                count, accused = count + 1, accused + bool(found)
                said = ", ".join(one.node for one in found[:3]) or "nothing"
                spent = time.process_time() - begun
                print(f"| {recipe} | {target.name} | {scheme} | {said} | {compared} | {spent:.1f} |", flush=True)
    print(f"\n{accused} of {count} engines that are right accused")
    return int(bool(wrong or accused))


def _line(row: Row) -> str:
    right = "yes" if row.right else "NO"
    cells = (row.fault, row.recipe, row.scheme, row.level, row.named, right, row.extra, f"{row.seconds:.1f}")
    return "| " + " | ".join(map(str, cells)) + " |"


def feeds(job: Job) -> list[dict[str, Any]]:
    """What `exportyard explain` looks at: an evaluation sample, and the least sizes."""
    asked = explanation.sizes(job.recipe, None)
    return [dict(one) for one in explanation.inputs(job.recipe, job.model(job.targets[0], "fp32"), asked)]


def graph(job: Job, scheme: Scheme) -> onnx.ModelProto:
    """A form, to be changed."""
    return onnx.load(job.onnx(scheme).stored.file("model.onnx"))


def planted(job: Job) -> Iterator[Row]:
    """Every fault in one recipe's engine or form."""
    given, target = feeds(job), job.targets[0]
    for fault, plant in faults.PLANTS.items():
        scheme: Scheme = STATIC if fault in INTEGER else "fp32"
        engine = onnx.load(job.engine(target, scheme).stored.file("model.onnx"))
        form = graph(job, scheme)
        wanted = plant(engine, form)
        look = partial(explain_engine.departures, engine, form, given)
        yield _looked(job, fault, scheme, wanted, look)
    for fault, plant in faults.FORM_PLANTS.items():
        form, fp32 = graph(job, STATIC), graph(job, "fp32")
        wanted = plant(form, fp32)
        yield _looked(job, fault, STATIC, wanted, partial(_of_form, job, STATIC, form, fp32, given))
    fp32 = graph(job, "fp32")
    wanted = faults.overflow(fp32)
    form = onnx.ModelProto()
    form.CopyFrom(fp32)
    half.convert(Graph(form))
    yield _looked(job, "fp16 overflow", "fp16", wanted, partial(explain_form.departures, form, fp32, None, given, {}))


def _looked(job: Job, fault: str, scheme: str, wanted: set[str], look: Callable[[], Found]) -> Row:
    begun = time.process_time()
    found = look()[0]
    first = found[0] if found else None
    named = "nothing" if first is None else f"{first.operator} `{first.node}`: {first.kind}"
    right = first is not None and first.node in wanted
    level = "" if first is None else first.level
    spent = time.process_time() - begun
    return Row(fault, job.recipe.name, scheme, level, named, right, max(len(found) - 1, 0), spent)


def _of_form(
    job: Job, scheme: Scheme, form: onnx.ModelProto, fp32: onnx.ModelProto, given: list[dict[str, Any]]
) -> Found:
    stored = job.onnx(scheme).stored
    chosen = json.loads(stored.file(SEARCH).read_text())["chosen"] if SEARCH in stored.artifact.files else {}
    static = scheme not in ("fp16", "int8-dynamic")
    return explain_form.departures(
        form,
        fp32,
        FORMS.get(scheme),
        given,
        calibrate.load(job.statistics().stored.file(STATISTICS)) if static else {},
        corrected=bool(chosen.get("correct")),
        smooth=bool(chosen.get("smooth")),
    )


def healthy(job: Job, target: Target, scheme: Scheme) -> tuple[tuple[Departure, ...], int]:
    """What is said of an engine and its form as they are."""
    found = job.explanation_report(target, scheme)
    return found.departures, found.compared


if __name__ == "__main__":
    np.seterr(all="ignore")
    raise SystemExit(main())
