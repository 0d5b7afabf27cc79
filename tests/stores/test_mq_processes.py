"""MQCachedS3ResourceStore in four processes: what they see of each other, and how stale their reads are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.rabbitmq import RabbitMQ, rabbitmq, running  # noqa: F401
from tests.stores.mq_helpers import Proxy, broker_fixture, certificates_fixture, until  # noqa: F401

pytestmark = pytest.mark.rabbitmq


class Process:
    """A process that runs mq_worker."""

    def __init__(self, url: str, name: str, cache_dir: Path, **options) -> None:
        arguments = json.dumps({"amqp_url": url, "name": name, "cache_dir": str(cache_dir), **options})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.stores.mq_worker", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, name: str, **arguments) -> None:
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()

    def hear(self):
        line = self.process.stdout.readline()
        assert line, "the worker has ended"
        return json.loads(line)

    def ask(self, name: str, **arguments):
        self.tell(name, **arguments)
        return self.hear()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


@pytest.fixture
def start(tmp_path, ministack_s3) -> Iterator[Callable[..., list[Process]]]:  # noqa: ARG001 - the environment names it
    with contextlib.ExitStack() as stack:

        def started(*urls: str, **options) -> list[Process]:
            made = []
            for at, url in enumerate(urls):
                made.append(Process(url, tmp_path.name, tmp_path / f"cache {at}", **options))
                stack.callback(made[-1].stop)
            assert [one.hear() for one in made] == ["ready"] * len(made)
            return made

        yield started


def wait(holds: Callable[[], bool]) -> None:
    asyncio.run(until(holds))


def all_fresh(processes) -> bool:
    states = [one.ask("state") for one in processes]
    return all(state == {"fresh": True, "impairments": []} for state in states)


class Write(NamedTuple):
    acknowledged: float
    number: int


class Read(NamedTuple):
    began: float
    number: int


def too_old(writes: list[Write], reads: list[Read], bound: Callable[[Read], float]) -> list[Read]:
    """Return the reads that are staler than documented."""
    return [
        one
        for one in reads
        if one.number
        < max((write.number for write in writes if write.acknowledged < one.began - bound(one)), default=0)
    ]


def test_the_checker_finds_stale_reads():
    writes = [Write(10.0, 1), Write(11.0, 2)]
    reads = [Read(10.5, 0), Read(11.5, 1), Read(11.9, 1), Read(12.1, 1), Read(12.1, 2), Read(13.0, 0)]
    assert too_old(writes, reads, lambda _: 1.0) == [Read(12.1, 1), Read(13.0, 0)]
    assert too_old(writes, reads, lambda _: 2.5) == [Read(13.0, 0)]


def test_four_processes_see_each_others_writes_and_purges(start, rabbitmq):  # noqa: F811
    processes = start(*[rabbitmq] * 4)
    processes[0].ask("set", rid="r", number=0)
    for one in processes:
        wait(lambda one=one: one.ask("get", rid="r")[1] == 0)
    wait(lambda: all_fresh(processes))
    for number in range(1, 9):
        writer = processes[number % 4]
        acknowledged = writer.ask("set", rid="r", number=number)
        for one in processes:
            while True:
                began, seen = one.ask("get", rid="r")
                if seen == number:
                    break
                assert began < acknowledged + 1.0, "the write should have been seen"
    for one in processes:
        one.ask("read_keys")
        assert {one.ask("get", rid="r")[1] for _ in range(50)} == {8}
        assert one.ask("read_keys") == []  # not the index, and not a body
    uids = processes[0].ask("uids", rid="r")
    for one in processes:
        for revision in range(1, 10):
            one.ask("get", rid="r", revision=revision)
        assert one.ask("cached", uids=uids) == [9, 9]
    purged = processes[3].ask("purge", rid="r")
    for one in processes:
        while True:
            began, seen = one.ask("get", rid="r")
            if seen is None:
                break
            assert began < purged + 1.0
        wait(lambda one=one: one.ask("cached", uids=uids) == [0, 0])


def test_a_process_that_was_stopped_makes_no_stale_read(start, rabbitmq):  # noqa: F811
    writer, reader = start(*[rabbitmq] * 2)
    for rid in ("r", "s"):
        writer.ask("set", rid=rid, number=1)
        wait(lambda rid=rid: reader.ask("get", rid=rid)[1] == 1)
    uids = writer.ask("uids", rid="s")
    wait(lambda: all_fresh([writer, reader]))
    assert reader.ask("cached", uids=uids) == [1, 1]
    reader.process.send_signal(signal.SIGSTOP)
    writer.ask("set", rid="r", number=2)
    done = writer.ask("purge", rid="s")
    wait(lambda: time.monotonic() > done + 1.0)
    reader.tell("get", rid="r")
    reader.tell("get", rid="s")
    reader.process.send_signal(signal.SIGCONT)
    assert reader.hear()[1] == 2
    assert reader.hear()[1] is None
    wait(lambda: reader.ask("cached", uids=uids) == [0, 0])
    wait(lambda: all_fresh([reader]))


def test_no_read_is_staler_than_documented_during_failures(start, broker):
    staleness = 2.0
    with Proxy(broker.url) as writers, Proxy(broker.url) as readers:
        urls = [writers.amqp_url, readers.amqp_url, broker.url, broker.url]
        writer, cut_off, *others = processes = start(*urls, max_staleness_s=staleness)
        writer.ask("set", rid="r", number=0)
        for one in processes:
            wait(lambda one=one: one.ask("get", rid="r")[1] == 0)
        wait(lambda: all_fresh(processes))
        writer.ask("write_all_the_time", rid="r")
        for one in (cut_off, *others):
            one.ask("read_all_the_time", rid="r")

        def impaired(one: Process) -> bool:
            return any("RabbitMQ cannot be reached" in said for said in one.ask("state")["impairments"])

        # A reader alone
        readers.hold()
        wait(lambda: impaired(cut_off))
        assert all_fresh([writer, *others])
        readers.release()
        wait(lambda: all_fresh(processes))
        # A writer alone: the readers do not know
        began = time.monotonic()
        writers.hold()
        wait(lambda: impaired(writer))
        seen = others[0].ask("get", rid="r")[1]
        wait(lambda: others[0].ask("get", rid="r")[1] > seen)  # by looking
        assert all_fresh([cut_off, *others])
        writers.release()
        wait(lambda: all_fresh(processes))
        ended = time.monotonic()
        # The broker
        broker.kill()
        wait(lambda: all(map(impaired, processes)))
        broker.launch()
        broker.wait()
        wait(lambda: all_fresh(processes))
        ends = [one.ask("end") for one in processes]
    assert [end["failures"] for end in ends] == [[]] * 4
    writes = [Write(*event) for event in ends[0]["events"]]
    assert len(writes) > 20
    for end in ends[1:]:
        reads = [Read(*event) for event in end["events"]]
        assert len(reads) > 100
        assert [read.number for read in reads] == sorted(read.number for read in reads)  # never back
        old = too_old(writes, reads, lambda one: staleness if began <= one.began <= ended + 1.0 else 1.0)
        assert old == []
