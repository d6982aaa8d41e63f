"""ONNX Runtime's own profile of a session: which operators its optimised graph has, and how long each takes.

Its clock is cut to whole microseconds, so that an operator seems up to one microsecond shorter than it is. Writing an
operator's record takes longer than a small operator runs; that is outside of the operator's own time.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnxruntime

from pipeline.types import OperatorTime

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.types import Runner, Tensors

_ENDING = "_kernel_time"


class Recorder:
    """Where a session's profile goes, and what is read back from there; a context, whose end removes the files.

    Attributes:
        run: the session as a runner, set once there is one.
    """

    def __init__(self, options: Any, *, keeps_graph: bool) -> None:
        """Set `options` to profile; with `keeps_graph` the session also writes the graph that it really runs."""
        self._folder = tempfile.TemporaryDirectory(prefix="exportyard-")
        self._graph = Path(self._folder.name, "model.onnx") if keeps_graph else None
        self._session: Any = None
        self.run: Runner | None = None
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(self._folder.name, "profile"))
        if self._graph is not None:
            options.optimized_model_filepath = str(self._graph)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{self._graph.name}.data"
            )

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._session is not None:
            self._session.end_profiling()
        self._folder.cleanup()

    def watch(self, session: onnxruntime.InferenceSession, run: Runner) -> None:
        """Take the session that was made with the options."""
        self._session, self.run = session, run

    def __call__(self, feeds: Tensors, /) -> dict[str, NDArray[np.generic]]:
        """As any runner."""
        assert self.run is not None
        return self.run(feeds)

    def operators(self) -> Sequence[OperatorTime]:
        """See `pipeline.types.ProfiledRunner`."""
        path = Path(self._session.end_profiling())
        self._session = None
        nodes = {} if self._graph is None else _nodes(self._graph)
        return operators(json.loads(path.read_text()), nodes)


def _nodes(path: Path) -> dict[str, onnx.NodeProto]:
    return {node.name: node for node in onnx.load(path, load_external_data=False).graph.node}


def operators(events: Sequence[Mapping[str, Any]], nodes: Mapping[str, onnx.NodeProto]) -> list[OperatorTime]:
    """What a profile says, operator by operator, in the order they first ran in.

    What runs inside another operator (in the body of a loop, say) is in the time of that.

    Args:
        events: as ONNX Runtime writes them; microseconds.
        nodes: of the graph that ran, by name; a name that isn't there has no tensors.
    """
    found: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    ends = -1
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(_ENDING)]
    # of two that begin in the same microsecond the longer one is the outer one
    for event in sorted(kernels, key=lambda one: (one["ts"], -one["dur"])):
        if event["ts"] < ends:
            continue
        ends = event["ts"] + event["dur"]
        name = event["name"].removesuffix(_ENDING)
        kinds[name] = str(event["args"].get("op_name", ""))
        found.setdefault(name, []).append(event["dur"] / 1e3)
    return [
        OperatorTime(
            name=name,
            kind=kinds[name],
            ms=tuple(ms),
            reads=tuple(nodes[name].input) if name in nodes else (),
            makes=tuple(nodes[name].output) if name in nodes else (),
        )
        for name, ms in found.items()
    ]
