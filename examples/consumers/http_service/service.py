"""An HTTP service for one engine of a release: FastAPI, ONNX Runtime, and requests that are put together to batches.

It starts with ``uvicorn --factory service:create``, and reads from its environment:

- ``RELEASE``: the release folder (``/release``); ``TARGET``: which engine, if it has several for ONNX Runtime;
- ``THREADS``: of one call, 0 is all cores (0); ``MAX_WAIT_MS``: how long a request may wait for others (2);
- ``MAX_QUEUE``: more waiting requests than these are turned away (256).
"""

import asyncio
import contextlib
import math
import os
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, create_model
from release import Engine, distances

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
TIMES_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class Numbers:
    """What ``/metrics`` shows."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.answers = Counter("predict_answers", "Answers by status.", ["status"], registry=registry)
        self.time = Histogram("predict_seconds", "From request to answer.", buckets=TIMES_S, registry=registry)
        self.batch = Histogram("batch_rows", "Rows of one call of the engine.", buckets=SIZES, registry=registry)
        self.waiting = Gauge("waiting_requests", "Requests that wait for the engine.", registry=registry)


@dataclass
class Waiting:
    """A request: its inputs, its rows of the batch axis, and where its answer will be."""

    feeds: dict[str, np.ndarray]
    rows: int
    answer: asyncio.Future
    sizes: dict[str, int] = field(default_factory=dict)


class Batcher:
    """Puts requests together along the axis that is the first of every input and output, if there is one."""

    def __init__(self, engine, numbers, wait_s, limit):
        self.engine, self.numbers, self.wait_s = engine, numbers, wait_s
        self.axis = batch_axis(engine)
        self.most = _axes(engine)[self.axis]["max"] if self.axis else 1
        self.queue = asyncio.Queue(limit)

    async def answer(self, feeds):
        """Outputs for these inputs; the request waits for others first, but not long."""
        sizes = check(self.engine, feeds)
        rows = sizes.pop(self.axis) if self.axis else 1
        one = Waiting(feeds, rows, asyncio.get_running_loop().create_future(), sizes)
        try:
            self.queue.put_nowait(one)
        except asyncio.QueueFull:
            raise HTTPException(503, "too many requests wait", {"Retry-After": "1"}) from None
        return await one.answer

    async def work(self):
        """Serve the queue until cancelled."""
        held = None
        while True:
            batch = [held or await self.queue.get()]
            held = await self._gather(batch)
            self.numbers.waiting.set(self.queue.qsize())
            try:
                await self._run(batch)
            except Exception as error:  # the next batch may be better
                for one in batch:
                    one.answer.done() or one.answer.set_exception(error)

    async def _gather(self, batch):
        """Add requests of the same other sizes to `batch`; the first that doesn't fit, for the next one."""
        until = time.monotonic() + self.wait_s
        rows = batch[0].rows
        while self.axis and rows < self.most:
            one = await self._next(until)
            if one is None or rows + one.rows > self.most or one.sizes != batch[0].sizes:
                return one
            batch.append(one)
            rows += one.rows
        return None

    async def _next(self, until):
        """The next request, if it is there or comes in time."""
        with contextlib.suppress(asyncio.QueueEmpty):
            return self.queue.get_nowait()
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(self.queue.get(), max(0.0, until - time.monotonic()))
        return None

    async def _run(self, batch):
        whole = {name: np.concatenate([one.feeds[name] for one in batch]) for name in batch[0].feeds}
        if self.axis is None:
            whole = batch[0].feeds
        self.numbers.batch.observe(sum(one.rows for one in batch))
        outputs = await asyncio.to_thread(self.engine, whole)
        start = 0
        for one in batch:
            part = slice(start, start + one.rows) if self.axis else ...
            one.answer.done() or one.answer.set_result({name: array[part] for name, array in outputs.items()})
            start += one.rows


def _axes(engine):
    return engine.entry.get("selector", engine.manifest["signature"])["axes"]


def batch_axis(engine):
    """The axis along which requests can be put together, or None."""
    if engine.entry["scheme"] == "int8-dynamic":
        return None  # which takes its ranges from all that it is given: one request would change another's answer
    firsts = {spec["shape"][0] if spec["shape"] else None for spec in [*engine.inputs, *engine.outputs]}
    return firsts.pop() if len(firsts) == 1 and firsts <= set(_axes(engine)) else None


