"""The page docs/costs.md: the monthly cost of a stack, with the arithmetic. `python -m infra.costs` prints it.

    >>> total(lines(StackConfig(storage="postgres-s3"), millions=1))
    25.52

The config decides which lines there are. A test compares the counted resources with those that the program registers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from app.settings import Server
from infra.components.cache import node_count
from infra.config import KINDS, StackConfig, read
from infra.zones import ZONES

MONTH_H = 730
MONTH_S = 3600 * MONTH_H / 1e6
"""Seconds of a month, in millions."""
VOLUMES = (0, 1, 100)
"""Millions of requests a month."""


class Price(NamedTuple):
    """A list price of AWS."""

    usd: float
    unit: str
    what: str


LAMBDA = Price(0.20, "M requests", "Lambda, requests")
LAMBDA_GB_S = Price(13.3334, "M GB-s", "Lambda, time on arm64")
SNAP_START = Price(1.5046, "M GB-s", "Lambda SnapStart, one published version")
HTTP_API = Price(1.00, "M requests", "HTTP API")
PUT = Price(5.00, "M requests", "S3 Standard, PUT and LIST")
GET = Price(0.40, "M requests", "S3 Standard, GET")
S3_GB = Price(0.023, "GB-month", "S3 Standard, storage")
LOGS = Price(0.50, "GB", "CloudWatch Logs, ingested")
METRIC = Price(0.30, "metric-month", "CloudWatch, custom metric")
ALARM = Price(0.10, "alarm-month", "CloudWatch, alarm")
TRACE = Price(5.00, "M traces", "X-Ray, recorded")
SECRET = Price(0.40, "secret-month", "Secrets Manager")
OUT = Price(0.09, "GB", "To the internet, after 100 GB a month of the account")
GP3 = Price(0.115, "GB-month", "RDS for PostgreSQL, gp3 storage")
ACU = Price(0.12, "ACU-hour", "Aurora Serverless v2")
PROXY = Price(0.015, "vCPU-hour or ACU-hour", "RDS Proxy; at least 2 vCPU, of Aurora Serverless 8 ACU")
CACHE_GB = Price(0.084, "GB-hour", "ElastiCache Serverless for Valkey, at least 0.1 GB")
ECPU = Price(0.0023, "M ECPU", "ElastiCache Serverless for Valkey, requests")
ENDPOINT = Price(0.01, "hour and subnet", "Interface endpoint")
MQ_GB = Price(0.10, "GB-month", "Amazon MQ for RabbitMQ, storage")
INSTANCES = {
    "db.t4g.micro": Price(0.016, "hour", "RDS for PostgreSQL, db.t4g.micro"),
    "cache.t4g.micro": Price(0.0128, "hour", "ElastiCache for Valkey, cache.t4g.micro"),
    "mq.m7g.medium": Price(0.1367, "hour", "Amazon MQ, mq.m7g.medium (**estimate**)"),
    "mq.m5.large": Price(0.288, "hour", "Amazon MQ, mq.m5.large"),
}

# Assumptions and measurements. A test compares the measured ones with benchmarks/RESULTS.md, with log lines, and with
# the registered resources.
READS, WRITES, REQUEST_S = 0.9, 0.1, 0.05
RUNS = MONTH_H / 1e6
"""Runs of the hourly housekeeping in a month, in millions."""
RUN_S, RUN_GETS = 1, 20
WRITE_PUTS, WRITE_KB, GET_GETS = 2.03, 25, 2
"""PUTs and KB of an update and GETs of a get in s3-sqlite. One PUT and one GET of them are those of the body."""
OLD_DAYS = 2
"""Days that old versions of HEAD stay in the bucket: S3 applies the rules of the bucket once a day."""
HITS, KEPT_KB = 0.8, 2
ANSWER_KB, FREE_OUT_GB = 2, 100
LOG_KB = {"http-api": 1.6, "function-url": 1.3}
METRICS, READ_ECPUS, WRITE_ECPUS = 6, 3, 6
ALARMS: dict[Server | None, int] = {None: 4, "postgres": 3, "cache": 1, "broker": 2}


class Number(NamedTuple):
    """A number and the arithmetic that it comes from."""

    value: float
    """Requests are counted in millions, and a million KB is a GB."""
    text: str
    is_sum: bool = False
    """Whether it is a sum, which needs brackets in a product."""


class Line(NamedTuple):
    """The part of a month's cost that comes from one price."""

    price: Price
    usd: float
    sum: str
    """The arithmetic, such as 1 M × 0.20."""


