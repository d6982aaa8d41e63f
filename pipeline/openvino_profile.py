"""OpenVINO's own profile of a compiled model.

It keeps, of each layer, only the mean over all calls since the model was compiled, in whole microseconds. So times are
differences to what was there after the first calls, in which kernels are generated; they can't be told call by call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.types import OperatorTime

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.types import Runner, Tensors

WARM_UP = 3  # calls: OpenVINO generates and caches kernels in the first two


class Recorder:
    """A request whose calls are profiled; see `pipeline.types.ProfiledRunner`."""

    def __init__(self, compiled: Any, request: Any, run: Runner) -> None:
        """Take a model that was compiled with ``PERF_COUNT``, and a request of it as a runner."""
        self._compiled, self._request, self._run = compiled, request, run
        self._calls = 0
        self._before: Mapping[str, float] = {}

    def __call__(self, feeds: Tensors, /) -> dict[str, NDArray[np.generic]]:
        """As any runner; the first calls are more, since they warm up."""
        if self._calls == 0:
            for _ in range(WARM_UP):
                self._run(feeds)
            self._before = {layer.node_name: WARM_UP * _ms(layer) for layer in self._request.get_profiling_info()}
        self._calls += 1
        return self._run(feeds)

    def operators(self) -> Sequence[OperatorTime]:
        """What each layer took; one entry, for all calls together."""
        names = {
            layer.friendly_name: str(layer.get_rt_info()["originalLayersNames"].value)
            for layer in self._compiled.get_runtime_model().get_ordered_ops()
        }
        found = []
        for layer in self._request.get_profiling_info():
            total = (self._calls + WARM_UP) * _ms(layer) - self._before.get(layer.node_name, 0)
            if str(layer.status) != "Status.EXECUTED":
                continue
            found.append(
                OperatorTime(
                    name=layer.node_name,
                    kind=layer.node_type,
                    ms=(max(total, 0.0),),
                    stands_for=tuple(filter(None, names.get(layer.node_name, "").split(","))),
                )
            )
        return found


def _ms(layer: Any) -> float:
    return float(layer.real_time.total_seconds() * 1e3)
