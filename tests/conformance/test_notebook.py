"""The notebook of docs/: it runs in a kernel, and what is stored with it is of a run of its code."""

from __future__ import annotations

import re
import time

import pytest
from jupyter_client.manager import start_new_kernel

from benchmarks.notebook import NOTEBOOK, digest, executed, in_short, read


def kinds(notebook) -> list[list[str]]:
    """Return for each cell in which forms it shows what, the streams as one."""
    shown = [
        [sorted(output.get("data", {"text": 0})) for output in cell.get("outputs", [])] for cell in notebook.cells
    ]
    return [sorted({kind for output in outputs for kind in output}) for outputs in shown]


def test_the_notebook_runs_and_shows_what_is_stored():
    stored = read()
    assert stored.metadata["outputs_of"] == digest(stored), "its code is newer: make docs-notebook"
    run = in_short(executed(read()))
    assert kinds(run) == kinds(stored) and sum("image/png" in kind for kind in kinds(run)) == 3
    losses = [float(loss) for loss in re.findall(r"^\d+ (\d\.\d+)$", printed(run), re.MULTILINE)]
    assert len(losses) == 6 and losses[-1] < 0.6 * losses[0]
    nats = [float(number) for number in re.findall(r"nats per code: (\d+\.\d+)", printed(run))]
    assert len(nats) == 4 and nats[-1] < nats[0] < 4.3  # ln 64 = 4.16


def printed(notebook) -> str:
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def test_links_of_the_notebook_lead_somewhere():
    prose = "\n".join(cell.source for cell in read().cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\(([^)#]+)\)", prose)
    assert targets and [name for name in targets if not (NOTEBOOK.parent / name).exists()] == []


# ------------------------------------------------------------------------------------------- a live session

TRAINER = """
import torch
from vqdist import DiscreteVAE, DiscreteVAETrainer
def trainer_of(name):
    torch.manual_seed(3)
    vae = DiscreteVAE(image_size=16, num_tokens=16, codebook_dim=8, num_layers=2, hidden_dim=8)
    options = dict(folder="synthetic:64", batch_size=4, valid_frac=0.25, save_results_every=0, validate_every=0)
    return DiscreteVAETrainer(vae, num_train_steps=STEPS, num_workers=0, results_folder=name, **options)
def weights(trainer):
    return torch.cat([tensor.flatten().float() for _, tensor in trainer.named_tensors()])
STEPS = 400
"""
LOOP = "for step, numbers in trainer.steps():\n    print('at', step, flush=True)"


class Session:
    """A kernel, as a notebook has it."""

    def __init__(self, folder):
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=str(folder), startup_timeout=120)

    def run(self, code: str, interrupt_at: str | None = None) -> tuple[str, str]:
        """Run a cell, and interrupt it when it has printed something; return the error's name and what was printed."""
        said: list[str] = []
        message = self.client.execute(code)
        interrupted = interrupt_at is None
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            answer = self.client.get_iopub_msg(timeout=300)
            content = answer["content"]
            if answer["parent_header"].get("msg_id") != message:
                continue
            if answer["msg_type"] == "stream" and content["name"] == "stdout":
                said.append(content["text"])
                if not interrupted and interrupt_at in "".join(said):
                    interrupted = True
                    self.manager.interrupt_kernel()
            if answer["msg_type"] == "status" and content["execution_state"] == "idle":
                break
        while (reply := self.client.get_shell_msg(timeout=60))["parent_header"].get("msg_id") != message:
            pass
        return reply["content"].get("ename", ""), "".join(said)

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def session(tmp_path):
    session = Session(tmp_path)
    yield session
    session.close()


@pytest.mark.nightly  # it interrupts, and waits
def test_an_interrupted_cell_is_continued_to_the_same_weights(session):
    assert session.run(TRAINER)[0] == ""
    assert session.run("whole = trainer_of('whole')\nwhole.train()\nwhole.close()")[0] == ""
    assert session.run("trainer = trainer_of('cell')")[0] == ""
    error, said = session.run(LOOP, interrupt_at="at 3\n")
    assert error == "Stopped" and "at 400" not in said
    stopped = session.run("print(trainer.step, trainer.checkpoints.steps())")[1]
    step = int(stopped.split()[0])
    assert 3 <= step < 400 and stopped.split()[-1] == f"[{step}]"  # it is saved
    error, said = session.run(LOOP, interrupt_at=f"at {step + 2}\n")
    assert error == "Stopped" and f"at {step + 1}\n" in said
    assert session.run("last = [step for step, _ in trainer.steps()][-1]\nprint(last)")[1].split()[-1] == "400"
    assert session.run("print(torch.equal(weights(trainer), weights(whole)))")[1].split()[-1] == "True"


@pytest.mark.nightly  # a kernel and two interpreters
def test_a_dataset_of_a_notebook_in_processes_that_are_not_forked_is_one_line(session):
    cell = """
import multiprocessing, torch
from vqdist import DiscreteVAE, DiscreteVAETrainer, UserError
class Mine(torch.utils.data.Dataset):
    def __len__(self): return 64
    def __getitem__(self, index): return torch.full((3, 16, 16), index / 64)
vae = DiscreteVAE(image_size=16, num_tokens=16, codebook_dim=8, num_layers=2, hidden_dim=8)
options = dict(dataset=Mine(), batch_size=4, num_train_steps=2, save_results_every=0, validate_every=0)
with DiscreteVAETrainer(vae, num_workers=1, results_folder="forked", **options) as trainer:
    trainer.train()
multiprocessing.set_start_method("spawn", force=True)
with DiscreteVAETrainer(vae, num_workers=1, results_folder="spawned", **options) as trainer:
    try:
        trainer.train()
    except UserError as error:
        print(error)
"""
    error, said = session.run(cell)
    assert error == "" and "Mine is defined in a notebook or at a prompt" in said and "num_workers 0" in said
