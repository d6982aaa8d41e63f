"""Twelve small architectures of transformers: none may ship slower than fp32 or beyond its budget.

    python benchmarks/architectures.py [--only NAME ...] [--out docs/int8.md]

Each is made a recipe in a temporary workspace: a network from a configuration with seeded random weights, data drawn
from a seed, a budget of 0.99 in cosine. What the pipeline chooses is then timed again here, independently of the
timings that it chose by, turn by turn with its fp32 engine. Any that fails, is slower or is outside of its budget is
named at the end, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this folder is on it

from benchmarks import side_by_side as sides
from pipeline import backends, run
from pipeline.errors import ExportyardError
from pipeline.job import Job
from pipeline.timing import timed_sizes, timed_threads
from pipeline.types import Runner
from pipeline.workspace import Workspace

ZOO = Path(__file__).resolve().parent / "zoo"
SIDE = 128
SECONDS = 1.0  # of timing, for each batch and number of threads
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One network: classes of transformers and the settings of its configuration.

    `last_norm` ends the names of the batch norms that end a block.
    """

    name: str
    kind: Literal["vision", "text"]
    family: str
    head: str
    settings: Settings
    last_norm: str = ""


def _vision(name: str, family: str, settings: Settings, last_norm: str = "") -> Architecture:
    return Architecture(name, "vision", family, "ForImageClassification", settings, last_norm)


def _text(name: str, family: str, settings: Settings) -> Architecture:
    return Architecture(name, "text", family, "Model", settings)


# initial weights of transformers are tiny (0.02), which would leave attention even; trained ones aren't
_VIT = {
    "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768,
    "image_size": SIDE, "patch_size": 16, "initializer_range": 0.05,
}  # fmt: skip
_BERT = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
    "initializer_range": 0.05,
}  # fmt: skip

