"""A server of S3 on this machine."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

import pytest

from tests import extras


@contextlib.contextmanager
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A new bucket's name; the environment leads to its server.

    The test is skipped where a package for it is not installed.
    """
    extras.need("s3fs", "s3")
    extras.need("moto", "s3-tests")
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1", "ENDPOINT_URL": f"http://{host}:{port}"
        }.items():  # fmt: skip
            monkeypatch.setenv(f"AWS_{name}", value)
        name = f"models-{uuid.uuid4().hex}"  # all servers of one process share their buckets
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
        yield name
    finally:
        server.stop()