def lines(config: StackConfig, millions: float) -> Iterator[Line]:
    """Yield the lines of the bill for a month. Raises KeyError for an instance that INSTANCES has no price of.

    millions    requests of the month, in millions
    """
    requests, reads, writes = _m(millions), _m(READS * millions), _m(WRITES * millions)
    pair, memory = config.pairs[0], Number(config.memory_mb / 1024, f"{config.memory_mb / 1024:g} GB")
    yield _line(LAMBDA, _plus(requests, _m(RUNS)))
    seconds = _plus(_times(requests, _n(REQUEST_S, "s")), _times(_m(RUNS), _n(RUN_S, "s")))
    yield _line(LAMBDA_GB_S, _times(seconds, memory))
    if config.snap_start:
        yield _line(SNAP_START, _times(_m(MONTH_S), memory))
    if config.edge == "http-api":
        yield _line(HTTP_API, requests)
    yield _line(LOGS, _times(requests, _n(LOG_KB[config.edge], "KB")))
    yield _line(METRIC, _n(METRICS if millions else 0))
    yield _line(TRACE, _traces(millions + RUNS))
    out = _times(requests, _n(ANSWER_KB, "KB"))
    yield _line(OUT, Number(max(0, out.value - FREE_OUT_GB), f"{out.text} - {FREE_OUT_GB} GB", is_sum=True))

    meta, resource = pair.traits
    indexed, cached = meta.uses_s3, resource.is_cached
    yield _line(PUT, _times(writes, _n(WRITE_PUTS if indexed else 1)))
    body = _n(round(1 - HITS, 2)) if cached else _n(1)
    gets = _times(reads, _plus(_n(GET_GETS - 1), body) if indexed else body)
    yield _line(GET, _plus(gets, _times(_m(RUNS), _n(RUN_GETS))))
    kept = _times(writes, _n(KEPT_KB, "KB"))
    old = _times(writes, _n(WRITE_KB, "KB"), Number(OLD_DAYS / 30, f"{OLD_DAYS}/30"))
    yield _line(S3_GB, _plus(_n(1, "GB"), kept, *([old] if indexed else [])))

    # Aurora has no alarm for a full disk.
    fewer = "postgres" in config.servers and config.postgres.mode == "aurora"
    # Each node of a cache has an alarm.
    more = (
        node_count(is_protected=config.is_protected) - 1
        if "cache" in config.servers and config.cache.mode == "nodes"
        else 0
    )
    yield _line(ALARM, _n(sum(ALARMS[server] for server in (None, *config.servers)) - fewer + more))
    # The secrets of the API token, the database's master user, and the broker's user.
    secrets = (config.auth == "token", "postgres" in config.servers, "broker" in config.servers)
    yield _line(SECRET, _n(sum(secrets)))
    if "postgres" in config.servers:
        yield from _database(config)
    if "cache" in config.servers:
        yield from _cache(config, reads, writes)
    if "broker" in config.servers:
        nodes = _n(3 if config.broker.mode == "cluster" else 1)
        yield _line(INSTANCES[config.broker.instance], _times(nodes, _n(MONTH_H)))
        yield _line(MQ_GB, _times(nodes, _n(1, "GB")))
        yield _line(ENDPOINT, _times(_n(ZONES), _n(MONTH_H)))


def _database(config: StackConfig) -> Iterator[Line]:
    database, hours = config.postgres, _n(MONTH_H)
    copies = _n(2 if database.multi_az else 1)
    if database.mode == "aurora":
        yield _line(ACU, _times(copies, hours, _n(0.5, "ACU")))
    else:
        yield _line(INSTANCES[database.class_], _times(copies, hours))
        yield _line(GP3, _times(copies, _n(database.storage_gb, "GB")))
    if database.proxy:
        yield _line(PROXY, _times(hours, _n(8 if database.mode == "aurora" else 2)))


