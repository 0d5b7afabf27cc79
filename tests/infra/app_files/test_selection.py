"""The files of the app that go into the zip: no secrets, no databases, and only regular files."""

from __future__ import annotations

import ast
import os
import shutil
import socket
import tempfile
from contextlib import closing
from pathlib import Path

import pytest

from app import wiring
from app.autocrud.errors import ConfigError
from infra import app_files
from infra.app_files import LISTED, NOT_DEPLOYED, LeftOut, copy, listed, select
from infra.artifact import ROOT
from tests.infra.app_files.trees import PEM, chosen, git, put
from tests.not_run import not_run


def test_only_the_marker_file_of_types_is_left_out_in_silence(app, tmp_path):
    put(app, "py.typed", "models.pyi", "happy.typed")
    assert chosen(app, tmp_path) == (["happy.typed", "models.py"], {})


NEVER = [
    "models.py~",
    "models.py.bak",
    "models.py.BAK",
    "models.py.orig",
    "models.py.rej",
    "models.py.swp",
    "models.py.swo",
    "#models.py#",
    "models.py#",
    ".#models.py",
    ".env",
    "prod.env",
    "PROD.ENV",
    "prod.env.bak",
    "prod.env.2",
    "Thumbs.db",
    ".DS_Store",
    "desktop.ini",
    "dev.sqlite",
    "dev.sqlite3",
    "dev.db-wal",
    "dev.sqlite3-shm",
    "dev.sqlite-journal",
    "prod.key",
    "PROD.KEY",
    "prod.p12",
    "prod.pfx",
    "models.py.tmp",
    "models.py.save",
    ".hidden/x",
    "node_modules/x/i.js",
    "more/node_modules/i.js",
    "more/.env",
    "more/a.key",
]


def test_some_files_never_go_in(project, tmp_path):
    """This holds although git tracks them, and although `package-include` names them."""
    put(project, *NEVER, "page.html", "environment.json", "keys.json", "orig.txt")
    put(project, "rds.crt", content="-----BEGIN CERTIFICATE-----\n")
    put(project.parent, "pyproject.toml", content='[tool.crudstack]\npackage-include = ["app/**"]\n')
    if (project.parent / ".git").exists() and shutil.which("git"):
        git(project.parent, "add", "--force", ".")
    files, left_out = chosen(project, tmp_path)
    assert files == sorted(
        ["environment.json", "keys.json", "models.py", "models.py#", "orig.txt", "page.html", "rds.crt"]
    )
    for name in set(NEVER) - {"models.py#"}:
        assert any(name == path or (path.endswith("/") and name.startswith(path)) for path in left_out), name


@pytest.mark.parametrize(
    "start",
    [b"SQLite format 3\0", b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83", b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"],
)
def test_databases_are_known_by_their_content(app, tmp_path, start):
    put(app, "data.bin", content=start + bytes(100))
    put(app, "text.bin", content=b"no " + start)
    put(app, "empty.db", "empty.txt", content=b"")
    put(app, "berkeley.db", content=b"no SQLite")
    files, left_out = chosen(app, tmp_path)
    assert files == ["berkeley.db", "empty.txt", "models.py", "text.bin"]
    assert left_out == {"data.bin": "an SQLite database", "empty.db": "an SQLite database"}


