"""One run per output_dir."""

import errno
import fcntl
import json
import os
import re
import resource
import socket

import pytest
import torch.distributed as dist

from notus.engine.lock import OutputLock
from notus.errors import UserError


@pytest.fixture(autouse=True)
def first_rank(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)


def test_the_second_is_told_who_holds_it(tmp_path):
    with OutputLock(tmp_path) as held:
        held.take()
        held.take()  # once is enough
        about = json.loads((tmp_path / "lock").read_text())
        assert about["host"] == socket.gethostname() and about["pid"] == os.getpid()
        told = re.escape(f"in use by another run ({json.dumps(about)})")
        with OutputLock(tmp_path) as second, pytest.raises(UserError, match=told):
            second.take()
        assert json.loads((tmp_path / "lock").read_text()) == about
    assert (tmp_path / "lock").read_text() == ""
    with OutputLock(tmp_path) as third:
        third.take()


def test_what_a_dead_process_left_is_free(tmp_path):
    about = {"host": "elsewhere", "pid": 1, "started": "long ago"}
    (tmp_path / "lock").write_text(json.dumps(about))
    with OutputLock(tmp_path) as held:
        held.take()  # the kernel decides, not the text
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(file, operation) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with OutputLock(tmp_path) as held, OutputLock(tmp_path) as second:
        held.take()
        (warning,) = capsys.readouterr().err.splitlines()
        assert warning.startswith(f"warning: {tmp_path / 'lock'}: no lock (No locks available); ")
        second.take()


def test_no_space_for_it(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with OutputLock(tmp_path) as held, pytest.raises(UserError, match="lock: cannot be writ"):
            held.take()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_other_ranks_take_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    with OutputLock(tmp_path) as held:
        held.take()
    assert not list(tmp_path.iterdir())
