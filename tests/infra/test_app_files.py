"""Which files of the app go into the zip: nothing that git ignores, and never what may hold secrets."""

from __future__ import annotations

import ast
import os
import shutil
import socket
import subprocess
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app import wiring
from app.autocrud.errors import ConfigError
from infra import app_files
from infra.app_files import LISTED, NOT_DEPLOYED, PRIVATE, LeftOut, copy, listed, select
from infra.artifact import ROOT
from infra.ignored_files import FileRules, GitRules, rules_for
from tests.not_run import not_run

PEM = f"-----BEGIN {PRIVATE}-----\nMIIE\n-----END {PRIVATE}-----\n"


def git(directory: Path, *arguments: str) -> None:
    """Run git without the settings of this machine's user."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    nobody = ("-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "protocol.file.allow=always")
    subprocess.run(
        ["git", *nobody, *arguments],
        cwd=directory,
        env=environment | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"},
        check=True,
        capture_output=True,
    )


def put(app: Path, *paths: str, content: str | bytes = "x") -> None:
    for path in paths:
        (app / path).parent.mkdir(parents=True, exist_ok=True)
        (app / path).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture(autouse=True)
def nobodys_settings(monkeypatch, tmp_path):
    """Git's settings of this machine's user ignore nothing here."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)


@pytest.fixture
def app(tmp_path):
    """The app of one module, of a project that is no checkout."""
    directory = tmp_path / "project" / "app"
    put(directory, "models.py")
    return directory


@pytest.fixture(params=["checkout", "without git", "no checkout"])
def project(request, app, monkeypatch):
    """The same in each of the places where `.gitignore` is obeyed."""
    if request.param != "no checkout":
        git(app.parent, "init", "--quiet")
    if request.param == "without git":
        monkeypatch.setenv("PATH", str(app.parent / "nothing"))
    return app


