"""Two real processes against one: weights, losses, validation, resume, codebooks and traffic, on every backend."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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
    OPTIMIZERS,
    SHARDED,
    WHOLE_RUNS,
    build_ar_trainer,
    build_dvae_trainer,
    build_trainer,
    exported_weights,
    largest_difference,
    optimizer_options,
    train_steps,
    trained_and_evaluated,
    weights_of,
    whole_run,
)

WORKER = str(ROOT / "tests" / "workers" / "backend_worker.py")
# on every push, and nightly
ON_PUSH, NIGHTLY = ("accelerate", "zero2"), ("fsdp2", "zero0", "zero1", "zero3")
BACKENDS = [*ON_PUSH, *(pytest.param(name, marks=pytest.mark.nightly) for name in NIGHTLY)]

# Optimizers that a backend cannot hold, and what rounding makes of one whose matrix products are bfloat16.
REFUSED = {
    **dict.fromkeys(["fsdp2", "zero1", "zero2"], ("muon", "schedule_free", "adamw_8bit")),
    "zero3": ("muon", "schedule_free", "adamw_8bit", "counting"),
}
ROUNDING = {"muon": 1e-4}

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]  # with what the fixtures run


class Ranks(NamedTuple):
    """The results of two ranks of a backend."""

    name: str  # of BACKENDS
    folder: Path
    results: dict

    def of_reference(self, key: str) -> str:
        """Return the key of the one-process run that a VQGAN's is compared with."""
        return f"{key}_unpenalised" if self.name in SHARDED else key


@pytest.fixture(scope="module")
def launch(tmp_path_factory) -> Callable[[str], Ranks]:
    """Run the worker on two ranks of a backend, once."""

    @functools.cache
    def launched(name: str) -> Ranks:
        folder = tmp_path_factory.mktemp(name)
        torchrun([WORKER, name, str(folder)], timeout=900)
        return Ranks(name, folder, torch.load(folder / "results.pt"))

    return launched


@pytest.fixture(scope="module", params=BACKENDS)
def ranks(request, launch) -> Ranks:
    """Two ranks of each backend in turn."""
    return launch(request.param)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict:
    """One process with the same global batches: batch 8 and accumulation 2 for 2 x batch 4 and accumulation 2."""
    folder = tmp_path_factory.mktemp("reference")
    results = {}
    for quantizer, penalty in itertools.product(("lfq", "vq"), ("", "_unpenalised")):
        options = {**EVERYTHING, **({"apply_grad_penalty_every": 0} if penalty else {})}
        key = f"{quantizer}{penalty}"
        trainer = build_trainer(folder / key, quantizer=quantizer, grad_accum_every=2, batch_size=8, **options)
        logs = [trainer.train_step() for _ in range(4)]
        results[f"parity_{key}"] = weights_of(trainer)
        results[f"logs_{key}"] = [trainer.backend.mean(line) for line in logs]
        results[f"valid_{key}"] = trainer.evaluate()
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
    for kind, average in itertools.product(WHOLE_RUNS, (True, False)):
        trainer = whole_run(folder, kind, average=average, batch_size=8)
        results[f"export_{kind}_{average}"] = exported_weights(trainer)
    return results


@pytest.fixture(scope="module")
def by_optimizer(tmp_path_factory) -> Callable[[str], dict]:
    """Return the weights of one process by an optimizer, and those that are evaluated, computed once."""

    @functools.cache
    def trained(name: str) -> dict:
        options = {**optimizer_options(name), "batch_size": 8}
        return trained_and_evaluated(build_ar_trainer(tmp_path_factory.mktemp(name), "prior", **options), 4)

    return trained


@pytest.mark.parametrize("quantizer", ["lfq", "vq"])
def test_weights_are_those_of_one_process(ranks, reference, quantizer):
    expected = reference[ranks.of_reference(f"parity_{quantizer}")]
    difference, name = largest_difference(expected, ranks.results[f"parity_{quantizer}"])
    assert difference <= 1e-6, f"{name} differs by {difference}"


def assert_same_export(reference: dict, results: dict, kind: str, average: bool) -> None:
    expected, exported = (found[f"export_{kind}_{average}"] for found in (reference, results))
    difference, name = largest_difference(expected, exported)
    assert difference <= 1e-6, f"{name} differs by {difference}"
    assert largest_difference(exported, results[f"export_{kind}_{not average}"])[0] > 1e-6  # it was the average


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("kind", WHOLE_RUNS)
def test_the_export_of_a_whole_run_is_that_of_one_process(ranks, reference, kind, average):
    assert_same_export(reference, ranks.results, kind, average)


