"""Packages that only some backends need: without one its tests are skipped, and `make test-all` lets none be."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

from pipeline import host

ALL = "EXPORTYARD_TEST_ALL"
thorough = pytest.mark.skipif(not os.environ.get(ALL), reason=f"takes minutes; `make test-all` sets {ALL}")
"""For tests of rare things, of which `make test` has a few."""


def need(module: str, extra: str) -> None:
    """Skip the test, or the whole file, where the package `module` of the extra `extra` is not installed."""
    if not host.has_module(module):
        skip(f"the package `{module}` is not installed (`pip install 'exportyard[{extra}]'`)")


def skip(reason: str) -> NoReturn:
    """Skip for `reason`; a package that is not installed is a failure where all are asked for."""
    if os.environ.get(ALL) and "not installed" in reason:
        pytest.fail(reason)
    pytest.skip(reason, allow_module_level=True)
