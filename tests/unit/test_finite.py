"""No value that is not finite is committed, in one process; test_distributed.py runs the same on two ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal

import not_finite
import pytest
import torch
from not_finite import SELDOM, assert_ends, end_of, spoil_images
from scenarios import AR_MODELS, build_ar_trainer, build_dvae_trainer, build_trainer, weights_of
from torch.utils._python_dispatch import TorchDispatchMode

from vqdist.backends.local import LocalBackend
from vqdist.cli import main
from vqdist.errors import UserError
from vqdist.trainers.finite import FiniteGuard, FirstNotFinite


@pytest.mark.parametrize("scenario", not_finite.SCENARIOS)
def test_one_process(scenario, tmp_path):
    scenario(tmp_path)


# ------------------------------------------------------------------------------------------- waiting for the device


class Waits(TorchDispatchMode):
    """Counts the reads of a tensor's value, each of which waits for its device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def waits_of_a_step(trainer) -> int:
    for _ in range(2):  # the first step logs and makes the optimizer's state
        trainer.train_step()
    with Waits() as waits:
        trainer.train_step()
    return waits.count


@pytest.mark.parametrize("build", [build_trainer, build_dvae_trainer, *AR_MODELS])
def test_watching_waits_for_no_device(build, tmp_path, monkeypatch):
    """Adam on a CPU reads its step counts, so what is compared is a trainer without the guard."""

    def made(name: str, **options):
        options = {"log_every": 10, "check_ranks_every": 0, "use_ema": False, **options}
        if isinstance(build, str):
            return build_ar_trainer(tmp_path / name, build, **options)
        return build(tmp_path / name, **options)

    watched = waits_of_a_step(made("watched"))
    skipping = waits_of_a_step(made("skipping", on_nonfinite="skip"))
    monkeypatch.setattr(FiniteGuard, "begin", lambda *_: None)
    monkeypatch.setattr(FiniteGuard, "step", lambda _self, _name, engine, _numbers, *, lr: engine.step(lr=lr))
    monkeypatch.setattr(FiniteGuard, "end", lambda *_: None)
    assert watched == waits_of_a_step(made("bare")) < skipping


# ------------------------------------------------------------------------------------------- what is read


def test_the_first_is_named_whatever_came_later():
    seen = FirstNotFinite(LocalBackend(device="cpu"), {"b": "vae"})
    assert seen.read() is None
    good, nan, inf = torch.tensor(1.0), torch.tensor(torch.nan), torch.tensor(-torch.inf)
    seen.add(1, {"a": good, "b": good})
    assert seen.read() is None
    seen.add(2, {"a": good, "b": inf, "c": nan})  # other names than before
    seen.add(3, {"a": nan, "b": nan})
    seen.add(4, {"a": good, "b": good})
    assert seen.read() == "b is -inf in the vae at step 2"


def test_a_mask_that_is_infinite_from_the_start_is_a_constant():
    guard = FiniteGuard(LocalBackend(device="cpu"), skip=False, max_skipped_steps=1)
    mask, broken = torch.tensor([0.0, -torch.inf]), torch.tensor([torch.inf, torch.nan])
    weight = torch.ones(2, dtype=torch.bfloat16)
    tensors = {"buffer mask of the a": mask, "buffer b of the a": broken, "weight w of the a": weight}
    guard.except_constants(tensors.items())
    assert guard.tensors(tensors.items()) == "the buffer b of the a is not finite"
    broken.fill_(3e38)  # of a norm the square would not be finite
    assert guard.tensors(tensors.items()) is None
    weight[1] = torch.inf
    assert guard.tensors(tensors.items()) == "the weight w of the a is not finite"


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("kind", AR_MODELS)
def test_models_of_codes_are_watched(kind, tmp_path):
    trainer = build_ar_trainer(tmp_path, kind, **{**SELDOM, "save_model_every": 2})
    update = trainer.update

    def spoilt(batches):
        numbers = update(batches)
        return {**numbers, "loss": numbers["loss"] * torch.nan} if trainer.step == 2 else numbers

    trainer.update = spoilt
    assert_ends(trainer, "^loss is nan in the model", step=3, kept=[2])


