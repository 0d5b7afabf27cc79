"""HEAD of S3-SQLite: bytes, names and versions."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.autocrud.errors import ConfigError, StoreDamaged
from app.autocrud.resource_manager.backends.s3_sqlite.head import (
    FORMAT,
    FORMATS,
    MAX_PAST,
    Head,
    LogRecord,
    Segment,
    Snapshot,
    decode_head,
    decode_segment,
    encode_segment,
    segment_key,
    snapshot_key,
    version_in,
)

NUMBERS = st.integers(1, 10**9)
RECORDS = st.builds(LogRecord, NUMBERS, st.binary(min_size=16, max_size=16), NUMBERS, st.binary(max_size=20))
SEGMENTS = st.builds(Segment, st.text(max_size=5), NUMBERS, NUMBERS, NUMBERS)
SNAPSHOTS = st.builds(Snapshot, st.text(max_size=5), NUMBERS, NUMBERS, st.text(max_size=5))
HEADS = st.builds(
    Head,
    store=st.text(max_size=5),
    ver=NUMBERS,
    seq=NUMBERS,
    fmt=st.sampled_from(FORMATS),
    blob_epoch=st.integers(0, 3),
    nonce=st.binary(max_size=8),
    snap=st.none() | SNAPSHOTS,
    segs=st.lists(SEGMENTS, max_size=3).map(tuple),
    tail=st.lists(RECORDS, max_size=3).map(tuple),
    others=st.dictionaries(st.sampled_from(["later", "blobs"]), st.integers(0, 9), max_size=2),
)


@given(HEADS)
def test_a_head_is_read_as_it_was_written(head):
    assert decode_head(head.encode()) == head


@given(HEADS)
def test_keys_of_later_versions_are_kept(head):
    read = msgspec.msgpack.decode(decode_head(head.encode()).encode())
    assert {name: read[name] for name in head.others} == head.others


@given(HEADS, NUMBERS)
def test_the_next_head_is_one_version_up_and_has_other_bytes(head, seq):
    one, other = head.next(seq=seq), head.next(seq=seq)
    assert one.ver == head.ver + 1
    assert one.encode() != other.encode()
    assert one.past[-1] == (head.ver, head.nonce)
    assert len(one.past) <= MAX_PAST


@given(HEADS)
def test_a_head_refers_to_its_segments_and_its_snapshot(head):
    assert head.keys == {segment.key for segment in head.segs} | ({head.snap.key} if head.snap else set())


@given(st.lists(RECORDS, max_size=4))
def test_a_segment_is_read_as_it_was_written(records):
    assert decode_segment(encode_segment(records)) == records


@given(NUMBERS, NUMBERS)
def test_the_version_is_in_the_name(ver, number):
    for key in (segment_key("p/", ver, number), snapshot_key("p/", ver, number)):
        assert version_in(key.removeprefix("p/")) == ver
        assert version_in(key) is None
        assert version_in(key.removeprefix("p/") + "x") is None


@pytest.mark.parametrize("body", [b"", b"\xc0", b"\x80", b"{}", msgspec.msgpack.encode({"fmt": FORMAT})])
def test_other_bytes_are_damage(body):
    with pytest.raises(StoreDamaged):
        decode_head(body)


def test_a_later_format_is_refused_by_its_number():
    with pytest.raises(ConfigError, match="has format 4, this program knows 1, 2, 3: deploy a newer one"):
        decode_head(msgspec.msgpack.encode({"fmt": 4, "store": "s"}))


def test_a_store_without_blobs_keeps_its_format_and_its_keys():
    written = msgspec.msgpack.decode(Head(store="s").encode())
    assert written["fmt"] == FORMAT
    assert "blob_epoch" not in written
