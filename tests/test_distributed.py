"""Two real processes against one: weights, losses, validation, resume, codebooks and traffic, on every backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import ROOT, torchrun
from scenarios import (
    AR_MODELS,
    AR_PARITY,
    DVAE_DRAWS,
    DVAE_EVERYTHING,
    EVERYTHING,
    LINEAR,
    build_ar_trainer,
    build_dvae_trainer,
    build_trainer,
    largest_difference,
    train_steps,
    weights_of,
)

WORKER = str(ROOT / "tests" / "workers" / "backend_worker.py")
BACKENDS = [("accelerate", "-"), ("deepspeed", "0"), ("deepspeed", "1"), ("deepspeed", "2")]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=BACKENDS, ids=lambda backend: "".join(backend).strip("-"))
def ranks(request, tmp_path_factory) -> tuple[Path, dict, str]:
    """What two ranks of a backend came to: their folder, their results, the backend's name."""
    name, stage = request.param
    folder = tmp_path_factory.mktemp(f"{name}{stage}")
    torchrun([WORKER, name, stage, str(folder)], timeout=500)
    return folder, torch.load(folder / "results.pt"), name


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict:
    """One process with the same global batches: batch 8 and accumulation 2 for 2 x batch 4 and accumulation 2."""
    folder = tmp_path_factory.mktemp("reference")
    results = {}
    for quantizer in ("lfq", "vq"):
        trainer = build_trainer(
            folder / quantizer, quantizer=quantizer, grad_accum_every=2, batch_size=8, **EVERYTHING
        )
        logs = [trainer.train_step() for _ in range(4)]
        results[f"parity_{quantizer}"] = weights_of(trainer)
        results[f"logs_{quantizer}"] = [trainer.backend.mean(line) for line in logs]
        results[f"valid_{quantizer}"] = trainer.evaluate()
    options = {**EVERYTHING, "precision": "bf16", "grad_accum_every": 2, "batch_size": 8}
    trainer = build_trainer(folder / "bf16", quantizer="vq", **options)
    results["logs_bf16"] = [trainer.backend.mean(trainer.train_step()) for _ in range(4)]
    for draw, model in DVAE_DRAWS.items():
        trainer = build_dvae_trainer(folder / draw, model=model, grad_accum_every=2, batch_size=8, **DVAE_EVERYTHING)
        logs = [trainer.train_step() for _ in range(4)]
        results[f"dvae_{draw}"] = weights_of(trainer)
        results[f"logs_dvae_{draw}"] = [trainer.backend.mean(line) for line in logs]
        results[f"valid_dvae_{draw}"] = trainer.evaluate()
    trainer = build_dvae_trainer(
        folder / "dvae_bf16",
        model=DVAE_DRAWS["soft"],
        precision="bf16",
        grad_accum_every=2,
        batch_size=8,
        **DVAE_EVERYTHING,
    )
    results["logs_dvae_bf16"] = [trainer.backend.mean(trainer.train_step()) for _ in range(4)]
    for kind in AR_MODELS:
        trainer = build_ar_trainer(folder / kind, kind, grad_accum_every=2, batch_size=8, **AR_PARITY[kind])
        logs = [trainer.train_step() for _ in range(4)]
        results[kind] = weights_of(trainer)
        results[f"logs_{kind}"] = [trainer.backend.mean(line) for line in logs]
        results[f"valid_{kind}"] = trainer.evaluate()
    options = {**AR_PARITY["prior"], "precision": "bf16", "grad_accum_every": 2, "batch_size": 8}
    trainer = build_ar_trainer(folder / "prior_bf16", "prior", **options)
    results["logs_prior_bf16"] = [trainer.backend.mean(trainer.train_step()) for _ in range(4)]
    return results


@pytest.mark.parametrize("quantizer", ["lfq", "vq"])
def test_weights_are_those_of_one_process(ranks, reference, quantizer):
    difference, name = largest_difference(reference[f"parity_{quantizer}"], ranks[1][f"parity_{quantizer}"])
    assert difference <= 1e-6, f"{name} differs by {difference}"


