"""Runs that meet NaN, on any backend: in one process, or in the two ranks of workers/backend_worker.py.

The last rank alone meets it wherever a rank may do so alone.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scenarios import EVERYTHING, build_dvae_trainer, build_trainer, weights_of
from torch import Tensor

from vqdist.errors import UserError
from vqdist.trainers.base import Trainer

# a line at steps 1 and 10 and at the end, checkpoints between them
SELDOM = {"num_train_steps": 12, "log_every": 10, "save_model_every": 2, "valid_frac": 0.0, "check_ranks_every": 0}


def penalty() -> dict:
    """None where the discriminator is sharded, as the worker says in EVERYTHING."""
    return {"apply_grad_penalty_every": EVERYTHING["apply_grad_penalty_every"]}


def is_last(trainer: Trainer) -> bool:
    return trainer.backend.rank == trainer.backend.world_size - 1


def spoil_images(trainer: Trainer, steps: Collection[int]) -> None:
    """Images of these steps are NaN on the last rank."""
    update = trainer.update

    def spoilt(batches: list[Any]) -> dict[str, Tensor]:
        spoils = is_last(trainer) and trainer.step + 1 in steps
        return update(list(map(without_a_number, batches)) if spoils else batches)

    def without_a_number(batch: Any) -> Any:  # images, or what begins with them
        return batch * torch.nan if isinstance(batch, Tensor) else (batch[0] * torch.nan, *batch[1:])

    trainer.update = spoilt


def spoil_number(trainer: Trainer, steps: Collection[int]) -> None:
    """Log an infinite loss on the last rank in these steps; every gradient is finite."""
    loss = trainer.loss

    def spoilt(*args) -> tuple[Tensor, dict[str, Tensor]]:
        value, numbers = loss(*args)
        spoils = is_last(trainer) and trainer.step + 1 in steps
        return value, {**numbers, "recon_loss": numbers["recon_loss"] * torch.inf} if spoils else numbers

    trainer.loss = spoilt


def without_steps(trainer: Trainer, steps: Collection[int]) -> None:
    """Take the images of these steps and do nothing with them."""
    update, average = trainer.update, trainer.networks.update_average
    trainer.update = lambda batches: {} if trainer.step + 1 in steps else update(batches)
    trainer.networks.update_average = lambda: None if trainer.step in steps else average()


def spoil_largest(trainer: Trainer, tensors: list[tuple[str, Tensor]]) -> str:
    """Make one value of the largest tensor NaN on the last rank; return the tensor's name."""
    name, tensor = max(tensors, key=lambda item: item[1].numel())
    if is_last(trainer):
        with torch.no_grad():
            tensor.data.view(-1)[0] = torch.nan
    return name


def after(trainer: Trainer, step: int, do: Callable[[], None]) -> None:
    """Do something after a step's average and before its checkpoint."""
    update_average = trainer.networks.update_average

    def then() -> None:
        update_average()
        if trainer.step == step:
            do()

    trainer.networks.update_average = then


def end_of(trainer: Trainer) -> str:
    """Train to the line that ends it, which is the same on every rank; return that."""
    with pytest.raises(UserError) as error:
        trainer.train()
    message = str(error.value)
    assert "\n" not in message
    mark = torch.tensor([zlib.crc32(message.encode())], device=trainer.device)
    assert bool((trainer.backend.gather(mark) == mark).all()), message
    return message


def assert_ends(trainer: Trainer, problem: str, *, step: int, kept: list[int]) -> None:
    """Training ends with this problem of this step, the advice names the newest checkpoint, and all are finite."""
    newest = f"the newest checkpoint is {trainer.checkpoints.path(kept[-1])}: resume" if kept else "no checkpoint yet"
    message = end_of(trainer)
    assert re.search(rf"{problem} at step {step}; .*{re.escape(newest)}", message), message
    assert "--trainer.allow_config_change true" in message
    trainer.backend.barrier()
    assert trainer.checkpoints.steps() == kept
    if trainer.is_main:
        for path in trainer.run_folder.rglob("*.safetensors"):
            assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values()), path
    assert (trainer.run_folder / "export").exists() == bool(kept)
    trainer.backend.barrier()


