"""Choose the files of the app that go into the zip, and say which ones were left out, and why.

>>> selection = select(Path("app"))
>>> selection.files
['__init__.py', 'handler.py', ...]
>>> selection.left_out
[LeftOut('credentials.json', 'git ignores it')]

Files that git ignores stay out; `[tool.crudstack] package-include` in pyproject.toml includes generated data again.
Files of `NEVER`, SQLite databases and files with a private key stay out in any case. A module with a private key in it
fails the build, because the app would lack the module.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pathspec import GitIgnoreSpec

from app.autocrud.errors import ConfigError
from infra.ignored_files import Rules, repository_rules, rules_for

CA_FILE = "rds-ca.pem"
"""AWS's bundle of certificates, without which the app cannot verify the database's certificate."""
NOT_DEPLOYED = frozenset(
    {
        "archive_place.py",
        "autocrud/testing",
        "backup_commands.py",
        "bucket_check.py",
        "cli.py",
        "dev/__init__.py",
        "dev/aws_account.py",
        "dev/environment.py",
        "dev/local_s3.py",
        "dev/pulumi_cli.py",
        "progress_line.py",
        "s3_tools/__init__.py",
        "s3_tools/direct_checks.py",
        "s3_tools/lost_copies.py",
        "s3_tools/s3_check.py",
        "s3_tools/s3_check_command.py",
        "s3_tools/s3_requests.py",
        "s3_tools/s3_rescue.py",
        "server/__init__.py",
        "stack_backup.py",
        "server/connections.py",
        "server/http_answers.py",
        "server/http_protocol.py",
        "server/overload.py",
        "server/request_body.py",
        "server/request_head.py",
        "server/serve.py",
    }
)
"""Modules of the app that no handler on Lambda imports."""
UNNOTICED = frozenset({"__pycache__", ".git", ".gitattributes", ".gitignore", ".gitkeep", ".keep"})
"""Names that are never in the zip, and that the report does not list."""

IGNORED = "git ignores it"
HIDDEN = "hidden"
COPY = "an editor's or a tool's copy"
SECRETS = "may hold secrets"
DESKTOP = "of a desktop"
DATABASE = "an SQLite database"
MODULES = "of Node.js"
KEY = "holds a private key"

NEVER: dict[str, tuple[str, ...]] = {
    COPY: (
        *("*~", "~$*", "#*#", "*.bak", "*.bak[0-9]*", "*.backup", "*.old", "*.orig", "*.rej", "*.save", "*.tmp"),
        *("*.sw[m-p]", "*.kate-swp"),
    ),
    SECRETS: ("*.env", "*.env.*", "*.env[-_~]*", "*.kdbx"),
    DESKTOP: ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx"),
    DATABASE: (
        *("*.sqlite", "*.sqlite[0-9]", "*.db3", "*.sqlite-*", "*.sqlite[0-9]-*"),
        *("*.*-wal", "*.*-shm", "*.*-journal", "*.db-*"),
    ),
    MODULES: ("node_modules",),
    KEY: ("*.key", "*.p12", "*.pfx", "*.ppk", "*.jks", "*.keystore"),
}
"""Names that are never in the zip, in lower case, by the reason."""

BLOCK = 1024 * 1024
DATABASES = (
    b"SQLite format 3\0",
    *(b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83"),  # the write-ahead log, for either byte order
    *(b"\x18\xe2\x2d\x00", b"\x00\x2d\xe2\x18"),  # its index, in either byte order
    b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7",  # the rollback journal
)
"""The first bytes of the files of an SQLite database."""
PRIVATE = "PRIVATE" + " KEY"
"""In two parts, so that this file passes its own check."""
KEYS = tuple(PRIVATE.encode(encoding) for encoding in ("ascii", "utf-16-le", "utf-16-be"))
"""The words of PEM, also in the encodings of PowerShell."""


class LeftOut(NamedTuple):
    """A file or directory that is not in the zip."""

    path: str
    """Relative to the app. The path of a directory ends with a slash."""
    reason: str


class Selection(NamedTuple):
    """Files of the app, as sorted paths with slashes, relative to it."""

    files: list[str]
    left_out: list[LeftOut]
    size: int
    """Bytes of the files."""


class _Entry(NamedTuple):
    path: str
    is_directory: bool
    status: os.stat_result


class _Directory(NamedTuple):
    path: str
    rules: Rules
    base: str
    """The directory that the paths of `rules` are relative to, with a slash at its end, or empty."""
    ignored: bool
    """Whether git ignores it: then only its tracked files, and files of `package-include`, are in the zip."""


def select(app: Path) -> Selection:
    """Choose the files of the app. Raises ConfigError if one of them cannot be published."""
    include = _Include(app)
    files: list[str] = []
    left_out: list[LeftOut] = []
    size = 0
    level = [_Directory("", rules_for(app), "", ignored=False)]
    while level:
        below: list[_Directory] = []
        for directory in level:
            wanted = list(_not_never(app, _entries(app, directory.path), left_out, include))
            for entry, ignored in zip(wanted, _ignored(directory, wanted), strict=True):
                within = entry.path.removeprefix(directory.base)
                if entry.is_directory:
                    if ignored and not directory.rules.tracks(within) and not include.may_match_below(entry.path):
                        left_out.append(LeftOut(f"{entry.path}/", IGNORED))
                        continue
                    rules = directory.rules
                    # A submodule may be tracked in a directory that is ignored.
                    if rules.is_repository(within) and (not ignored or rules.tracks(within)):
                        inner = repository_rules(app / entry.path, rules, within)
                        below.append(_Directory(entry.path, inner, f"{entry.path}/", ignored=False))
                    else:
                        below.append(_Directory(entry.path, rules, directory.base, ignored))
                elif (included := include.matches(entry.path)) or not ignored or directory.rules.tracks(within):
                    _check_publishable(app, entry, included=included)
                    files.append(entry.path)
                    size += entry.status.st_size
                else:
                    left_out.append(LeftOut(entry.path, IGNORED))
        level = below
    _check_ca(app, files, left_out)
    include.check_all_matched()
    if not files:
        raise ConfigError(f"{shown(app)} holds no files for the zip{', ' + listed(left_out) if left_out else ''}")
    return Selection(sorted(files), sorted(left_out), size)


def copy(app: Path, selection: Selection, target: Path) -> Selection:
    """Copy the chosen files, and return those that were copied. Databases and data with a private key are left out.

    A file may change meanwhile: the copied bytes are checked, and not the file. Raises ConfigError if a module holds a
    key, or if a file cannot be read.
    """
    files: list[str] = []
    left_out = list(selection.left_out)
    for path in selection.files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        reason = _copy(app / path, target / path)
        if reason is None:
            files.append(path)
            continue
        (target / path).unlink()
        if reason == KEY and path.endswith(".py"):
            raise ConfigError(
                f"{shown(app / path)} has the words {PRIVATE!r} in it, so it may hold a key, and would be published:"
                " keep the key out of the code, for example in Secrets Manager, and write the words in another way"
            )
        left_out.append(LeftOut(path, reason))
    _check_ca(app, files, left_out)
    return Selection(files, sorted(left_out), selection.size)


def _entries(app: Path, directory: str) -> list[_Entry]:
    """Return the sorted entries of a directory. Opens no file and follows no link."""
    try:
        with os.scandir(app / directory) as found:
            names = sorted(entry.name for entry in found)
        entries = []
        for name in names:
            path = f"{directory}/{name}" if directory else name
            try:
                status = (app / path).lstat()
            except FileNotFoundError:  # a short-lived file of an editor
                continue
            entries.append(_Entry(path, stat.S_ISDIR(status.st_mode), status))
    except FileNotFoundError:
        if directory:
            raise ConfigError(f"{shown(app / directory)} changed while it was read: build again") from None
        raise ConfigError(f"{shown(app)} holds no files, expected those of the app") from None
    except OSError as error:
        raise ConfigError(f"{shown(app / directory)} cannot be read: {error.strerror}") from None
    return entries


def _not_never(app: Path, entries: Iterable[_Entry], left_out: list[LeftOut], include: _Include) -> Iterator[_Entry]:
    """Yield the entries whose names are allowed in the zip. Adds the others to `left_out`."""
    for entry in entries:
        name = entry.path.rpartition("/")[2]
        is_for_types = not entry.is_directory and (name == "py.typed" or name.endswith(".pyi"))
        if name in UNNOTICED or entry.path in NOT_DEPLOYED or is_for_types:
            continue
        if (reason := _never(app / entry.path)) is None:
            yield entry
            continue
        include.matches(entry.path)
        left_out.append(LeftOut(entry.path + "/" * entry.is_directory, reason))


def _never(path: Path) -> str | None:
    """Return the reason why a name is never in the zip; None if it may be."""
    name = path.name.lower()
    if name.startswith("."):
        return HIDDEN
    return next((why for why, patterns in NEVER.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)), None)


def _ignored(directory: _Directory, entries: Sequence[_Entry]) -> list[bool]:
    if directory.ignored:
        return [True] * len(entries)
    return directory.rules.ignored([(each.path.removeprefix(directory.base), each.is_directory) for each in entries])


def _check_publishable(app: Path, entry: _Entry, *, included: bool) -> None:
    """Raise ConfigError if this is no regular file, or if its name is not UTF-8, as names in a zip must be."""
    found = shown(app / entry.path)
    kinds: dict[Callable[[int], bool], str] = {
        stat.S_ISLNK: "a symbolic link",
        stat.S_ISSOCK: "a socket",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    kind = next((text for is_kind, text in kinds.items() if is_kind(entry.status.st_mode)), None)
    if kind is not None:
        what = "put what it leads to in its place" if kind == "a symbolic link" else "remove it"
        rest = "leave it out of package-include" if included else "have git ignore it"
        raise ConfigError(f"{found} is {kind}, expected a file: {what}, or {rest}")
    try:
        os.fsencode(entry.path).decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{found} has a name that is not UTF-8: rename it") from None


def _copy(source: Path, target: Path) -> str | None:
    """Copy a file in blocks. Return the reason why the copy must not be published; None if it may be."""
    tail, is_first, database = b"", True, None
    longest = max(map(len, KEYS))
    found = None
    try:
        # The flags refuse a link or a pipe that has replaced the file meanwhile.
        with (
            os.fdopen(os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file,
            target.open("wb") as copied,
        ):
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{shown(source)} changed while it was read: build again")
            while block := file.read(BLOCK):
                if is_first and block.startswith(DATABASES):
                    database = DATABASE
                is_first = False
                # A key may begin in one block and end in the next.
                if any(key in tail + block for key in KEYS):
                    found = KEY
                tail = block[-longest:]
                copied.write(block)
    except OSError as error:
        raise ConfigError(f"{shown(source)} cannot be read: {error.strerror}") from None
    if is_first and source.suffix.lower() == ".db":
        return DATABASE  # an empty file: a database without tables
    return found or database


def _check_ca(app: Path, files: Iterable[str], left_out: Iterable[LeftOut]) -> None:
    """Raise ConfigError if the CA file exists and would be left out: the app would no longer verify the database."""
    reason = next((each.reason for each in left_out if each.path == CA_FILE), None)
    if reason is None or CA_FILE in files:
        return
    expected = (
        f'`git add --force {CA_FILE}` there, or outside of a checkout `package-include = ["{app.name}/{CA_FILE}"]` in'
        " [tool.crudstack] of pyproject.toml"
        if reason == IGNORED
        else "put AWS's bundle of certificates in its place"
    )
    raise ConfigError(
        f"{shown(app / CA_FILE)} would be left out ({reason}), and without it the app does not verify the database's"
        f" certificate: {expected}, or delete the file"
    )


class _Include:
    """The setting `package-include`: patterns, as in `.gitignore`, of files that go in although git ignores them."""

    def __init__(self, app: Path) -> None:
        self._app, self._file = app, app.parent / "pyproject.toml"
        self._patterns = self._read()
        self._specs = {pattern: GitIgnoreSpec.from_lines([pattern]) for pattern in self._patterns}
        self._unmatched = set(self._patterns)

    def matches(self, path: str) -> bool:
        """Return whether a pattern matches a file of the app."""
        found = [each for each, spec in self._specs.items() if spec.match_file(f"{self._app.name}/{path}")]
        self._unmatched.difference_update(found)
        return bool(found)

    def may_match_below(self, directory: str) -> bool:
        """Return whether files below an ignored directory may match a pattern."""
        parts = [self._app.name, *directory.split("/")]
        return any(_may_match_below(pattern, parts) for pattern in self._patterns)

    def check_all_matched(self) -> None:
        """Raise ConfigError if a pattern has matched no file, because a file that the app needs is missing then."""
        if self._unmatched:
            raise ConfigError(
                f"package-include in {self._file} names {min(self._unmatched)!r}, and no file of {self._app} matches:"
                f" make the file first, or remove the pattern; patterns are relative to {self._app.parent}"
            )

    def _read(self) -> list[str]:
        try:
            tools = tomllib.loads(self._file.read_bytes().decode()).get("tool", {})
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"{self._file} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"{self._file} is no TOML: {error}") from None
        settings = tools.get("crudstack", {}) if isinstance(tools, dict) else tools
        expected = 'expected `package-include = ["app/data/*.json"]` alone in [tool.crudstack]'
        if not isinstance(settings, dict) or (unknown := sorted(settings.keys() - {"package-include"})):
            raise ConfigError(f"{self._file} has {unknown[0] if isinstance(settings, dict) else settings}: {expected}")
        patterns = settings.get("package-include", [])
        if not isinstance(patterns, list) or not all(isinstance(each, str) and each.strip() for each in patterns):
            raise ConfigError(f"package-include in {self._file} is {patterns!r}: {expected}")
        for pattern in patterns:
            if pattern.startswith(("!", "#")) or ".." in pattern.split("/"):
                raise ConfigError(f"package-include in {self._file} has {pattern!r}: {expected}")
        return patterns


def _may_match_below(pattern: str, parts: Sequence[str]) -> bool:
    """Return whether files below this directory may match. If that is not certain, return True."""
    wanted = pattern.strip("/").split("/")
    if len(wanted) == 1 and not pattern.startswith("/"):
        return True
    for part, wish in zip(parts, wanted, strict=False):
        if wish == "**":
            return True
        if not {"[", "\\"} & set(wish) and not fnmatch.fnmatchcase(part, wish):
            return False
    return True


def shown(path: Path | str) -> str:
    """Return a path as one line of printable text, whatever bytes are in it."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


LISTED = 5
"""The largest number of files of one directory that are named. Of more files only the number is printed."""


def listed(left_out: Sequence[LeftOut]) -> str:
    """Return one line about the files that were left out and why. Many files of one directory are only counted."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    for each in left_out:
        folder = re.sub(r"[^/]*/?$", "", each.path)
        by_reason.setdefault(each.reason, {}).setdefault(folder, []).append(each.path)
    texts = []
    for reason, folders in sorted(by_reason.items()):
        names: list[str] = []
        for folder, paths in sorted(folders.items()):
            names += paths if len(paths) <= LISTED else [f"{len(paths):,} files in {folder or './'}"]
        more = len(names) - 4 * LISTED
        text = ", ".join(map(shown, names[: 4 * LISTED])) + (f", and {more:,} more" if more > 0 else "")
        texts.append(f"{text} ({reason})")
    return f"left out: {'; '.join(texts)}" if texts else "nothing was left out"
