"""A worker of one pool, that leaves no run behind: those that it ends are reported as crashed, and can start again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket

import anyio
from anyio.abc import TaskStatus
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect.states import Crashed
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker, ProcessWorkerResult

from flows.api import connected
from pipeline import console, errors
from pipeline.errors import UsageError

TYPE = "process"
REPORT_LIMIT_S = 10.0


def work(pool: str, limit: int) -> None:
    """Run what is scheduled in `pool`, `limit` runs at a time, until SIGTERM or Ctrl-C ends it.

    Raises:
        UnavailableError: the server can't be reached.
        UsageError: it has no such pool, or one whose runs aren't processes.
    """
    with connected() as client:
        known = {found.name: found.type for found in client.read_work_pools()}
    if pool not in known:
        error = errors.unknown("work pool", pool, known, where="the Prefect server")
        raise UsageError(error.message, hint=f"{error.hint} `exportyard deploy` makes one for each pool of a target")
    if known[pool] != TYPE:
        raise UsageError(f"the runs of work pool `{pool}` are of type `{known[pool]}`, not `{TYPE}`", hint="another?")
    asyncio.run(_serve(pool, limit))


async def _serve(pool: str, limit: int) -> None:
    worker = _Worker(
        work_pool_name=pool,
        name=f"{socket.gethostname()}-{os.getpid()}",
        limit=limit,
        create_pool_if_not_found=False,
    )
    working = asyncio.ensure_future(worker.start(printer=console.say))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # also where a shell has started us with `&` and SIGINT ignored
        loop.add_signal_handler(number, working.cancel)
    try:
        await working
    except asyncio.CancelledError:
        console.say(f"worker `{worker.name}` has stopped")


class _Worker(ProcessWorker):
    """Prefect's own, which ends its runs' processes when it is stopped, and then says so to the server."""

    @classmethod
    def __dispatch_key__(cls) -> str:
        return "exportyard"  # Prefect's own keeps its name

    async def run(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        task_status: TaskStatus[int] | None = None,
    ) -> ProcessWorkerResult:
        """Run `flow_run` to its end, or to ours."""
        try:
            return await super().run(flow_run, configuration, task_status)
        except anyio.get_cancelled_exc_class():
            message = f"worker `{self.name}` was stopped; what was finished is kept, and another run goes on from there"
            with anyio.move_on_after(REPORT_LIMIT_S, shield=True):
                now = (await self.client.read_flow_run(flow_run.id)).state
                if now is None or not now.is_final():  # it may have ended by itself just now
                    await self.client.set_flow_run_state(flow_run.id, Crashed(message=message), force=True)
            raise

    async def _propose_crashed_state(
        self, flow_run: FlowRun, message: str, client: PrefectClient | None = None
    ) -> None:
        """Unless it has been retried since, which the process's runner made possible by saying so before us."""
        with contextlib.suppress(Exception):  # a server that is away or knows it not is Prefect's own matter
            now = await (client or self.client).read_flow_run(flow_run.id)
            starts = now.run_count - flow_run.run_count
            waits = now.state is not None and (now.state.is_scheduled() or now.state.is_pending())
            if starts > 1 or (starts == 1 and waits):
                return
        await super()._propose_crashed_state(flow_run, message, client)

    async def _submit_scheduled_flow_runs(self, flow_run_response: list[WorkerFlowRunResponse]) -> list[FlowRun]:
        """Not yet those whose first process still holds a place, since they were retried at once.

        Prefect's own asks for a second place for the same run, which ends the whole worker.
        """
        held = () if self._limiter is None else self._limiter.statistics().borrowers
        return await super()._submit_scheduled_flow_runs(
            [one for one in flow_run_response if one.flow_run.id not in held]
        )
