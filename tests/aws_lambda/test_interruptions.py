"""Functions that are frozen, cut off from their store, killed or out of time: no acknowledged write is lost."""

from __future__ import annotations

import itertools
import json
import threading

import pytest

from tests.aws_lambda.instances import ARTICLE, ask, settings
from tests.lambda_runtime import Instance, InvocationFailed
from tests.tcp_proxy import TcpProxy


def test_no_request_fails_after_connections_were_cut(instance, ministack_s3):
    with TcpProxy(ministack_s3.url) as proxy:
        one = instance(proxy.url)
        path = ask(one, "POST", "/article", json_body=ARTICLE).headers["location"]
        for number in range(20):
            one.freeze()
            cut = proxy.cut()
            one.thaw()
            if number % 2:
                assert ask(one, "PATCH", path, json_body={"title": f"{number}"}).status == 200
            else:
                assert ask(one, "GET", path).status == 200
            assert cut >= 1
        assert ask(one, "GET", path).json()["meta"]["revision"] == 11


def test_frozen_while_another_instance_writes(instance):
    frozen, other = instance(), instance()
    path = ask(frozen, "POST", "/article", json_body=ARTICLE).headers["location"]
    for round_ in range(5):
        frozen.freeze()
        for number in range(30):
            changed = ask(other, "PATCH", path, json_body={"title": f"{round_} {number}"})
            assert changed.status == 200
        other.invoke({"crudstack": "maintain"})
        frozen.thaw()
        seen = ask(frozen, "GET", path)
        assert (seen.headers["etag"], seen.json()["data"]["title"]) == (changed.headers["etag"], f"{round_} 29")
        stale = ask(frozen, "PATCH", path, json_body={"title": "stale"}, headers={"if-match": '"1-0000000000000000"'})
        assert stale.status == 412
        assert ask(frozen, "POST", "/article", json_body=ARTICLE | {"title": f"{round_}"}).status == 201
    assert ask(other, "GET", "/article/count").json() == {"count": 6}
    revisions = ask(other, "GET", f"{path}/revisions?limit=200").json()["items"]
    assert [one["revision"] for one in revisions] == list(range(151, 0, -1))


