"""Whole runs in every way on every backend: average, discriminator, precision and torch.compile, cell by cell.

Run by torchrun, or on its own for the local backend, this file is the worker: one process group runs all cells.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from launching import run, torchrun
from scenarios import SHARDED, build_trainer, evaluated_weights, largest_difference, weights_of
from test_field_networks import backend_of
from torch import Tensor

from vqdist import VQGanVAE
from vqdist.errors import UserError
from vqdist.trainers.vqgan import VQGanVAETrainer

pytestmark = [pytest.mark.distributed, pytest.mark.nightly, pytest.mark.timeout(1800)]
BACKENDS = ("local", "accelerate", "fsdp2", "zero0", "zero1", "zero2", "zero3")
STEPS = 2


class Cell(NamedTuple):
    """A way of training.

    Attributes:
        average: whether there is a moving average.
        gan: whether there is a discriminator.
        precision: fp32 or bf16.
        compiled: whether encoder and decoder are compiled.
    """

    average: bool
    gan: bool
    precision: str
    compiled: bool

    def __str__(self) -> str:
        said = (self.average, "average"), (self.gan, "gan"), (self.compiled, "compiled")
        return "-".join([self.precision, *(word for is_on, word in said if is_on)])


CELLS = [Cell(*values) for values in itertools.product((False, True), (False, True), ("fp32", "bf16"), (False, True))]
# ends of the one line that a backend says of a cell which it cannot do
COMPILE_REFUSED = "leave it out, or use ZeRO 0, 1, 2, DDP or FSDP2"


def expected(backend: str, cell: Cell) -> str:
    """Return `works`, or the end of the line that refuses."""
    return COMPILE_REFUSED if backend == "zero3" and cell.compiled else "works"


# --------------------------------------------------------------------------------------- the worker


def build(folder: Path, cell: Cell, **options: Any) -> VQGanVAETrainer:
    """Return the trainer of a cell; SGD, as Adam makes full steps of gradients that are rounding."""
    model: dict[str, Any] = {"dim": 8, "use_gan": cell.gan}
    players = {"discriminator_start": 1, "apply_grad_penalty_every": 1, "discr_max_grad_norm": 0.5}
    training = {"optimizer": "sgd", "lr": 0.05, "warmup_steps": 2, "max_grad_norm": 0.5}
    often = {"save_results_every": 1, "save_model_every": 1, "validate_every": 1, "num_images_save": 4}
    own = {"use_ema": cell.average, "precision": cell.precision, "compile": cell.compiled, "dist_timeout": 3.0}
    given = {**training, **often, **own, **(players if cell.gan else {}), **options}
    return build_trainer(folder / str(cell), quantizer="vq", model=model, num_train_steps=STEPS, **given)


def whole_run(folder: Path, cell: Cell, **options: Any) -> dict[str, Tensor]:
    """Train to the end, load what was exported, resume from both checkpoints; return the weights at the end."""
    trainer = build(folder, cell, **options)
    assert trainer.train()["images"] == 16
    weights, evaluated = weights_of(trainer), evaluated_weights(trainer)
    check_files(trainer)
    if trainer.is_main:
        check_export(trainer, evaluated)
    trainer.backend.barrier()
    check_resume(build(folder, cell, **options), weights)
    return weights


def check_files(trainer: VQGanVAETrainer) -> None:
    """Assert that each step left a picture and a checkpoint, and that log lines are of every step."""
    pictures = {path.name for path in (trainer.run_folder / "results").glob("*.png")}
    checkpoints = {path.name for path in (trainer.run_folder / "checkpoints").iterdir() if path.is_dir()}
    for step in range(1, STEPS + 1):
        assert f"step_{step:08d}.png" in pictures, sorted(pictures)
        assert f"step_{step:08d}" in checkpoints, sorted(checkpoints)
    lines = (trainer.run_folder / "metrics.jsonl").read_text().splitlines()
    assert sum('"valid/psnr"' in line for line in lines) == STEPS


def check_export(trainer: VQGanVAETrainer, evaluated: dict[str, Tensor]) -> None:
    """Assert that the export is the network that was evaluated, and that it reconstructs."""
    model = VQGanVAE.from_pretrained(trainer.run_folder / "export")
    difference, name = largest_difference(evaluated, dict(model.autoencoder.state_dict()))
    assert difference == 0, f"{name} of the export differs by {difference}"
    with torch.no_grad():
        recon = model.eval()(torch.rand(2, 3, 16, 16))
    assert recon.shape == (2, 3, 16, 16) and recon.isfinite().all()


def check_resume(trainer: VQGanVAETrainer, expected: dict[str, Tensor]) -> None:
    """Assert that a new trainer is where the run ended, and gets there from the checkpoint before."""
    assert trainer.step == STEPS
    assert_same(expected, weights_of(trainer))
    trainer.load(trainer.checkpoints.path(STEPS - 1))
    assert trainer.step == STEPS - 1
    trainer.train_step()
    assert_same(expected, weights_of(trainer))


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    difference, name = largest_difference(first, second)
    assert difference == 0, f"{name} differs by {difference} after resume"


def outcome(folder: Path, cell: Cell, **options: Any) -> Any:
    """Return the weights of a cell, or what it raised: the line of a `UserError`, else the traceback."""
    torch._dynamo.reset()  # it keeps few graphs of one function
    try:
        return whole_run(folder, cell, **options)
    except UserError as error:
        return str(error)
    except Exception:
        return traceback.format_exc()


def main() -> None:
    import torch._dynamo
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # no processes beside those of the test
    folder, name = Path(sys.argv[1]), sys.argv[2]
    options = {"backend": "local"} if name == "local" else backend_of(name)
    unpenalised = {"apply_grad_penalty_every": 0} if name in SHARDED else {}
    results = {}
    for cell in CELLS:
        found = results[str(cell)] = outcome(folder, cell, **options, **(unpenalised if cell.gan else {}))
        print(name, cell, "works" if isinstance(found, dict) else found, flush=True)
    if os.environ.get("RANK", "0") == "0":
        torch.save(results, folder / "results.pt")


# --------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """Return how to get what a backend came to in every cell, by one start of it."""
    compiled = tmp_path_factory.mktemp("compiled")  # what one backend compiled serves the next

    @functools.cache
    def launched(name: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(name)
        arguments = [__file__, str(folder), name]
        variables = {"TORCHINDUCTOR_CACHE_DIR": str(compiled)}
        if name == "local":
            run([sys.executable, *arguments], timeout=1500, **variables)
        else:
            torchrun(arguments, timeout=1500, **variables)
        return torch.load(folder / "results.pt")

    return launched


@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cell_is_as_the_table_says(backend, cell, outcomes):
    found = outcomes(backend)[str(cell)]
    said = expected(backend, cell)
    if said == "works":
        assert isinstance(found, dict), found
    else:
        assert isinstance(found, str) and found.endswith(said) and "\n" not in found, found


def without_codebook(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if "_codebook." not in name}


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.compiled], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_network_trains_as_one_that_is_not(backend, cell, outcomes):
    compiled = outcomes(backend)[str(cell)]
    if isinstance(compiled, str):
        assert expected(backend, cell) != "works"
        return
    plain = outcomes(backend)[str(cell._replace(compiled=False))]
    tolerance = 1e-5
    if cell.precision == "bf16":  # other roundings within a kernel, by which an image may get another code
        plain, compiled = map(without_codebook, (plain, compiled))
        tolerance = 1e-2
    difference, name = largest_difference(plain, compiled)
    assert difference <= tolerance, f"{name} differs by {difference}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_option_changes_the_weights(backend, outcomes):
    found = outcomes(backend)
    first = Cell(average=False, gan=False, precision="fp32", compiled=False)
    key = "generator.decoder.last_layer.weight"
    for other in (first._replace(gan=True), first._replace(precision="bf16")):
        assert not torch.equal(found[str(first)][key], found[str(other)][key]), other
    assert not any(name.startswith("ema.") for name in found[str(first)])
    averaged = found[str(first._replace(average=True))]
    live = {name: one for name, one in averaged.items() if not name.startswith("ema.")}
    assert largest_difference(found[str(first)], live)[0] == 0
    assert averaged.keys() > live.keys()


if __name__ == "__main__":
    main()
