"""Versions and release tags, compared with GTO's own grammar."""

import re

import pytest
from gto.constants import tag_re
from hypothesis import given
from hypothesis import strategies as st

from pipeline import tags
from pipeline.errors import ReleaseError, UsageError
from pipeline.tags import Tag, Version

numbers = st.integers(0, 10**6)
labels = st.from_regex(
    r"(?:0|[1-9]\d{0,3}|[a-z-][0-9a-z-]{0,5})(?:\.(?:0|[1-9]\d{0,3}|[a-z][0-9a-z]{0,3})){0,2}", fullmatch=True
)
releases = st.builds(Version, numbers, numbers, numbers, st.one_of(st.just(""), labels.filter(str.isascii)))
names = st.from_regex(r"[a-z0-9](?:[a-z0-9_-]{0,10}[a-z0-9])?", fullmatch=True).filter(str.isascii)
folders = st.one_of(st.just(""), st.from_regex(r"[a-z]{1,5}(?:/[a-z]{1,5}){0,2}", fullmatch=True))


@given(names, releases, folders, st.booleans())
def test_a_tag_is_read_as_it_was_written_and_gto_reads_the_same(name, version, folder, withdrawn):
    tag = Tag(name, version, folder, withdrawn)
    assert tags.parse_tag(str(tag)) == tag
    gto = re.search(tag_re, str(tag))
    assert gto is not None
    assert (gto["version"], gto["cancel"] == "!") == (f"v{version}", withdrawn)
    assert gto["artifact"] == (f"{folder}={name}" if folder else name)


@given(st.text(alphabet="ab@v019.#!-=/", max_size=16))
def test_any_text_is_a_tag_only_if_it_is_one_for_gto(text):
    tag = tags.parse_tag(text)
    assert tag is None or re.search(tag_re, text)


@pytest.mark.parametrize(
    "text",
    ["v1.0.0", "digits", "digits@1.0.0", "digits@v1.0", "digits@v01.0.0", "digits@v1.0.0-", "digits#prod", "@v1.0.0"],
)
def test_other_tags_are_not_releases(text):
    assert tags.parse_tag(text) is None


def test_a_counter_of_gto_is_read_over():
    assert tags.parse_tag("digits@v1.0.0#3") == Tag("digits", Version(1, 0, 0))


def test_versions_are_ordered_as_semver_orders_them():
    ordered = (
        "0.9.9 1.0.0-alpha 1.0.0-alpha.1 1.0.0-alpha.beta 1.0.0-beta.2 1.0.0-beta.11 1.0.0-rc.1 1.0.0 1.0.10 1.2.0"
    )
    found = [tags.parse(text) for text in ordered.split()]
    assert sorted(set(found)) == found


@given(st.lists(releases, min_size=1), st.sampled_from(tags.BUMPS))
def test_the_next_version_is_above_all_others(existing, bump):
    assert tags.next_version(existing, bump) > max(existing)


@pytest.mark.parametrize(
    ("existing", "bump", "expected"),
    [
        ([], "patch", "1.0.0"),
        ([], "major", "1.0.0"),
        (["1.0.0", "1.9.0", "1.10.0"], "patch", "1.10.1"),
        (["1.2.3"], "minor", "1.3.0"),
        (["1.2.3"], "major", "2.0.0"),
        (["1.0.0", "2.0.0-rc.1"], "patch", "2.0.0"),
    ],
)
def test_next_version(existing, bump, expected):
    assert str(tags.next_version([tags.parse(text) for text in existing], bump)) == expected


def test_the_first_version_can_be_told():
    assert str(tags.next_version([], "patch", first="v0.1.0")) == "0.1.0"


def test_a_misspelt_bump_gets_the_nearest():
    with pytest.raises(UsageError, match="did you mean `minor`"):
        tags.next_version([], "minro")


@pytest.mark.parametrize("text", ["", "1", "1.0", "one", "1.0.0.0", "v1.0.0+build", " 1.0.0"])
def test_what_is_no_version_is_refused(text):
    with pytest.raises(UsageError, match="is not a version"):
        tags.parse(text)


@pytest.mark.parametrize(("name", "better"), [("yolo.v8", "yolo-v8"), ("digits-", "digits"), ("a@b", "a-b")])
def test_a_name_that_a_tag_cannot_carry_is_refused(name, better):
    with pytest.raises(ReleaseError, match=f"rename the recipe, for example to `{better}`"):
        tags.check_name(name)


@given(names)
def test_a_name_is_accepted_if_gto_accepts_it(name):
    tags.check_name(name)
    assert re.search(tag_re, f"{name}@v1.0.0")
