"""Every target that this machine can build and run, side by side: verdicts, and times next to ONNX Runtime and eager.

    python benchmarks/targets.py [--recipes resnet50 minilm digits arr_coc] [--targets T ...] [--workspace DIR]
                                 [--seconds S] [--out docs/targets.md]

Each recipe is exported for all rows of `targets/targets.toml` that run here, new ones included, and for the rows that
choose among them. Then the engine that each row ships, and its fp32 one, are timed turn by turn on one thread, in
processor time. Exits with 1 if a row failed or the fastest target is slower than it must be. With `--workspace` what
was built is kept for the next time.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.pop(0)  # run as a script, this folder is first on it, where the library `tvm` would be tvm.py
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import side_by_side as sides
from pipeline import backends, run, summary, targets
from pipeline.job import Job
from pipeline.run import Verdict
from pipeline.timing import timed_sizes
from pipeline.types import Scheme, Target
from pipeline.workspace import Workspace

RECIPES = ("resnet50", "minilm", "digits", "arr_coc")
BASE, EAGER = ("linux-x86_64-vnni-onnxruntime", "fp32"), ("any-python-eager", "fp32")
FASTEST = {
    "resnet50": 6.0,
    "minilm": 3.2,
}  # of ONNX Runtime's speed in fp32, at batch 1, that the best target must reach

Form = tuple[str, Scheme]
"""A target and a numeric form."""


@dataclass
class Found:
    """All about one recipe.

    Attributes:
        verdicts: on the rows that were built, in the file's order.
        choices: on the rows that choose among them.
        ratios: of each form at each of `sizes`, relative to `BASE`.
    """

    recipe: str
    verdicts: list[Verdict]
    choices: list[Verdict]
    sizes: list[Mapping[str, int]] = field(default_factory=list)
    ratios: list[dict[str, sides.Ratio]] = field(default_factory=list)


def rows_here(rows: Mapping[str, Target], wanted: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Names of the rows that are built and timed here, and why the others are not."""
    here, others = [], {}
    for name, row in rows.items():
        if wanted and name not in (*wanted, BASE[0], EAGER[0]):
            continue
        backend = backends.find(row.backend)
        reason = backend.missing(row) or backend.not_runnable(row) or targets.not_measured(row)
        if reason is None:
            here.append(name)
        else:
            others[name] = reason
    return here, others


def measured(root: Path, recipe: str, names: Sequence[str], seconds: float) -> Found:
    """Export one recipe for the rows `names`, and time what they ship."""
    shutil.copytree(sides.ROOT / "recipes" / recipe, root / "recipes" / recipe, dirs_exist_ok=True)
    job = run.prepare(Workspace(root), recipe, targets=names)
    done = run.export(job, watch=partial(_say, recipe))
    found = Found(
        recipe, [one for one in done if not one.target.candidates and not one.rows], [one for one in done if one.rows]
    )
    with contextlib.closing(job):
        engines = loaders(job, found.verdicts)
        found.sizes = list(timed_sizes(job.recipe.axes))
        found.ratios = sides.speeds(job, engines, spell(BASE), 1, found.sizes, seconds * len(engines))
    return found


def loaders(job: Job, verdicts: Sequence[Verdict]) -> dict[str, sides.Loader]:
    """The form that each row ships, and its fp32 one."""
    found: dict[str, sides.Loader] = {}
    for verdict in verdicts:
        for scheme in shown(verdict):
            engine = job.engine(verdict.target, scheme).stored
            found[spell((verdict.target.name, scheme))] = partial(backends.loaded, engine, verdict.target)
    return found


def shown(verdict: Verdict) -> list[Scheme]:
    """Forms of a row that passed which are in the table: fp32 and the one that it ships."""
    if verdict.status != "passed" or verdict.scheme is None:
        return []
    forms = {scheme for scheme, parity in verdict.candidates.items() if parity.passed} & {"fp32", verdict.scheme}
    return sorted(forms)


def spell(form: Form) -> str:
    """A form as a key of `Found.ratios`."""
    return " ".join(form)


def best(found: Found) -> tuple[str, float]:
    """The fastest target and form at batch 1, and its speed relative to ONNX Runtime in fp32."""
    speeds = {name: ratio.median for name, ratio in found.ratios[0].items()}
    name = max(speeds, key=lambda one: speeds[one])
    return name, speeds[name]


