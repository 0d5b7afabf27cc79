"""A process that used S3ObjectStore ends with its own exit code, whenever it ends."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time

import pytest

from app.autocrud.resource_manager.backends.s3 import obstore_exit
from tests.services import BUCKET

ANSWERED = "await asyncio.gather(*(store.get('exit/a') for _ in range(20)))"
ABANDONED = "tasks = [asyncio.ensure_future(store.get('exit/a')) for _ in range(40)]\n    await asyncio.sleep(0.005)"
SCRIPT = """
import asyncio, sys
from app.autocrud.resource_manager.backends.s3.object_store import S3ObjectStore

async def main():
    store = S3ObjectStore(sys.argv[1], sys.argv[2], "local", "local", "us-east-1")
    await store.put("exit/a", b"x")
    {}

asyncio.run(main())
"""


@pytest.mark.parametrize("end", [ANSWERED, ABANDONED])
def test_a_short_script_ends_with_its_own_exit_code(ministack_s3, end):
    """Without the wait at exit, about one of ten runs ended with SIGABRT."""
    command = [sys.executable, "-c", SCRIPT.format(end), BUCKET, ministack_s3.url]
    for _ in range(30):
        done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


PROVIDER = """
import asyncio, sys, threading, time
from app.autocrud.resource_manager.backends.s3 import credentials, object_store

started = threading.Event()

def provider():
    started.set()
    time.sleep(float(sys.argv[1]))
    print("the provider has returned", flush=True)
    return {"access_key_id": "a", "secret_access_key": "b", "token": None, "expires_at": None}

async def main():
    store = object_store.S3ObjectStore("b", "http://127.0.0.1:1", region_name="us-east-1")
    task = asyncio.ensure_future(store.get("a"))
    await asyncio.to_thread(started.wait)
    task.cancel()
    await asyncio.wait([task])

credentials.provider = lambda: provider
asyncio.run(main())
"""


@pytest.mark.parametrize("seconds", [0.0, 0.005, 0.5])
def test_the_exit_waits_for_a_credential_provider_whose_request_was_cancelled(seconds):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    for _ in range(10 if seconds < 0.1 else 1):
        done = subprocess.run(
            [sys.executable, "-c", PROVIDER, str(seconds)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "the provider has returned\n", "")


def test_the_exit_waits_for_a_thread_that_still_has_the_future_of_a_request():
    entered, leave, left = threading.Event(), threading.Event(), threading.Event()
    loop = asyncio.new_event_loop()
    held = [obstore_exit.tracked(loop.create_future())]
    touched: list[bool] = []

    def like_obstore() -> None:
        entered.set()
        assert leave.wait(60)
        left.set()
        held.clear()

    def touch() -> None:
        touched.append(left.is_set())
        if len(touched) == 5:
            leave.set()

    thread = threading.Thread(target=like_obstore)
    thread.start()
    assert entered.wait(60)
    obstore_exit.wait(touch)
    assert left.is_set()
    assert len(touched) > 5
    thread.join()
    loop.close()


def test_a_loop_is_closed_after_the_threads_that_answer_to_it():
    leaving, failed, threads = threading.Event(), [], []

    def like_obstore(held, loop) -> None:
        assert leaving.wait(60)
        time.sleep(0.05)
        try:
            loop.call_soon_threadsafe(lambda: None)
        except RuntimeError as error:  # obstore would print it
            failed.append(error)
        held.clear()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        held = [obstore_exit.tracked(loop.create_future())]
        threads.append(threading.Thread(target=like_obstore, args=(held, loop)))
        threads[0].start()
        leaving.set()

    asyncio.run(main())
    threads[0].join()
    assert failed == []


def test_a_loop_that_is_closed_in_another_way_is_forgotten():
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()

    async def use(loop) -> None:
        obstore_exit.tracked(loop.create_future())

    first.run_until_complete(use(first))
    assert first in obstore_exit._guards
    first.close()
    second.run_until_complete(use(second))
    assert first not in obstore_exit._guards
    second.run_until_complete(second.shutdown_asyncgens())
    second.close()
    assert second not in obstore_exit._guards


def test_an_error_that_python_printed_does_not_hold_a_request(caplog):
    """The traceback of an answer to a closed loop refers to the future of the request."""
    loop = asyncio.new_event_loop()
    future = obstore_exit.tracked(loop.create_future())

    def answer(held):
        raise RuntimeError(f"Event loop of {held} is closed")

    try:
        answer(future)
    except RuntimeError as error:
        sys.last_traceback = error.__traceback__
    del future
    obstore_exit.wait(lambda: None)
    assert "under way" not in caplog.text
    loop.close()


def test_an_abandoned_request_does_not_block_the_exit_of_the_process(monkeypatch, caplog):
    monkeypatch.setattr(obstore_exit, "LONGEST_WAIT_S", 0.01)
    loop = asyncio.new_event_loop()
    future = obstore_exit.tracked(loop.create_future())
    obstore_exit.wait(lambda: None)
    assert "still under way when the process ended" in caplog.text
    del future
    gc.collect()
    loop.close()