def test_two_instances_write_while_each_is_frozen_in_turn(instance):
    instances, acknowledged, ended = [instance(), instance()], [[], []], threading.Event()

    def write(at):
        for number in itertools.count():
            if ended.is_set():
                return
            created = ask(instances[at], "POST", "/article", json_body=ARTICLE | {"title": f"{at}.{number}"})
            assert created.status in (201, 503), created.body
            if created.status == 201:
                acknowledged[at].append((created.headers["location"], f"{at}.{number}"))

    threads = [threading.Thread(target=write, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for round_ in range(12):
        goal = len(acknowledged[1 - round_ % 2]) + 8
        instances[round_ % 2].freeze()
        while len(acknowledged[1 - round_ % 2]) < goal:
            threads[0].join(0.005)
        instances[round_ % 2].thaw()
    ended.set()
    for thread in threads:
        thread.join()
    for path, title in itertools.chain(*acknowledged):
        for one in instances:
            assert ask(one, "GET", f"{path}/data").json()["title"] == title


def test_a_timeout_in_the_middle_of_a_write(instance, ministack_s3):
    """The answer of the store is delayed during a commit, so the client gets 503 in time.

    A retry with the same Idempotency-Key writes once, on either instance.
    """
    key = {"idempotency-key": "order-17"}
    with TcpProxy(ministack_s3.url) as proxy:
        slow, other = instance(proxy.url), instance()
        assert ask(slow, "POST", "/article", json_body=ARTICLE).status == 201
        proxy.hold()
        late = ask(slow, "POST", "/article", json_body=ARTICLE | {"title": "once"}, headers=key, seconds=2.5)
        assert (late.status, late.json()["type"]) == (503, "urn:crudstack:outcome-unknown")
        first = ask(other, "POST", "/article", json_body=ARTICLE | {"title": "once"}, headers=key)
        assert first.status == 201
        proxy.release()
        again = ask(slow, "POST", "/article", json_body=ARTICLE | {"title": "once"}, headers=key)
        assert (again.status, again.body) == (201, first.body)
        assert again.headers["idempotency-replayed"] == "true"
        assert ask(slow, "GET", "/article/count").json() == {"count": 2}
        proxy.hold()
        read = ask(slow, "GET", "/article/count", seconds=2.0)
        assert (read.status, read.json()["type"]) == (503, "urn:crudstack:store-unavailable")


@pytest.mark.parametrize(("memory", "seconds", "status"), [(128, 6.0, 503), (512, 29.0, 200)])
def test_work_in_python_is_refused_if_it_might_exceed_the_time(ministack_s3, tmp_path, task, memory, seconds, status):
    """A text of 5 MB in JSON escapes takes a third of a second of a whole CPU, and a function has a share of a CPU.

    No timer interrupts running Python, so the request is refused before the work. A refused request changes nothing.
    With the default memory and time, a request within the limits succeeds.
    """
    environment = settings(ministack_s3, tmp_path.name) | {"AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(memory)}
    body = json.dumps({"content": "\x01" * 600_000})  # each is six characters in JSON, and two more in an event
    with Instance(task, environment, tmp_path) as one:
        path = ask(one, "POST", "/article", json_body=ARTICLE).headers["location"]
        ask(one, "PATCH", path, json_body={"title": "Moon"})
        before = ask(one, "GET", path)
        with one.throttled(memory / 1769):
            answer = ask(
                one, "PATCH", path, body=body, seconds=seconds, headers={"content-type": "application/merge-patch+json"}
            )
        assert answer.status == status, answer.body
        after = ask(one, "GET", path)
        if status == 503:
            assert answer.json()["type"] == "urn:crudstack:not-enough-time"
            assert after.body == before.body
        else:
            assert after.json()["meta"]["revision"] == 3


def test_housekeeping_stops_before_the_deadline(instance, ministack_s3):
    with TcpProxy(ministack_s3.url) as proxy:
        one = instance(proxy.url)
        for number in range(20):
            assert ask(one, "POST", "/article", json_body=ARTICLE | {"title": f"{number}"}).status == 201
        proxy.hold()
        one.invoke({"crudstack": "maintain"}, seconds=3)
        assert one.lines()[-1]["message"].startswith("maintain was cut off")
        proxy.release()
        assert ask(one, "GET", "/article/count").json() == {"count": 20}
        one.invoke({"crudstack": "maintain"})
        assert one.lines()[-1]["message"] == "maintain"


def test_a_process_killed_in_the_middle_of_a_write(instance, ministack_s3):
    with TcpProxy(ministack_s3.url) as proxy:
        for number in range(6):
            key = {"idempotency-key": f"key-{number}"}
            doomed = instance(proxy.url)
            assert doomed.request("GET", "/healthz").status == 200
            proxy.hold()
            asked = threading.Thread(target=_create_unanswered, args=(doomed, key, number))
            asked.start()
            assert proxy.held.wait(20)
            doomed.kill()
            asked.join()
            proxy.release()
            proxy.cut()
            told = [
                ask(instance(), "POST", "/article", json_body=ARTICLE | {"title": f"{number}"}, headers=key)
                for _ in range(2)
            ]
            assert [one.status for one in told] == [201, 201]
            assert told[0].body == told[1].body
    assert ask(instance(), "GET", "/article/count").json() == {"count": 6}


def _create_unanswered(doomed: Instance, key, number) -> None:
    with pytest.raises(InvocationFailed):
        ask(doomed, "POST", "/article", json_body=ARTICLE | {"title": f"{number}"}, headers=key)


def test_scheduled_housekeeping(instance):
    one = instance()
    ask(one, "POST", "/article", json_body=ARTICLE)
    scheduled = {"version": "0", "id": "1", "detail-type": "Scheduled Event", "source": "aws.events", "detail": {}}
    assert one.invoke(scheduled, 10)["maintained"] == ["airport", "article", "user"]
    (line,) = (line for line in one.lines() if line["message"] == "maintain")
    assert 7 < line["budget_s"] <= 9
