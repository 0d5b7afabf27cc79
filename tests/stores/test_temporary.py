"""Directories of processes: those of processes that are gone are removed, and no others."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import apsw
import pytest

from app.autocrud.resource_manager.runtime import temporary
from app.autocrud.resource_manager.runtime.temporary import ProcessDirectory, remove_abandoned

DAY = 24 * 3600


@pytest.fixture(autouse=True)
def tmp(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(temporary, "_cleaned", set())
    return tmp_path


def process(script: str) -> subprocess.Popen[str]:
    """Run a script in another process; it has answered with a line when this returns."""
    begin = "import os, sys, time\nfrom app.autocrud.resource_manager.runtime.temporary import ProcessDirectory\n"
    command = [sys.executable, "-c", begin + textwrap.dedent(script)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


HOLD = """
    directory = ProcessDirectory()
    (directory.path / "file").write_text("content")
    print(directory.path, flush=True)
    sys.stdin.read()
"""


def ends(started: subprocess.Popen[str], how: int = signal.SIGKILL) -> None:
    started.send_signal(how)
    started.communicate()


def names(tmp: Path) -> list[str]:
    return sorted(path.name for path in tmp.iterdir())


def test_the_directory_of_a_killed_process_is_removed_by_the_next(tmp):
    killed = process(HOLD)
    left = Path(killed.stdout.readline().strip())
    ends(killed)
    assert (left / "file").exists()
    with ProcessDirectory() as mine:
        assert names(tmp) == [mine.path.name]
    assert names(tmp) == []


def test_the_directory_of_a_stopped_process_stays():
    living = process(HOLD)
    path = Path(living.stdout.readline().strip())
    living.send_signal(signal.SIGSTOP)
    with ProcessDirectory():
        remove_abandoned()
        assert (path / "file").read_text() == "content"
    living.send_signal(signal.SIGCONT)
    ends(living, signal.SIGTERM)


def test_a_child_keeps_what_its_parent_left_and_does_not_remove_it_before(tmp):
    parent = process(
        """
        directory = ProcessDirectory()
        if os.fork() == 0:
            if os.fork() == 0:
                sys.exit()  # this child ends in the ordinary way
            os.wait()
            print(directory.path, directory.path.exists(), os.getpid(), flush=True)
            sys.stdin.read()
            os._exit(0)
        time.sleep(60)
        """
    )
    path, there, child = parent.stdout.readline().split()
    assert there == "True", "the end of a child removed the directory of its parent"
    parent.kill()
    parent.wait()
    remove_abandoned()
    assert Path(path).exists(), "the child still uses it"
    os.kill(int(child), signal.SIGKILL)
    parent.communicate()  # its pipes close with the child
    remove_abandoned()
    assert names(tmp) == []


def test_a_program_that_a_killed_process_started_keeps_nothing(tmp):
    parent = process(
        """
        import subprocess
        directory = ProcessDirectory()
        started = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], close_fds=False)
        print(started.pid, flush=True)
        time.sleep(60)
        """
    )
    started = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    os.kill(started, 0)  # it runs
    remove_abandoned()
    assert names(tmp) == []
    parent.communicate()


def test_directories_of_other_programs_stay(tmp, monkeypatch):
    precious = tmp / "precious"
    precious.mkdir()
    (precious / "file").touch()
    name = f"{temporary.PREFIX}{'0' * 16}"
    (tmp / name).symlink_to(precious)
    for other in ("crudstack-tests", f"{temporary.PREFIX}x", f"{temporary.PREFIX}{'0' * 16}.bak", "crudstack-cache"):
        (tmp / other).mkdir()
    (tmp / f"{temporary.PREFIX}{'1' * 16}").touch()  # no directory
    before = names(tmp)
    remove_abandoned()
    assert names(tmp) == before
    assert (precious / "file").exists()

    (tmp / f"{temporary.PREFIX}{'2' * 16}").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 12345)
        remove_abandoned()
    assert (tmp / f"{temporary.PREFIX}{'2' * 16}").exists(), "it belongs to another user"
    remove_abandoned()
    assert not (tmp / f"{temporary.PREFIX}{'2' * 16}").exists()


def test_a_removal_that_was_stopped_half_way_is_finished(tmp, monkeypatch):
    left = tmp / f"{temporary.PREFIX}{'a' * 16}"
    left.mkdir()
    for number in range(3):
        (left / f"{number}").touch()

    def half(path, **_):
        (Path(path) / "1").unlink()

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        remove_abandoned()
    assert names(left) == ["0", "2"]
    remove_abandoned()
    assert names(tmp) == []


def test_a_cleaner_between_mkdir_and_the_lock_costs_another_attempt(tmp, monkeypatch):
    """P2: no process uses a directory that a cleaner has removed, or is removing."""
    locked, attempts = temporary._locked, []

    def late(path):
        attempts.append(path)
        if len(attempts) == 1:
            monkeypatch.setattr(temporary, "_locked", locked)
            remove_abandoned()  # of another process
            monkeypatch.setattr(temporary, "_locked", late)
        if len(attempts) == 2:
            held = locked(path)  # a cleaner that is about to remove it
            try:
                return locked(path)
            finally:
                os.close(held)
        return locked(path)

    monkeypatch.setattr(temporary, "_locked", late)
    monkeypatch.setattr(temporary, "_cleaned", {str(tmp)})
    with ProcessDirectory() as mine:
        assert len(attempts) == 3
        assert mine.path == Path(attempts[2])
        assert mine.path.is_dir()


def test_many_processes_that_start_and_are_killed_leave_each_other_alone(tmp):
    rng = random.Random(18)
    script = """
        import random
        from app.autocrud.resource_manager.runtime import temporary
        print("up", flush=True)
        while True:
            temporary._cleaned.clear()
            with ProcessDirectory() as directory:
                (directory.path / "file").write_text("content")
                for _ in range(random.randrange(4)):
                    temporary.remove_abandoned()
                if (directory.path / "file").read_text() != "content":
                    sys.exit(3)
    """
    running = [process(script) for _ in range(4)]
    for one in running:
        one.stdout.readline()
    for _ in range(12):
        time.sleep(rng.random() / 10)
        victim = running.pop(0)
        assert victim.poll() is None, "it found its directory removed"
        ends(victim)
        running.append(process(script))
        running[-1].stdout.readline()
    for one in running:
        assert one.poll() is None
        ends(one)
    remove_abandoned()
    assert names(tmp) == []


# Those of earlier releases


def old(tmp: Path, name: str = "crudstack-0a_b1c2d") -> Path:
    path = tmp / name
    path.mkdir()
    for file in ("current", "lock"):
        (path / file).touch()
    connection = apsw.Connection(str(path / "copy-1.sqlite"))
    connection.pragma("journal_mode", "wal")
    connection.execute("CREATE TABLE t (x)")
    connection.close()
    return path


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_an_old_copy_that_no_process_has_open_is_removed(tmp):
    path = old(tmp)
    remove_abandoned()
    assert path.exists(), "it is young, so it may be in the making"
    age(path, 2 * DAY)
    remove_abandoned()
    assert not path.exists()


def test_an_old_copy_that_a_process_has_open_stays(tmp):
    path = old(tmp)
    script = f"""
        import apsw
        connection = apsw.Connection({str(path / "copy-1.sqlite")!r})
        connection.execute("SELECT * FROM t").fetchall()
        print("open", flush=True)
        sys.stdin.read()
    """
    reader = process(script)
    reader.stdout.readline()
    age(path, 2 * DAY)
    remove_abandoned()
    assert path.exists()
    ends(reader)
    remove_abandoned()
    assert not path.exists()


def test_a_directory_of_another_program_with_a_like_name_stays(tmp):
    path = tmp / "crudstack-abcdefgh"
    path.mkdir()
    (path / "data").touch()
    age(path, 2 * DAY)
    remove_abandoned()
    assert path.exists()


def test_directories_without_locks_work_and_the_log_says_so(tmp, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(temporary.fcntl, "flock", refuse)
    with ProcessDirectory() as mine:
        assert mine.path.is_dir()
        assert names(tmp) == [mine.path.name]
    assert "cannot be locked" in caplog.text
    assert names(tmp) == []


def test_without_a_free_descriptor_no_directory_without_a_lock_is_made(tmp, monkeypatch):
    """It would stay for ever if the process is killed later."""

    def refuse(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(temporary.os, "open", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            ProcessDirectory()
    assert names(tmp) == []
    with ProcessDirectory() as mine:
        assert mine.path.name.startswith(temporary.PREFIX)
