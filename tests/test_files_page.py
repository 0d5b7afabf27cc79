"""The commands and the code of docs/files.md work as they stand there, on disk and on S3."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from app import settings
from app.autocrud import errors
from app.autocrud.core import MAINTAIN_EVERY_S
from app.autocrud.http import blobs, direct_blobs, header_values, ranges, transfers
from app.autocrud.resource_manager.contract.direct import KEEP_STAGING_S, MAX_OPEN, URL_LIFE_S
from app.autocrud.resource_manager.model.blob import Blob
from examples import photos
from tests.conftest import Server

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/files.md").read_text()
PNG = b"\x89PNG\r\n\x1a\n"
ON_S3 = "## Straight to S3"


def blocks(language: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command with the texts that its output must contain."""
    for block in blocks("bash", page):
        for step in re.findall(r"((?:(?!#> ).*\n)+?(?<!\\\n))((?:#> .*\n)*)(?=\S|\Z)", block):
            yield step[0], [line.removeprefix("#> ") for line in step[1].splitlines()]


def run(page: str, url: str, directory: Path) -> None:
    """Run all commands of a page in one shell, and compare their output."""
    steps = list(commands(page))
    assert len(steps) >= 12
    script = "set -euo pipefail\n" + "".join(f"{command}printf '\\n=== \\n'\n" for command, _ in steps)
    for name in ("sun", "moon"):
        (directory / f"{name}.png").write_bytes(PNG + name.encode() * 5000)
    done = subprocess.run(
        ["bash", "-c", script.replace("localhost:8000", url.removeprefix("http://"))],
        cwd=directory,
        capture_output=True,
        check=False,
        timeout=120,
    )
    output = done.stdout.decode(errors="replace").split("\n=== \n")
    for (command, expected), printed in zip(steps, output, strict=False):
        for text in expected:
            assert text in printed, f"{command}\nprinted\n{printed}"
    assert done.returncode == 0, f"{steps[len(output) - 1][0]}\n{done.stderr.decode()}"


def test_the_commands_of_the_page_with_files_on_disk(serve: Callable[..., Server], tmp_path: Path):
    server = serve("disk", tmp_path / "data", module="examples.photos")
    before, _, after = PAGE.partition(ON_S3)
    run(before + after.partition("\n## ")[2], server.url, tmp_path)


def test_the_commands_of_the_page_with_files_on_s3(serve: Callable[..., Server], tmp_path: Path, ministack_s3):
    server = serve("s3-sqlite", tmp_path / "data", s3=ministack_s3, prefix=tmp_path.name, module="examples.photos")
    run(PAGE, server.url, tmp_path)


def test_the_model_of_the_page_is_that_of_the_example():
    (code,) = blocks("python")
    names: dict[str, object] = {"__name__": "page"}
    exec(compile(code, "page", "exec", dont_inherit=True), names)  # noqa: S102 - the code of our own page
    for name in ("Photo", "Video"):
        fields, of_example = (msgspec.structs.fields(model) for model in (names[name], getattr(photos, name)))
        assert [(field.name, str(field.type).split(".")[-1]) for field in fields] == [
            (field.name, str(field.type).split(".")[-1]) for field in of_example
        ]


def test_the_functions_of_the_page_are_those_of_the_example():
    example = (ROOT / "examples/photos.html").read_text()
    assert len(blocks("js")) == 1
    for function in blocks("js"):
        assert function in example


def test_the_errors_and_settings_of_the_page_exist():
    modules = (errors, blobs, direct_blobs, header_values, ranges, transfers)
    known = {
        (error.status, error.type)
        for module in modules
        for error in vars(module).values()
        if isinstance(error, type) and issubclass(error, errors.CrudError)
    }
    named = {(int(status), type_) for status, type_ in re.findall(r"^\| (\d+) \| `([a-z-]+)` ", PAGE, re.MULTILINE)}
    assert len(named) == 11
    assert named <= known
    assert set(re.findall(r"CRUDSTACK_\w+", PAGE)) <= set(settings.VARIABLES)


def test_the_times_and_numbers_of_the_page():
    assert (URL_LIFE_S, KEEP_STAGING_S, MAINTAIN_EVERY_S) == (3600, 3600, 3600), "hours on the page"
    assert (MAX_OPEN, ranges.MAX_RANGES, direct_blobs.WAIT_S) == (100, 16, 20)
    assert msgspec.json.encode(Blob(sha256="0" * 64)).endswith(b'"content_type":"application/octet-stream","name":""}')
