"""The files that git ignores. In a checkout git itself is asked; elsewhere the `.gitignore` files are read.

>>> rules = rules_for(Path("app"))
>>> rules.ignored([("models.py", False), ("credentials.json", False), ("data", True)])
[False, True, False]

In a checkout git applies `.gitignore`, `.git/info/exclude` and the user's `core.excludesFile`, and a tracked file is
not ignored. Without git, or outside of a checkout, this module reads the `.gitignore` files and `.git/info/exclude`.
Every other failure of git is a ConfigError, so that no failure publishes a file.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from pathspec import GitIgnoreSpec

from app.autocrud.errors import ConfigError

LIMIT_S = 60
"""Seconds after which a command of git is stopped. Usually it takes some milliseconds."""
KEPT = frozenset({"GIT_CONFIG_GLOBAL", "GIT_CONFIG_NOSYSTEM", "GIT_CONFIG_SYSTEM"})
"""Variables that name the user's settings. All other `GIT_*`, which hooks set, may name another repository."""


class Rules(Protocol):
    """The files that git ignores below a directory.

    Paths are relative to it, with slashes. Bytes that are not UTF-8 are surrogates.
    """

    def ignored(self, entries: Sequence[tuple[str, bool]]) -> list[bool]:
        """Return for each entry whether git ignores it. An entry is a path, and whether it is a directory.

        A directory that a pattern matches counts as ignored, also if files in it are tracked: see `tracks`.
        """
        ...

    def tracks(self, path: str) -> bool:
        """Return whether a file is tracked, or a directory holds tracked files, although a pattern matches it."""
        ...

    def is_repository(self, path: str) -> bool:
        """Return whether a directory is a repository of its own, to which `repository_rules` apply."""
        ...


def rules_for(directory: Path) -> Rules:
    """Return the rules for the files below a directory of the project. Raises ConfigError if git fails."""
    directory = directory.resolve()
    top = next((parent for parent in (directory, *directory.parents) if os.path.lexists(parent / ".git")), None)
    if top is None:
        return FileRules(directory.parent, directory)
    if shutil.which("git") is None:
        return FileRules(top, directory)
    try:
        rules = GitRules(directory)
        project = directory.parent
        if top not in (directory, project) and not rules.tracks(""):
            # A repository that contains the project and ignores it, such as one of a home directory, is not asked.
            relative = project.relative_to(top).as_posix()
            if GitRules(top).ignored([(relative, True)]) == [True]:
                return FileRules(project, directory)
    except _NotARepositoryError:
        return FileRules(top, directory)
    return rules


def repository_rules(directory: Path, outer: Rules, path: str) -> Rules:
    """Return the rules for a repository within the project, such as a submodule. Raises ConfigError if git fails.

    directory    the directory of the inner repository
    outer        the rules of the repository that contains it
    path         the path of the directory in the outer repository
    """
    inner: Rules = FileRules(directory, directory)
    if os.path.lexists(directory / ".git") and shutil.which("git") is not None:
        with contextlib.suppress(_NotARepositoryError):
            inner = GitRules(directory.resolve())
    return InnerRules(inner, outer, path)


class _NotARepositoryError(Exception):
    """Git finds no repository, although there is a `.git`: for example, the repository was not copied with it."""


