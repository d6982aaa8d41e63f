"""Engines on another machine: a board with TVM's RPC server, or one that is emulated here."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline import emulator, targets
from pipeline.errors import BuildError, UnavailableError, last_line
from pipeline.tvm import link as tvm_link
from pipeline.tvm import weights as tvm_weights
from pipeline.types import Device, Runner, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.store import Stored
    from pipeline.types import Tensors

PATIENCE_S = 2.0  # until a board counts as silent


def is_remote(target: Target) -> bool:
    """Whether engines of `target` are run on another machine than this, real or emulated."""
    return target.device is not None or targets.unfit(target) is not None


def unreachable(target: Target) -> str | None:
    """Why engines of `target` can't be run, or None if they can. Cheap, and never raises."""
    if target.device is not None:
        return None if _answers(target.device) else _silent(target.device)
    reason = targets.unfit(target)
    if reason is None:
        return None
    lacking = emulator.missing(target)
    return None if lacking is None else f"{reason}, and {lacking}"


def _answers(device: Device) -> bool:
    try:
        with socket.create_connection(device.address, timeout=PATIENCE_S):
            return True
    except (OSError, OverflowError, UnicodeError):
        return False


def _silent(device: Device) -> str:
    return f"no RPC server answers at {device.rpc} (`python -m tvm.exec.rpc_server` on the device starts one)"


@dataclass(frozen=True)
class Remote:
    """See `pipeline.types.DeviceRunner`."""

    run: Runner
    clock: Callable[[Tensors, int], float]
    threads: int

    def __call__(self, feeds: Tensors) -> dict[str, NDArray[Any]]:
        """One call, over the network."""
        return self.run(feeds)

    def cores(self) -> int:
        """Threads of the device's pool."""
        return self.threads

    def seconds(self, feeds: Tensors, calls: int) -> float:
        """As the device's clock has it."""
        return self.clock(feeds, calls)


@contextlib.contextmanager
def loaded(engine: Stored, target: Target, threads: int | None) -> Iterator[Remote]:
    """The engine on the row's device, or in the emulator.

    Raises:
        UnavailableError: nothing answers there.
        BuildError: the engine can't be loaded there.
    """
    with _session(target) as session:
        try:
            there = _There(session, engine, target, threads)
        except Exception as error:  # the server's own errors come as whatever they were there
            raise BuildError(
                f"the engine `{engine.path}` can't be loaded on {_where(target)}: {last_line(error)}",
                hint="see whether its TVM runtime is of the version in `runtime.json`",
            ) from error
        try:
            yield Remote(there.run, there.seconds, there.cores)
        finally:
            there.forget()


class _There:
    """An engine in the memory of another machine; `forget` frees it, whoever still holds this."""

    def __init__(self, session: Any, engine: Stored, target: Target, threads: int | None) -> None:
        from tvm import relax

        self.signature = engine.signature()
        self.device: Any = session.cpu()
        self.machine: Any = relax.VirtualMachine(_library(session, engine, target), self.device)
        self.weights = [self._sent(array) for array in tvm_weights.read(engine.path)]
        self.cores = int(session.get_function("runtime.NumThreads")())
        any_core = 1
        session.get_function("runtime.config_threadpool")(any_core, threads or self.cores)

    def _sent(self, array: Any) -> Any:
        import tvm

        return tvm.runtime.tensor(array, self.device)

    def _fill(self, feeds: Tensors) -> None:
        self.machine.set_input("main", *(self._sent(feeds[spec.name]) for spec in self.signature.inputs), *self.weights)

    def run(self, feeds: Tensors) -> dict[str, NDArray[Any]]:
        import tvm

        self._fill(feeds)
        self.machine.invoke_stateful("main")
        found = self.machine.get_outputs("main")
        arrays = [found] if isinstance(found, tvm.runtime.Tensor) else list(found)
        return {spec.name: array.numpy() for spec, array in zip(self.signature.outputs, arrays, strict=True)}

    def seconds(self, feeds: Tensors, calls: int) -> float:
        self._fill(feeds)
        return float(self.machine.time_evaluator("invoke_stateful", self.device, number=calls, repeat=1)("main").mean)

    def forget(self) -> None:
        del self.machine, self.weights, self.device


def _where(target: Target) -> str:
    return f"the device at {target.device.rpc}" if target.device is not None else "the emulator"


@contextlib.contextmanager
def _session(target: Target) -> Iterator[Any]:
    from tvm import rpc

    with contextlib.ExitStack() as stack:
        if target.device is None:
            name, port = "127.0.0.1", stack.enter_context(emulator.serving(target.arch))
        else:
            name, port = target.device.address
        try:
            session = rpc.connect(name, port)
        except Exception as error:
            raise UnavailableError(
                f"can't talk to {_where(target)}: {last_line(error)}", hint="see whether TVM's RPC server runs there"
            ) from error
        try:
            yield session
        finally:  # a server has one client at a time, and the next may come before this one is collected
            session.get_function("CloseRPCConnection")()


def _library(session: Any, engine: Stored, target: Target) -> Any:
    path = engine.file(tvm_link.LIBRARY)
    if target.device is None:  # an emulator sees this host's files
        return session.load_module(str(path.resolve()))
    session.upload(bytearray(path.read_bytes()), path.name)
    return session.load_module(path.name)
