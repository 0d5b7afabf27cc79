"""Conditions of requests: lists of ETags as RFC 9110 writes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.autocrud.http.conditions import (
    MAX_ETAGS,
    InvalidCondition,
    creates,
    etags,
    expected,
    not_modified,
    parse_version,
)
from app.autocrud.http.messages import Request
from app.autocrud.http.problems import PreconditionRequired
from app.autocrud.resource_manager.records import NO_STATE, Version

from .metadata import metadata

OPAQUE = st.text(
    st.characters(codec="latin-1", exclude_characters='"\x7f', min_codepoint=0x21, max_codepoint=0xFF).filter(
        lambda letter: not 0x80 > ord(letter) > 0x7E
    ),
    max_size=8,
)
VERSIONS = st.builds(
    lambda number, nonce: Version(number, f"{nonce:016x}"), st.integers(0, 10**17), st.integers(0, 2**64 - 1)
)


def request(**headers: str) -> Request:
    """Return a request with these headers; an underscore stands for a hyphen."""
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw, "path": "/", "query_string": b""}, None, [], 1000)


@given(st.lists(st.tuples(st.booleans(), OPAQUE), min_size=1, max_size=5), st.sampled_from([",", ", ", " ,\t"]))
def test_a_list_is_read_as_it_was_written(tags, comma):
    header = comma.join(f'{"W/" if weak else ""}"{opaque}"' for weak, opaque in tags)
    assert etags(header) == tags


@pytest.mark.parametrize("header", ["", "1", '"1" "2"', '"1",', 'w/"1"', '"1', '"a b"', ',"1"'])
def test_other_texts_are_refused(header):
    with pytest.raises(InvalidCondition):
        etags(header)


def test_a_list_has_an_end():
    assert len(etags(",".join(['"1"'] * MAX_ETAGS))) == MAX_ETAGS
    with pytest.raises(InvalidCondition, match="at most 100"):
        etags(",".join(['"1"'] * (MAX_ETAGS + 1)))


@given(VERSIONS)
def test_a_version_is_its_etag(version):
    opaque = f"{version.version}-{version.nonce}"
    assert Version.of_opaque_tag(opaque) == version
    assert version.etag == f'"{opaque}"'
    assert parse_version(version.etag) == version
    assert expected(request(if_match=f'"{opaque}"'), required=True) == [version]


@pytest.mark.parametrize("opaque", ["", "1", "1-", "x-0123456789abcdef", "1-0123456789ABCDEF", "1-0123456789abcde"])
def test_an_etag_of_another_server_names_no_state(opaque):
    assert Version.of_opaque_tag(opaque) == NO_STATE


def test_weak_etags_never_match_a_write():
    assert expected(request(if_match='W/"1-0123456789abcdef"'), required=True) == [NO_STATE]
    assert parse_version('W/"1-0123456789abcdef"') == NO_STATE


def test_a_write_without_a_condition():
    assert expected(request(), required=False) is None
    assert expected(request(if_match=" * "), required=True) is None
    with pytest.raises(PreconditionRequired):
        expected(request(), required=True)


def test_a_conditional_read():
    meta = metadata()
    assert not not_modified(request(), meta.etag)
    assert not_modified(request(if_none_match="*"), meta.etag)
    assert not_modified(request(if_none_match=f'"other", W/{meta.etag}'), meta.etag)
    assert not not_modified(request(if_none_match='"other"'), meta.etag)


def test_a_conditional_create():
    assert not creates(request())
    assert creates(request(if_none_match="*"))
    with pytest.raises(InvalidCondition, match="takes only"):
        creates(request(if_none_match='"1"'))
    with pytest.raises(InvalidCondition, match="cannot both hold"):
        creates(request(if_none_match="*", if_match='"1"'))
