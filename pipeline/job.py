"""A job: one recipe, some targets, and the chain that makes each artifact from those before it.

Each method makes one artifact and whatever it needs first, or finds it unchanged in the store. The command line and
the Prefect flow call the same methods. Stages are imported when there is work for them, so a job with nothing to do
never loads torch.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from pipeline import backends, digest, host, limits, recipes, store, timeline, tolerances, vectors
from pipeline import targets as rows_of
from pipeline.errors import (
    CheckpointError,
    DataError,
    LimitError,
    NotApplicable,
    UnavailableError,
    first_line,
    nearest,
)
from pipeline.store import Key, Made, Stored, write_json
from pipeline.timeline import StepTime
from pipeline.types import (
    CHECKPOINT_KINDS,
    Audit,
    Comparison,
    Compilation,
    Explanation,
    LatencyReport,
    Limits,
    ParityReport,
    Recipe,
    Reporter,
    Scheme,
    Target,
    no_report,
)
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.explain.explanation import Model
    from pipeline.reference import Answers

Work = Callable[[Path], Mapping[str, JsonValue]]
NOT_APPLICABLE = "not-applicable.json"
SEARCH = "search.json"
LOGS = ".logs"
TUNING = Path("targets/tuning")  # records of tuning, for all recipes; in git
STATIC_SCHEMES: frozenset[Scheme] = frozenset({"int8-u8s8", "int8-s8s8", "int8-u8u8"})


class Maker:
    """Makes artifacts for real; `Inspector` stands in for it where nothing may be made."""

    def make(self, folder: Path, key: Key, work: Work) -> Made:
        """See `store.make`."""
        return store.make(folder, key, work)


@dataclass
class Job:
    """See the module.

    Attributes:
        targets: rows to build, those among which a row of `asked` chooses included.
        asked: rows that the user wants; `targets` if empty.
        limits: what a builder may take whose row has no such limit; None lets those of rows without `limits` work in
            this process.
        made: what this job has made or verified, so that it is done once.
        ended: steps whose builders were ended; they aren't tried again.
        logs: folder for what builders print, a file a target; by default beside the recipe's artifacts.
    """

    workspace: Workspace
    recipe: Recipe
    targets: list[Target]
    given_checkpoint: Path | None = None
    report: Reporter = no_report
    maker: Maker = field(default_factory=Maker)
    asked: list[Target] = field(default_factory=list)
    limits: Limits | None = None
    made: dict[str, Made] = field(default_factory=dict)
    ended: dict[str, LimitError] = field(default_factory=dict)
    logs: Path | None = None
    _answers: Answers | None = None
    _logs: set[str] = field(default_factory=set)

    @property
    def folder(self) -> Path:
        """Where this recipe's artifacts are."""
        return self.workspace.artifacts / self.recipe.name

    def _make(self, step: str, key: Callable[[], Key], work: Work) -> Made:
        if step in self.ended:
            raise self.ended[step]
        if step not in self.made:
            try:
                asked = key()
                self.made[step] = self.maker.make(self.folder / step, asked, partial(self._worked, step, asked, work))
            except LimitError as error:
                self.ended[step] = error
                raise
        return self.made[step]

    def _worked(self, step: str, key: Key, work: Work, out: Path) -> Mapping[str, JsonValue]:
        """Do the work of one step, and note when that was and how long it took."""
        self._define_operators()
        start, begun = time.time(), time.perf_counter()
        facts = work(out)
        seconds = time.perf_counter() - begun
        took = StepTime(step=step, key=key.digest, start=start, seconds=seconds, where=timeline.here())
        timeline.note(self.folder, [took])
        return facts

    def _define_operators(self) -> None:
        """Import the user's code if the program has operators of its own: without them it can't even be read."""
        if self._has_operators():
            _define_operators(self.recipe)

    def _has_operators(self) -> bool:
        program = self.made.get("program")
        return program is not None and bool(program.stored.artifact.facts.get("operators"))

    # --- from the recipe to the fp32 graph -------------------------------------------------------------------------

    def checkpoint(self) -> Made:
        """The trained weights: a copy of the file given, of the recipe's file, or what its `train` writes."""
        source = self._checkpoint_file()
        if source is not None:
            return self._make("checkpoint", lambda: self._file_key(source), lambda out: _copy(source, out))
        train = self.recipe.train
        if train is None:  # the recipe's own check makes sure of this
            raise CheckpointError(f"recipe `{self.recipe.name}` has no checkpoint", hint="give `--checkpoint P`")
        name = f"model{self.recipe.train_suffix}"

        def key() -> Key:
            code = {"code": recipes.code_digest(self.recipe, train)}
            return Key("checkpoint", code, {"train": train, "file": name}, recipes.code_tools(self.recipe, train))

        def work(out: Path) -> Mapping[str, JsonValue]:
            recipes.call(self.recipe, train, "train", out / name)
            if not (out / name).is_file():
                raise CheckpointError(f'`train = "{train}"` wrote no file at the path that it was given')
            return {"source": train}

        return self._make("checkpoint", key, work)

    def _checkpoint_file(self) -> Path | None:
        """The checkpoint's file; None when the recipe trains its own."""
        named = self.given_checkpoint
        if named is None and self.recipe.checkpoint is not None:
            named = self.recipe.folder / self.recipe.checkpoint
            if not named.exists() and self.recipe.train is not None:
                return None
        if named is not None:
            check_checkpoint_file(named)
        return named

    def _file_key(self, source: Path) -> Key:
        try:
            content = digest.of_file(source)
        except OSError as error:
            raise CheckpointError(f"can't read the checkpoint `{source}`: {error.strerror}") from None
        return Key("checkpoint", {"file": content}, {"file": f"model{source.suffix}"})

    def data(self) -> Made:
        """Calibration and evaluation samples, checked and written down."""

        def key() -> Key:
            inputs, tools = {}, host.versions(["numpy"])
            for which, setting in (("calibration", self.recipe.calibration), ("evaluation", self.recipe.evaluation)):
                if setting is None:
                    continue
                inputs[which] = self._data_digest(setting.data)
                tools |= recipes.code_tools(self.recipe, setting.data)
            config = self.recipe.model_dump(mode="json", include={"inputs", "axes"})
            config["calibration"] = self.recipe.calibration and self.recipe.calibration.samples
            config["evaluation"] = self.recipe.evaluation.samples
            return Key("data", inputs, config, tools)

        def work(out: Path) -> Mapping[str, JsonValue]:
            from pipeline import samples

            return samples.write_all(self.recipe, out)

        return self._make("data", key, work)

    def _data_digest(self, source: str) -> str:
        if recipes.is_code(source):
            return recipes.code_digest(self.recipe, source)
        path = self.recipe.folder / source
        if not os.path.isfile(path):  # noqa: PTH113  unlike `is_file`, it takes any text for a path
            return "missing"  # `samples.write` says so, with the nearest name
        try:
            return digest.of_file(path)
        except OSError as error:
            raise DataError(f"can't read `{path}`: {error.strerror}", hint="see whether you may (`ls -l`)") from None

    def program(self) -> Made:
        """The captured program."""

        def key() -> Key:
            sources = (self.recipe.factory, self.recipe.feeds)
            inputs = {"checkpoint": self.checkpoint().stored.digest, "code": recipes.code_digest(self.recipe, *sources)}
            config = self.recipe.model_dump(mode="json", include={"inputs", "outputs", "axes", "factory", "feeds"})
            return Key("program", inputs, config, _tools("torch") | recipes.code_tools(self.recipe, *sources))

        def work(out: Path) -> Mapping[str, JsonValue]:
            from pipeline.stages.capture import capture

            return capture(self.recipe, self.checkpoint().stored, out)

        return self._make("program", key, work)

    def compilation(self) -> Made:
        """What torch.compile would make of the model; asked for, it isn't part of an export."""

        def key() -> Key:
            sources = (self.recipe.factory, self.recipe.feeds)
            inputs = {"checkpoint": self.checkpoint().stored.digest, "code": recipes.code_digest(self.recipe, *sources)}
            inputs["program"] = self.program().stored.digest
            config = self.recipe.model_dump(mode="json", include={"inputs", "outputs", "axes", "factory", "feeds"})
            return Key("compilation", inputs, config, _tools("torch") | recipes.code_tools(self.recipe, *sources))

        def work(out: Path) -> Mapping[str, JsonValue]:
            from pipeline.stages.compilation import compilation

            return compilation(self.recipe, self.checkpoint().stored, self.program().stored, out)

        return self._make("compilation", key, work)

    def compilation_report(self) -> Compilation:
        """The content of `compilation`."""
        return Compilation.model_validate_json(self.compilation().stored.file("compilation.json").read_text())

    def onnx(self, scheme: Scheme) -> Made:
        """The ONNX graph in one numeric form; see `left_out` for a form that doesn't apply to this model."""
        return self._fp32() if scheme == "fp32" else self._quantized(scheme)

    def _fp32(self) -> Made:
        made = self._graph()
        if NOT_APPLICABLE in made.stored.artifact.files:
            raise NotApplicable(str(made.stored.artifact.facts["reason"]), hint=str(made.stored.artifact.facts["hint"]))
        return made

    def graph(self) -> Made:
        """The fp32 graph; of a model that has none, what says so, as long as one of the targets needs none.

        Raises:
            NotApplicable: there is none, and every target needs it.
        """
        if any(backends.find(target.backend).source(target) == "program" for target in self.targets):
            return self._graph()
        return self._fp32()

    def _graph(self) -> Made:
        def key() -> Key:
            code = self.recipe.translations
            inputs = {"program": self.program().stored.digest, "code": recipes.code_digest(self.recipe, code)}
            config = self.recipe.model_dump(mode="json", include={"opset", "translations"})
            return Key("onnx", inputs, config, _tools("torch", "onnx", "onnx-ir", "onnxscript"))

        def work(out: Path) -> Mapping[str, JsonValue]:
            from pipeline.stages.to_onnx import to_onnx

            try:
                return to_onnx(self.recipe, self.program().stored, out)
            except NotApplicable as error:
                told = f"no ONNX graph, so engines are compared with the program: {first_line(error)}"
                return {**_not_applicable("fp32", error, out), "hint": error.hint, "warnings": [told]}

        return self._make("onnx/fp32", key, work)

    # --- numeric forms ---------------------------------------------------------------------------------------------

    def statistics(self) -> Made:
        """What calibration found out about every activation; shared by all static schemes."""

        def key() -> Key:
            data = {
                name: fact.sha256
                for name, fact in self.data().stored.artifact.files.items()
                if name.startswith("calibration-")
            }
            inputs = {"onnx": self._fp32().stored.digest, "calibration": digest.of_json(data)}
            return Key("statistics", inputs, {}, _tools("onnx", "onnxruntime", "numpy"))

        def work(out: Path) -> Mapping[str, JsonValue]:
            from pipeline.stages.quantize import statistics

            return statistics(self.recipe, self._fp32().stored, self.data().stored, out, self.report)

        if self.recipe.calibration is None:
            raise DataError(
                f"recipe `{self.recipe.name}` has no [calibration], which static INT8 needs",
                hint='add `[calibration]` with `data = "calibration.npz"` to recipe.toml',
            )
        return self._make("statistics", key, work)

    def _quantized(self, scheme: Scheme) -> Made:
        static = scheme in STATIC_SCHEMES

        def key() -> Key:
            inputs = {"onnx": self._fp32().stored.digest}
            config: dict[str, JsonValue] = {"scheme": scheme}
            tools = _tools("onnx", "onnxruntime", "onnxconverter-common")
            if static:  # what the search measures counts, too
                metric = self.recipe.evaluation.metric
                inputs |= {
                    "statistics": self.statistics().stored.digest,
                    "program": self.program().stored.digest,
                    "data": self.data().stored.digest,
                    "code": recipes.code_digest(self.recipe, metric),
                }
                config |= self.recipe.model_dump(mode="json", include={"outputs", "evaluation", "budget"})
                config["method"] = self.recipe.calibration.method if self.recipe.calibration else None
                tools |= _tools("torch", "numpy") | recipes.code_tools(self.recipe, metric)
            return Key("onnx", inputs, config, tools)

        def work(out: Path) -> Mapping[str, JsonValue]:
            try:
                return self._searched(scheme, out) if static else self._converted(scheme, out)
            except NotApplicable as error:
                return _not_applicable(scheme, error, out)

        return self._make(f"onnx/{scheme}", key, work)

    def _converted(self, scheme: Scheme, out: Path) -> Mapping[str, JsonValue]:
        from pipeline.stages.quantize import quantize

        return quantize(self.recipe, self._fp32().stored, scheme, None, out, self.report)

    def _searched(self, scheme: Scheme, out: Path) -> Mapping[str, JsonValue]:
        from pipeline.stages.search import search

        # beside the artifacts, since it outlives an attempt that is killed
        journal = self.folder / ".search" / f"{scheme}.jsonl"
        ranges = self.statistics().stored
        return search(self.recipe, self._fp32().stored, scheme, ranges, self.answers(), out, journal, self.report)

    def quantized_program(self, scheme: Scheme, quantizer: str) -> Made:
        """The program in an INT8 form, for backends that build from programs."""

        def key() -> Key:
            metric = self.recipe.evaluation.metric
            inputs = {
                "program": self.program().stored.digest,
                "data": self.data().stored.digest,
                "code": recipes.code_digest(self.recipe, metric),
            }
            config = self.recipe.model_dump(mode="json", include={"outputs", "evaluation", "budget"})
            tools = _tools("torch", "torchao", "numpy") | recipes.code_tools(self.recipe, metric)
            return Key("program", inputs, config | {"scheme": scheme, "quantizer": quantizer}, tools)

        def work(out: Path) -> Mapping[str, JsonValue]:
            from pipeline.stages.quantize_program import quantize_program

            program, data = self.program().stored, self.data().stored
            try:
                return quantize_program(self.recipe, program, data, scheme, quantizer, self.answers(), out, self.report)
            except NotApplicable as error:
                return _not_applicable(scheme, error, out)

        return self._make(f"programs/{scheme}-{quantizer}", key, work)

    def form(self, target: Target, scheme: Scheme) -> Made:
        """The model in one numeric form, as `target` is meant to keep it: what its engines are compared with."""
        quantizer = backends.quantizer(target, scheme)
        if quantizer is not None:
            return self.quantized_program(scheme, quantizer)
        if scheme == "fp32" and backends.find(target.backend).source(target) == "program":
            graph = self._graph()
            return self.program() if NOT_APPLICABLE in graph.stored.artifact.files else graph
        return self.onnx(scheme)

    def form_steps(self, target: Target, scheme: Scheme) -> Iterator[tuple[str, Callable[[], Made]]]:
        """What leads from the model in fp32 to `form`; nothing where that can't be made."""
        if scheme == "fp32" or (scheme in STATIC_SCHEMES and self.recipe.calibration is None):
            return
        quantizer = backends.quantizer(target, scheme)
        if quantizer is not None:
            yield f"programs/{scheme}-{quantizer}", partial(self.quantized_program, scheme, quantizer)
            return
        if scheme in STATIC_SCHEMES:
            yield "statistics", self.statistics
        yield f"onnx/{scheme}", partial(self._quantized, scheme)

    def left_out(self, target: Target, scheme: Scheme) -> str | None:
        """Why this numeric form doesn't exist for this model, or None if it does."""
        if scheme == "fp32":
            return None
        if scheme in STATIC_SCHEMES and self.recipe.calibration is None:
            return "needs [calibration] data"
        made = self.form(target, scheme)
        if NOT_APPLICABLE in made.stored.artifact.files:
            return f"does not apply: {made.stored.artifact.facts.get('reason')}"
        return None

    # --- one target ------------------------------------------------------------------------------------------------

    def missing(self, target: Target) -> str | None:
        """Why this host can't build `target`, or None if it can."""
        return backends.find(target.backend).missing(target)

    def not_runnable(self, target: Target) -> str | None:
        """Why this host can't run engines of `target`, or None if it can."""
        return backends.find(target.backend).not_runnable(target)

    def tunes(self, target: Target) -> bool:
        """Whether the row asks for tuning, and its backend can do that."""
        return backends.tuning_file(target) is not None

    def tuning(self, target: Target, scheme: Scheme) -> Made:
        """The schedules that were found to be the fastest ones, for a row that `tunes`.

        Raises:
            UnavailableError: there is something to measure, and this host can't run it.
        """
        shared = self.workspace.root / TUNING / str(backends.tuning_file(target))

        def key() -> Key:
            inputs = {"model": _content(self._source(target, scheme))}
            # a row that measures adds to the records itself, and must not become stale by that
            if target.options["tune"] == "cached" and shared.is_file():
                inputs["records"] = digest.of_file(shared)
            return Key("tuning", inputs, *_build_settings(target))

        def work(out: Path) -> Mapping[str, JsonValue]:
            from pipeline.stages.tune import tune

            model = self._source(target, scheme).stored
            return tune(backends.tuner(target.backend), model, target, shared, out, self.report)

        return self._make(f"tuning/{target.name}/{scheme}", key, work)

    def _source(self, target: Target, scheme: Scheme) -> Made:
        """What the row's backend builds from."""
        if backends.find(target.backend).source(target) == "onnx" or backends.quantizer(target, scheme) is not None:
            return self.form(target, scheme)
        return self.program()

    def engine(self, target: Target, scheme: Scheme) -> Made:
        """The engine of one target in one numeric form.

        Raises:
            UnavailableError: this host can't build it.
            BuildError: the backend can't make it.
        """

        def key() -> Key:
            inputs = {"model": _content(self._source(target, scheme))}
            if self.tunes(target):
                inputs["tuning"] = _content(self.tuning(target, scheme))
            config, tools = _build_settings(target)
            return Key("engine", inputs, config | {"scheme": scheme}, tools)

        def work(out: Path) -> Mapping[str, JsonValue]:
            tuning = self.tuning(target, scheme).stored.path if self.tunes(target) else None
            recipe = self.recipe if self._has_operators() else None
            arguments = recipe, self._source(target, scheme).stored, target, scheme, out, tuning
            allowed = limits.of(target, self.limits)
            if allowed is None:
                return _build(*arguments)
            return limits.kept(target, allowed, self._builders_log(target), _build, *arguments)

        step = f"engine/{target.name}/{scheme}"
        reason = self.missing(target)
        if reason is not None and step not in self.made:  # another host may have made it
            raise UnavailableError(
                f"`{target.name}` can't be built on this host: {reason}",
                hint="`exportyard doctor` says what to install",
            )
        return self._make(step, key, work)

    def _builders_log(self, target: Target) -> Path:
        """Where what the target's builders print goes; that of earlier jobs is forgotten."""
        log = (self.logs or self.folder / LOGS) / f"{target.name}.log"
        if target.name not in self._logs:
            self._logs.add(target.name)
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_bytes(b"")
        return log

    def parity(self, target: Target, scheme: Scheme) -> Made:
        """How far the engine is from its ONNX graph and from eager fp32."""

        def key() -> Key:
            metric = (self.recipe.evaluation.metric, self.recipe.feeds)
            inputs = {
                "engine": self.engine(target, scheme).stored.digest,
                "onnx": self.form(target, scheme).stored.digest,
                "program": self.program().stored.digest,
                "data": self.data().stored.digest,
                "code": recipes.code_digest(self.recipe, *metric),
                "vectors": digest.of_json(vectors.digests(self.recipe)),
            }
            config = self.recipe.model_dump(mode="json", include={"axes", "inputs", "outputs", "evaluation"})
            config["budget"] = self.recipe.budget.model_dump(mode="json", exclude={"min_int8_share"})
            bounds = tolerances.of(self.recipe, target, scheme)
            config["vs_onnx"] = {output: bound.plain() for output, bound in bounds.items()}
            config["stress"] = self.recipe.stress.plain()
            settings, own = _build_settings(target)  # how an engine is run may depend on them, too
            tools = _tools("torch", "onnxruntime", "numpy") | recipes.code_tools(self.recipe, *metric)
            return Key("parity", inputs, config | {"row": settings} | _place(target), tools | own)

        def work(out: Path) -> Mapping[str, JsonValue]:
            from pipeline.stages.parity import parity

            engine, model = self.engine(target, scheme).stored, self.form(target, scheme).stored
            return parity(self.recipe, engine, model, self.answers(), target, scheme, out, self.report)

        return self._make(self._run(target, f"parity/{target.name}/{scheme}"), key, work)

    def parity_report(self, target: Target, scheme: Scheme) -> ParityReport:
        """The content of `parity`."""
        return ParityReport.model_validate_json(self.parity(target, scheme).stored.file("parity.json").read_text())

    def explanation(self, target: Target, scheme: Scheme) -> Made:
        """Where the engine stops being the model, if it does, operator by operator."""
        ran = self.not_runnable(target) is None

        def key() -> Key:
            inputs = {
                "engine": self.engine(target, scheme).stored.digest,
                "onnx": self.form(target, scheme).stored.digest,
                "graph": self._graph().stored.digest,
                "program": self.program().stored.digest,
                "data": self.data().stored.digest,
                "code": recipes.code_digest(self.recipe, self.recipe.feeds),
            }
            if ran:
                inputs["parity"] = self.parity(target, scheme).stored.digest
            config = self.recipe.model_dump(mode="json", include={"axes", "inputs", "calibration"})
            settings, own = _build_settings(target)
            config |= {"row": settings, "scheme": scheme} | _place(target)
            tools = _tools("torch", "onnx", "onnxruntime", "numpy") | recipes.code_tools(self.recipe, self.recipe.feeds)
            return Key("explanation", inputs, config, tools | own)

        def work(out: Path) -> Mapping[str, JsonValue]:
            from pipeline.explain.explanation import explanation

            parity = self.parity_report(target, scheme) if ran else None
            return explanation(self.recipe, self.model(target, scheme), target, scheme, parity, out, self.report)

        return self._make(f"explanation/{target.name}/{scheme}", key, work)

    def model(self, target: Target, scheme: Scheme, file: Path | None = None) -> Model:
        """What an explanation compares; `file` is an engine from elsewhere, to be looked at instead of the store's."""
        from pipeline.explain.explanation import Model

        graph = self._graph().stored
        static = scheme in STATIC_SCHEMES and backends.quantizer(target, scheme) is None
        return Model(
            engine=None if file is not None else self.engine(target, scheme).stored,
            form=self.form(target, scheme).stored,
            graph=None if NOT_APPLICABLE in graph.artifact.files else graph,
            program=self.program().stored,
            data=self.data().stored,
            statistics=self.statistics().stored if static else None,
            file=file,
            source=self._source(target, scheme).stored,
            tuning=self.tuning(target, scheme).stored.path if self.tunes(target) else None,
        )

    def explanation_report(self, target: Target, scheme: Scheme) -> Explanation:
        """The content of `explanation`."""
        path = self.explanation(target, scheme).stored.file("explanation.json")
        return Explanation.model_validate_json(path.read_text())

    def audit(self, target: Target, scheme: Scheme) -> Made:
        """What the engine really runs in INT8. It is read, not run, so that any host can tell."""

        def key() -> Key:
            model = self.form(target, scheme).stored
            inputs = {"engine": self.engine(target, scheme).stored.digest, "onnx": model.digest}
            config: dict[str, JsonValue] = {"backend": target.backend, "target": target.name, "scheme": scheme}
            return Key("audit", inputs, config, _tools("onnx", "onnxruntime"))

        def work(out: Path) -> Mapping[str, JsonValue]:
            from pipeline.stages.audit import audit

            return audit(self.engine(target, scheme).stored, self.form(target, scheme).stored, target, scheme, out)

        return self._make(f"audit/{target.name}/{scheme}", key, work)

    def audit_report(self, target: Target, scheme: Scheme) -> Audit:
        """The content of `audit`."""
        return Audit.model_validate_json(self.audit(target, scheme).stored.file("audit.json").read_text())

    def latency(self, target: Target, schemes: tuple[Scheme, ...]) -> Made:
        """How fast the engines of `schemes` are, measured together; and their profiles, if the backend can tell."""

        def forms() -> dict[Scheme, Stored]:
            can = backends.can_profile(target)
            return {scheme: self.form(target, scheme).stored for scheme in schemes if can}

        def key() -> Key:
            inputs: dict[str, str] = {scheme: self.engine(target, scheme).stored.digest for scheme in schemes}
            inputs |= {f"form of {scheme}": form.digest for scheme, form in forms().items()}
            inputs["program"] = self.program().stored.digest
            config = self.recipe.model_dump(mode="json", include={"axes", "inputs"})
            config |= {"cpu": host.cpu_name(), "threads": host.cpu_count()} | _place(target) | _measured()
            settings, own = _build_settings(target)
            return Key("latency", inputs, config | {"row": settings}, own | _tools("torch"))

        def work(out: Path) -> Mapping[str, JsonValue]:
            from pipeline.stages.benchmark import benchmark

            engines = {scheme: self.engine(target, scheme).stored for scheme in schemes}
            return benchmark(self.recipe, target, engines, forms(), self.program().stored, out, self.report)

        return self._make(self._run(target, f"latency/{target.name}"), key, work)

    def latency_report(self, target: Target, schemes: tuple[Scheme, ...]) -> LatencyReport:
        """The content of `latency`."""
        return LatencyReport.model_validate_json(self.latency(target, schemes).stored.file("latency.json").read_text())

    def comparison(self, target: Target, rows: Mapping[str, tuple[Target, Scheme]]) -> Made:
        """How fast what `rows` ship is, measured together: `target` chooses among them."""

        def key() -> Key:
            inputs = {name: self.engine(*row).stored.digest for name, row in rows.items()}
            inputs["program"] = self.program().stored.digest
            config = self.recipe.model_dump(mode="json", include={"axes", "inputs"}) | _measured()
            tools, settings = _tools("torch"), {}
            for name, (row, _) in rows.items():
                settings[name], own = _build_settings(row)
                tools |= {f"{name} {tool}": value for tool, value in own.items()}
            return Key("latency", inputs, config | {"cpu": host.cpu_name(), "rows": settings}, tools)

        def work(out: Path) -> Mapping[str, JsonValue]:
            from pipeline.stages.benchmark import compare_rows

            engines = {name: (self.engine(*row).stored, row[0]) for name, row in rows.items()}
            return compare_rows(self.recipe, engines, self.program().stored, out, self.report)

        return self._make(f"latency/{target.name}", key, work)

    def comparison_report(self, target: Target, rows: Mapping[str, tuple[Target, Scheme]]) -> Comparison:
        """The content of `comparison`."""
        return Comparison.model_validate_json(self.comparison(target, rows).stored.file("comparison.json").read_text())

    def _run(self, target: Target, step: str) -> str:
        """`step`, for which engines of `target` are run, unless another host has done it.

        Raises:
            UnavailableError: this host can't run them.
        """
        reason = self.not_runnable(target)
        if reason is not None and step not in self.made:
            raise UnavailableError(f"`{target.name}` can't be run on this host: {reason}")
        return step

    def answers(self) -> Answers:
        """What eager fp32 and the graphs answer, kept while this job lives."""
        if self._answers is None:
            from pipeline.reference import Answers

            self._answers = Answers(self.recipe, self.program().stored, self.data().stored)
        return self._answers

    def warnings(self) -> list[str]:
        """What the artifacts of this job say that a user should know, though nothing failed."""
        told = (made.stored.artifact.facts.get("warnings") for made in self.made.values())
        return [str(text) for found in told if isinstance(found, list) for text in found]

    def close(self) -> None:
        """Free the models that `answers` has loaded."""
        if self._answers is not None:
            self._answers.close()
            self._answers = None