@pytest.mark.parametrize("encoding", ["ascii", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("before", [0, 100, app_files.BLOCK - 15, app_files.BLOCK - 1, 3 * app_files.BLOCK - 8])
def test_private_keys_are_found_in_every_directory(app, tmp_path, before, encoding):
    put(app, "data.json", content=b"\0" * before + PEM.encode(encoding))
    files, left_out = chosen(app, tmp_path)
    assert files == ["models.py"]
    assert left_out == {"data.json": "holds a private key"}


def test_a_module_with_a_key_fails_because_the_app_would_lack_it(app, tmp_path):
    put(app, "keys.py", content=f'KEY = """{PEM}"""')
    with pytest.raises(ConfigError, match=r"/app/keys\.py has the words 'PRIVATE KEY' in it, so it may hold a key"):
        copy(app, select(app), tmp_path / "copy")


def test_data_that_was_generated_is_brought_back(project, tmp_path):
    put(project.parent, ".gitignore", content="generated/\n*.csv\n*.pem\n")
    put(project, "generated/a.json", "generated/deep/b.json", "generated/c.txt", "d.csv", "more/e.csv", "prod.key")
    put(project, "key.pem", content=PEM)
    include = '["app/generated/**/*.json", "/app/d.csv", "app/*.key", "*.pem"]'
    put(project.parent, "pyproject.toml", content=f"[tool.crudstack]\npackage-include = {include}\n")
    files, left_out = chosen(project, tmp_path)
    assert files == ["d.csv", "generated/a.json", "generated/deep/b.json", "models.py"]
    assert left_out == {
        "generated/c.txt": "git ignores it",
        "more/e.csv": "git ignores it",
        "prod.key": "holds a private key",
        "key.pem": "holds a private key",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[tool.crudstack]\npackage-include = ["app/none.json"]', "names 'app/none.json', and no file of"),
        ('[tool.crudstack]\npackage-include = "app/x.json"', "is 'app/x.json': expected"),
        ("[tool.crudstack]\npackage-include = [1]", r"is \[1\]: expected"),
        ('[tool.crudstack]\npackage-include = ["!app/x"]', "has '!app/x': expected"),
        ('[tool.crudstack]\npackage-include = ["../x"]', r"has '\.\./x': expected"),
        ("[tool.crudstack]\npackage_include = []", "has package_include: expected"),
        ("[tool]\ncrudstack = 1", "has 1: expected"),
        ("tool = 1", "has 1: expected"),
        ("[tool", "is no TOML"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(app, text, message):
    put(app.parent, "pyproject.toml", content=text)
    with pytest.raises(ConfigError, match=message):
        select(app)


def test_the_ca_file_is_not_left_out_in_silence(project, tmp_path):
    put(project.parent, ".gitignore", content="*.pem\n")
    put(project, "rds-ca.pem", content="-----BEGIN CERTIFICATE-----\n")
    with pytest.raises(
        ConfigError, match=r"/app/rds-ca\.pem would be left out \(git ignores it\), and without it the app"
    ) as raised:
        select(project)
    # Without git, or in an archive of the sources, `git add` is not possible.
    assert 'or outside of a checkout `package-include = ["app/rds-ca.pem"]` in [tool.crudstack]' in str(raised.value)
    put(project.parent, "pyproject.toml", content='[tool.crudstack]\npackage-include = ["app/rds-ca.pem"]\n')
    assert chosen(project, tmp_path)[0] == ["models.py", "rds-ca.pem"]
    put(project, "rds-ca.pem", content=PEM)
    with pytest.raises(ConfigError, match=r"/app/rds-ca\.pem would be left out \(holds a private key\)"):
        copy(project, select(project), tmp_path / "again")


def test_the_ca_file_is_the_one_that_the_app_reads():
    assert Path(wiring.__file__).with_name(app_files.CA_FILE) == wiring.RDS_CERTIFICATES


def make_socket(path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as made:
        # The path of a socket must be short. So the socket is created from its own directory.
        here = os.open(".", os.O_RDONLY)
        os.chdir(path.parent)
        try:
            made.bind(path.name)
        finally:
            os.fchdir(here)
            os.close(here)


@pytest.mark.parametrize(
    ("name", "make", "kind"),
    [
        ("s", make_socket, "is a socket, expected a file"),
        ("p", os.mkfifo, "is a pipe, expected a file"),
        ("l", lambda path: path.symlink_to("/etc/hostname"), "is a symbolic link, expected a file"),
        (os.fsdecode(b"caf\xe9.txt"), lambda path: path.write_text(""), r"caf\xe9.txt has a name that is not UTF-8"),
        ("a\nb\x1b", os.mkfifo, "a\\nb\\x1b is a pipe, expected a file"),
    ],
)
def test_a_path_that_is_not_a_file_is_one_sentence(project, tmp_path, name, make, kind):
    make(project / name)
    with pytest.raises(ConfigError) as raised:
        select(project)
    assert kind in str(raised.value)
    assert str(raised.value).isprintable()
    assert str(project) in str(raised.value)
    # If git ignores the path, its type does not matter.
    pattern = os.fsencode(name).replace(b"\n", b"?")
    put(project.parent, ".gitignore", content=pattern + b"\n")
    assert chosen(project, tmp_path)[0] == ["models.py"]


def test_a_device_is_one_sentence(app):
    if os.geteuid() != 0:
        not_run("devices: only root can make one; run the tests as root")
    os.mknod(app / "null", 0o600 | 0o020000, os.makedev(1, 3))
    with pytest.raises(ConfigError, match="/app/null is a device, expected a file"):
        select(app)


def test_an_unreadable_file_is_one_sentence():
    with tempfile.TemporaryDirectory() as name:
        app = Path(name, "project/app")
        put(app, "models.py", "closed/x", "secret.json")
        for path in (Path(name), app.parent, app):
            path.chmod(0o755)
        user = os.geteuid()
        (app / "closed").chmod(0)
        (app / "secret.json").chmod(0)
        target = Path(tempfile.mkdtemp())
        target.chmod(0o777)
        try:
            if user == 0:
                os.seteuid(65534)
            with pytest.raises(ConfigError, match="/app/closed cannot be read: Permission denied"):
                select(app)
            selection = app_files.Selection(["secret.json"], [], 1)
            with pytest.raises(ConfigError, match=r"/app/secret\.json cannot be read: Permission denied"):
                copy(app, selection, target)
        finally:
            os.seteuid(user)
            (app / "closed").chmod(0o755)
            shutil.rmtree(target)


def test_a_file_that_became_a_pipe_or_a_link_is_not_opened(app, tmp_path):
    put(app, "a.json", "b.json")
    selection = select(app)
    (app / "a.json").unlink()
    os.mkfifo(app / "a.json")
    with pytest.raises(ConfigError, match=r"a\.json changed while it was read"):
        copy(app, selection, tmp_path / "copy")
    (app / "a.json").unlink()
    (app / "a.json").symlink_to("/etc/hostname")
    with pytest.raises(ConfigError, match=r"a\.json cannot be read"):
        copy(app, selection, tmp_path / "copy")


def test_a_file_that_is_gone_before_it_is_looked_at_is_not_there(app, monkeypatch):
    """Editors create and delete files such as 4913 beside the file that they save."""
    put(app, "4913")
    lstat = Path.lstat

    def after(path):
        if path.name == "4913":
            path.unlink()
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", after)
    assert select(app).files == ["models.py"]


def test_the_report_is_short():
    many = [LeftOut(f"data/{number}.csv", "git ignores it") for number in range(LISTED + 1)]
    few = [LeftOut(f"{number}.env", "may hold secrets") for number in range(LISTED)]
    assert listed([*many, *few, LeftOut("a\x1bb.key", "holds a private key")]) == (
        "left out: 6 files in data/ (git ignores it); a\\x1bb.key (holds a private key);"
        " 0.env, 1.env, 2.env, 3.env, 4.env (may hold secrets)"
    )
    folders = [LeftOut(f"{number:03}/x.csv", "git ignores it") for number in range(1000)]
    assert len(listed(folders)) < 500
    assert "and 980 more (git ignores it)" in listed(folders)
    assert listed([]) == "nothing was left out"


def test_modules_of_the_app_that_no_handler_imports_are_not_deployed():
    app = ROOT / "app"
    imported: set[Path] = set()
    found = [app / "handler.py", app / "bootstrap.py", app / "backup.py"]
    while found:
        path = found.pop()
        if path in imported:
            continue
        imported.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                names = [base, *(base / name.name for name in node.names)]
                modules = [name.with_suffix(".py") for name in names] + [name / "__init__.py" for name in names]
                found += [module for module in modules if module.exists()]
    ours = {path for path in app.rglob("*.py") if not path.is_relative_to(app / "autocrud")} - {app / "__init__.py"}
    assert {path.relative_to(app).as_posix() for path in ours - imported} == NOT_DEPLOYED - {"autocrud/testing"}
    assert (app / "autocrud/testing").is_dir()
