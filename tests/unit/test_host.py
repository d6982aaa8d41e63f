"""What the environment asks for."""

import pytest

from pipeline import host
from pipeline.errors import UsageError


def test_measuring_takes_a_second_unless_told(monkeypatch):
    monkeypatch.delenv(host.MEASURE_S)  # that of all tests
    assert host.measure_s() == 1

    monkeypatch.setenv(host.MEASURE_S, "0.25")
    assert host.measure_s() == 0.25


@pytest.mark.parametrize("text", ["", "fast", "0", "-1", "nan", "inf"])
def test_measuring_for_no_time_is_refused(monkeypatch, text):
    monkeypatch.setenv(host.MEASURE_S, text)
    with pytest.raises(UsageError, match=f"EXPORTYARD_MEASURE_S is `{text}`"):
        host.measure_s()