def _cache(config: StackConfig, reads: Number, writes: Number) -> Iterator[Line]:
    if config.cache.mode == "nodes":
        yield _line(
            INSTANCES[config.cache.node_type], _times(_n(node_count(is_protected=config.is_protected)), _n(MONTH_H))
        )
        return
    yield _line(CACHE_GB, _times(_n(MONTH_H), _n(0.1, "GB")))
    yield _line(ECPU, _plus(_times(reads, _n(READ_ECPUS)), _times(writes, _n(WRITE_ECPUS))))


def _traces(millions: float) -> Number:
    """Return the traces of a month in millions: of the first request in each second, and of 5 % of the others."""
    if millions <= MONTH_S:
        return _m(millions)
    return _plus(_m(MONTH_S), _times(_n(0.05), _m(millions - MONTH_S)))


def total(lines: Iterable[Line]) -> float:
    """Return the cost in USD, rounded to cents."""
    return round(math.fsum(line.usd for line in lines), 2)


def _n(value: float, unit: str = "") -> Number:
    return Number(value, f"{value:,g} {unit}".rstrip())


def _m(millions: float) -> Number:
    return Number(millions, f"{1e6 * millions:,g}" if 0 < millions < 0.1 else f"{round(millions, 3):g} M")


def _times(*numbers: Number) -> Number:
    factors = [number for number in numbers if number.text != "1"] or [_n(1)]
    text = " × ".join(f"({factor.text})" if factor.is_sum else factor.text for factor in factors)
    return Number(math.prod(number.value for number in numbers), text)


def _plus(*numbers: Number) -> Number:
    there = [number for number in numbers if number.value] or [_n(0)]
    text = " + ".join(number.text for number in there)
    return Number(math.fsum(number.value for number in there), text, is_sum=len(there) > 1)


def _line(price: Price, quantity: Number) -> Line:
    text = _times(quantity, Number(0, f"{_price(price)}{'/M' if price.unit.startswith('M ') else ''}")).text
    return Line(price, quantity.value * price.usd, text if quantity.value else "")


CHOICES: tuple[dict[str, str], ...] = (
    {"edge": "function-url"},
    {"memory_mb": "1024"},
    {"snap_start": "true"},
    {"storage": "full", "postgres": '{"multi_az": true}'},
    {"storage": "full", "postgres": '{"proxy": true}'},
    {"storage": "full", "postgres": '{"mode": "aurora"}'},
    {"storage": "full", "cache": '{"mode": "nodes"}'},
    {"storage": "full", "cache": '{"mode": "nodes"}', "stage": "prod"},
    {"storage": "full", "broker": '{"mode": "cluster"}'},
    {"storage": "full", "broker": '{"version": "3.13", "instance": "mq.m5.large"}'},
)


