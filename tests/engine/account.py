"""The AWS account of the tests. Its resources are in a file that several processes may share."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.engine.aws_types import NOT_TOLD_BY_AWS, TYPES, Properties


class AwsError(Exception):
    """AWS refused a request."""


class Account:
    """The resources of an account by type and id.

    A resource is a dict of its properties on the wire. `_untold` has the properties that AWS stores and never returns.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file, self._lock = directory / "account.json", directory / "account.lock"

    @contextmanager
    def _changed(self) -> Iterator[dict[str, Any]]:
        """Lock the account, yield its content, and write it back. A killed process leaves the file unchanged."""
        with self._lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = self._read()
            yield content
            new = self._file.with_suffix(".new")
            new.write_text(json.dumps(content, sort_keys=True))
            new.replace(self._file)

    def _read(self) -> dict[str, Any]:
        if self._file.exists():
            content: dict[str, Any] = json.loads(self._file.read_text())
            return content
        return {"resources": {}, "gone": [], "log_policy": []}

    def all(self, type_: str = "") -> dict[str, Properties]:
        """Return the resources of a type by id; of every type by "TYPE ID" if none is given."""
        found: dict[str, Properties] = self._read()["resources"]
        if not type_:
            return found
        return {key.partition(" ")[2]: value for key, value in found.items() if key.partition(" ")[0] == type_}

    def get(self, type_: str, id: str) -> Properties | None:
        return self.all(type_).get(id)

    def one(self, type_: str, name_holds: str = "") -> Properties:
        """Return the only resource of a type whose id contains `name_holds`.

        Raises AssertionError if there is none, or more than one.
        """
        found = [value for id, value in self.all(type_).items() if name_holds in id]
        assert len(found) == 1, f"{len(found)} of {type_} {name_holds}: {sorted(self.all(type_))}"
        return found[0]

    def change(self, type_: str, id: str, **properties: Any) -> None:
        """Change a resource behind the provider's back, as AWS or a person in its console does."""
        with self._changed() as content:
            content["resources"][f"{type_} {id}"].update(properties)

    def remove(self, type_: str, id: str) -> None:
        """Remove a resource behind the provider's back."""
        with self._changed() as content:
            del content["resources"][f"{type_} {id}"]
            content["gone"].append(id)

    # What the provider asks AWS to do

    def create(self, type_: str, id: str, properties: Properties) -> None:
        """Raises AwsError if the id is taken, or if a property names a resource that was deleted."""
        with self._changed() as content:
            self._refuse_lost_references(content, id, properties)
            if f"{type_} {id}" in content["resources"] and not TYPES[type_].put:
                raise AwsError(f"{id} exists already")
            if type_.endswith(":Stage"):
                self._let_write_access_logs(content, properties)
            if type_.endswith(":SecretVersion"):
                self._move_labels(content, properties)
            content["resources"][f"{type_} {id}"] = self._kept(type_, properties)

    def update(self, type_: str, id: str, properties: Properties) -> None:
        """Raises AwsError if AWS cannot do this change in place."""
        with self._changed() as content:
            old = content["resources"].get(f"{type_} {id}")
            if old is None:
                raise AwsError(f"{id} does not exist")
            self._refuse_lost_references(content, id, properties)
            if type_.endswith(":Broker") and old.get("engineVersion") != properties.get("engineVersion"):
                # Amazon MQ developer guide, "RabbitMQ 4": in-place upgrades from 3.13 are not supported.
                raise AwsError("BadRequestException: in place upgrades to this engine version are not supported")
            content["resources"][f"{type_} {id}"] = self._kept(type_, properties)

    def delete(self, type_: str, id: str) -> None:
        """Raises AwsError if another resource depends on this one, or if it is protected from deletion."""
        with self._changed() as content:
            resources: dict[str, Properties] = content["resources"]
            there = resources.get(f"{type_} {id}")
            if there is None:
                raise AwsError(f"{id} does not exist")
            if there.get("deletionProtection"):
                raise AwsError(f"InvalidParameterCombination: cannot delete protected {id}")
            if type_.endswith("s3/bucket:Bucket") and there.get("objects") and not there.get("forceDestroy"):
                raise AwsError(f"BucketNotEmpty: {id}")
            for key, other in resources.items():
                held = any(_names(value, id) for value in _found(other, TYPES[type_].held_by))
                if held and key != f"{type_} {id}" and not _goes_with_it(key):
                    raise AwsError(f"DependencyViolation: {id} has a dependent object, {key}")
            del resources[f"{type_} {id}"]
            content["gone"].append(id)

    def current_secret(self, secret_id: str) -> str:
        """Return what GetSecretValue answers for a secret: the version with the label AWSCURRENT."""
        found = [
            version
            for version in self.all("aws:secretsmanager/secretVersion:SecretVersion").values()
            if version["secretId"] == secret_id and "AWSCURRENT" in version["versionStages"]
        ]
        assert len(found) == 1, f"{secret_id} has {len(found)} current versions"
        value: str = found[0]["secretString"]
        return value

    @staticmethod
    def _kept(type_: str, properties: Properties) -> Properties:
        """Return the properties of a resource, with those that AWS does not return under `_untold`."""
        untold = (*TYPES[type_].untold, *TYPES[type_].forgotten)
        told = {name: value for name, value in properties.items() if name not in untold}
        return {**told, "_untold": {name: properties[name] for name in untold if name in properties}}

    @staticmethod
    def _refuse_lost_references(content: dict[str, Any], id: str, properties: Properties) -> None:
        # If an id follows from a name (a function's alias), a new resource gets the id of the deleted one.
        there = {key.partition(" ")[2] for key in content["resources"]} | {id}
        for gone in set(content["gone"]) - there:
            # Names that a person chose ("api.example.org", "$default") exist without AWS.
            if re.search(r"[0-9a-f]{7}", gone) and _names(properties, gone):
                raise AwsError(f"InvalidParameterValue: {gone} does not exist")

    @staticmethod
    def _let_write_access_logs(content: dict[str, Any], properties: Properties) -> None:
        """Add the log group to the region's resource policy, from which API Gateway never removes it."""
        group = (properties.get("accessLogSettings") or {}).get("destinationArn", "")
        if group and ":log-group:/aws/vendedlogs/" not in group:
            content["log_policy"].append(group)
            if len(json.dumps(content["log_policy"])) > 5120:
                raise AwsError("BadRequestException: insufficient permissions to enable logging")

    @staticmethod
    def _move_labels(content: dict[str, Any], properties: Properties) -> None:
        """Move labels to a new version of a secret.

        Each label is on one version at most. The version that loses AWSCURRENT becomes AWSPREVIOUS.
        """
        taken = set(properties["versionStages"])
        for key, other in content["resources"].items():
            if not key.startswith("aws:secretsmanager/secretVersion") or other["secretId"] != properties["secretId"]:
                continue
            labels = set(other["versionStages"])
            if "AWSCURRENT" in labels & taken:
                labels |= {"AWSPREVIOUS"}
            elif "AWSCURRENT" in taken:
                labels -= {"AWSPREVIOUS"}
            other["versionStages"] = sorted(labels - taken)


def _names(value: Any, id: str) -> bool:
    if isinstance(value, dict):
        return any(_names(item, id) for item in value.values())
    return any(_names(item, id) for item in value) if isinstance(value, list) else value == id


def _found(value: Any, names: tuple[str, ...]) -> Iterator[Any]:
    """Yield all properties with one of these names, at any depth of a resource."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name in names:
                yield item
            else:
                yield from _found(item, names)
    elif isinstance(value, list):
        for item in value:
            yield from _found(item, names)


def _goes_with_it(key: str) -> bool:
    """Tell whether AWS deletes the resource together with its VPC or route table."""
    return key.startswith(("aws:ec2/defaultSecurityGroup", "aws:ec2/routeTableAssociation"))


def told(type_: str, properties: Properties, known: Properties) -> Properties:
    """Return the answer of the provider's Read: properties from AWS, and from the state those that AWS does not return.

    known    the state of the resource, which is the only place of such properties
    """
    answer = {name: value for name, value in properties.items() if name != "_untold"}
    answer |= {name: [] for name in TYPES[type_].forgotten}
    for name in (*TYPES[type_].untold, *NOT_TOLD_BY_AWS):
        answer.pop(name, None)
        if name in known:
            answer[name] = known[name]
    return answer