def chosen(app: Path, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    selection = copy(app, select(app), tmp_path / "copy")
    found = sorted(path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*.*"))
    assert [path for path in found if (tmp_path / "copy" / path).is_file()] == sorted(selection.files)
    return selection.files, dict(selection.left_out)


def test_what_git_ignores_stays_out(project, tmp_path):
    put(
        project.parent,
        ".gitignore",
        content="credentials.json\n*.pem\n!ca.pem\n/app/local_settings.py\ndata/\n[ab]?.csv\n",
    )
    put(project, "more/.gitignore", content="*.txt\r\n!keep.txt\r\n/deep/**/x.bin\r\n")
    put(
        project,
        "credentials.json",
        "prod.pem",
        "local_settings.py",
        "data/a",
        "data/b/c",
        "a1.csv",
        "more/deep/1/2/x.bin",
    )
    put(project, "ca.pem", "more/local_settings.py", "c1.csv", "more/keep.txt", "more/x.bin")
    put(project, "more/no.txt", "more/credentials.json")
    files, left_out = chosen(project, tmp_path)
    assert files == ["c1.csv", "ca.pem", "models.py", "more/keep.txt", "more/local_settings.py", "more/x.bin"]
    names = (
        "a1.csv credentials.json data/ local_settings.py more/credentials.json more/deep/1/2/x.bin more/no.txt prod.pem"
    )
    assert left_out == dict.fromkeys(names.split(), "git ignores it")


def test_a_directory_that_git_ignores_is_not_walked(project, monkeypatch):
    put(project.parent, ".gitignore", content="data/\n")
    put(project, "data/a/b", "node_modules/x/i.js")
    walked = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: walked.append(Path(path).name) or scan(path))
    assert select(project).left_out == [("data/", "git ignores it"), ("node_modules/", "of Node.js")]
    assert walked == ["app"]


def test_what_git_tracks_is_not_ignored(app, tmp_path):
    git(app.parent, "init", "--quiet")
    put(app.parent, ".gitignore", content="data/\n*.json\n")
    put(app, "data/kept.json", "data/more/kept.json", "data/no.json", "data/other/no.json", "kept.json", "no.json")
    git(app.parent, "add", "--force", "app/kept.json", "app/data/kept.json", "app/data/more/kept.json")
    files, left_out = chosen(app, tmp_path)
    assert files == ["data/kept.json", "data/more/kept.json", "kept.json", "models.py"]
    assert left_out.keys() == {"data/no.json", "data/other/", "no.json"}


def test_all_that_git_obeys_is_obeyed(app, tmp_path):
    git(app.parent, "init", "--quiet")
    put(app.parent, ".git/info/exclude", content="mine.txt\n")
    put(tmp_path, "home/.config/git/ignore", content="users.txt\n")
    put(app, "mine.txt", "users.txt")
    assert chosen(app, tmp_path)[0] == ["models.py"]


@pytest.mark.parametrize("variable", ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"])
def test_the_variables_of_a_hook_of_another_repository_are_not_obeyed(app, tmp_path, monkeypatch, variable):
    git(app.parent, "init", "--quiet")
    put(app.parent, ".gitignore", content="secret.json\n")
    put(app, "secret.json")
    (tmp_path / "other").mkdir()
    git(tmp_path / "other", "init", "--quiet")
    put(tmp_path / "other", "f")
    git(tmp_path / "other", "add", "f")
    other = {"GIT_DIR": ".git", "GIT_INDEX_FILE": ".git/index"}.get(variable, "")
    monkeypatch.setenv(variable, str(tmp_path / "other" / other))
    assert chosen(app, tmp_path)[0] == ["models.py"]


def test_a_worktree_and_a_submodule_are_checkouts(tmp_path):
    for name in ("one", "lib"):
        (tmp_path / name).mkdir()
        git(tmp_path / name, "init", "--quiet")
        put(tmp_path / name, ".gitignore", content=f"{name}.json\n")
        put(tmp_path / name, "app/models.py")
        git(tmp_path / name, "add", ".")
        git(tmp_path / name, "commit", "--quiet", "--message", "x")
    git(tmp_path / "one", "submodule", "add", "--quiet", str(tmp_path / "lib"), "app/lib")
    git(tmp_path / "one", "commit", "--quiet", "--message", "y")
    git(tmp_path / "one", "worktree", "add", "--quiet", str(tmp_path / "two"))
    for name in ("one", "two"):
        put(tmp_path / name / "app", "one.json", "lib/lib.json", "lib/other.json")
    assert chosen(tmp_path / "one/app", tmp_path)[0] == ["lib/app/models.py", "lib/other.json", "models.py"]
    shutil.rmtree(tmp_path / "copy")
    # Submodules of a worktree are not checked out, so the files there are nobody's, and `.gitignore` files decide.
    put(tmp_path / "two/app", "lib/.gitignore", content="lib.json\n")
    assert chosen(tmp_path / "two/app", tmp_path)[0] == ["lib/other.json", "models.py"]


def test_the_name_of_a_file_is_no_pattern_for_tracked_files(app, tmp_path):
    git(app.parent, "init", "--quiet")
    put(app.parent, ".gitignore", content="*.json\n*.d\n")
    put(app, "key1.json", "key[1].json", "k?y1.json", "data1.d/x.txt", "data[1].d/x.txt")
    git(app.parent, "add", "--force", "app/key1.json", "app/data1.d/x.txt")
    assert chosen(app, tmp_path)[0] == ["data1.d/x.txt", "key1.json", "models.py"]


def test_what_git_ignores_stays_out_of_a_clone_within_the_project_too(project, tmp_path):
    put(project.parent, ".gitignore", content="credentials.json\n")
    put(project, "lib/m.py", "lib/credentials.json", "lib/mine.json", "lib/.gitignore", content="mine.json\n")
    if shutil.which("git") is None:
        (project / "lib/.git").mkdir()
    else:
        git(project / "lib", "init", "--quiet")
    assert chosen(project, tmp_path)[0] == ["lib/m.py", "models.py"]


def test_a_submodule_that_is_tracked_in_an_ignored_directory_goes_in(app, tmp_path):
    (tmp_path / "lib").mkdir()
    git(tmp_path / "lib", "init", "--quiet")
    put(tmp_path / "lib", "m.py")
    git(tmp_path / "lib", "add", ".")
    git(tmp_path / "lib", "commit", "--quiet", "--message", "x")
    git(app.parent, "init", "--quiet")
    put(app.parent, ".gitignore", content="vendor/\n")
    git(app.parent, "submodule", "add", "--force", "--quiet", str(tmp_path / "lib"), "app/vendor/lib")
    put(app, "vendor/x.json", "vendor/lib/x.json")
    assert chosen(app, tmp_path)[0] == ["models.py", "vendor/lib/m.py"]


def test_patterns_that_git_cannot_read_publish_nothing(project):
    """Git warns, exits with 0 and goes on without them. A link stands for an unreadable file: root reads all."""
    put(project.parent, "patterns", content="credentials.json\n")
    (project.parent / ".gitignore").symlink_to("patterns")
    put(project, "credentials.json")
    with pytest.raises(ConfigError, match=r"\.gitignore.* link") as raised:
        select(project)
    assert "\n" not in str(raised.value)


def test_only_the_marker_file_of_types_is_left_out_in_silence(app, tmp_path):
    put(app, "py.typed", "models.pyi", "happy.typed")
    assert chosen(app, tmp_path) == (["happy.typed", "models.py"], {})


def test_in_a_larger_repository_its_rules_hold_too(tmp_path):
    git(tmp_path, "init", "--quiet")
    put(tmp_path, ".gitignore", content="*.secret\n")
    app = tmp_path / "services/crud/app"
    put(app, "models.py", "a.secret", "b.json")
    put(app.parent, ".gitignore", content="b.json\n")
    assert chosen(app, tmp_path)[0] == ["models.py"]


def test_a_repository_around_that_ignores_the_whole_project_says_nothing_of_it(tmp_path):
    """Such as a repository of the files in a home directory."""
    git(tmp_path, "init", "--quiet")
    put(tmp_path, ".gitignore", content="*\n")
    app = tmp_path / "crud/app"
    put(app, "models.py", "a.secret")
    put(app.parent, ".gitignore", content="*.secret\n")
    assert chosen(app, tmp_path)[0] == ["models.py"]


def test_a_repository_that_was_not_copied_with_its_worktree_is_none(app, tmp_path):
    put(app.parent, ".git", content="gitdir: /nowhere/.git/worktrees/x\n")
    put(app.parent, ".gitignore", content="*.secret\n")
    put(app, "a.secret")
    assert chosen(app, tmp_path)[0] == ["models.py"]


def test_a_checkout_of_another_owner_is_asked_too(app, tmp_path):
    git(app.parent, "init", "--quiet")
    put(app.parent, ".git/info/exclude", content="mine.txt\n")
    put(app, "mine.txt")
    if os.geteuid() == 0:
        for path in (app.parent, *app.parent.rglob("*")):
            os.chown(path, 65534, 65534)
    assert chosen(app, tmp_path)[0] == ["models.py"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'fatal: index file corrupt' >&2; exit 128", "fatal: index file corrupt; run `git status` there"),
        ("exit 3", "it ended with 3; run"),
        ("case $* in *check-ignore*) printf 'a\\0';; esac", "gave 1 fields for 1 files, expected 4 for each"),
        ("case $* in *check-ignore*) ;; esac", "gave 0 fields for 1 files"),
    ],
)
def test_a_failure_of_git_publishes_nothing(app, tmp_path, monkeypatch, script, message):
    git(app.parent, "init", "--quiet")
    put(tmp_path, "bin/git", content=f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin/git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ConfigError) as raised:
        select(app)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


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
    """Although git tracks them, and although they are asked for."""
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
def test_private_keys_are_found_wherever_they_are(app, tmp_path, before, encoding):
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
    # Without git, or in an archive of the sources, nothing can be added.
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
        # The path of a socket is short, so it is made in its directory.
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
def test_what_is_no_file_is_one_sentence_with_its_path(project, tmp_path, name, make, kind):
    make(project / name)
    with pytest.raises(ConfigError) as raised:
        select(project)
    assert kind in str(raised.value)
    assert str(raised.value).isprintable()
    assert str(project) in str(raised.value)
    # If git ignores it, it does not matter.
    pattern = os.fsencode(name).replace(b"\n", b"?")
    put(project.parent, ".gitignore", content=pattern + b"\n")
    assert chosen(project, tmp_path)[0] == ["models.py"]


def test_a_device_is_one_sentence(app):
    if os.geteuid() != 0:
        not_run("devices: only root can make one; run the tests as root")
    os.mknod(app / "null", 0o600 | 0o020000, os.makedev(1, 3))
    with pytest.raises(ConfigError, match="/app/null is a device, expected a file"):
        select(app)


def test_what_cannot_be_read_is_one_sentence():
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
    """Editors make and delete files like 4913 beside the one that they save."""
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


NAMES = st.sampled_from(["a", "b", "ab", "a.txt", "b.json", "data", "x y", "[", "Q"])
PARTS = st.sampled_from(["a", "b", "*", "**", "?", "a*", "*.txt", "[ab]", "[!a]", "data", "x y", "\\[", "q"])
PATTERNS = st.builds(
    lambda bang, slash, parts, end: bang + slash + "/".join(parts) + end,
    st.sampled_from(["", "", "!"]),
    st.sampled_from(["", "/"]),
    st.lists(PARTS, min_size=1, max_size=3),
    st.sampled_from(["", "", "/", " ", "\r"]),
).filter(lambda pattern: not pattern.endswith("**/"))  # of `a/**/` pathspec takes `a` itself for ignored


@pytest.fixture(scope="module")
def repository():
    with tempfile.TemporaryDirectory() as name:
        git(Path(name), "init", "--quiet")
        yield Path(name).resolve()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tree=st.lists(st.lists(NAMES, min_size=1, max_size=4), min_size=1, max_size=6),
    patterns=st.lists(PATTERNS, max_size=4),
    nested=st.lists(PATTERNS, max_size=3),
)
@example([["a", "a"]], ["a/"], ["!a"])
@example([["data", "a.txt"]], ["/app/data/*", "!a.txt"], [])
def test_files_are_read_as_git_reads_them(repository, tree, patterns, nested):
    """Without git the same files are left out."""
    app = repository / "app"
    shutil.rmtree(app, ignore_errors=True)
    for parts in tree:
        path = app.joinpath(*parts)
        if not any(parent.is_file() for parent in path.parents) and not path.exists():
            put(app, "/".join(parts))
    app.mkdir(exist_ok=True)
    put(repository, ".gitignore", content="\n".join(patterns))
    put(app, "a/.gitignore" if (app / "a").is_dir() else ".gitignore", content="\n".join(nested))
    assert isinstance(rules := rules_for(app), GitRules)
    assert walked(app, rules) == walked(app, FileRules(repository, app))


def walked(app: Path, rules) -> dict[str, bool]:
    """What is ignored, directory by directory, as `select` asks."""
    found: dict[str, bool] = {}
    level = [""]
    while level:
        entries = [
            (path.relative_to(app).as_posix(), path.is_dir())
            for parent in level
            for path in sorted((app / parent).iterdir())
        ]
        ignored = dict(zip([path for path, _ in entries], rules.ignored(entries), strict=True))
        found |= ignored
        level = [path for path, is_directory in entries if is_directory and not ignored[path]]
    return found


def test_modules_of_the_app_that_no_handler_imports_are_not_deployed():
    app = ROOT / "app"
    imported: set[Path] = set()
    found = [app / "handler.py", app / "bootstrap.py"]
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
