"""One process writes a folder at a time; whoever ends, however it ends, is in nobody's way."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import environment
from scenarios import build_dvae_trainer, build_tokenizer

from vqdist.backends import create_backend
from vqdist.data.dataset import ImageDataset
from vqdist.encoding import CodeWriter
from vqdist.errors import UserError
from vqdist.files import LOCK, lock_folder

HOLD = "import sys, time; from pathlib import Path; from vqdist.files import lock_folder\n"
HOLD += "lock = lock_folder(Path(sys.argv[1])); print('held', flush=True); time.sleep(100)"


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock of `tmp_path`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_another_process_is_refused_with_who_holds_it(tmp_path, holder):
    with pytest.raises(UserError) as error:
        lock_folder(tmp_path, patience=100)  # of this machine's process the system knows that it lives
    assert str(error.value) == (
        f"another process writes {tmp_path} (process {holder.pid} on {socket.gethostname()}); wait for its end, stop "
        "it, or give another folder"
    )


def test_a_run_folder_that_is_in_use_is_refused_before_anything_is_written(tmp_path, holder):
    (tmp_path / "checkpoints" / "step_00000001.partial").mkdir(parents=True)  # the other one is writing it
    with pytest.raises(UserError, match=f"another process writes .*process {holder.pid} on"):
        build_dvae_trainer(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "checkpoints"]
    assert (tmp_path / "checkpoints" / "step_00000001.partial").is_dir()


def test_codes_are_written_by_one_process(tmp_path, holder):
    writer = CodeWriter(
        build_tokenizer(), ImageDataset("synthetic:8", 16, augment=False), tmp_path, batch_size=4, shard_size=8
    )
    with pytest.raises(UserError, match=f"another process writes .*process {holder.pid} on"):
        writer.write(create_backend("local"), num_workers=0)
    holder.kill()
    holder.wait()
    writer.write(create_backend("local"), num_workers=0)
    assert not (tmp_path / LOCK).exists()


def test_a_killed_process_leaves_its_file_and_no_lock(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == holder.pid
    lock = lock_folder(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    del lock
    assert not (tmp_path / LOCK).exists()


def test_one_process_has_it_as_often_as_it_likes(tmp_path):
    first, second = build_dvae_trainer(tmp_path), build_dvae_trainer(tmp_path)
    assert first.run.lock is second.run.lock and (tmp_path / LOCK).is_file()
    first.close()
    assert (tmp_path / LOCK).is_file()
    second.close()
    assert not (tmp_path / LOCK).exists()


def test_a_forked_process_neither_has_it_nor_gives_it_up(tmp_path):
    lock = lock_folder(tmp_path)
    child = os.fork()
    if child == 0:
        refused = 1
        try:
            lock_folder(tmp_path)
        except UserError:
            refused = 0
        del lock
        gc.collect()
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert lock is not None and (tmp_path / LOCK).is_file()


def test_a_process_of_another_machine_is_waited_for(tmp_path, holder):
    """Its machine may have died; the file server gives the lock up after a while."""
    (tmp_path / LOCK).write_text(json.dumps({"host": "far-away", "pid": 7}))
    began = time.monotonic()
    with pytest.raises(UserError, match=r"\(process 7 on far-away\)"):
        lock_folder(tmp_path, patience=0.5)
    assert 0.5 <= time.monotonic() - began < 20
    subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({holder.pid}, 9)"])
    assert lock_folder(tmp_path, patience=60) is not None


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert lock_folder(tmp_path) is None
    build_dvae_trainer(tmp_path / "run").train_step()


def test_another_error_is_not_taken_for_a_missing_lock(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        lock_folder(Path(tmp_path / "missing"))