def page() -> str:
    """Return the text of docs/costs.md."""
    most = [max(lines(StackConfig(), volume), key=lambda line: line.usd).price.what for volume in VOLUMES]
    return f"""\
# What a stack costs

`make docs` writes this page from `infra/costs.py`; change it there. **To be checked**: these are list prices of
us-east-1 as known in June 2025, in USD, without tax. The permanent free tiers of Lambda, CloudWatch and X-Ray are not
deducted. Other regions cost more, mostly by 5 to 20 %. AWS shows today's prices on its price pages and in its Pricing
Calculator.

## A month

With the defaults of the [config](config.md), in any stage.

| kind | idle | 1 M requests | 100 M requests |
| --- | --- | --- | --- |
{_rows((f"`{kind}`", *map(_usd, _months(StackConfig(storage=kind)))) for kind in KINDS)}

The largest part of `s3-sqlite` is:

- idle: {most[0]}
- at 1 M requests: {most[1]}
- at 100 M requests: {most[2]}

A choice adds these amounts. Choices about a database, cache or broker are compared with `full`, all others with
`s3-sqlite`:

| config | idle | 1 M requests | 100 M requests |
| --- | --- | --- | --- |
{_rows(_choices())}

## Assumptions

- A month has 730 hours. {READS:.0%} of the requests read one resource, {WRITES:.0%} update one. The requests come
  evenly, which is the most expensive pattern for X-Ray: it records the first request in each second, and 5 % of the
  others. 100 M requests a month are 38 a second.
- A request takes {1000 * REQUEST_S:g} ms of a function with {StackConfig().memory_mb} MB, and its answer {ANSWER_KB}
  KB. App, Lambda and HTTP API log {LOG_KB["http-api"]} KB of it, which contain {METRICS} metrics.
- `s3-sqlite`, as measured in `benchmarks/RESULTS.md`: an update is {WRITE_PUTS} PUTs and uploads {WRITE_KB} KB,
  mostly `HEAD`, whose old versions stay in the bucket for {OLD_DAYS} days. A get is {GET_GETS} GETs; a count, or a
  list from the index, is one. One PUT of an update and one GET of a get are those of the body: all other kinds send
  only these to S3.
- {HITS:.0%} of the reads of bodies are cache hits, if the kind has caches.
- The bucket holds 1 GB, and {KEPT_KB} KB more of every write. Housekeeping runs every hour for {RUN_S} s, with
  {RUN_GETS} GETs.
- A read is {READ_ECPUS} ECPU, a write {WRITE_ECPUS}. The cache holds less than 0.1 GB, because its entries expire
  after 2 s. Aurora stays at its minimum of 0.5 ACU.
- The broker holds invalidations only: 1 GB. If AWS bills its whole disk of 200 GB, add 20 USD. The price of its hour
  is an estimate, half of 0.2734, which is reported for mq.m7g.large. For mq.m7g.medium 0.08 to 0.14 is reported.
- `snap_start` is counted for one version of the function. **Each `pulumi up` that changes the function publishes
  another version**, and AWS bills every version that exists, {SNAP_START.usd:g} USD per million GB-seconds: ten
  versions cost ten times as much. Delete the versions that the alias `live` does not name.
- Not counted: the function for backups, 0.02 for each run of 15 minutes; cold starts; restoring the snapshots of
  SnapStart (0.00014 per GB each); storing logs (0.03 per GB-month); the logs of database and broker; reading secrets;
  traffic between zones; the Route 53 zone of a domain (0.50); CPU credits of t4g instances that are busy all day;
  backups that are larger than the database.

## Arithmetic

`/M` is a price per million, M times KB is GB, and an empty cell is 0. The cost of a kind is the sum of its rows.

| what | kinds | idle | 1 M requests | 100 M requests |
| --- | --- | --- | --- | --- |
{_rows(_sums())}

## Prices

| what | USD | per |
| --- | --- | --- |
{_rows((price.what, _price(price), price.unit) for price in _prices())}
"""


def _months(config: StackConfig) -> list[float]:
    return [total(lines(config, volume)) for volume in VOLUMES]


def _choices() -> Iterator[tuple[str, ...]]:
    for values in CHOICES:
        config = read(values)
        usual = _months(StackConfig(storage=config.storage))
        more = [f"{month - before:+,.2f}" for month, before in zip(_months(config), usual, strict=True)]
        yield " ".join(f"`{key}: {value}`" for key, value in values.items() if key != "storage"), *more


def _sums() -> Iterator[tuple[str, ...]]:
    """Yield a row for each price; kinds with different sums have a row each."""
    kinds: dict[tuple[Price, tuple[str, ...]], list[str]] = {}
    for kind in KINDS:
        months = [list(lines(StackConfig(storage=kind), volume)) for volume in VOLUMES]
        for same in zip(*months, strict=True):
            cells = tuple(f"{line.sum} = {_usd(line.usd)}" if line.sum else "" for line in same)
            kinds.setdefault((same[0].price, cells), []).append(f"`{kind}`")
    prices = _prices()
    for (price, cells), who in sorted(kinds.items(), key=lambda row: prices.index(row[0][0])):
        yield price.what, "all" if len(who) == len(KINDS) else ", ".join(who), *cells


def _prices() -> list[Price]:
    return [*(value for value in globals().values() if isinstance(value, Price)), *INSTANCES.values()]


def _price(price: Price) -> str:
    return max(f"{price.usd:g}", f"{price.usd:.2f}", key=len)


def _usd(usd: float) -> str:
    return f"{usd:,.2f}"


def _rows(rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(page(), end="")