def test_a_signal_saves_nothing_that_is_not_finite(tmp_path):
    trainer = build_dvae_trainer(tmp_path, **{**SELDOM, "save_model_every": 0})
    spoil_images(trainer, {3})
    not_finite.after(trainer, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert_ends(trainer, "^loss is nan in the vae", step=3, kept=[])


def test_the_last_update_and_what_is_saved_by_hand(tmp_path):
    """The update of the last step makes the NaN; neither a checkpoint nor an export can be asked for afterwards."""
    trainer = build_dvae_trainer(tmp_path, **{**SELDOM, "num_train_steps": 3, "save_model_every": 0})
    not_finite.after(trainer, 3, lambda: trainer.model.decoder[-1].bias.data.fill_(torch.nan))
    assert_ends(trainer, "^the weight decoder.* of the vae is not finite", step=3, kept=[])
    for write in (trainer.save, trainer.export):
        with pytest.raises(UserError, match="^the weight decoder.* of the vae is not finite at step 3; there is no"):
            write(tmp_path / "by_hand")
    assert not (tmp_path / "by_hand").exists()


def test_a_checkpoint_of_before_that_is_not_finite_is_passed_over(tmp_path, monkeypatch, capsys):
    trainer = build_dvae_trainer(tmp_path, **SELDOM)
    with monkeypatch.context() as before:
        before.setattr(FiniteGuard, "tensors", lambda *_: None)
        before.setattr(FiniteGuard, "numbers", lambda *_: None)
        not_finite.after(trainer, 4, lambda: trainer.ema.ema_model.decoder[-1].bias.data.fill_(torch.nan))
        for _ in range(4):
            trainer.train_step()
        expected = {name: tensor for name, tensor in weights_of(trainer).items() if "ema" not in name}
        trainer.checkpoints.settle()
        trainer.close()
    resumed = build_dvae_trainer(tmp_path, **SELDOM)
    assert resumed.step == 2
    assert "step_00000004 was saved though the weight decoder" in capsys.readouterr().err
    for _ in range(2):
        resumed.train_step()
    assert all(torch.equal(weights_of(resumed)[name], tensor) for name, tensor in expected.items())
    resumed.checkpoints.settle()
    assert build_dvae_trainer(tmp_path, **SELDOM).step == 4


# ------------------------------------------------------------------------------------------- the whole command

TINY = (
    *("train", "dvae", "--data", "digits", "--image_size", "16", "--data.augment", "false", "--model.channels", "1"),
    *("--model.hidden_dim", "8", "--model.num_tokens", "32", "--model.codebook_dim", "8", "--model.num_layers", "2"),
    *("--trainer.num_train_steps", "30", "--trainer.batch_size", "4", "--trainer.save_model_every", "1"),
    *("--trainer.validate_every", "0", "--data.valid_frac", "0", "--data.num_workers", "0"),
)


def test_a_rate_that_is_too_high_ends_in_advice_that_works(tmp_path, capsys):
    """Updates that spoil the weights themselves, with a line every ten steps and a checkpoint every step."""
    command = [*TINY, "--out", str(tmp_path)]
    assert main([*command, "--trainer.lr", "1e30"]) == 2
    said = capsys.readouterr().err
    first = tmp_path / "checkpoints" / "step_00000001"
    assert f"loss is nan in the vae at step 2; the newest checkpoint is {first}: resume" in said
    advised = ["--trainer.lr", "1e-4", "--trainer.max_grad_norm", "1", "--trainer.allow_config_change", "true"]
    assert main([*command, *advised]) == 2  # its weights are finite, and as large as that rate
    assert f"and if that was done, remove {first} to go on from before it" in capsys.readouterr().err
    shutil.rmtree(first)
    assert main([*command, *advised]) == 0
    assert main([*command, *advised, "--trainer.on_nonfinite", "skip"]) == 0
    assert re.search(r"^  skipped_steps +0$", capsys.readouterr().out, re.MULTILINE)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(value is not None for value in lines[-1].values()) and lines[-1]["step"] == 30


def test_a_run_that_gave_up_may_be_resumed_with_the_other_choice(tmp_path):
    """Both options are free to change."""
    options = {**SELDOM, "on_nonfinite": "skip", "max_skipped_steps": 1}
    trainer = build_dvae_trainer(tmp_path, **options)
    spoil_images(trainer, {3})
    assert "1 updates of the vae in a row were skipped" in end_of(trainer)
    trainer.close()
    assert build_dvae_trainer(tmp_path, **SELDOM).step == 2