def check(engine, feeds):
    """The size of each axis.

    Raises:
        HTTPException: an input has another shape than the signature says.
    """
    sizes = {}
    for spec in engine.inputs:
        shape = feeds[spec["name"]].shape
        if len(shape) != len(spec["shape"]):
            raise HTTPException(422, f"`{spec['name']}` has the shape {list(shape)}, expected {spec['shape']}")
        for dim, size in zip(spec["shape"], shape, strict=True):
            if sizes.setdefault(dim, size if isinstance(dim, str) else dim) != size:
                raise HTTPException(422, f"`{spec['name']}` has the shape {list(shape)}, expected {spec['shape']}")
    found = {name: size for name, size in sizes.items() if isinstance(name, str)}
    for name, size in found.items():
        axis = _axes(engine)[name]
        if not axis["min"] <= size <= axis["max"]:
            raise HTTPException(422, f"`{name}` is {size}, served are {axis['min']} to {axis['max']}")
    return found


def arrays(engine, values):
    """Inputs as arrays.

    Raises:
        HTTPException: what was sent is no array of the input's type.
    """
    found = {}
    for spec in engine.inputs:
        try:
            plain = np.asarray(values[spec["name"]])
            if not np.can_cast(plain.dtype, spec["dtype"], "same_kind"):
                raise ValueError(f"these are {plain.dtype}")
            found[spec["name"]] = plain.astype(spec["dtype"])
            if not np.array_equal(found[spec["name"]], plain) and plain.dtype.kind in "iub":
                raise ValueError("a number is too large")
        except (ValueError, OverflowError) as error:
            raise HTTPException(422, f"`{spec['name']}` is no array of {spec['dtype']}: {error}") from None
    return found


def plain(outputs):
    """Outputs as nested lists; JSON has no NaN and no infinity, so these are null."""
    return {name: _finite(array.tolist()) for name, array in outputs.items()}


def _finite(value):
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _described(name, specs):
    fields: dict[str, Any] = {
        spec["name"]: (list[Any], Field(description=f"{spec['dtype']} {spec['shape']}")) for spec in specs
    }
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)


class Health(BaseModel):
    """What is served."""

    recipe: str
    version: str
    target: str
    scheme: str


def create():
    """The application, after the engine has reproduced the golden vectors.

    Raises:
        RuntimeError: it has not.
    """
    engine = Engine(
        os.environ.get("RELEASE", "/release"), os.environ.get("TARGET"), int(os.environ.get("THREADS", "0"))
    )
    wrong = [f"{case} {name} {words}" for case, name, words, bad in distances(engine) if bad]
    if wrong:
        raise RuntimeError(f"{engine.target} does not reproduce the golden vectors: {'; '.join(wrong)}")
    return serving(engine)


def serving(engine):
    """The application for an engine."""
    numbers = Numbers()
    # made when the event loop runs
    batcher: list[Batcher] = []

    @contextlib.asynccontextmanager
    async def lifespan(_app):
        wait_s = float(os.environ.get("MAX_WAIT_MS", "2")) / 1000
        batcher.append(Batcher(engine, numbers, wait_s, int(os.environ.get("MAX_QUEUE", "256"))))
        worker = asyncio.create_task(batcher[0].work())
        yield
        worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker

    entry, manifest = engine.entry, engine.manifest
    app = FastAPI(title=manifest["recipe"], version=manifest["version"], lifespan=lifespan)
    inputs, outputs = _described("Inputs", engine.inputs), _described("Outputs", engine.outputs)

    @app.middleware("http")
    async def measured(request: Request, call):
        since = time.perf_counter()
        response = await call(request)
        if request.url.path == "/predict":
            numbers.answers.labels(response.status_code).inc()
            numbers.time.observe(time.perf_counter() - since)
        return response

    @app.exception_handler(RequestValidationError)
    async def refused(_request: Request, error: RequestValidationError):
        # without the numbers that were sent
        found = [{"where": fault["loc"], "what": fault["msg"]} for fault in error.errors()]
        return JSONResponse({"detail": found}, 422)

    @app.post("/predict", response_model=outputs)
    async def predict(body: inputs):
        """Run the engine on nested lists of numbers."""
        return JSONResponse(plain(await batcher[0].answer(arrays(engine, body.model_dump()))))

    @app.get("/healthz")
    async def healthz() -> Health:
        """Answers as soon as the engine has reproduced the golden vectors."""
        names = {"recipe": manifest["recipe"], "version": manifest["version"]}
        return Health(**names, target=engine.target, scheme=entry["scheme"])

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters and histograms, as Prometheus reads them."""
        return Response(generate_latest(numbers.registry), media_type=CONTENT_TYPE_LATEST)

    return app
