"""The error tree: one exit code each, hints that help, and nothing lost between processes."""

import pickle

import pytest

from pipeline import errors
from pipeline.errors import ExportyardError


def tree(kind=ExportyardError):
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


def test_each_class_on_the_first_level_has_its_own_exit_code():
    codes = [kind.exit_code for kind in tree() if kind.__base__ in (Exception, ExportyardError)]
    assert len(codes) == len(set(codes))
    assert all(1 <= code <= 125 for code in codes)


@pytest.mark.parametrize("kind", list(tree()))
def test_errors_travel_between_processes(kind):
    back = pickle.loads(pickle.dumps(kind("it broke", hint="mend it")))
    assert (type(back), back.message, back.hint) == (kind, "it broke", "mend it")
    assert str(back) == "it broke\n\nhint: mend it"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("digit", "did you mean `digits`?"),
        ("resnet", "did you mean `resnet50`?"),
        ("zzz", "known: `digits`, `resnet50`"),
    ],
)
def test_a_misspelt_name(name, hint):
    found = errors.unknown("recipe", name, ["resnet50", "digits"])
    assert found.message == f"unknown recipe `{name}`"
    assert found.hint == hint
