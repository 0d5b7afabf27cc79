"""The largest possible environment of a function.

It is never smaller than the real one, and a config is refused if it exceeds 4,096 bytes.
"""

from __future__ import annotations

import json

import pytest

from app.autocrud.errors import ConfigError
from app.settings import JwtAuth
from infra.config import read
from infra.environment import LIMIT, VARIABLE, size, size_of_outputs
from tests.infra.stacks import CONFIGS, environment, recording


def shape(value):
    """Return the keys of nested objects, the length of each list, and the type of each other value."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return len(value) if isinstance(value, list) else type(value).__name__


def known(value, worst):
    """Yield the texts that the program knows, beside those at the worst; AWS fills in the others."""
    if isinstance(value, dict):
        for key in value:
            yield from known(value[key], worst[key])
    elif isinstance(value, str) and "${" not in value:
        yield value, worst


@pytest.mark.parametrize("name", CONFIGS)
def test_the_worst_has_the_keys_of_what_the_function_gets(name):
    for function in recording(name).all("aws:lambda/function:Function"):
        variables = environment(function)
        if not function.name.endswith(("-api", "-backup")):
            assert variables == {}
            continue
        assert list(variables) == [VARIABLE]
        given, worst = json.loads(variables[VARIABLE]), json.loads(json.dumps(CONFIGS[name].largest_outputs()))
        assert shape(given) == shape(worst)
        assert all(len(text) <= len(longest) for text, longest in known(given, worst))
        assert size_of_outputs(CONFIGS[name].largest_outputs()) < LIMIT


def test_the_size_is_that_of_the_text_that_lambda_measures():
    """Of the text in Lambda's own error: "String measured: ..."."""
    assert size({"A": '{"b": "c"}'}) == len(r'{"A":"{\"b\": \"c\"}"}')
    assert size({"A": json.dumps("é")}) == len(r'{"A":"\"\\u00e9\""}')


def models(number, name="m{}"):
    return {name.format(index): "s3-sqlite" for index in range(number)}


LONG = {
    "storage_overrides": lambda number: json.dumps(models(number)),
    "cors": lambda number: json.dumps([f"https://www{index}.example.org" for index in range(number)]),
    "auth": lambda number: json.dumps({"mode": "jwt", "issuer": "https://a.b", "audiences": ["audience"] * number}),
}


@pytest.mark.parametrize("key", LONG)
@pytest.mark.parametrize("storage", ["s3-sqlite", "full"])
def test_the_last_entry_that_fits_is_taken_and_the_next_is_refused(key, storage):
    number = 1
    while True:
        values = {"storage": storage, key: LONG[key](number)}
        try:
            config = read(values)
        except ConfigError as error:
            said = error.detail
            break
        assert size_of_outputs(config.largest_outputs()) <= LIMIT
        number += 1
    assert number > 20
    assert said.startswith(f"crudstack:{key} is ")
    assert f"of which {key} takes " in said
    assert "expected at most 4,096, which Lambda takes: fewer or shorter entries" in said
    assert LIMIT < int(said.partition("would have ")[2].partition(" bytes")[0].replace(",", "")) < LIMIT + 100


def test_several_settings_are_measured_together_with_the_escapes_of_json():
    """None of them is too long by itself; `é` takes seven bytes in the text that Lambda measures."""
    values = {
        "storage_overrides": json.dumps(models(24, "{}" + "é" * 12)),
        "cors": json.dumps([f"https://www{index}.example.org" for index in range(30)]),
        "auth": json.dumps({"mode": "jwt", "issuer": "https://a.b", "audiences": ["audience"] * 20}),
    }
    for key, value in values.items():
        assert read({key: value}).stage == "dev"
    with pytest.raises(ConfigError) as refused:
        read(values)
    assert "of which storage_overrides takes 2," in refused.value.detail
    assert ", cors takes " in refused.value.detail
    assert ", auth takes " in refused.value.detail


def test_the_longest_hosts_and_arns_of_aws_fit_into_the_largest_outputs():
    config = read({"storage": "full", "auth": "token", "stage": "pr-abcdefghijklm"})
    worst = config.largest_outputs()
    longest = {
        "db": "crudstack-pr-abcdefghijklm-database-0123456.cluster-abcdefghijkl.us-isob-east-1.rds.amazonaws.com.cn",
        "cache": "crudstack-pr-abcdefghijklm-cache-0123456-abcdef.serverless.apse1.cache.amazonaws.com.cn",
    }
    for key, host in longest.items():
        assert len(worst[key]["host"]) >= len(host)
    name = "crudstack-pr-abcdefghijklm-broker-0123456-AbCdEf"
    arn = f"arn:aws-us-gov:secretsmanager:us-gov-west-1:123456789012:secret:{name}"
    assert len(worst["broker"]["secret_arn"]) >= len(arn)
    assert isinstance(config.auth, str | JwtAuth)
