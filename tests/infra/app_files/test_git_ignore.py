"""Files that git ignores stay out of the zip, and tracked files go in."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app.autocrud.errors import ConfigError
from infra.app_files import select
from infra.ignored_files import FileRules, GitRules, rules_for
from tests.infra.app_files.trees import chosen, git, put


def test_ignored_files_stay_out(project, tmp_path):
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


def test_tracked_files_are_not_ignored(app, tmp_path):
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
    # Submodules of a worktree are not checked out. So no repository tracks the files there, and `.gitignore` decides.
    put(tmp_path / "two/app", "lib/.gitignore", content="lib.json\n")
    assert chosen(tmp_path / "two/app", tmp_path)[0] == ["lib/other.json", "models.py"]


def test_the_name_of_a_file_is_no_pattern_for_tracked_files(app, tmp_path):
    git(app.parent, "init", "--quiet")
    put(app.parent, ".gitignore", content="*.json\n*.d\n")
    put(app, "key1.json", "key[1].json", "k?y1.json", "data1.d/x.txt", "data[1].d/x.txt")
    git(app.parent, "add", "--force", "app/key1.json", "app/data1.d/x.txt")
    assert chosen(app, tmp_path)[0] == ["data1.d/x.txt", "key1.json", "models.py"]


def test_ignored_files_of_a_clone_within_the_project_stay_out(project, tmp_path):
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
    """Git warns, ignores the patterns and exits with 0. The test uses a link, because root can read every file."""
    put(project.parent, "patterns", content="credentials.json\n")
    (project.parent / ".gitignore").symlink_to("patterns")
    put(project, "credentials.json")
    with pytest.raises(ConfigError, match=r"\.gitignore.* link") as raised:
        select(project)
    assert "\n" not in str(raised.value)


def test_in_a_larger_repository_its_rules_hold_too(tmp_path):
    git(tmp_path, "init", "--quiet")
    put(tmp_path, ".gitignore", content="*.secret\n")
    app = tmp_path / "services/crud/app"
    put(app, "models.py", "a.secret", "b.json")
    put(app.parent, ".gitignore", content="b.json\n")
    assert chosen(app, tmp_path)[0] == ["models.py"]


def test_a_repository_around_that_ignores_the_whole_project_says_nothing_of_it(tmp_path):
    """An example is a repository of the files in a home directory."""
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


NAMES = st.sampled_from(["a", "b", "ab", "a.txt", "b.json", "data", "x y", "[", "Q"])
PARTS = st.sampled_from(["a", "b", "*", "**", "?", "a*", "*.txt", "[ab]", "[!a]", "data", "x y", "\\[", "q"])
PATTERNS = st.builds(
    lambda bang, slash, parts, end: bang + slash + "/".join(parts) + end,
    st.sampled_from(["", "", "!"]),
    st.sampled_from(["", "/"]),
    st.lists(PARTS, min_size=1, max_size=3),
    st.sampled_from(["", "", "/", " ", "\r"]),
).filter(lambda pattern: not pattern.endswith("**/"))  # for `a/**/`, pathspec ignores `a` itself too


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
    """The rules without git leave out the same files."""
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
    """Return whether each path is ignored. Asks directory by directory, as `select` does."""
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
