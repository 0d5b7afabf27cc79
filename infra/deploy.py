"""The command `make deploy STAGE=dev`: it creates or updates a stack on AWS, and asks before anything is billed.

    python -m infra.deploy --stage dev [--stack NAME] [--yes]

`deploy` lists the steps. Each step is a function that does one thing, or raises ConfigError with one sentence that says
what is missing and what to do. Every step can be repeated: the user corrects the problem and runs the command again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import yaml
from cyclopts import App, CycloptsError, Parameter

from app.autocrud.errors import ConfigError, CrudError
from app.dev import pulumi_cli
from app.dev.aws_account import KEY as PROFILE
from app.dev.aws_account import check_profile
from app.settings import JwtAuth, StackOutputs, TokenAuth

if TYPE_CHECKING:
    from infra.config import StackConfig

INSTALL = "`curl -fsSL https://get.pulumi.com | sh`, `brew install pulumi/tap/pulumi` or `winget install pulumi`"
NOT_LOGGED_IN = 3
"""Exit code of `pulumi whoami` without a login."""
NO_SUCH_STACK = 6
"""Exit code of `pulumi stack select` for a stack that does not exist."""
REGION = re.compile(r"[a-z]{2,}(-[a-z]+)+-[0-9]+")
UNRESERVED = 100
"""Concurrent executions that AWS keeps for the functions of an account that reserve none."""
PROD = """\
The stage prod protects its data: `pulumi destroy`, and updates that would delete the database, the bucket, the API
token or the URL, are refused until `pulumi state unprotect`. Old versions of objects are kept for 30 days."""

cli = App(
    name="python -m infra.deploy",
    help="Create or update a stack on AWS.",
    help_format="plaintext",
    version_flags=[],
    suppress_keyboard_interrupt=False,
)


class Aws(NamedTuple):
    """The account and region of the stack, and a session with the credentials for them."""

    session: Any
    """A boto3.Session."""
    account: str
    region: str


@cli.default
def deploy(*, stage: str, stack: str | None = None, yes: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Create or update a stack on AWS.

    Parameters
    ----------
    stage
        dev, prod, local or pr-NAME. The stage prod protects its data.
    stack
        The name of the stack in Pulumi; that of the stage if none is given.
    yes
        Ask no questions: log in locally if there is no login, and make the changes.
    """
    name = stack or stage
    check_place()
    check_stage(stage)
    check_terminal(yes=yes)
    check_pulumi()
    check_python()
    stored = stack_file(name)
    check_passphrase(name, stored, log_in(yes=yes))
    check_profile(_stored(stored, PROFILE))
    aws = check_credentials(stored, choose_region(stored, yes=yes))
    is_new = select_stack(name)
    config = configure(name, stage, stored, aws.region, is_new=is_new)
    check_quota(aws, config, None if is_new else deployed_function(name))
    preview(name)
    print(f"\n{cost(config)}")
    if config.is_protected:
        print(PROD)
    confirm(aws, yes=yes)
    update(name, stage)
    outputs = pulumi_cli.outputs(name)
    print(f"\n{address(outputs, name)}")
    check_reservation(aws, config, outputs)


def check_place() -> None:
    """Raise ConfigError if this is not the directory of Pulumi.yaml."""
    if not Path("Pulumi.yaml").exists():
        raise ConfigError(f"there is no Pulumi.yaml in {Path.cwd()}: run this in the directory of the clone")


def check_stage(stage: str) -> None:
    """Raise ConfigError if there is no such stage."""
    from infra.config import allowed, read

    try:
        read({"stage": stage})
    except ConfigError:
        raise ConfigError(f"STAGE is {stage!r}: expected {allowed('stage')}") from None


def check_terminal(*, yes: bool) -> None:
    """Raise ConfigError if questions cannot be asked and are not answered by `yes`."""
    if not yes and not sys.stdin.isatty():
        raise ConfigError(
            "there is no terminal to ask for confirmation: run it in one, or say YES=1 (`make deploy`) or --yes to make"
            " the changes without questions"
        )


