"""By module of the model: what engines really run in which numbers, and where the time of their calls goes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from pipeline.candidates import Candidate
from pipeline.report.data import ModuleShare, ModuleTime, Numbers, Share, WhereTime
from pipeline.types import Audit, AuditRow, Profile

if TYPE_CHECKING:
    from pipeline.run import Verdict

MOST_GROUPS = 30  # modules that one looks at; a model with more of them is summed one level higher
_ORDER = ("int8", "fp16", "bf16", "fp32", "fp64")


def numbers(rows: Sequence[Verdict], tried: Sequence[Candidate]) -> Iterator[Numbers]:
    """One entry for each engine whose form isn't plain fp32: nothing can have fallen back there."""
    places = {(one.target, one.scheme): place for place, one in enumerate(tried)}
    for row in rows:
        for scheme, audit in row.audits.items():
            if scheme != "fp32":
                yield _numbers(row.target.name, audit, places.get((row.target.name, scheme)))


def _numbers(target: str, audit: Audit, form: int | None) -> Numbers:
    total = sum(row.macs for row in audit.rows)
    by_kind: Counter[str] = Counter()
    for row in audit.rows:
        by_kind[row.runs_in] += row.macs
    return Numbers(
        form=form,
        target=target,
        scheme=audit.scheme,
        macs=total,
        int8_share=audit.int8_share,
        shares=tuple(
            Share(runs_in=kind, macs=by_kind[kind], share=by_kind[kind] / max(total, 1))
            for kind in _ORDER
            if kind in by_kind
        ),
        modules=tuple(_modules(audit.rows, total)),
        not_audited=audit.not_audited,
    )


def _modules(rows: Sequence[AuditRow], total: int) -> Iterator[ModuleShare]:
    for module, found in grouped([(row.module or row.node, row) for row in rows]).items():
        macs = sum(row.macs for row in found)
        whole = sum(row.macs for row in found if row.runs_in == "int8")
        yield ModuleShare(
            module=module,
            operators=len(found),
            macs=macs,
            share=macs / max(total, 1),
            int8_share=whole / max(macs, 1),
        )


Row = TypeVar("Row")


def grouped(rows: Sequence[tuple[str, Row]]) -> dict[str, list[Row]]:
    """Rows by module, in the order they come in: modules as deep as there are not too many groups."""
    names = [tuple(name.split(".")) for name, _ in rows]
    depth = 1
    for deeper in range(2, max(map(len, names), default=1) + 1):
        if len({name[:deeper] for name in names}) > MOST_GROUPS:
            break
        depth = deeper
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for name, (_, row) in zip(names, rows, strict=True):
        groups[".".join(name[:depth])].append(row)
    return dict(groups)


def where_time(target: str, profile: Profile) -> WhereTime:
    """A profile by module."""
    rows = [(row.module or f"({row.operator})", row) for row in profile.rows]
    whole = profile.operators_ms
    modules = [
        ModuleTime(module=module, operators=len(found), ms=sum(row.ms for row in found), share=share)
        for module, found in grouped(rows).items()
        for share in [sum(row.ms for row in found) / whole if whole > 0 else 0.0]
    ]
    return WhereTime(
        target=target,
        scheme=profile.scheme,
        sizes=profile.sizes,
        threads=profile.threads,
        call_ms=profile.call_ms,
        plain_ms=profile.plain_ms,
        operators_ms=whole,
        modules=tuple(sorted(modules, key=lambda one: (-one.ms, one.module))),
        not_profiled=profile.not_profiled,
    )