@pytest.mark.parametrize("draw", DVAE_DRAWS)
def test_a_discrete_vae_is_that_of_one_process(ranks, reference, draw):
    difference, name = largest_difference(reference[f"dvae_{draw}"], ranks[1][f"dvae_{draw}"])
    assert difference <= 1e-6, f"{name} differs by {difference}"
    for ours, theirs in zip(ranks[1][f"logs_dvae_{draw}"], reference[f"logs_dvae_{draw}"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert ours["temperature"] < 1 and ours["lr"] < DVAE_EVERYTHING["lr"]  # the schedules were on
    valid = ranks[1][f"valid_dvae_{draw}"]
    assert valid["images"] == 16 and valid == pytest.approx(reference[f"valid_dvae_{draw}"], rel=1e-4)


@pytest.mark.parametrize("kind", AR_MODELS)
def test_a_model_of_codes_is_that_of_one_process(ranks, reference, kind):
    difference, name = largest_difference(reference[kind], ranks[1][kind])
    assert difference <= 1e-6, f"{name} differs by {difference}"
    for ours, theirs in zip(ranks[1][f"logs_{kind}"], reference[f"logs_{kind}"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    valid = ranks[1][f"valid_{kind}"]
    assert valid["images"] == 16 and valid == pytest.approx(reference[f"valid_{kind}"], rel=1e-4)


@pytest.mark.parametrize("quantizer", ["lfq", "vq"])
def test_losses_and_norms_are_those_of_one_process(ranks, reference, quantizer):
    per_rank = {"adaptive_weight", "adversarial_weight", "lr", "generator_grad_norm", "discriminator_grad_norm"}
    for ours, theirs in zip(ranks[1][f"logs_{quantizer}"], reference[f"logs_{quantizer}"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in {*per_rank & ours.keys(), "recon_loss"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    "bf16, exact, loss, norm",
    [
        ("bf16", "vq", "recon_loss", "generator_grad_norm"),
        ("dvae_bf16", "dvae_soft", "recon_loss", "grad_norm"),
        ("prior_bf16", "prior", "cross_entropy", "grad_norm"),
    ],
)
def test_bf16_losses_and_norms_are_near_those_of_one_process(ranks, reference, bf16, exact, loss, norm):
    for ours, theirs in zip(ranks[1][f"logs_{bf16}"], reference[f"logs_{bf16}"], strict=True):
        for name in (loss, norm):
            assert ours[name] == pytest.approx(theirs[name], rel=0.05), name
    exact = [line[loss] for line in reference[f"logs_{exact}"]]
    assert [line[loss] for line in reference[f"logs_{bf16}"]] != exact  # bf16 was really on
    assert [line[loss] for line in reference[f"logs_{bf16}"]] == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("quantizer", ["lfq", "vq"])
def test_validation_on_two_ranks_is_validation_on_one(ranks, reference, quantizer):
    ours, theirs = ranks[1][f"valid_{quantizer}"], reference[f"valid_{quantizer}"]
    assert ours["images"] == theirs["images"] == 16
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("split", [(1, 16), (4, 4)])
def test_linear_losses_do_not_depend_on_the_split(ranks, tmp_path, split):
    folder, results, name = ranks
    if name != "accelerate":
        assert (
            "linear_2x4" not in results
        )  # one backend shows the splits; the others are held to it by the tests above
        return
    accumulation, batch = split
    options = {**EVERYTHING, **LINEAR, "grad_accum_every": accumulation, "batch_size": batch}
    expected = train_steps(build_trainer(tmp_path, quantizer="fsq", **options), 4)
    for key in ("linear_2x4", "linear_1x8"):
        difference, where = largest_difference(expected, results[key])
        assert difference <= 1e-6, f"{key}: {where} differs by {difference}"
    options = {**DVAE_EVERYTHING, "grad_accum_every": accumulation, "batch_size": batch}
    expected = train_steps(build_dvae_trainer(tmp_path / "dvae", **options), 4)
    for key in ("dvae_linear_4x2", "dvae_linear_1x8"):
        difference, where = largest_difference(expected, results[key])
        assert difference <= 1e-6, f"{key}: {where} differs by {difference}"
    for kind, keys in {"prior": ["prior_linear_4x2", "prior_linear_1x8"], "var": ["var_linear_4x2"]}.items():
        options = {**AR_PARITY[kind], "grad_accum_every": accumulation, "batch_size": batch}
        expected = train_steps(build_ar_trainer(tmp_path / kind, kind, **options), 4)
        for key in keys:
            difference, where = largest_difference(expected, results[key])
            assert difference <= 1e-6, f"{key}: {where} differs by {difference}"


def test_one_process_resumes_what_two_saved(ranks, tmp_path, capsys):
    folder, results, name = ranks
    options = {**EVERYTHING, "num_train_steps": 6, "grad_accum_every": 2}
    trainer = build_trainer(folder / "stopped", quantizer="random_vq", **options)
    assert trainer.step == 3
    message = capsys.readouterr().err
    assert f"was saved by 2 processes ({name}) and is resumed by 1 (local)" in message
    train_steps(trainer, 3)
    assert all(int(state["step"]) == 6 for state in trainer.generator.optimizer.state.values())


def test_each_network_exchanges_once_per_step(ranks):
    folder, results, name = ranks
    if name != "accelerate":
        assert "exchanges" not in results  # counted in DDP; `make bench` counts DeepSpeed's
        return
    for network, (calls, size) in results["exchanges"].items():
        assert calls == 1, f"{network}: {calls} exchanges in one step of 4 micro-batches"
        assert size == results["sizes"][network]
