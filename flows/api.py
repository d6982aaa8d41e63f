"""The Prefect server that the profile points to, or why it can't be reached; never one that Prefect starts itself."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import TypeVar

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL

from pipeline.errors import ExportyardError, UnavailableError, UsageError, first_line

Result = TypeVar("Result")
PATIENCE_S = 900.0
_PAUSE_S = 2.0

log = logging.getLogger("pipeline.flow")


@contextlib.contextmanager
def connected() -> Iterator[SyncPrefectClient]:
    """A client of the server; what goes wrong between the two of them is said in our words.

    Raises:
        UnavailableError: no server is set, it can't be reached, has a fault, or wants another password.
        UsageError: the server has refused what it was asked for.
    """
    url = address()
    try:
        with get_client(sync_client=True) as client:
            yield client
    except httpx.HTTPStatusError as error:
        raise _refused(url, error.response) from error
    except httpx.RequestError as error:
        raise UnavailableError(
            f"the Prefect server at {url} can't be reached: {type(error).__name__} {first_line(error)}".rstrip(),
            hint="start it (`prefect server start`), or point to another: `prefect config set PREFECT_API_URL=URL`",
        ) from error


def patiently(work: Callable[[], Result]) -> Result:
    """What `work` finds out from the server, asked again while that is away, as when it is started anew.

    Raises:
        UnavailableError: it is away for longer, or wants another password.
        UsageError: the server has refused what it was asked for.
    """
    limit = time.monotonic() + PATIENCE_S
    while True:
        try:
            return work()
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.is_client_error:
                raise _refused(address(), error.response) from error
            if time.monotonic() > limit:
                raise UnavailableError(
                    f"the Prefect server is away for more than {PATIENCE_S:.0f} s: {first_line(error)}",
                    hint="start it again and retry the run: `prefect flow-run retry ID`; what is done stays done",
                ) from error
            log.warning("the Prefect server is away (%s), asking again", type(error).__name__)
            time.sleep(_PAUSE_S)


def address() -> str:
    """The URL of the server's API.

    Raises:
        UnavailableError: no server is set.
    """
    url = PREFECT_API_URL.value()
    if not url:
        raise UnavailableError(
            "no Prefect server is set",
            hint="`prefect server start`, and `prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api`",
        )
    return str(url)


def _refused(url: str, response: httpx.Response) -> ExportyardError:
    if response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return UnavailableError(
            f"the Prefect server at {url} wants a password, or another one",
            hint="set `PREFECT_API_AUTH_STRING` to what the server has in `PREFECT_SERVER_API_AUTH_STRING`",
        )
    said = f"the Prefect server at {url} answered {response.status_code}: {_detail(response)}"
    if response.is_server_error:
        return UnavailableError(said, hint="its log says more; try again")
    return UsageError(said, hint="is it the server of another version? `exportyard deploy` writes the deployments anew")


def _detail(response: httpx.Response) -> str:
    try:
        found = response.json()
    except ValueError:
        return response.reason_phrase
    detail = found.get("detail", found.get("exception_message", "")) if isinstance(found, dict) else ""
    return str(detail or response.reason_phrase)[:300]
