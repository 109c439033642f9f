"""Locks of folders: held against other processes and hosts, taken over from dead ones."""

import json
import os
import socket
import time

from common import UserError, locks

import pytest
from helpers import locking_process


def test_a_folder_is_locked_until_its_process_ends(tmp_path):
    folder = tmp_path / "run"
    first, answer = locking_process(folder)
    assert answer == "locked"
    with pytest.raises(UserError) as error:
        locks.lock(folder, "take another folder")
    assert str(error.value) == (
        f"{folder} is in use by process {first.pid} on {socket.gethostname()}: wait for its end, "
        "or take another folder")
    (folder / ".latest.pth.123.tmp").touch()  # of older versions
    (folder / ".latest.pth.ab12cd_9.tmp").touch()
    (folder / ".latest.pth.lic-ab12cd_9.tmp").touch()
    first.kill()
    assert (folder / ".lock").exists()
    locks.lock(folder, "take another folder")  # stale: taken over
    try:
        assert [path.name for path in folder.iterdir()] == [".lock"]
        assert f"is in use by process {os.getpid()} on" in locking_process(folder)[1]
        locks.lock(folder, "take another folder")  # a second time by the same process
    finally:
        locks.release(folder)
    assert not list(folder.iterdir())
    with locks.locked(folder, ""):
        assert "is in use by process" in locking_process(folder)[1]
    second, answer = locking_process(folder)
    assert answer == "locked"
    second.kill()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"process": "x", "host": 1}'])
def test_a_broken_lock_is_taken_over(content, tmp_path):
    (tmp_path / ".lock").write_bytes(content)
    with locks.locked(tmp_path, ""):
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_of_another_host_ends_with_its_signs_of_life(tmp_path):
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"process": 7, "host": "elsewhere"}))
    with pytest.raises(UserError) as error:
        locks.lock(tmp_path, "take another folder")
    assert str(error.value).endswith(
        "process 7 on elsewhere (last sign of life 0 s ago): wait for its end, or, if that process "
        f"no longer runs, remove {path}, or take another folder")
    assert json.loads(path.read_text())["process"] == 7
    then = time.time() - locks.SILENT - 1
    os.utime(path, (then, then))
    with locks.locked(tmp_path, ""):
        assert f"is in use by process {os.getpid()} on" in locking_process(tmp_path)[1]
