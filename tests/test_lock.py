"""Two runs in one folder: the second is told who has it; a kill lets go."""

import os
import signal
import subprocess
import sys

import pytest

from lpt.engine.lock import locked
from lpt.errors import DiskError, LptError

HOLD = "import sys, time; from pathlib import Path; from lpt.engine.lock import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_the_other_process_is_named_and_a_kill_lets_go(tmp_path):
    folder = tmp_path / "run"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(LptError, match=rf"--out .*run is in use by process {other.pid} on .+ since 20"), locked(folder):
        raise AssertionError("held twice")
    os.kill(other.pid, signal.SIGKILL)
    other.communicate()
    with locked(folder):  # though its note is still there
        assert (folder / "running.json").exists()
    assert not (folder / "running.json").exists()


def test_what_a_killed_process_had_half_written_is_removed_by_the_next(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    half = [tmp_path / ".report.json.17.tmp", tmp_path / "checkpoints" / ".phase1.safetensors.17.tmp"]
    for path in half:
        path.write_bytes(b"half")
    others = [tmp_path / "mine.tmp", tmp_path / "another run" / "checkpoints" / ".phase1.safetensors.18.tmp"]
    others[1].parent.mkdir(parents=True)
    for path in others:
        path.write_text("not of this run")
    with locked(tmp_path):
        assert not any(path.exists() for path in half) and all(path.exists() for path in others)


def test_a_note_that_cannot_be_removed_hides_no_other_error(tmp_path):
    with pytest.raises(DiskError, match=r"report\.json cannot be written"), locked(tmp_path):
        (tmp_path / "running.json").unlink()
        (tmp_path / "running.json").mkdir()
        raise DiskError(tmp_path / "report.json", OSError(30, "Read-only file system"))


def test_a_note_that_cannot_be_read_is_no_second_error(tmp_path):
    with locked(tmp_path):
        (tmp_path / "running.json").write_text("{")
        with pytest.raises(LptError, match="is in use by another process: wait"), locked(tmp_path):
            pass