def _define_operators(recipe: Recipe) -> None:
    if recipe.factory is not None:
        recipes.resolve(recipe, recipe.factory, "factory")


def _build(
    recipe: Recipe | None, model: Stored, target: Target, scheme: Scheme, out: Path, tuning: Path | None
) -> Mapping[str, JsonValue]:
    """The stage build, perhaps in a new process; `recipe` is there if its code defines operators of the model."""
    from pipeline.stages.build import build

    if recipe is not None:
        _define_operators(recipe)
    return build(model, target, scheme, out, tuning)


def _not_applicable(scheme: Scheme, error: NotApplicable, out: Path) -> Mapping[str, JsonValue]:
    """What is kept of a form that means nothing for a model: a fact about it, not to be found out again."""
    shutil.rmtree(out)
    out.mkdir()
    write_json(out / NOT_APPLICABLE, {"scheme": scheme, "reason": error.message})
    return {"reason": error.message}


def check_checkpoint_file(path: Path) -> None:
    """Refuse a path that can't be a checkpoint.

    Raises:
        CheckpointError: missing, a folder, or of an unknown kind.
    """
    if not os.path.exists(path):  # noqa: PTH110  unlike `exists`, it takes any text for a path
        close = nearest(path.name, [entry.name for entry in path.parent.glob("*")]) if path.parent.is_dir() else None
        raise CheckpointError(
            f"there is no checkpoint `{path}`",
            hint=f"did you mean `{path.with_name(close)}`?" if close else "give an existing file with `--checkpoint P`",
        )
    if not path.is_file():
        raise CheckpointError(f"the checkpoint `{path}` is not a file", hint="name the file with the weights")
    if path.suffix not in CHECKPOINT_KINDS:
        raise CheckpointError(
            f"can't tell what kind of checkpoint `{path.name}` is",
            hint="expected .pt or .pth (a state dict), .safetensors, or .pt2 (torch.export.save)",
        )


