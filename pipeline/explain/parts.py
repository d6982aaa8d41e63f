"""Parts of a model that can be built alone: what such a part reads and makes, and where a model is best cut.

A form is a sequence of steps, each an operator. Some are no place to cut at: what only weights or sizes decide goes
with whoever reads it, and a tensor that is quantised and dequantised is so on both sides of a cut, where it is a float.
So a part of an INT8 form is compiled to the same kernels as in the whole. Rounding to bfloat16 is no different.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from pipeline.store import Stored

Array = NDArray[Any]
Feeds = Mapping[str, Array]
Role = Literal["core", "carried", "quantize", "dequantize"]


@dataclass(frozen=True)
class Step:
    """One operator of a form.

    Attributes:
        name: of its node.
        operator: its type.
        reads: tensors that it reads; constants are left out.
        makes: tensors that it makes.
        role: ``core`` is where a cut may be; ``carried`` comes along with its readers; the others come in pairs.
        module: path of the user's module; ``""`` if unknown.
        line: ``file:line`` of the user's source; ``""`` if unknown.
    """

    name: str
    operator: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    role: Role = "core"
    module: str = ""
    line: str = ""


@dataclass(frozen=True)
class Part:
    """Some steps of a form as a model of their own.

    Attributes:
        steps: places in the form's `steps`, in order; what comes along is among them.
        reads: for each input, the tensor of the form whose values it is given: of its own name, or what came of that
            when it was quantised and dequantised.
        makes: its outputs, by their names in the form.
    """

    steps: tuple[int, ...]
    reads: Mapping[str, str]
    makes: tuple[str, ...]


class Form(Protocol):
    """A numeric form of a model that can be cut into parts.

    Attributes:
        steps: in an order in which they can run.
        inputs: of the whole.
        ends: outputs of the whole.
    """

    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    ends: tuple[str, ...]

    def values(self, names: Iterable[str]) -> list[dict[str, Array]]:
        """The tensors called `names`, as the form says they are, for each of the feeds that it was given."""
        ...

    def scale(self, name: str) -> Array | None:
        """One step of the numbers that the tensor `name` can have; None where it was not dequantised."""
        ...

    def write(self, part: Part, folder: Path) -> Stored:
        """The part as a model that backends can build from, as an artifact in `folder`.

        Raises:
            BuildError: a tensor where it is cut has a dtype that no signature has, or it can't be traced.
        """
        ...


class Plan:
    """What belongs together in a form; see the module.

    Attributes:
        core: places of the steps between which it may be cut.
    """

    def __init__(self, form: Form) -> None:
        self._steps, self._inputs, self._ends = form.steps, set(form.inputs), set(form.ends)
        self.core = tuple(place for place, step in enumerate(form.steps) if step.role == "core")
        self._maker = {name: place for place, step in enumerate(form.steps) for name in step.makes}
        self._readers: dict[str, list[int]] = {}
        for place, step in enumerate(form.steps):
            for name in step.reads:
                self._readers.setdefault(name, []).append(place)

    def part(self, places: Iterable[int], more: Iterable[str] = ()) -> Part:
        """The part that holds the core steps `places`.

        Args:
            places: in the form's `steps`.
            more: tensors that it shall make besides those that others read; they are made of its steps.
        """
        inside = set(places)
        reads: dict[str, str] = {}
        for place in sorted(inside):
            for name in self._steps[place].reads:
                self._take(name, inside, reads)
        core = [place for place in sorted(inside) if self._steps[place].role == "core"]
        made = (name for place in core for name in self._steps[place].makes)
        makes = dict.fromkeys(end for name in made for end in self._goes_out(name, inside))
        makes |= dict.fromkeys(more)
        for name in makes:
            self._take(name, inside, reads)
        return Part(tuple(sorted(inside)), reads, tuple(makes))

    def _take(self, name: str, inside: set[int], reads: dict[str, str], stands_for: str | None = None) -> None:
        """Make `name` known inside: by steps that come along, or as an input."""
        place = self._maker.get(name)
        if place in inside:
            return
        role = self._steps[place].role if place is not None else "core"
        if place is None or role == "core":
            if stands_for is None or place is None:
                reads[name] = name
            else:
                reads.setdefault(name, stands_for)
            return
        inside.add(place)
        for read in self._steps[place].reads:
            self._take(read, inside, reads, name if role == "dequantize" else stands_for)

    def _goes_out(self, name: str, inside: set[int]) -> Iterable[str]:
        """`name`, if the whole makes it or a core step outside reads it; what it is dequantised to, if that is read."""
        if name in self._ends:
            yield name
        for reader in self._readers.get(name, ()):
            role = self._steps[reader].role
            if role == "core" and reader not in inside:
                yield name
            elif role == "quantize":
                pairs = (two for one in self._steps[reader].makes for two in self._readers.get(one, ()))
                floats = [end for two in pairs for end in self._steps[two].makes]
                if any(self._leaves(end, inside) for end in floats):
                    yield floats[0]

    def _leaves(self, name: str, inside: set[int]) -> bool:
        readers = self._readers.get(name, ())
        return name in self._ends or any(self._steps[one].role == "core" and one not in inside for one in readers)

    def cuts(self, places: Sequence[int]) -> list[int]:
        """Where to cut `places` in two, best first: few tensors cross there, and the halves are alike.

        Returns:
            Lengths of the first half.
        """
        middle, quarter = len(places) / 2, len(places) // 4
        crossing = self._crossing(places)
        inner = range(max(1, quarter), max(2, len(places) - quarter))
        return sorted(inner, key=lambda cut: (crossing[cut], abs(cut - middle)))

    def _crossing(self, places: Sequence[int]) -> list[int]:
        """For each length of a first half, how many of its tensors the others read."""
        position = {place: count for count, place in enumerate(places)}
        change = [0] * (len(places) + 2)
        for place, start in position.items():
            for name in self._steps[place].makes:
                last = max((position.get(reader, 0) for reader in self._final_readers(name)), default=0)
                if last > start:
                    change[start + 1] += 1
                    change[last + 1] -= 1
        return list(itertools.accumulate(change))

    def _final_readers(self, name: str) -> Iterable[int]:
        for reader in self._readers.get(name, ()):
            if self._steps[reader].role == "core":
                yield reader
            else:
                for end in self._steps[reader].makes:
                    yield from self._final_readers(end)
