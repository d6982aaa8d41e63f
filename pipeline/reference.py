"""What engines are compared with: the program run eagerly in fp32, and ONNX graphs run as they are written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime
from numpy.typing import NDArray

from pipeline import digest, samples
from pipeline import program as programs
from pipeline.errors import CaptureError, ConversionError, DataError, ExportyardError, first_line
from pipeline.samples import Sample
from pipeline.store import Stored
from pipeline.types import Recipe, Runner

if TYPE_CHECKING:
    from pipeline.types import Tensors

Outputs = dict[str, NDArray[Any]]


@contextlib.contextmanager
def eager(program: Stored, threads: int | None = None) -> Iterator[Runner]:
    """The captured program, run operator by operator by PyTorch in fp32.

    Raises:
        BuildError: the program's file is broken.
    """
    module = programs.runnable(programs.load(program.file(programs.FILE)))
    with programs.threads(threads):
        yield programs.runner(module, program.signature())


def written(path: Path) -> Runner:
    """An ONNX graph run by ONNX Runtime with every optimisation off: what the file says, on any processor alike."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), sess_options=options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(feeds: Tensors) -> Outputs:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))

    return run


@contextlib.contextmanager
def as_written(model: Stored) -> Iterator[Runner]:
    """What an artifact says, as it is written: a graph, or a program in a form that its backend reads."""
    if "model.onnx" in model.artifact.files:
        yield written(model.file("model.onnx"))
        return
    with eager(model) as run:
        yield run


class Answers:
    """What eager fp32 and the ONNX graphs of one recipe answer; each question is asked once.

    Several engines are compared with the same answers, so these are kept while one export runs.

    Attributes:
        program: artifact that eager fp32 runs.
        data: artifact with the calibration and evaluation samples.
    """

    def __init__(self, recipe: Recipe, program: Stored, data: Stored) -> None:
        self._recipe, self.program, self.data = recipe, program, data
        self._sized: dict[tuple[str, str], Outputs] = {}
        self._asked: dict[tuple[str, str], Outputs | Exception] = {}
        self._evaluated: list[tuple[Sample, Outputs]] | None = None
        self._stack = contextlib.ExitStack()
        self._runners: dict[str, Runner] = {}

    def close(self) -> None:
        """Free the loaded models."""
        self._stack.close()
        self._runners.clear()

    def feeds(self, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
        """The inputs at these axis sizes; the same at every call."""
        seed = sum((place + 1) * size for place, size in enumerate(sizes.values()))
        return samples.feeds(self._recipe, sizes, seed)

    def eager(self, sizes: Mapping[str, int]) -> Outputs:
        """What the program answers to `feeds(sizes)`."""
        return self._answer("eager", self._eager, sizes)

    def onnx(self, model: Stored, sizes: Mapping[str, int]) -> Outputs:
        """What the graph `model`, run as written, answers to `feeds(sizes)`."""
        return self._answer(model.digest, lambda: self._written(model), sizes)

    def evaluation(self) -> list[tuple[Sample, Outputs]]:
        """Every evaluation sample, with what the program answers to it."""
        if self._evaluated is None:
            run = self._eager()
            found = samples.samples(self._recipe, self.data, "evaluation")
            self._evaluated = [(sample, self._ask(run, place, sample)) for place, sample in enumerate(found)]
        return self._evaluated

    def ask(self, feeds: Tensors, model: Stored | None = None) -> Outputs:
        """What the program answers to `feeds`, or the graph `model` run as written; whatever they raise comes out."""
        key = ("eager" if model is None else model.digest, digest.of_arrays(feeds))
        if key not in self._asked:
            run = self._eager() if model is None else self._written(model)
            try:
                self._asked[key] = dict(run(feeds))
            except Exception as error:  # torch's and ONNX Runtime's own: an answer, too, that several will ask for
                self._asked[key] = error.with_traceback(None)
        found = self._asked[key]
        if isinstance(found, Exception):
            raise found
        return found

    def form(self, model: Stored | None) -> Runner:
        """The graph `model` run as written, or the program: for more questions than are worth to be remembered."""
        return self._eager() if model is None else self._written(model)

    def _ask(self, run: Runner, place: int, sample: Sample) -> Outputs:
        try:
            return dict(run(sample.feeds))
        except Exception as error:  # an index that the model has no row for, say
            raise DataError(
                f"recipe `{self._recipe.name}`, [evaluation] sample {place}: the model fails on it:"
                f" {type(error).__name__}: {first_line(error)}",
                hint="see whether its values and sizes are such as the model takes",
            ) from error

    def _answer(self, who: str, runner: Any, sizes: Mapping[str, int]) -> Outputs:
        key = (who, str(sorted(sizes.items())))
        if key not in self._sized:
            run, feeds = runner(), self.feeds(sizes)
            try:
                self._sized[key] = run(feeds)
            except Exception as error:  # torch's and ONNX Runtime's own
                raise _failure(self._recipe, who, sizes, error) from error
        return self._sized[key]

    def _eager(self) -> Runner:
        if "eager" not in self._runners:
            self._runners["eager"] = self._stack.enter_context(eager(self.program))
        return self._runners["eager"]

    def _written(self, model: Stored) -> Runner:
        if model.digest not in self._runners:
            self._runners[model.digest] = self._stack.enter_context(as_written(model))
        return self._runners[model.digest]


def _failure(recipe: Recipe, who: str, sizes: Mapping[str, int], error: Exception) -> ExportyardError:
    where = ", ".join(f"{name} = {size}" for name, size in sizes.items()) or "its only size"
    what, kind = ("model", CaptureError) if who == "eager" else ("ONNX graph", ConversionError)
    return kind(
        f"recipe `{recipe.name}`: the {what} fails at {where}: {type(error).__name__}: {first_line(error)}",
        hint="narrow [axes] or the `range` of [[inputs]] in recipe.toml to what the model can take",
    )
