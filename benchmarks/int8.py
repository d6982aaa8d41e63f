"""INT8 side by side: what exportyard chooses, its fp32 engine, and what `onnxruntime.quantization` gives.

    python benchmarks/int8.py [--recipes resnet50 minilm digits arr_coc] [--quick] [--out docs/int8.md]

Each recipe is exported for one row in a temporary workspace. The same fp32 graph and the same calibration data then go
through `onnxruntime.quantization`, after the pre-processing that its manual asks for: `quantize_static` and
`quantize_dynamic` with every setting at its default, and `quantize_static` with the settings that experts use on x86
(U8 activations, S8 weights, per channel). All forms are timed turn by turn in this process with one and with all
threads, at batch 1 and 4. Calibration is by minmax, so onnxruntime needs little memory for it; its entropy calibrator
keeps every activation of every sample (see calibration.py).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this folder is on it

import onnxruntime
from onnxruntime import quantization

from benchmarks import side_by_side as sides
from pipeline import backends, host, run, samples
from pipeline.job import Job
from pipeline.types import Runner, Signature, Sizes, Target
from pipeline.workspace import Workspace

RECIPES = ("resnet50", "minilm", "digits", "arr_coc")
BATCHES = (1, 4)
SECONDS = 6.0  # of timing, for each batch and number of threads
FP32, STATIC, DYNAMIC, EXPERT = "fp32", "quantize_static", "quantize_dynamic", "U8S8 per channel"

# what has to hold with one thread at batch 1: least speed relative to fp32, and a bound on the distance
PROMISES = {"resnet50": (2.5, "sqnr_db", 31.0), "minilm": (2.3, "cosine", 0.99)}


@dataclass(frozen=True)
class Form:
    """One numeric form of a recipe; `error` says why there is none."""

    label: str
    size_bytes: int = 0
    load: sides.Loader | None = None
    error: str = ""


class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # it has no types
    """The recipe's calibration samples, as onnxruntime reads them."""

    def __init__(self, job: Job) -> None:
        self._feeds = (sample.feeds for sample in samples.samples(job.recipe, job.data().stored, "calibration"))

    def get_next(self) -> Mapping[str, Any] | None:
        """The next feeds; None at the end."""
        return next(self._feeds, None)


def exported(root: Path, recipe: str) -> tuple[Job, run.Verdict]:
    """The recipe exported for `sides.TARGET` in the workspace `root`."""
    shutil.copytree(sides.ROOT / "recipes" / recipe, root / "recipes" / recipe, dirs_exist_ok=True)
    shutil.copytree(sides.ROOT / "targets", root / "targets", dirs_exist_ok=True)
    job = run.prepare(Workspace(root), recipe, targets=[sides.TARGET])
    return job, run.export(job)[0]


def our_forms(job: Job, verdict: run.Verdict) -> dict[str, Form]:
    """Our fp32 engine, and every other that was built, chosen or not."""
    target = verdict.target
    if verdict.scheme is None or verdict.engine is None:
        raise SystemExit(f"{job.recipe.name}: nothing to ship: {verdict.reason}")
    built = [FP32, *(scheme for scheme in verdict.candidates if scheme != FP32)]
    engines = {scheme: job.engine(target, scheme).stored for scheme in built} | {verdict.scheme: verdict.engine}
    chosen = verdict.scheme
    return {
        name: Form(
            f"exportyard {name}{' **(chosen)**' if name == chosen else ''}",
            engine.size_bytes,
            partial(_engine, engine, target),
        )
        for name, engine in engines.items()
    }


def _engine(engine: Any, target: Target, threads: int) -> contextlib.AbstractContextManager[Runner]:
    return backends.loaded(engine, target, threads)


def their_forms(job: Job, folder: Path) -> dict[str, Form]:
    """The files that `onnxruntime.quantization` makes of the same graph and the same data."""
    folder.mkdir(parents=True, exist_ok=True)
    source = job.onnx("fp32").stored.file("model.onnx")
    signature = job.onnx("fp32").stored.signature()
    ready = _preprocessed(source, folder)
    expert = {
        "activation_type": quantization.QuantType.QUInt8,
        "weight_type": quantization.QuantType.QInt8,
        "per_channel": True,
    }
    makers = {
        STATIC: (
            "onnxruntime quantize_static, defaults",
            lambda path: quantization.quantize_static(ready, path, Reader(job)),
        ),
        DYNAMIC: ("onnxruntime quantize_dynamic, defaults", lambda path: quantization.quantize_dynamic(ready, path)),
        EXPERT: (
            "onnxruntime quantize_static, U8S8 per channel",
            lambda path: quantization.quantize_static(ready, path, Reader(job), **expert),
        ),
    }
    found = {}
    for name, (label, make) in makers.items():
        path = folder / f"{name.replace(' ', '-')}.onnx"
        try:
            with _quiet():
                make(path)
            load = partial(_session, path, signature)
            with load(1):
                pass
        except Exception as error:  # whatever it raises is its result
            found[name] = Form(label, error=f"{type(error).__name__}: {' '.join(str(error).split())[:80]}")
            continue
        found[name] = Form(label, path.stat().st_size, load)
    return found


def _preprocessed(source: Path, folder: Path) -> Path:
    """The graph as their manual asks for it; without symbolic shapes where their inference of these fails."""
    ready = folder / "ready.onnx"
    for skip in (False, True):
        with contextlib.suppress(Exception), _quiet(), contextlib.chdir(folder):  # it leaves files where it is
            quantization.quant_pre_process(source, ready, skip_symbolic_shape=skip)
            return ready
    return source


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger().setLevel(level)