def check_pulumi() -> None:
    """Raise ConfigError if there is no `pulumi` on PATH, or if it is too old for this project."""
    if shutil.which("pulumi") is None:
        installed = Path(os.environ.get("PULUMI_HOME") or Path.home() / ".pulumi", "bin")
        if (installed / "pulumi").exists():
            raise ConfigError(
                f"pulumi is in {installed}, which is not on PATH: open a new shell, or"
                f' `export PATH="{installed}:$PATH"`'
            )
        raise ConfigError(f"pulumi is not on PATH: install it by {INSTALL}, and open a new shell")
    found = pulumi_cli.ask("version").strip().removeprefix("v")
    wanted = str(yaml.safe_load(Path("Pulumi.yaml").read_text())["requiredPulumiVersion"]).removeprefix(">=")
    if _numbers(found) < _numbers(wanted):
        raise ConfigError(f"pulumi on PATH is version {found}, expected {wanted} or later: update it by {INSTALL}")


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if found is None:
        raise ConfigError(f"`pulumi version` is {version!r}, expected a version like 3.276.0: install pulumi again")
    return tuple(map(int, found.groups()))


def check_python() -> None:
    """Raise ConfigError if there is no Python of Lambda's version, which compiles the zip, and uv cannot install it."""
    from infra import artifact

    artifact.interpreter(artifact.LAMBDA.python)


def stack_file(stack: str) -> dict[str, Any]:
    """Return the content of Pulumi.STACK.yaml, {} if there is no such file. Raises ConfigError if it cannot be read."""
    file = _file_of(stack)
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get("config") or {}, dict):
        raise ConfigError(f"{file} is not a stack's config: expected keys below `config:`, see {file.name}.example")
    return content


def _file_of(stack: str) -> Path:
    return Path(f"Pulumi.{stack.rpartition('/')[2]}.yaml")


def _stored(stored: Mapping[str, Any], key: str) -> str | None:
    """Return a value of the stack's file, else of Pulumi.yaml. Needs no `pulumi`. Values other than text are None."""
    project = yaml.safe_load(Path("Pulumi.yaml").read_text())
    value = {**_plain(project), **(stored.get("config") or {})}.get(key)
    return value if isinstance(value, str) else None


def _plain(project: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that Pulumi.yaml gives to all stacks, without the defaults of the project's own keys."""
    found = {}
    for key, value in (project.get("config") or {}).items():
        if ":" in key:
            found[key] = value.get("value", value.get("default")) if isinstance(value, dict) else value
    return found


def log_in(*, yes: bool) -> str:
    """Return the URL of the backend that Pulumi is logged in to. Logs in, after a question, if there is no login.

    Raises ConfigError if there is no login afterwards, or if the backend cannot be reached.
    """
    done = pulumi_cli.run("whoami", "--json")
    if done.returncode == NOT_LOGGED_IN:
        if os.environ.get("PULUMI_BACKEND_URL"):
            raise ConfigError("pulumi is not logged in to the backend of PULUMI_BACKEND_URL: run `pulumi login` first")
        if not yes and not asked("Pulumi is not logged in. Keep the state of stacks on this machine, below ~/.pulumi?"):
            raise ConfigError(
                "pulumi is not logged in: run `pulumi login s3://BUCKET`, or `pulumi login` for Pulumi Cloud, and then"
                " this"
            )
        pulumi_cli.ask("login", "--local")
        print("Logged in. The state of stacks is on this machine, below ~/.pulumi: keep it, updates need it.")
        done = pulumi_cli.run("whoami", "--json")
    if done.returncode != 0:
        raise ConfigError(f"`pulumi whoami` cannot reach the backend: {pulumi_cli.reason(done)}")
    return str(json.loads(done.stdout)["url"])


def check_passphrase(stack: str, stored: Mapping[str, Any], backend: str) -> None:
    """Raise ConfigError if the stack's secrets need a passphrase and the environment has none.

    The passphrase is not asked for, because every later `pulumi preview`, `up` or `destroy` needs the variable too.
    """
    by_service = backend.startswith(("https://", "http://")) and "encryptionsalt" not in stored
    if by_service or stored.get("secretsprovider") not in (None, "passphrase"):
        return
    if "PULUMI_CONFIG_PASSPHRASE" in os.environ:
        return
    if not (file := os.environ.get("PULUMI_CONFIG_PASSPHRASE_FILE")):
        which = f"the one of {_file_of(stack)}" if "encryptionsalt" in stored else "one of your own, which you keep"
        raise ConfigError(
            f"no passphrase is set, with which Pulumi encrypts the secrets of the stack: `export"
            f" PULUMI_CONFIG_PASSPHRASE='...'` with {which}"
        )
    try:
        Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"PULUMI_CONFIG_PASSPHRASE_FILE names {file}, which cannot be read: {error.strerror}; expected a file that"
            " holds the passphrase"
        ) from None


