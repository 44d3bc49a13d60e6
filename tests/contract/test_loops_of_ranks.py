"""For-loops over a training on two real ranks: what the others are told of an error, and signals before `break`."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from launching import ROOT, end_of, environment, free_port, torchrun, warmed

pytestmark = pytest.mark.distributed

HEAD = """
    import sys
    from scenarios import build_dvae_trainer
    trainer = build_dvae_trainer(sys.argv[1], num_train_steps=100, save_model_every=2, backend="accelerate")
    rank = trainer.backend.rank
"""
IN_THE_BODY = """
    for step, numbers in trainer.steps():
        if rank == 1 and step == 3:
            raise KeyError("my own mistake")
"""
IN_A_BLOCK = """
    with trainer:
        for step, numbers in trainer.steps():
            if rank == 1 and step == 3:
                sys.exit("no more of this")
"""
BETWEEN_LOOPS = """
    for step, numbers in trainer.steps():
        if step == 3:
            break
    if rank == 1:
        open("nowhere/my_file")
    for step, numbers in trainer.steps():
        pass
"""


def run_ranks(folder: Path, body: str) -> list[tuple[int, str]]:
    """Run a script as two ranks without a launcher; return exit code and standard error of each."""
    (folder / "script.py").write_text(textwrap.dedent(HEAD) + textwrap.dedent(body))
    command, variables = warmed([sys.executable, str(folder / "script.py"), str(folder / "run")])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            command,
            cwd=folder,
            env=environment(**{**variables, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(2)
    ]
    errors = [end_of(process, 200)[1] for process in ranks]
    return [(process.returncode, error) for process, error in zip(ranks, errors, strict=True)]


@pytest.mark.parametrize(
    "body, reason, code",
    [
        (IN_THE_BODY, "it ended with: KeyError: 'my own mistake'", 1),
        (IN_A_BLOCK, "it ended with: SystemExit: no more of this", 1),
        (BETWEEN_LOOPS, "it ended with: FileNotFoundError: [Errno 2] No such file or directory: 'nowhere/my_file'", 1),
    ],
    ids=["body", "block", "between"],
)
def test_an_error_of_one_ranks_script_ends_the_other_with_one_line(tmp_path, body, reason, code):
    (survivor, line), (guilty, errors) = run_ranks(tmp_path, body)
    assert (survivor, guilty) == (69, code), (line, errors)
    (last,) = [one for one in line.splitlines() if one.startswith("vqdist: error: ")]
    assert last.startswith("vqdist: error: lost rank 1 (host ") and "after step 3: " in last and reason in last
    newest = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert f"the last complete checkpoint is {newest}: the same command goes on" in last
    assert "Traceback" not in line and ("Traceback" in errors) == (body is not IN_A_BLOCK)


def test_signals_and_errors_in_loops_of_two_ranks(tmp_path):
    done = torchrun([str(ROOT / "tests" / "workers" / "loop_worker.py"), str(tmp_path)])
    assert done.stdout.count("as expected") == 2
