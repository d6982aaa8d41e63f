"""The state of the machine while something is timed on it: which cores, at what clock, and what else is at work."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline import host
from pipeline.types import Machine

_CPUS = Path("/sys/devices/system/cpu")
_STAT = Path("/proc/stat")
_THREADS = Path("/proc/self/task")
BUSY_CORES = 0.5
"""Other work on half a core meets every second turn of a runner on that core."""


@contextlib.contextmanager
def pinned(count: int | None) -> Iterator[tuple[int, ...]]:
    """Inside, all threads of this process run on `count` cores, whose numbers are given; none where it can't be done.

    They are the last ones, since interrupts come to the first. For None, and afterwards, all threads may run anywhere,
    those too that a runtime has pinned (TVM does, also the thread that calls it, which would then slow all others).
    """
    wanted = host.cores() if count is None else host.cores()[-count:]
    done = _pin(wanted)
    try:
        yield wanted if done and count is not None else ()
    finally:
        if done:
            _pin(host.cores())


def _pin(cores: tuple[int, ...]) -> bool:
    if not hasattr(os, "sched_setaffinity") or not _THREADS.is_dir():
        return False
    for thread in _THREADS.iterdir():
        with contextlib.suppress(OSError):  # it has ended since
            os.sched_setaffinity(int(thread.name), cores)
    return True


class Observer:
    """Looks at the machine before, while and after something is timed.

    Only what happens while `timing` is entered counts as such.
    """

    def __init__(self) -> None:
        self.load_before = load()
        self._clock_s = self._others_s = 0.0
        self._known = _busy_s() is not None

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """Around what is timed."""
        clock, own, busy = time.perf_counter(), _own_s(), _busy_s()
        try:
            yield
        finally:
            after = _busy_s()
            if busy is not None and after is not None:
                self._clock_s += time.perf_counter() - clock
                self._others_s += max(0.0, after - busy - (_own_s() - own))

    def found(self) -> Machine:
        """What there is to say now."""
        known = self._known and self._clock_s > 0
        return Machine(
            cpu=host.cpu_name(),
            cores=host.cpu_count(),
            governor=governor(_CPUS / f"cpu{host.cores()[0]}"),
            turbo=turbo(_CPUS),
            load_before=self.load_before,
            load_after=load(),
            others=round(self._others_s / self._clock_s, 2) if known else None,
        )


def load() -> float | None:
    """The load average over the last minute; None on a system that has none."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def governor(cpu: Path) -> str | None:
    """What governs the clock of a core, as the kernel says below `cpu`; None where it doesn't (in most clouds)."""
    return _text(cpu / "cpufreq" / "scaling_governor")


def turbo(cpus: Path) -> bool | None:
    """Whether clocks may rise above their nominal rate; None where the kernel doesn't say."""
    no_turbo, boost = _text(cpus / "intel_pstate" / "no_turbo"), _text(cpus / "cpufreq" / "boost")
    if no_turbo is not None:
        return no_turbo == "0"
    return None if boost is None else boost == "1"


def warnings(found: Machine) -> list[str]:
    """What of the machine's state makes times on it worth less."""
    told = []
    if found.load_before is not None and found.load_before >= 1:
        told.append(
            f"the machine was busy before (load average {found.load_before:.2f}): trust ratios rather than times"
        )
    if found.others is not None and found.others >= BUSY_CORES:
        told.append(
            f"other work took {found.others:.1f} of {found.cores} cores while timing: trust ratios on one thread, "
            "and none of runtimes whose threads spin (OpenVINO)"
        )
    return told


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _own_s() -> float:
    """Processor time of this process and of those that it has started and that have ended."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _busy_s() -> float | None:
    """Processor time that anything took on our cores since the system started; None where the kernel doesn't tell."""
    text = _text(_STAT)
    return None if text is None else busy_of(text, host.cores(), os.sysconf("SC_CLK_TCK"))


def busy_of(stat: str, cores: tuple[int, ...], ticks: int) -> float | None:
    """Seconds in which `cores` were at work for anybody, from the text of ``/proc/stat``.

    Args:
        stat: lines ``cpu0 user nice system idle iowait irq softirq steal ...``, in ticks.
        cores: their numbers.
        ticks: of a second.
    """
    total, seen = 0, 0
    for line in stat.splitlines():
        found = re.match(r"cpu(\d+)((?: \d+)+)", line)
        if found is not None and int(found.group(1)) in cores:
            numbers = [int(number) for number in found.group(2).split()]
            total += sum(numbers[:3]) + sum(numbers[5:8])  # guests' time is in the user's already
            seen += 1
    return total / ticks if seen else None