def lines(found: Found) -> list[list[str]]:
    """The recipe's lines of the table; what ships is in bold."""
    made: list[list[str]] = []
    for verdict in found.verdicts:
        name = verdict.target.name
        for scheme in shown(verdict):
            parity, key = verdict.candidates[scheme], spell((name, scheme))
            speeds = [f"{one[key].median:.2f}" for one in (found.ratios[0], found.ratios[-1])]
            eager = found.ratios[0][key].median / found.ratios[0][spell(EAGER)].median
            distance = summary.decibels(summary.worst_sqnr_db(parity.sizes))
            told = f"**{scheme}**" if scheme == verdict.scheme else scheme
            passed = f"passed at {len(parity.sizes)} sizes, {distance}"
            made.append([found.recipe, name, told, passed, f"{found.ratios[0][key].ms:.3g}", *speeds, f"{eager:.2f}"])
        if not shown(verdict):
            made.append([found.recipe, name, "", f"{verdict.status}: {_short(verdict.reason)}", *[""] * 4])
    return made


def page(every: Sequence[Found], others: Mapping[str, str], command: str, load: Sequence[float]) -> str:
    """The table, what the rows that choose took, and the rows that don't run here."""
    head = ["recipe", "target", "form", "parity", "ms at batch 1", "x ORT", "x ORT at opt", "x eager"]
    chosen = [
        f"- `{one.target.name}` takes for {found.recipe} `{one.built_for}`, {one.scheme}"
        if one.built_for
        else f"- `{one.target.name}` takes nothing for {found.recipe}: {_short(one.reason)}"
        for found in every
        for one in found.choices
    ]
    absent = [
        f"- {', '.join(f'`{name}`' for name in others if others[name] == reason)}: {reason}"
        for reason in dict.fromkeys(others.values())
    ]
    parts = [sides.table(head, [line for found in every for line in lines(found)]), "\n".join(chosen)]
    parts += ["Not run on that machine:\n\n" + "\n".join(absent) if absent else "", sides.conditions(command, load)]
    return "\n\n".join(part for part in parts if part)


def lacking(every: Sequence[Found]) -> list[str]:
    """Rows that failed, and recipes whose fastest target isn't fast enough."""
    told = [
        f"{found.recipe}, {one.target.name}: {_short(one.reason)}"
        for found in every
        for one in (*found.verdicts, *found.choices)
        if one.status == "failed"
    ]
    for found in every:
        name, speed = best(found)
        if speed < FASTEST.get(found.recipe, 0):
            told.append(
                f"{found.recipe}: the fastest is {name} with {speed:.2f}x of ONNX Runtime in fp32, "
                f"{FASTEST[found.recipe]}x is wanted"
            )
    return told


def _short(reason: str) -> str:
    return " ".join(reason.replace("|", "/").split())[:90]


def _say(recipe: str, step: str, state: str, seconds: float) -> None:
    if state != "cached":
        print(f"{time.strftime('%H:%M:%S')} {recipe} {step} {state} ({seconds:.0f} s)", file=sys.stderr, flush=True)


def main() -> int:
    """Entry point; 1 when something lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="R")
    parser.add_argument("--targets", nargs="+", default=[], metavar="T", help="rows, instead of all that run here")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing, for each engine and size")
    parser.add_argument("--out", type=Path, help="page whose table to replace")
    parser.add_argument("--workspace", type=Path, help="folder to work in and to keep; a temporary one if not given")
    options = parser.parse_args()
    load = sides.load_average()
    with contextlib.ExitStack() as stack:
        root = (options.workspace or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        shutil.copytree(sides.ROOT / "targets", root / "targets", dirs_exist_ok=True)
        names, others = rows_here(Workspace(root).rows(), options.targets)
        every = []
        for recipe in options.recipes:
            every.append(measured(root, recipe, names, options.seconds))
            print(f"{recipe}: {best(every[-1])}", file=sys.stderr, flush=True)
    words = ["python benchmarks/targets.py"]
    words += ["--recipes", *options.recipes] if options.recipes != list(RECIPES) else []
    words += ["--targets", *options.targets] if options.targets else []
    text = page(every, others, " ".join(words), load)
    print(text)
    if options.out is not None:
        sides.write_between(options.out, "targets", text)
    missed = lacking(every)
    print("\n".join(["", *missed]) if missed else "\nnothing lacks")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
