"""What is told of the machine that something is timed on."""

import os

import pytest

from pipeline import host, machine
from pipeline.types import Machine

STAT = """cpu  400 0 200 9000 0 10 10 20 5 0
cpu0 100 10 50 4000 7 1 2 3 50 0
cpu1 300 0 150 5000 7 4 5 6 50 0
cpu12 999 999 999 0 0 0 0 0 0 0
intr 12345
"""


def test_what_all_work_took_on_our_cores():
    # user, nice and system, and interrupts and what the host took; no idling, and guests are in user already
    assert machine.busy_of(STAT, (0,), ticks=100) == pytest.approx((100 + 10 + 50 + 1 + 2 + 3) / 100)
    assert machine.busy_of(STAT, (0, 1), ticks=100) == pytest.approx((166 + 465) / 100)
    assert machine.busy_of("nothing here", (0,), ticks=100) is None


def test_a_kernel_that_does_not_tell_is_no_fault(tmp_path):
    assert machine.governor(tmp_path) is None
    assert machine.turbo(tmp_path) is None


def test_governor_and_turbo_where_the_kernel_tells(tmp_path):
    (tmp_path / "cpufreq").mkdir()
    (tmp_path / "cpufreq" / "scaling_governor").write_text("performance\n")
    assert machine.governor(tmp_path) == "performance"
    (tmp_path / "cpufreq" / "boost").write_text("1\n")
    assert machine.turbo(tmp_path) is True
    (tmp_path / "intel_pstate").mkdir()
    (tmp_path / "intel_pstate" / "no_turbo").write_text("1\n")
    assert machine.turbo(tmp_path) is False


def test_a_busy_machine_is_a_warning_and_a_quiet_one_is_not():
    quiet = Machine(cpu="c", cores=2, load_before=0.2, load_after=1.5, others=0.1)
    assert machine.warnings(quiet) == []  # our own work is in the load afterwards
    busy = quiet.model_copy(update={"load_before": 3.0, "others": 1.2})
    first, second = machine.warnings(busy)
    assert "load average 3.00" in first
    assert "1.2 of 2 cores" in second
    assert machine.warnings(Machine(cpu="c", cores=2)) == []


def test_other_work_is_seen_and_our_own_is_not():
    observer = machine.Observer()
    with observer.timing():
        sum(range(3_000_000))
    found = observer.found()
    assert found.cpu == host.cpu_name()
    assert found.others is None or 0 <= found.others <= found.cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system can't pin")
def test_threads_are_kept_on_cores_and_let_go():
    before = os.sched_getaffinity(0)
    with machine.pinned(1) as cores:
        assert os.sched_getaffinity(0) == set(cores) == {host.cores()[-1]}
    assert os.sched_getaffinity(0) == before
    with machine.pinned(None) as cores:
        assert cores == ()
        assert os.sched_getaffinity(0) == before
