"""Who else can use the Prefect server that the profile points to."""

from __future__ import annotations

import ipaddress
from http import HTTPStatus
from urllib.parse import urlsplit

import httpx
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY, PREFECT_API_URL

PATIENCE_S = 3.0


def warning() -> str | None:
    """What is wrong with how the server can be reached; None if it is on loopback, away, or as it should be."""
    url = PREFECT_API_URL.value()
    if not url or _is_loopback(urlsplit(url).hostname or ""):
        return None
    try:
        answer = httpx.get(f"{url}/admin/version", timeout=PATIENCE_S)
    except httpx.HTTPError:
        return None
    if answer.status_code == HTTPStatus.OK:
        return (
            f"the Prefect server at {url} is open to everybody who can reach it: set "
            "`PREFECT_SERVER_API_AUTH_STRING` on it (docs/flows.md)"
        )
    secret = PREFECT_API_AUTH_STRING.value() or PREFECT_API_KEY.value()
    if secret and urlsplit(url).scheme == "http":
        return f"the password for {url} crosses the network unencrypted: put a proxy with TLS in front of it"
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