class GitRules:
    """Rules that ask git, so they include everything that git takes into account."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        listed = _git(directory, "ls-files", "-z").split(b"\0")
        self._files = {os.fsdecode(path) for path in listed if path}
        self._folders = {parent.as_posix() for path in self._files for parent in PurePosixPath(path).parents}

    def ignored(self, entries: Sequence[tuple[str, bool]]) -> list[bool]:
        """Return which entries git ignores, in one call of git."""
        if not entries:
            return []
        # Without --no-index git would read names as patterns, and treat `key[1].json` as tracked if `key1.json` is. The
        # answers are matched by their order, because git may print a name in another Unicode normalization than the
        # directory has.
        asked = b"".join(os.fsencode(f"./{path}") + b"\0" for path, _ in entries)
        said = _git(self._directory, "check-ignore", "--no-index", "--stdin", "-z", "-v", "-n", input=asked)
        answers = said.split(b"\0")[:-1]
        patterns = answers[2::4]
        if len(patterns) != len(entries) or len(answers) != 4 * len(entries):
            raise ConfigError(
                f"`git check-ignore` in {self._directory} gave {len(answers)} fields for {len(entries)} files, expected"
                f" 4 for each: check the git on PATH with `git --version`"
            )
        return [
            bool(pattern) and not pattern.startswith(b"!") and path not in self._files
            for pattern, (path, _) in zip(patterns, entries, strict=True)
        ]

    def tracks(self, path: str) -> bool:
        """Return whether the index has this file, or files below this directory."""
        return path in self._files or (path or ".") in self._folders

    def is_repository(self, path: str) -> bool:
        """Return whether this is a submodule, or another clone."""
        return path in self._files or os.path.lexists(self._directory / path / ".git")


class InnerRules:
    """The rules of a repository within another one, such as a submodule.

    A file is ignored if either repository has a pattern for it.
    `tracks` returns True for the files that the inner repository tracks, so they are not ignored.
    """

    def __init__(self, inner: Rules, outer: Rules, path: str) -> None:
        self._inner, self._outer, self._path = inner, outer, path

    def ignored(self, entries: Sequence[tuple[str, bool]]) -> list[bool]:
        """Return for each entry whether either repository ignores it."""
        of_outer = self._outer.ignored([(f"{self._path}/{path}", is_directory) for path, is_directory in entries])
        return [inner or outer for inner, outer in zip(self._inner.ignored(entries), of_outer, strict=True)]

    def tracks(self, path: str) -> bool:
        """Return whether the index of the inner repository has this file, or files below this directory."""
        return self._inner.tracks(path)

    def is_repository(self, path: str) -> bool:
        """Return whether this is a submodule, or another clone."""
        return self._inner.is_repository(path)


class FileRules:
    """The rules of `.gitignore` files and of `.git/info/exclude`, read without git.

    top          the uppermost directory whose `.gitignore` is read
    directory    the directory that paths are relative to: `top`, or one below it

    A tracked file that a pattern matches counts as ignored, because only git knows that it is tracked. `?` matches a
    character, and not a byte as in git; `a/**/` matches `a` too. Each of these ignores more than git, never less.
    """

    def __init__(self, top: Path, directory: Path) -> None:
        self._top, self._directory = top, directory
        self._specs: dict[Path, GitIgnoreSpec] = {}
        self._exclude = _spec(top / ".git/info/exclude")
        parts = directory.relative_to(top).parts
        above = [top.joinpath(*parts[: count + 1]) for count in range(len(parts))]
        self._all = any(self._matched(path, is_directory=True) for path in above)

    def ignored(self, entries: Sequence[tuple[str, bool]]) -> list[bool]:
        """Return for each entry whether the patterns match it. Callers have asked for its parent directories before."""
        return [self._all or self._matched(self._directory / path, is_directory=is_dir) for path, is_dir in entries]

    def tracks(self, path: str) -> bool:
        """Return False, because only git knows which files are tracked."""
        return False

    def is_repository(self, path: str) -> bool:
        """Return whether this is a submodule, or another clone."""
        return os.path.lexists(self._directory / path / ".git")

    def _matched(self, path: Path, *, is_directory: bool) -> bool:
        """Return whether the deciding pattern, the last one of the nearest file, excludes this path."""
        for parent in path.parents:
            if parent not in self._specs:
                self._specs[parent] = _spec(parent / ".gitignore")
            if (found := _check(self._specs[parent], path, parent, is_directory=is_directory)) is not None:
                return found
            if parent == self._top:
                break
        return _check(self._exclude, path, self._top, is_directory=is_directory) or False


def _check(spec: GitIgnoreSpec, path: Path, parent: Path, *, is_directory: bool) -> bool | None:
    """Return whether the last pattern that matches this path excludes it; None if no pattern matches it.

    A pattern that matches only a parent of the path does not count. GitIgnoreSpec.check_file is not used: it decides
    about a whole path at once, and ranks patterns for directories in another order than git.
    """
    relative = path.relative_to(parent).as_posix()
    for pattern in reversed(list(spec.patterns)):
        # A comment has no such attributes.
        if pattern.include is None or pattern.regex is None:
            continue
        has_parent = PARENT in pattern.regex.groupindex
        match = pattern.regex.search(relative)
        if match is not None and (not has_parent or match.end(PARENT) == -1):
            return pattern.include
        match = pattern.regex.search(f"{relative}/") if is_directory and has_parent else None
        if match is not None and match.end(PARENT) == len(relative) + 1:
            return pattern.include
    return None


PARENT = "ps_d"
"""The group of pathspec's regular expressions that matches the slash behind a directory."""


def _spec(file: Path) -> GitIgnoreSpec:
    """Read a file of patterns like git, which ignores a byte order mark and the line ends of Windows."""
    # `.git/info/exclude` may be a link.
    if file.name == ".gitignore" and file.is_symlink():
        raise ConfigError(f"{file} is a symbolic link, which git does not follow: put the file itself in its place")
    if not file.is_file():
        return GitIgnoreSpec.from_lines([])
    try:
        text = file.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
        return GitIgnoreSpec.from_lines(line.removesuffix("\r") for line in text.split("\n"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read, so what git ignores is not known: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{file} has a pattern that cannot be read: {error}") from None


def _git(directory: Path, *arguments: str, input: bytes = b"") -> bytes:
    """Return what git prints about a checkout. Raises ConfigError if it fails.

    A checkout of another owner, as in a container, is allowed: these commands only read and start no program of the
    checkout, and the code of the checkout runs here already.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_") or name in KEPT}
    command = ["git", "-c", "safe.directory=*", "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            input=input,
            capture_output=True,
            check=False,
            env=environment | {"LC_ALL": "C"},
            timeout=LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"git cannot say what it ignores in {directory}: {error}") from None
    said = done.stderr.decode(errors="replace").strip().splitlines()
    # Git only warns about such a file, and continues without its patterns.
    if unread := [line for line in said if "unable to access" in line]:
        raise ConfigError(
            f"git cannot read all of what it ignores in {directory}, so nothing is published: {unread[0]}; make that"
            " file readable and not a link, or remove it"
        )
    # Exit code 1 of check-ignore: none is ignored.
    if done.returncode == 0 or (done.returncode == 1 and arguments[0] == "check-ignore"):
        return done.stdout
    if any("not a git repository" in line for line in said):
        raise _NotARepositoryError
    reason = said[0] if said else f"it ended with {done.returncode}"
    raise ConfigError(
        f"git cannot say what it ignores in {directory}, so nothing is published: {reason}; run `git status` there, and"
        " build again when it works"
    )