@contextlib.contextmanager
def _session(path: Path, signature: Signature, threads: int) -> Iterator[Runner]:
    """The file as a user would run it, optimised while it is loaded; threads and checks as for our engines."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def call(feeds: Any) -> dict[str, Any]:
        return {name: array.copy() for name, array in zip(names, session.run(names, dict(feeds)), strict=True)}

    yield backends.checked(call, signature)


def timed_sizes(job: Job) -> list[Sizes]:
    """Batch 1 and 4, other axes at opt."""
    opt = {name: axis.opt for name, axis in job.recipe.axes.items()}
    return [opt | {"batch": batch} for batch in BATCHES]


@dataclass(frozen=True)
class Found:
    """All about one recipe; ratios by (threads, batch) and form."""

    recipe: str
    chosen: str
    reason: str
    forms: Mapping[str, Form]
    qualities: Mapping[str, sides.Quality]
    ratios: Mapping[tuple[int, int], Mapping[str, sides.Ratio]]


def measured(root: Path, recipe: str, seconds: float) -> Found:
    """Export, quantise, judge and time one recipe."""
    begun = time.perf_counter()
    job, verdict = exported(root, recipe)
    _say(recipe, "exported", begun)
    try:
        forms = our_forms(job, verdict) | their_forms(job, root / "onnxruntime" / recipe)
        _say(recipe, "quantised by onnxruntime", begun)
        loaders = {name: form.load for name, form in forms.items() if form.load is not None}
        qualities = {name: sides.quality(job, load) for name, load in loaders.items()}
        _say(recipe, "judged", begun)
        ratios = {}
        for threads in sorted({1, host.cpu_count()}):
            sizes = timed_sizes(job)
            rows = sides.speeds(job, loaders, FP32, threads, sizes, seconds)
            ratios |= {(threads, one["batch"]): row for one, row in zip(sizes, rows, strict=True)}
        _say(recipe, "timed", begun)
    finally:
        job.close()
    return Found(recipe, str(verdict.scheme), verdict.reason, forms, qualities, ratios)


def _say(recipe: str, what: str, begun: float) -> None:
    print(f"{recipe}: {what} after {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)


def rows_of(found: Found) -> list[list[str]]:
    """The rows of one recipe in the table."""
    rows = []
    for name, form in found.forms.items():
        first = [found.recipe, form.label]
        if name not in found.qualities:
            rows.append([*first, form.error, *[""] * (3 + len(found.ratios))])
            continue
        one = found.qualities[name]
        cells = [_cell(row[name], base=name == FP32) for row in found.ratios.values()]
        held = "yes" if not one.broken else "**no**"
        rows.append([*first, f"{form.size_bytes / 1e6:.2f}", f"{one.sqnr_db:.1f}", f"{one.cosine:.4f}", held, *cells])
    return rows


def _cell(ratio: sides.Ratio, *, base: bool) -> str:
    return f"1 = {ratio.ms:.3g} ms" if base else str(ratio)


def missed(found: Found) -> list[str]:
    """What doesn't hold of a recipe that must: the promises, never slower than fp32, never outside the budget."""
    name, ratios = found.chosen, found.ratios
    one = found.qualities[name]
    lacking = [f"{found.recipe} ships {name} outside its budget: {text}" for text in one.broken]
    for (threads, batch), row in ratios.items():
        if name != FP32 and row[name].slower:
            lacking.append(f"{found.recipe} {name}, {threads} threads, batch {batch}: {row[name]} of fp32")
    if found.recipe in PROMISES:
        speed, bound, least = PROMISES[found.recipe]
        if ratios[1, 1][name].median < speed:
            lacking.append(f"{found.recipe} {name} {ratios[1, 1][name]} of fp32, expected {speed}")
        if getattr(one, bound) < least:
            lacking.append(f"{found.recipe} {name} {bound} {getattr(one, bound):.4f}, expected {least}")
    return lacking


def page(every: list[Found], command: str, load: Any) -> str:
    """The table with what it was measured on, and why each form was chosen."""
    timings = [
        f"{threads} thread{'s' if threads > 1 else ''}, batch {batch}" for threads, batch in next(iter(every)).ratios
    ]
    head = ["recipe", "form", "MB", "SQNR dB", "cosine", "in budget", *timings]
    rows = [row for found in every for row in rows_of(found)]
    reasons = [f"- `{found.recipe}` ships `{found.chosen}`: {found.reason}" for found in every]
    return "\n\n".join([sides.table(head, rows), "\n".join(reasons), sides.conditions(command, load)])


def main() -> int:
    """Entry point; 1 when something that must hold does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--quick", action="store_true", help="a third of the timing")
    parser.add_argument("--out", type=Path, help="page whose table to replace")
    parser.add_argument("--workspace", type=Path, help="folder to work in and to keep; a temporary one if not given")
    options = parser.parse_args()
    load = sides.load_average()
    with contextlib.ExitStack() as stack:
        root = options.workspace or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        every = [
            measured(root.resolve(), recipe, SECONDS / 3 if options.quick else SECONDS) for recipe in options.recipes
        ]
    words = ["python benchmarks/int8.py"]
    words += ["--recipes", *options.recipes] if tuple(options.recipes) != RECIPES else []
    words += ["--quick"] if options.quick else []
    text = page(every, " ".join(words), load)
    print(text)
    if options.out is not None:
        sides.write_between(options.out, "int8", text)
    lacking = [line for found in every for line in missed(found)]
    print("\n".join(["", *lacking]) if lacking else "\nall that must hold does")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