def raises(folder: Path, **backend) -> None:
    """Nothing is committed after NaN in an image, an update, a moment, the average or an idle discriminator."""
    several = r" \(rank 1\)" if backend else ""
    trainer = build_dvae_trainer(folder / "image", **SELDOM, **backend)
    spoil_images(trainer, {5})
    assert_ends(trainer, f"^loss is nan in the vae{several}", step=5, kept=[2, 4])

    trainer = build_dvae_trainer(folder / "number", **SELDOM, **backend)
    spoil_number(trainer, {10})
    assert_ends(trainer, f"^recon_loss is inf in the vae{several}", step=10, kept=[2, 4, 6, 8][-3:])

    trainer = build_dvae_trainer(folder / "moment", **SELDOM, **backend)
    moments = trainer.main_engine.held_moments
    after(trainer, 3, lambda: spoil_largest(trainer, [item for item in moments() if item[0].startswith("exp_avg ")]))
    # its norm is finite, and its update is not: weights are looked at, not numbers
    assert_ends(trainer, "^the weight .* of the vae is not finite", step=4, kept=[2])

    trainer = build_dvae_trainer(folder / "average", **SELDOM, **backend)
    averaged = list(trainer.main_engine.held_weights(trainer.ema.ema_model))
    after(trainer, 2, lambda: spoil_largest(trainer, averaged))
    assert_ends(trainer, "^the weight .* of the average is not finite", step=2, kept=[])

    trainer = build_trainer(folder / "idle", discriminator_start=100, **penalty(), **SELDOM, **backend)
    name = spoil_largest(trainer, list(trainer.engines["discriminator"].held_weights()))
    assert_ends(trainer, f"^the {re.escape(name)} of the discriminator is not finite", step=2, kept=[])


def skips(folder: Path, **backend) -> None:
    """Compare to the bit: dropped updates leave weights, codebooks, moments and average as without their steps."""
    shared = {"grad_accum_every": 2, "num_train_steps": 5, "log_every": 10, **backend}
    vqgan = {"quantizer": "vq", "discr_max_grad_norm": 0.5, "max_grad_norm": 0.5, **penalty(), **shared}
    for build, options, spoil, steps in (
        (build_trainer, vqgan, spoil_images, {1, 3}),
        (build_dvae_trainer, shared, spoil_number, {2}),
    ):
        name = spoil.__name__
        skipping = build(folder / name, on_nonfinite="skip", **options)
        spoil(skipping, steps)
        skipping.train()
        straight = build(folder / f"without_{name}", **options)
        without_steps(straight, steps)
        straight.train()
        expected = weights_of(straight)
        for key, tensor in weights_of(skipping).items():
            assert torch.equal(tensor, expected[key]), f"{name}: {key}"
        for engine in straight.engines:
            pairs = zip(straight.engines[engine].held_moments(), skipping.engines[engine].held_moments(), strict=True)
            for (key, moment), (_, other) in pairs:
                assert torch.equal(moment, other), f"{name}: {key} of the {engine}"
        straight.backend.barrier()
        lines = [json.loads(line) for line in (skipping.run_folder / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "lr" in line]
        assert [line["skipped_steps"] for line in lines] == [int(1 in steps), len(steps)]
        skipping.backend.barrier()
        again = build(folder / name, on_nonfinite="skip", **options)
        assert again.step == 5 and again.guard.skipped_steps == len(steps)


def skipping_gives_up(folder: Path, **backend) -> None:
    """Not after two, one good one and two, but after three in a row; what it names is the first of the three."""
    options = {**SELDOM, "on_nonfinite": "skip", "max_skipped_steps": 3, **backend}
    trainer = build_dvae_trainer(folder / "gives_up", **options)
    spoil_images(trainer, {2, 3, 5, 6, 7})
    cause = r"^3 updates of the vae in a row were skipped, .*: loss is nan in the vae.*"
    assert_ends(trainer, cause, step=5, kept=[2, 4, 6])
    assert trainer.step == 7 and trainer.guard.skipped_steps == 5


SCENARIOS = (raises, skips, skipping_gives_up)
