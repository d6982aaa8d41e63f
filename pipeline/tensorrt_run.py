"""A TensorRT engine in use: torch holds the GPU's memory and its stream, TensorRT computes.

As in `pipeline.tensorrt_build`, every call of TensorRT is checked against its versions 10 and 11 (tests/apis).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tensorrt as trt
import torch

from pipeline import tensorrt_plan as plan
from pipeline.errors import BuildError
from pipeline.tensorrt_build import Log
from pipeline.tensorrt_plan import Settings, Shape

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.types import Signature, Tensors

KEPT_GRAPHS = 8  # each holds memory for the activations of its own sizes
DATA_DEPENDENT = -1


class Engine:
    """An engine on the GPU, and what it needs for the sizes that it was last called with. For one thread at a time."""

    def __init__(self, path: Path, signature: Signature, settings: Settings) -> None:
        self._log = Log()
        runtime = trt.Runtime(self._log)
        runtime.engine_host_code_allowed = settings.version_compatible
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise plan.load_error(self._log.lines, path)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._engine, self._log_of = engine, (runtime, self._log)  # what the engine refers to stays alive
        self._inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        self._profiles = plan.profiles(signature, settings.opt_profile)
        self._dtypes = {spec.name: spec.dtype for spec in (*signature.inputs, *signature.outputs)}
        self._graphs = settings.cuda_graph
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._shared = None if self._graphs else self._context()
        self._calls: OrderedDict[tuple[Shape, ...], _Call] = OrderedDict()

    def run(self, feeds: Tensors) -> dict[str, NDArray[Any]]:
        """One call: feeds go to the GPU, outputs come back as arrays of their own.

        Raises:
            BuildError: TensorRT refuses the sizes, or fails.
        """
        with torch.cuda.stream(self._stream):
            call = self._call({name: tuple(feeds[name].shape) for name in self._inputs})
            for name, buffer in call.inputs.items():
                buffer.copy_(torch.from_numpy(_plain(feeds[name])))
            call.compute(self._stream)
            found = {name: buffer.to("cpu", copy=True) for name, buffer in call.outputs.items()}
            self._stream.synchronize()
        return {name: array.numpy() for name, array in found.items()}

    def _context(self) -> trt.IExecutionContext:
        context = self._engine.create_execution_context()
        if context is None:
            raise BuildError(f"tensorrt can't run the engine: {plan.one_line(' '.join(self._log.lines[-1:]))}")
        return context

    def _call(self, shapes: Mapping[str, Shape]) -> _Call:
        key = tuple(shapes.values())
        call = self._calls.get(key)
        if call is None:
            # a captured graph owns its context: a context that changes afterwards would invalidate it
            context = self._shared or self._context()
            call = _Call(context, plan.choose(self._profiles, shapes), shapes, self._outputs, self._dtypes)
            call.prepare(self._stream)
            if self._graphs:
                call.capture(self._stream)
            self._calls[key] = call
            while len(self._calls) > (KEPT_GRAPHS if self._graphs else 1):
                self._calls.popitem(last=False)
        self._calls.move_to_end(key)
        return call


class _Call:
    """Buffers, and a context that knows them, for one combination of shapes."""

    def __init__(
        self,
        context: trt.IExecutionContext,
        profile: int,
        shapes: Mapping[str, Shape],
        outputs: Sequence[str],
        dtypes: Mapping[str, str],
    ) -> None:
        self._context, self._profile, self._shapes, self._dtypes = context, profile, shapes, dtypes
        self._graph: torch.cuda.CUDAGraph | None = None
        self.inputs = {name: self._buffer(name, shape) for name, shape in shapes.items()}
        self.outputs: dict[str, torch.Tensor] = dict.fromkeys(outputs, torch.empty(0))

    def _buffer(self, name: str, shape: Shape) -> torch.Tensor:
        dtype: torch.dtype = getattr(torch, self._dtypes[name])
        return torch.empty(shape, dtype=dtype, device="cuda")

    def prepare(self, stream: torch.cuda.Stream) -> None:
        """Tell the context shapes and addresses."""
        if not self._context.set_optimization_profile_async(self._profile, stream.cuda_stream):
            raise BuildError(f"tensorrt has no profile {self._profile} in the engine")
        for name, shape in self._shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise BuildError(f"tensorrt refuses the shape {list(shape)} of input `{name}`")
        unknown = self._context.infer_shapes()
        if unknown:
            raise BuildError(f"tensorrt can't tell the shapes of the outputs: it lacks {', '.join(unknown)}")
        for name in self.outputs:
            self.outputs[name] = self._buffer(name, self._shape_of(name))
        for name, buffer in (self.inputs | self.outputs).items():
            self._context.set_tensor_address(name, buffer.data_ptr())

    def _shape_of(self, name: str) -> Shape:
        dims = self._context.get_tensor_shape(name)
        shape = tuple(dims[index] for index in range(len(dims)))
        if DATA_DEPENDENT in shape:
            raise BuildError(
                f"the shape of output `{name}` depends on the data, not only on sizes",
                hint="return a tensor of the largest size, and how much of it counts",
            )
        return shape

    def capture(self, stream: torch.cuda.Stream) -> None:
        """Record one call as a CUDA graph, which `compute` then plays back."""
        self.compute(stream)  # once without: the first call with new shapes sets things up
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._enqueue(stream)

    def compute(self, stream: torch.cuda.Stream) -> None:
        """From input buffers to output buffers."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._enqueue(stream)

    def _enqueue(self, stream: torch.cuda.Stream) -> None:
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise BuildError("tensorrt failed to run the engine")


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that torch takes: contiguous, and its own to write to."""
    import numpy as np

    return np.array(array, order="C")