def choose_region(stored: Mapping[str, Any], *, yes: bool) -> str:
    """Return the region of the stack, from its config, the environment, the AWS profile or a question."""
    import botocore.session
    from botocore.exceptions import BotoCoreError

    region = _stored(stored, "aws:region") or os.environ.get("AWS_REGION")
    if not region:
        try:
            profile = _stored(stored, PROFILE)
            region = botocore.session.Session(profile=profile).get_config_variable("region")
        except BotoCoreError as error:
            raise ConfigError(_no_credentials(error)) from None
    if not region and not yes:
        region = input("AWS region, like eu-central-1: ").strip()
    if not region:
        raise ConfigError(
            "no AWS region is set: `export AWS_REGION=eu-central-1`, or whichever region the stack is to be in"
        )
    if not REGION.fullmatch(region):
        raise ConfigError(f"the AWS region is {region!r}: expected a name like eu-central-1")
    return region


def check_credentials(stored: Mapping[str, Any], region: str) -> Aws:
    """Return the account that the credentials belong to. Asks AWS.

    Raises ConfigError if there are no credentials, if AWS refuses them, or if AWS cannot be reached.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError

    try:
        session = boto3.Session(profile_name=_stored(stored, PROFILE), region_name=region)
        quickly = Config(connect_timeout=10, read_timeout=20, retries={"total_max_attempts": 2})
        identity = session.client("sts", config=quickly).get_caller_identity()
    except EndpointConnectionError:
        raise ConfigError(
            f"AWS cannot be reached in the region {region}: check the network, and whether there is such a region"
        ) from None
    except ClientError as error:
        told = error.response["Error"]
        raise ConfigError(
            f"AWS refuses the credentials ({told['Code']}: {told['Message']}): sign in again, with `aws sso login` for"
            " instance"
        ) from None
    except BotoCoreError as error:
        raise ConfigError(_no_credentials(error)) from None
    print(f"AWS account {identity['Account']}, region {region}, as {identity['Arn']}")
    return Aws(session, identity["Account"], region)


def _no_credentials(error: Exception) -> str:
    return (
        f"there are no AWS credentials ({error}): run `aws configure` or `aws configure sso`, or set AWS_PROFILE, or"
        " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; `aws sts get-caller-identity` has to work"
    )


def select_stack(stack: str) -> bool:
    """Select the stack, and create it if it does not exist. Return whether it has no resources yet."""
    done = pulumi_cli.run("stack", "select", stack)
    if done.returncode == NO_SUCH_STACK:
        done = pulumi_cli.run("stack", "init", stack)
        if done.returncode == 0:
            print(f"Created the stack {stack}, which is empty.")
    if "incorrect passphrase" in done.stderr:
        file = _file_of(stack)
        raise ConfigError(
            f"the passphrase is not the one that {file} was made with: export that one, or, if the stack was removed,"
            f" delete the line encryptionsalt of {file}"
        )
    if done.returncode != 0:
        raise ConfigError(f"`pulumi stack select {stack}` failed: {pulumi_cli.reason(done)}")
    stacks = json.loads(pulumi_cli.ask("stack", "ls", "--json"))
    return not any(each.get("current") and each.get("resourceCount") for each in stacks)


def configure(stack: str, stage: str, stored: Mapping[str, Any], region: str, *, is_new: bool) -> StackConfig:
    """Set the stage and the region if the stack has none. Return the config, which was checked.

    The stage of a stack that exists is never changed, because every resource would be replaced and the old data
    deleted. Raises ConfigError if the stack has another stage, or if the config is wrong.
    """
    from infra.config import read
    from infra.config_keys import Keys, check_keys, project_file_keys

    values = pulumi_cli.config(stack)
    project = pulumi_cli.project()
    keys = Keys(project=project, stack=stack, values=values, in_project_file=project_file_keys(Path("Pulumi.yaml")))
    check_keys(keys, lambda: None if is_new else deployed_stage(stack))
    own = {name: value.text for name, value in keys.own.items()}
    key = f"{project}:stage"
    # A key of a stack's file without a namespace is the project's.
    found, explicit = own.get("stage") or "dev", _stored(stored, key) or _stored(stored, "stage")
    if found != stage and (explicit or not is_new):
        raise ConfigError(
            f"the stack {stack} has the stage {found}, expected {stage}: a stage never changes, so name another stack,"
            f" like `make deploy STAGE={stage} STACK={stage}`"
        )
    if not explicit:
        pulumi_cli.ask("config", "set", key, stage, stack=stack)
    if "aws:region" not in values:
        pulumi_cli.ask("config", "set", "aws:region", region, stack=stack)
    return read({**own, "stage": stage}, project)


def deployed_stage(stack: str) -> str | None:
    """Return the stage that the resources of the stack have; None if there are none. Raises ConfigError."""
    from infra.protected import stage_of

    return stage_of(json.loads(pulumi_cli.ask("stack", "export", stack=stack)))


def deployed_function(stack: str) -> str | None:
    """Return the name of the function that the stack has; None before its first complete update."""
    try:
        return pulumi_cli.outputs(stack).function_name
    except ConfigError:
        return None


def check_quota(aws: Aws, config: StackConfig, function: str | None) -> None:
    """Raise ConfigError if the account has too few concurrent executions for the reservation of the function.

    function    the function that the stack has, whose reservation counts as free; None if there is none
    """
    from botocore.exceptions import ClientError

    wanted = config.reserved_concurrency
    if wanted is None:
        return
    functions = aws.session.client("lambda")
    try:
        limits = functions.get_account_settings()["AccountLimit"]
        answer = functions.get_function_concurrency(FunctionName=function) if function else {}
    except ClientError as error:
        print(f"Not checked: the account's quota of concurrent executions ({error.response['Error']['Code']}).")
        return
    free = limits["UnreservedConcurrentExecutions"] + answer.get("ReservedConcurrentExecutions", 0)
    if free - wanted < UNRESERVED:
        raise ConfigError(
            f"the account has {free} unreserved concurrent executions of Lambda, expected {wanted + UNRESERVED}:"
            " request a higher quota (`aws service-quotas request-service-quota-increase --service-code lambda"
            " --quota-code L-B99A9384 --desired-value 1000`), or set postgres.proxy, which needs no reservation"
        )


def preview(stack: str) -> None:
    """Show the changes that an update would make. Raises ConfigError if that fails."""
    if pulumi_cli.watch("preview", stack=stack) != 0:
        raise ConfigError("`pulumi preview` failed, as it says above; nothing was changed")


def cost(config: StackConfig) -> str:
    """Return a sentence with the estimated monthly cost of the whole stack."""
    from infra import costs

    try:
        idle, million = (costs.total(costs.lines(config, volume)) for volume in (0, 1))
    except KeyError as error:
        return (
            f"Estimated cost: unknown, because docs/costs.md has no price of {error.args[0]}. The Pricing Calculator of"
            " AWS has one."
        )
    return (
        f"Estimated cost of the whole stack: {idle:,.2f} USD a month idle, {million:,.2f} USD with 1 million requests."
        " List prices, see docs/costs.md."
    )


def confirm(aws: Aws, *, yes: bool) -> None:
    """Ask whether to make the changes. Raises ConfigError if the answer is no."""
    question = f"Make these changes in the account {aws.account}, {aws.region}? AWS bills for them from then on."
    if not yes and not asked(question, usual=False):
        raise ConfigError("declined: nothing was changed on AWS")


def asked(question: str, *, usual: bool = True) -> bool:
    """Ask a question, and return whether the answer is yes. The end of the input means no.

    usual    the answer that Enter gives
    """
    try:
        answer = input(f"{question} [{'Y/n' if usual else 'y/N'}] ").strip().lower()
    except EOFError:
        print()
        return False
    return usual if not answer else answer in ("y", "yes")


def update(stack: str, stage: str) -> None:
    """Run the update. Raises ConfigError if it fails."""
    if pulumi_cli.watch("up", "--yes", "--skip-preview", stack=stack) != 0:
        again = f"make deploy STAGE={stage}" + (f" STACK={stack}" if stack != stage else "")
        raise ConfigError(
            f"`pulumi up` failed, as it says above: solve that and run `{again}` again, it goes on from there"
        )


def address(outputs: StackOutputs, stack: str) -> str:
    """Return the URL of the API, and a command that sends it a request."""
    header = ""
    if isinstance(outputs.auth, TokenAuth):
        header = f' -H "Authorization: Bearer $(.venv/bin/crudstack token show --stack {stack})"'
    elif isinstance(outputs.auth, JwtAuth):
        header = ' -H "Authorization: Bearer $JWT"'
    lines = [f"The API is at {outputs.api_url}"]
    if isinstance(outputs.auth, JwtAuth):
        lines.append(f"JWT has to be a JSON Web Token of {outputs.auth.issuer}.")
    return "\n".join([*lines, f'curl -s "{outputs.api_url}/readyz"{header}'])


def check_reservation(aws: Aws, config: StackConfig, outputs: StackOutputs) -> None:
    """Raise ConfigError if the function has no reservation, although the config asks for one.

    If AWS refuses a reservation, the state contains it nevertheless. So a later update does not request it again.
    """
    from botocore.exceptions import ClientError

    wanted = config.reserved_concurrency
    if wanted is None:
        return
    try:
        answer = aws.session.client("lambda").get_function_concurrency(FunctionName=outputs.function_name)
    except ClientError as error:
        print(f"Not checked: the concurrency of {outputs.function_name} ({error.response['Error']['Code']}).")
        return
    if (found := answer.get("ReservedConcurrentExecutions")) != wanted:
        raise ConfigError(
            f"{outputs.function_name} reserves {found or 'no'} concurrent executions, expected {wanted}: request a"
            " higher quota for Lambda's concurrent executions, then run `pulumi refresh` and `pulumi up`"
        )


def main() -> int:
    """Run the command. Return 0, or 2 after one sentence on stderr, or 130 after Ctrl-C."""
    try:
        cli(exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return _ended(2, str(error))
    except CrudError as error:
        return _ended(2, error.detail)
    except (KeyboardInterrupt, EOFError):
        print()
        return _ended(128 + signal.SIGINT, "stopped")
    return 0


def _ended(code: int, why: str) -> int:
    sys.stdout.flush()  # so that in a log the steps come before the reason
    print(f"deploy: {why}".strip(), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