def test_zero_1_exports_what_one_process_does(tmp_path, reference):
    """On every push, because its weights share their storage; the rest of ZeRO 1 is nightly."""
    torchrun([WORKER, "zero1", str(tmp_path), "ends"], timeout=900)
    results = torch.load(tmp_path / "results.pt")
    for kind, average in itertools.product(WHOLE_RUNS, (True, False)):
        assert_same_export(reference, results, kind, average)


@pytest.mark.nightly  # those that draw at random are looked at on every push
@pytest.mark.parametrize("backend", ["accelerate", "zero2", "zero3", "fsdp2"])
def test_the_codebooks_of_every_quantizer_stay_equal_over_ranks(backend, tmp_path):
    torchrun([WORKER, backend, str(tmp_path), "codebooks"], timeout=900)


@pytest.mark.parametrize("draw", DVAE_DRAWS)
def test_a_discrete_vae_is_that_of_one_process(ranks, reference, draw):
    difference, name = largest_difference(reference[f"dvae_{draw}"], ranks.results[f"dvae_{draw}"])
    assert difference <= 1e-6, f"{name} differs by {difference}"
    for ours, theirs in zip(ranks.results[f"logs_dvae_{draw}"], reference[f"logs_dvae_{draw}"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert ours["temperature"] < 1 and ours["lr"] < DVAE_EVERYTHING["lr"]  # the schedules were on
    valid = ranks.results[f"valid_dvae_{draw}"]
    assert valid["images"] == 16 and valid == pytest.approx(reference[f"valid_dvae_{draw}"], rel=1e-4)


@pytest.mark.parametrize("kind", AR_MODELS)
def test_a_model_of_codes_is_that_of_one_process(ranks, reference, kind):
    difference, name = largest_difference(reference[kind], ranks.results[kind])
    assert difference <= 1e-6, f"{name} differs by {difference}"
    for ours, theirs in zip(ranks.results[f"logs_{kind}"], reference[f"logs_{kind}"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    valid = ranks.results[f"valid_{kind}"]
    assert valid["images"] == 16 and valid == pytest.approx(reference[f"valid_{kind}"], rel=1e-4)


@pytest.mark.parametrize("quantizer", ["lfq", "vq"])
def test_losses_and_norms_are_those_of_one_process(ranks, reference, quantizer):
    per_rank = {"adaptive_weight", "adversarial_weight", "lr", "generator_grad_norm", "discriminator_grad_norm"}
    expected = reference[ranks.of_reference(f"logs_{quantizer}")]
    for ours, theirs in zip(ranks.results[f"logs_{quantizer}"], expected, strict=True):
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
    for ours, theirs in zip(ranks.results[f"logs_{bf16}"], reference[f"logs_{bf16}"], strict=True):
        for name in (loss, norm):
            assert ours[name] == pytest.approx(theirs[name], rel=0.05), name
    exact = [line[loss] for line in reference[f"logs_{exact}"]]
    assert [line[loss] for line in reference[f"logs_{bf16}"]] != exact  # bf16 was really on
    assert [line[loss] for line in reference[f"logs_{bf16}"]] == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("quantizer", ["lfq", "vq"])
def test_validation_on_two_ranks_is_validation_on_one(ranks, reference, quantizer):
    ours = ranks.results[f"valid_{quantizer}"]
    theirs = reference[ranks.of_reference(f"valid_{quantizer}")]
    assert ours["images"] == theirs["images"] == 16
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("split", [(1, 16), (4, 4)])
def test_linear_losses_do_not_depend_on_the_split(ranks, tmp_path, split):
    name, folder, results = ranks
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


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_is_that_of_one_process_or_refused(ranks, by_optimizer, optimizer):
    found = ranks.results["optimizers"][optimizer]
    if isinstance(found, str):
        assert optimizer in REFUSED.get(ranks.name, ()), found
        return
    assert optimizer not in REFUSED.get(ranks.name, ())
    difference, name = largest_difference(by_optimizer(optimizer), found)
    assert difference <= ROUNDING.get(optimizer, 1e-6), f"{name} differs by {difference}"


def test_one_process_resumes_what_two_saved(ranks, tmp_path, capsys):
    name, folder, results = ranks
    options = {**EVERYTHING, "num_train_steps": 6, "grad_accum_every": 2}
    if name in SHARDED:
        options["apply_grad_penalty_every"] = 0
    backend = "deepspeed" if name.startswith("zero") else "accelerate"
    trainer = build_trainer(folder / "stopped", quantizer="random_vq", **options)
    assert trainer.step == 3
    message = capsys.readouterr().err
    assert f"was saved by 2 processes ({backend}) and is resumed by 1 (local)" in message
    train_steps(trainer, 3)
    assert all(int(state["step"]) == 6 for state in trainer.generator.optimizer.state.values())


def test_each_network_exchanges_once_per_step(ranks):
    name, folder, results = ranks
    if name != "accelerate":
        assert "exchanges" not in results  # counted in DDP; `make bench` counts DeepSpeed's
        return
    for network, (calls, size) in results["exchanges"].items():
        assert calls == 1, f"{network}: {calls} exchanges in one step of 4 micro-batches"
        assert size == results["sizes"][network]


# ------------------------------------------------------------------------------------------------- the table in docs/

ROWS = {
    "accelerate": "DDP (accelerate)",
    "fsdp2": "FSDP2 (accelerate)",
    **{f"zero{stage}": f"ZeRO {stage} (deepspeed)" for stage in range(4)},
}
COLUMNS = {"vqgan": "VQGAN", "dvae": "discrete VAE", "vq_ar": "VQ-AR", "prior": "prior", "var": "VAR"}
RESULTS_OF = {"vqgan": ["parity_lfq", "parity_vq"], "dvae": [f"dvae_{draw}" for draw in DVAE_DRAWS]}
TABLE = ROOT / "docs" / "support.md"
WRITE = "VQDIST_WRITE_SUPPORT_TABLE"


def cell(ranks: Ranks, reference: dict, model: str, notes: list[str]) -> str:
    """Return the results of two ranks of a backend for a model: it works if its weights are those of one process."""
    for key in RESULTS_OF.get(model, [model]):
        expected = reference[ranks.of_reference(key) if model == "vqgan" else key]
        if largest_difference(expected, ranks.results[key])[0] > 1e-6:
            return "**differs**"
    refused = ranks.results["refused"].get(model)
    if refused is None:
        return "works"
    if refused not in notes:
        notes.append(refused)
    return f"works, but [{notes.index(refused) + 1}]"


def cell_of_optimizer(ranks: Ranks, expected: Callable[[str], dict], optimizer: str, notes: list[str]) -> str:
    """Return the results of two ranks of a backend for a prior that an optimizer trains."""
    found = ranks.results["optimizers"][optimizer]
    if not isinstance(found, str):
        held = largest_difference(expected(optimizer), found)[0] <= ROUNDING.get(optimizer, 1e-6)
        return "works" if held else "**differs**"
    if found not in notes:
        notes.append(found)
    return f"refused [{notes.index(found) + 1}]"


def optimizer_table(launch, by_optimizer, notes: list[str]) -> list[str]:
    """Return the lines of the table of optimizers and backends."""
    lines = [
        "## Optimizers",
        "",
        "Of a prior, by the same rule; `muon` multiplies in bfloat16, so its weights agree within 1e-4. `own` and",
        "`counting` are given by import path (`tests/foreign/my_optimizer.py`); `counting` counts in its groups.",
        "`schedule_free` evaluates an average of its own, which is compared too. All of this was run on CPUs;",
        "`adamw_8bit` has not been run on a GPU yet.",
        "",
        f"| | {' | '.join(OPTIMIZERS)} |",
        f"| --- |{' --- |' * len(OPTIMIZERS)}",
        f"| one process (local) |{' the reference |' * len(OPTIMIZERS)}",
    ]
    for name, title in ROWS.items():
        cells = [cell_of_optimizer(launch(name), by_optimizer, optimizer, notes) for optimizer in OPTIMIZERS]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


@pytest.mark.nightly
def test_the_support_table_is_what_was_seen(launch, reference, by_optimizer):
    """docs/support.md says of each backend, model and optimizer what the runs above came to."""
    notes: list[str] = []
    lines = [
        "# What works on which backend",
        "",
        f"Written by {Path(__file__).name} from its runs (`make support-table`). *works*: two processes end with the",
        "weights, codebooks and average of one (within 1e-6; accumulation, clipping and schedules on), resume to the",
        "bit, and validate the same.",
        "",
        f"| | {' | '.join(COLUMNS.values())} |",
        f"| --- |{' --- |' * len(COLUMNS)}",
        f"| one process (local) |{' the reference |' * len(COLUMNS)}",
    ]
    for name, title in ROWS.items():
        cells = [cell(launch(name), reference, model, notes) for model in COLUMNS]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", *optimizer_table(launch, by_optimizer, notes)]
    lines += ["", *(f"[{number}] refused: *{note}*" for number, note in enumerate(notes, 1)), ""]
    text = "\n".join(lines)
    assert "differs" not in text, text
    if os.environ.get(WRITE):
        TABLE.write_text(text, encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == text, f"{TABLE} is not what was seen; write it with make support-table"