ARCHITECTURES = (
    _vision(
        "resnet18", "ResNet",
        {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"},
        "layer.1.normalization",
    ),
    _vision("mobilenetv2", "MobileNetV2", {"depth_multiplier": 0.5, "image_size": SIDE}, "reduce_1x1.normalization"),
    _vision(
        "efficientnet", "EfficientNet",
        {"width_coefficient": 0.5, "depth_coefficient": 0.5, "image_size": SIDE, "hidden_dim": 640},
        "project_bn",
    ),
    _vision(
        "regnet", "RegNet",
        {"embedding_size": 32, "hidden_sizes": [24, 56, 152, 368], "depths": [1, 1, 4, 7], "groups_width": 8},
        "layer.3.normalization",
    ),
    _vision(
        "convnext", "ConvNext",
        {"hidden_sizes": [40, 80, 160, 320], "depths": [2, 2, 6, 2], "image_size": SIDE, "layer_scale_init_value": 0.5},
    ),
    _vision(
        "mobilevit", "MobileViT",
        {
            "hidden_sizes": [64, 80, 96], "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320], "expand_ratio": 2.0,
            "image_size": SIDE,
        },
        "reduce_1x1.normalization",
    ),
    _vision("vit", "ViT", _VIT),
    _vision(
        "swin", "Swin",
        {
            "embed_dim": 48, "depths": [2, 2, 2, 2], "num_heads": [2, 4, 8, 16], "image_size": SIDE, "patch_size": 4,
            "window_size": 4, "initializer_range": 0.05,
        },
    ),
    _text(
        "distilbert", "DistilBert",
        {"dim": 256, "hidden_dim": 1024, "n_layers": 4, "n_heads": 4, "initializer_range": 0.05},
    ),
    _text("albert", "Albert", {**_BERT, "embedding_size": 128}),
    _text("electra", "Electra", {**_BERT, "embedding_size": 128}),
    _text("roberta", "Roberta", _BERT),
)  # fmt: skip

RECIPE = """
name = "{name}"
summary = "{family} of transformers, small, with seeded random weights"
train = "network:checkpoint"
factory = "network:{factory}"
feeds = "network:feeds"

[axes]
{axes}

{inputs}

[[outputs]]
name = "{output}"
kind = "{output_kind}"

[calibration]
data = "network:calibration"

[evaluation]
data = "network:evaluation"
metric = "cosine"

[budget]
drop = 0.01
vs_eager = {{ cosine = 0.99 }}
"""

BATCH = "batch = { min = 1, opt = 4, max = 8 }"
INPUT = """[[inputs]]
name = "{}"
dtype = "{}"
shape = {}
range = {}"""

WORDS: dict[str, dict[str, str]] = {
    "vision": {
        "factory": "Network",
        "axes": BATCH,
        "inputs": INPUT.format("images", "float32", f'["batch", 3, {SIDE}, {SIDE}]', "[-2.5, 2.5]"),
        "output": "logits",
        "output_kind": "logits",
    },
    "text": {
        "factory": "Encoder",
        "axes": f"{BATCH}\nseq = {{ min = 8, opt = 32, max = 64 }}",
        "inputs": "\n\n".join(
            INPUT.format(name, "int64", '["batch", "seq"]', span)
            for name, span in (("input_ids", "[0, 7999]"), ("attention_mask", "[0, 1]"))
        ),
        "output": "embedding",
        "output_kind": "embedding",
    },
}


@dataclass(frozen=True)
class Found:
    """What became of one architecture; `ratios` by threads and batch, in words."""

    name: str
    error: str = ""
    scheme: str = ""
    reason: str = ""
    seconds: float = 0
    megabytes: tuple[float, float] = (0, 0)
    quality: sides.Quality | None = None
    ratios: Mapping[str, sides.Ratio] = field(default_factory=dict)


def write_recipe(root: Path, one: Architecture) -> None:
    """Make `one` a recipe of the workspace `root`."""
    folder = root / "recipes" / one.name
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(sides.ROOT / "targets", root / "targets", dirs_exist_ok=True)
    shutil.copyfile(ZOO / f"{one.kind}.py", folder / "network.py")
    facts = {"CONFIG": f"{one.family}Config", "MODEL": f"{one.family}{one.head}", "SETTINGS": dict(one.settings)}
    if one.kind == "vision":
        facts |= {"SIDE": SIDE, "LAST_NORMS": (one.last_norm,) if one.last_norm else ()}
    (folder / "architecture.py").write_text("".join(f"{name} = {value!r}\n" for name, value in facts.items()))
    text = RECIPE.format(name=one.name, family=one.family, **WORDS[one.kind])
    (folder / "recipe.toml").write_text(text.lstrip())


def exported(root: Path, one: Architecture) -> tuple[Job, run.Verdict]:
    """Export one architecture for `sides.TARGET` in the workspace `root`.

    Raises:
        ExportyardError: it can't be captured or converted.
    """
    write_recipe(root, one)
    job = run.prepare(Workspace(root), one.name, targets=[sides.TARGET])
    return job, run.export(job)[0]


def measured(root: Path, one: Architecture) -> Found:
    """Export one architecture, then judge and time what was chosen."""
    begun = time.perf_counter()
    try:
        job, verdict = exported(root, one)
    except ExportyardError as error:
        return Found(one.name, error=f"{type(error).__name__}: {error.message}")
    seconds = time.perf_counter() - begun
    if verdict.engine is None:
        return Found(one.name, error=f"{verdict.status}: {verdict.reason}", seconds=seconds)
    with contextlib.closing(job):
        float_form = job.engine(verdict.target, "fp32").stored
        load = partial(_engine, verdict.engine, verdict.target)
        return Found(
            one.name,
            scheme=str(verdict.scheme),
            reason=verdict.reason,
            seconds=seconds,
            megabytes=(float_form.size_bytes / 1e6, verdict.engine.size_bytes / 1e6),
            quality=sides.quality(job, load),
            ratios=_ratios(job, {"fp32": partial(_engine, float_form, verdict.target), "chosen": load}),
        )


def _engine(engine: Any, target: Any, threads: int) -> contextlib.AbstractContextManager[Runner]:
    return backends.loaded(engine, target, threads)


def _ratios(job: Job, loaders: Mapping[str, sides.Loader]) -> dict[str, sides.Ratio]:
    """Speed of the chosen form; what looks slower than fp32 is timed twice more, twice as long.

    The middle one of the three counts.
    """
    found: dict[str, sides.Ratio] = {}
    for threads in timed_threads():
        for sizes in timed_sizes(job.recipe.axes):
            timed = [sides.speeds(job, loaders, "fp32", threads, [sizes], SECONDS)[0]["chosen"]]
            while timed[0].median < sides.NOISE and len(timed) < 3:
                timed.append(sides.speeds(job, loaders, "fp32", threads, [sizes], 2 * SECONDS)[0]["chosen"])
            ratio = sorted(timed, key=lambda one: one.median)[len(timed) // 2]
            found[f"{threads} thread{'s' if threads > 1 else ''}, batch {sizes['batch']}"] = ratio
    return found


def missed(every: list[Found]) -> list[str]:
    """Who failed, ships something slower than fp32, or something outside of its budget."""
    lacking = []
    for one in every:
        if one.error:
            lacking.append(f"{one.name}: {one.error}")
        slow = {where: ratio for where, ratio in one.ratios.items() if ratio.slower}
        if one.scheme != "fp32":  # which is timed against itself
            lacking += [f"{one.name} {one.scheme}, {where}: {ratio}" for where, ratio in slow.items()]
        lacking += [f"{one.name} {one.scheme}: {text}" for text in (one.quality.broken if one.quality else ())]
    return lacking


def page(every: list[Found], command: str, load: Any) -> str:
    """The table, why each form was chosen, and what it was measured on."""
    timings = next((list(one.ratios) for one in every if one.ratios), [])
    head = ["architecture", "ships", "MB", "fp32 MB", "SQNR dB", "cosine", *timings, "export s"]
    rows = []
    for one in every:
        if one.error or one.quality is None:
            rows.append([one.name, f"**failed**: {one.error[:80]}", *[""] * (len(head) - 2)])
            continue
        sizes = [f"{one.megabytes[1]:.2f}", f"{one.megabytes[0]:.2f}"]
        far = [f"{one.quality.sqnr_db:.1f}", f"{one.quality.cosine:.4f}"]
        cells = [str(one.ratios[name]) for name in timings]
        rows.append([one.name, one.scheme, *sizes, *far, *cells, f"{one.seconds:.0f}"])
    reasons = "\n".join(f"- `{one.name}` ships `{one.scheme}`: {one.reason}" for one in every if one.scheme)
    return "\n\n".join([sides.table(head, rows), reasons, sides.conditions(command, load)])


def main() -> int:
    """Entry point; 1 when an architecture failed, or ships what it must not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [one.name for one in ARCHITECTURES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--out", type=Path, help="page whose table to replace")
    parser.add_argument("--workspace", type=Path, help="folder to work in and to keep; a temporary one if not given")
    options = parser.parse_args()
    load = sides.load_average()
    every = []
    with contextlib.ExitStack() as stack:
        root = options.workspace or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for one in ARCHITECTURES:
            if one.name in options.only:
                every.append(measured(root.resolve(), one))
                print(f"{one.name}: {every[-1].scheme or every[-1].error}", file=sys.stderr, flush=True)
    words = ["python benchmarks/architectures.py", *(["--only", *options.only] if options.only != names else [])]
    text = page(every, " ".join(words), load)
    print(text)
    if options.out is not None:
        sides.write_between(options.out, "architectures", text)
    lacking = missed(every)
    print("\n".join(["", *lacking]) if lacking else "\nnone is slower than fp32, none is outside of its budget")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