def _copy(source: Path, out: Path) -> Mapping[str, JsonValue]:
    from pipeline import checkpoint

    if source.suffix != ".pt2":
        checkpoint.read(source)  # one that can't be read must not take the place of one that could
    shutil.copyfile(source, out / f"model{source.suffix}")
    return {"source": source.name}


def _content(made: Made) -> str:
    """What an artifact's files are, but for how a graph was found, which doesn't decide what is built from it."""
    files = made.stored.artifact.files
    return digest.of_json({name: fact.sha256 for name, fact in files.items() if name != SEARCH})


def _build_settings(target: Target) -> tuple[dict[str, JsonValue], dict[str, str]]:
    """What of a row, and which versions, decide its engines."""
    backend = backends.find(target.backend)
    config = target.model_dump(mode="json", include={"backend", "platform", "machine", "arch", "options"})
    tools = dict(backend.tools(target))
    if target.buckets is not None:
        config["buckets"] = {axis: [*sizes] for axis, sizes in target.buckets.items()}
        tools |= host.versions(["torch" if backend.source(target) == "program" else "onnx"])
    return config, tools


def _measured() -> dict[str, JsonValue]:
    """For the key of a measurement: how long it takes, where that isn't as usual."""
    seconds = host.measure_s()
    return {} if seconds == 1 else {"seconds": seconds}


def _place(target: Target) -> dict[str, JsonValue]:
    """Where engines of `target` are run, when that isn't this host: part of the key of what is measured there."""
    if target.device is not None:
        return {"device": target.device.plain()}
    return {"place": "emulator"} if rows_of.unfit(target) is not None else {}


def _tools(*distributions: str) -> dict[str, str]:
    return host.versions(["exportyard", *distributions])
