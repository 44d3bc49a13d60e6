"""Run by torchrun from test_distributed.py: everything that two ranks of one backend are compared on.

usage: backend_worker.py BACKEND FOLDER [ends | codebooks]   (BACKEND is accelerate, fsdp2 or zero0 .. zero3; with
a last word only what it says)

Rank 0 writes FOLDER/results.pt; assertions that concern the ranks themselves are made here.
"""

from __future__ import annotations

import itertools
import os
import sys
from functools import partial
from pathlib import Path

import not_finite
import pytest
import torch
import torch.distributed
from safetensors.torch import load_file
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
    unfollowed_buffers,
    weights_of,
    whole_run,
)

from vqdist.errors import RanksDiverged, UserError
from vqdist.models.pretrained import load_model_of_any_type
from vqdist.ranks import check_ranks_agree, on_main
from vqdist.registries import QUANTIZERS as OWN_QUANTIZERS
from vqdist.trainers.base import Trainer


def parity(backend: dict, folder: Path, results: dict) -> None:
    """Compare weights, losses and norms with one process on the same global batches."""
    for quantizer in ("lfq", "vq"):
        trainer = build_trainer(folder / quantizer, quantizer=quantizer, grad_accum_every=2, **EVERYTHING, **backend)
        logs = [trainer.train_step() for _ in range(4)]
        results[f"parity_{quantizer}"] = weights_of(trainer)
        assert not unfollowed_buffers(trainer)
        results[f"logs_{quantizer}"] = [trainer.backend.mean(line) for line in logs]
        results[f"valid_{quantizer}"] = trainer.evaluate()


def bf16(backend: dict, folder: Path, results: dict) -> None:
    """bfloat16 products; weights, codebooks and optimizer states in float32, equal over ranks."""
    options = {**EVERYTHING, "precision": "bf16", "grad_accum_every": 2, **backend}
    trainer = build_trainer(folder / "bf16", quantizer="vq", **options)
    assert trainer.generator(trainer.next_micro_batches()[0]).recon.dtype == torch.bfloat16
    trainer = build_trainer(folder / "bf16", quantizer="vq", **options)
    results["logs_bf16"] = [trainer.backend.mean(trainer.train_step()) for _ in range(4)]
    assert all(tensor.dtype != torch.bfloat16 for _, tensor in trainer.named_tensors())
    check_ranks_agree(trainer.backend, trainer.named_tensors(), trainer.step)


def linear_splits(backend: dict, folder: Path, results: dict) -> None:
    """16 images of one step as 2 processes x 2 micro-batches x 4 and as 2 x 1 x 8."""
    for accumulation, batch in ((2, 4), (1, 8)):
        options = {**EVERYTHING, **LINEAR, "grad_accum_every": accumulation, "batch_size": batch}
        trainer = build_trainer(folder / f"linear_{accumulation}", quantizer="fsq", **options, **backend)
        results[f"linear_{accumulation}x{batch}"] = train_steps(trainer, 4)
    for accumulation, batch, kind in ((4, 2, "prior"), (1, 8, "prior"), (4, 2, "var")):
        options = {**AR_PARITY[kind], "grad_accum_every": accumulation, "batch_size": batch}
        trainer = build_ar_trainer(folder / f"{kind}_linear_{accumulation}", kind, **options, **backend)
        results[f"{kind}_linear_{accumulation}x{batch}"] = train_steps(trainer, 4)
    for accumulation, batch in ((4, 2), (1, 8)):
        options = {**DVAE_EVERYTHING, "grad_accum_every": accumulation, "batch_size": batch}
        trainer = build_dvae_trainer(folder / f"dvae_linear_{accumulation}", **options, **backend)
        results[f"dvae_linear_{accumulation}x{batch}"] = train_steps(trainer, 4)


def resume(backend: dict, folder: Path, results: dict) -> None:
    """6 steps against 3, a checkpoint, a new trainer that loads it, and 3: equal to the bit, with the next batch."""
    options = {"num_train_steps": 6, "grad_accum_every": 2, **backend}

    def vqgan(name: str):
        return build_trainer(folder / name, quantizer="random_vq", **EVERYTHING, **options)

    def dvae(name: str):
        return build_dvae_trainer(folder / f"dvae_{name}", **DVAE_EVERYTHING, **options)

    results["resumed"] = weights_of(resumed_like_straight(vqgan))
    resumed_like_straight(dvae)
    for kind in AR_MODELS:
        ar = partial(build_ar_trainer, kind=kind, **AR_PARITY[kind], **options)
        resumed_like_straight(lambda name, build=ar, kind=kind: build(folder / f"{kind}_{name}"))


def resumed_like_straight(build) -> Trainer:
    """6 steps without a break against 3 and 3 around a checkpoint, of trainers that `build(folder name)` makes."""
    straight = build("straight")
    expected = train_steps(straight, 6)
    first = build("stopped")
    train_steps(first, 3)
    first.save(first.run_folder / "checkpoints" / "step_00000003")
    second = build("stopped")
    assert (second.step, second.position) == (3, first.position)
    actual = train_steps(second, 3)
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), f"{name} differs after resume"
    for one, other in zip(straight.next_micro_batches(), second.next_micro_batches(), strict=True):
        one, other = (batch if isinstance(batch, tuple) else (batch,) for batch in (one, other))
        for mine, theirs in zip(one, other, strict=True):  # tensors, and places
            assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
    return second


def discrete_vae(backend: dict, folder: Path, results: dict) -> None:
    """Train on one process's 16 images a step, two micro-batches on each rank, for every kind of draw."""
    for draw, model in DVAE_DRAWS.items():
        trainer = build_dvae_trainer(
            folder / f"dvae_{draw}", model=model, grad_accum_every=2, **DVAE_EVERYTHING, **backend
        )
        logs = [trainer.train_step() for _ in range(4)]
        results[f"dvae_{draw}"] = weights_of(trainer)
        results[f"logs_dvae_{draw}"] = [trainer.backend.mean(line) for line in logs]
        results[f"valid_dvae_{draw}"] = trainer.evaluate()
    trainer = build_dvae_trainer(
        folder / "dvae_bf16",
        model=DVAE_DRAWS["soft"],
        precision="bf16",
        grad_accum_every=2,
        **DVAE_EVERYTHING,
        **backend,
    )
    results["logs_dvae_bf16"] = [trainer.backend.mean(trainer.train_step()) for _ in range(4)]
    check_ranks_agree(trainer.backend, trainer.named_tensors(), trainer.step)


def autoregressive(backend: dict, folder: Path, results: dict) -> None:
    """Train on one process's 16 images a step, two micro-batches on each rank, for every model of codes."""
    for kind in AR_MODELS:
        trainer = build_ar_trainer(folder / kind, kind, grad_accum_every=2, **AR_PARITY[kind], **backend)
        logs = [trainer.train_step() for _ in range(4)]
        results[kind] = weights_of(trainer)
        results[f"logs_{kind}"] = [trainer.backend.mean(line) for line in logs]
        results[f"valid_{kind}"] = trainer.evaluate()
        check_ranks_agree(trainer.backend, trainer.named_tensors(), trainer.step)
    options = {**AR_PARITY["prior"], "precision": "bf16", "grad_accum_every": 2, **backend}
    trainer = build_ar_trainer(folder / "prior_bf16", "prior", **options)
    results["logs_prior_bf16"] = [trainer.backend.mean(trainer.train_step()) for _ in range(4)]


def optimizers(backend: dict, folder: Path, results: dict) -> None:
    """Train a prior by each optimizer: its weights after 4 steps, the same around a checkpoint, or why not."""
    results["optimizers"] = {}
    for name in OPTIMIZERS:
        build = partial(build_ar_trainer, kind="prior", **optimizer_options(name), **backend)
        try:
            straight = trained_and_evaluated(build(folder / f"{name}_straight"), 4)
            first = build(folder / f"{name}_stopped")
            train_steps(first, 2)
            first.save(first.run_folder / "checkpoints" / "step_00000002")
            second = build(folder / f"{name}_stopped")
            assert second.step == 2
            for key, tensor in trained_and_evaluated(second, 2).items():
                assert torch.equal(tensor, straight[key]), f"{key} by {name} differs after resume"
            results["optimizers"][name] = straight
        except UserError as error:
            results["optimizers"][name] = str(error)


# every quantizer, with what moves a codebook beside gradients
AT_RANDOM = {"kmeans_init": True, "threshold_ema_dead_code": 2}
DRAWS = {
    "vq": {"vq_kwargs": {**AT_RANDOM, "codebook_dim": 8}},
    "residual_vq": {"vq_kwargs": {**AT_RANDOM, "codebook_dim": 8}},
    "simvq": {"vq_kwargs": None},
    "multiscale_vq": {"vq_kwargs": None, "quantizer_kwargs": {**AT_RANDOM, "v_patch_nums": [1, 2, 4]}},
}
OTHERS = {
    "lfq": {},
    "fsq": {"codebook_size": None, "quantizer_kwargs": {"levels": [8, 5, 5]}},
    "gradient_vq": {"quantizer_kwargs": {"l2_norm": True, "entropy_weight": 0.1}},
    "learnable multiscale_vq": {
        "quantizer": "multiscale_vq",
        "quantizer_kwargs": {"v_patch_nums": [1, 2, 4], "learnable_codebook": True},
    },
    "ibq": {},
    "gumbel": {},
    "magvit2_lfq": {"dim": 8, "encdec_layer_mults": [1, 1], "codebook_size": 256},  # features of eight bits
    "cvq": {},
}


def every_codebook_stays_equal(backend: dict, folder: Path) -> None:
    """Train with all quantizers that vqdist has, those that learn by gradients alone too."""
    assert {*DRAWS, *(settings.get("quantizer", name) for name, settings in OTHERS.items())} >= {*OWN_QUANTIZERS}
    codebooks_stay_equal(backend, folder, {**DRAWS, **OTHERS})


def codebooks_stay_equal(backend: dict, folder: Path, quantizers: dict[str, dict]) -> None:
    """20 steps with k-means start and dead codes replaced, on different images: no rank drifts."""
    for name, kwargs in quantizers.items():
        model = {"codebook_size": 32, **kwargs}
        quantizer = model.pop("quantizer", name)
        trainer = build_trainer(folder / f"equal_{name}", quantizer=quantizer, model=model, **backend)
        before = weights_of(trainer)
        train_steps(trainer, 20)
        check_ranks_agree(trainer.backend, trainer.named_tensors(), trainer.step)
        assert not unfollowed_buffers(trainer)
        moved = [key for key, tensor in weights_of(trainer).items() if not torch.equal(before[key], tensor)]
        assert any(".quantizer." in key for key in moved) or name == "magvit2_lfq", name  # which has no weights


def divergence_is_found(backend: dict, folder: Path) -> None:
    """One changed bit on rank 1 stops every rank with the tensor's name."""
    trainer = build_trainer(folder / "diverged", **backend)
    trainer.train_step()
    if trainer.backend.rank == 1:
        with torch.no_grad():
            trainer.generator.module.last_layer.bias.add_(1e-6)
    with pytest.raises(
        RanksDiverged, match=r"after step 1 rank 1 .*generator\.decoder\.last_layer\.bias is the first of 1"
    ):
        check_ranks_agree(trainer.backend, trainer.named_tensors(), trainer.step)


def flags_and_means(trainer) -> None:
    """Check that a flag on one rank is seen by all, and that means are over ranks."""
    backend = trainer.backend
    assert backend.world_size == 2
    assert backend.any(backend.rank == 1)
    assert not backend.any(False)
    assert backend.mean({"rank": float(backend.rank), "one": torch.ones(())}) == {"rank": 0.5, "one": 1.0}
    assert backend.gather(torch.tensor([backend.rank])).tolist() == [[0], [1]]
    acts_of_rank_0(backend)


def acts_of_rank_0(backend) -> None:
    """Rank 0 acts for all; where it cannot, every rank fails with one line, and the next act is possible."""
    done = []
    on_main(backend, lambda: done.append(backend.rank), "there is no list")
    assert done == ([0] if backend.is_main else [])
    for error, reason in ((OSError(28, "the disk is full"), "the disk is full"), (RuntimeError("torn"), "torn")):

        def fail(error=error):
            raise error

        mine = reason if backend.is_main else rf"{reason} \(on rank 0\)"
        with pytest.raises(UserError, match=f"^a picture cannot be written: {mine}$"):
            on_main(backend, fail, "a picture cannot be written")

    def refuse():
        raise UserError("this folder is of another run; give another one")

    words = "this folder is of another run" if backend.is_main else "the folder cannot be made: this folder is of"
    with pytest.raises(UserError, match=f"^{words}"):
        on_main(backend, refuse, "the folder cannot be made")
    on_main(backend, lambda: done.clear(), "there is no list")
    assert done == []


def ends(backend: dict, folder: Path, results: dict) -> None:
    """`train()` to its end with an average and without, and once more when the export was damaged: what is loaded."""
    for kind, average in itertools.product(WHOLE_RUNS, (True, False)):
        trainer = whole_run(folder, kind, average=average, **backend)
        if trainer.is_main:
            (trainer.run_folder / "export" / "model.safetensors").unlink()
        trainer.backend.barrier()
        trainer = whole_run(folder, kind, average=average, **backend)  # which is at its end already
        if trainer.is_main:
            results[f"export_{kind}_{average}"] = exported_weights(trainer)


def whole_runs(backend: dict, folder: Path) -> None:
    """Validate, draw, save and export shards: the export holds the average, and so does its file."""
    options = {"save_results_every": 2, "save_model_every": 2, "validate_every": 2, **backend}
    builders = {
        "vqgan": partial(build_trainer, quantizer="vq", **EVERYTHING),
        "dvae": build_dvae_trainer,
        **{kind: partial(build_ar_trainer, kind=kind) for kind in AR_MODELS},
    }
    for kind, build in builders.items():
        trainer = build(folder / f"whole_{kind}", **options)
        assert trainer.train()["images"] == 16
        averaged = {name: tensor for name, tensor in trainer.named_tensors() if name.startswith("ema.")}
        if not trainer.is_main:
            continue
        assert sorted(path.name for path in trainer.run_folder.glob("results/*.png") if "_codes" not in path.name)
        saved = load_file(trainer.checkpoints.latest() / "ema.safetensors")
        model = load_model_of_any_type(trainer.run_folder / "export")
        exported = getattr(model, "autoencoder", model).state_dict()
        for name, tensor in averaged.items():
            key = name.removeprefix("ema.")
            assert torch.equal(saved[key], tensor), f"{kind}: {key} of the checkpoint is not the average"
            assert torch.equal(exported[key], tensor), f"{kind}: {key} of the export is not the average"


def channels_last(backend: dict, folder: Path) -> None:
    """Check that the default layout on a GPU gives the same weights, but for the rounding of other kernels."""
    first, second = (
        train_steps(build_trainer(folder / f"layout_{last}", channels_last=last, **EVERYTHING, **backend), 2)
        for last in (False, True)
    )
    difference, name = largest_difference(first, second)
    assert difference <= 1e-5, f"{name} differs by {difference}"


def in_parts(backend: dict, folder: Path) -> None:
    """Each rank holds half of the weights, of their average and of Adam's two moments."""
    trainer = build_ar_trainer(folder / "parts", "prior", **backend)
    trainer.train_step()
    engine = trainer.main_engine
    whole = sum(parameter.numel() for parameter in engine.empty.parameters())
    for held in (engine.local, trainer.ema.ema_model):
        assert sum(shard.numel() for shard in held.parameters()) == pytest.approx(whole / 2, rel=0.05)
    states = (getattr(engine, "engine", None) or engine).optimizer.state.values()
    moments = [getattr(value, "_local_tensor", value) for state in states for value in state.values()]
    assert sum(moment.numel() for moment in moments if moment.ndim) == pytest.approx(whole, rel=0.05)


def reduced_once(backend: dict, folder: Path) -> None:
    """Gradients are exchanged block by block, as often for 4 micro-batches as for one."""
    calls = {}
    for accumulation in (1, 4):
        trainer = build_ar_trainer(
            folder / f"reduced_{accumulation}", "prior", grad_accum_every=accumulation, batch_size=2, **backend
        )
        with torch.profiler.profile() as profile:
            trainer.train_step()
        calls[accumulation] = sum(event.count for event in profile.key_averages() if "reduce_scatter" in event.key)
    assert calls[1] == calls[4] > 2


def refusals(backend: dict, folder: Path, results: dict) -> None:
    """Return the line for a user who asks for a penalty on a sharded discriminator."""
    results["refused"] = {}
    try:
        build_trainer(folder / "penalised", **{**backend, "apply_grad_penalty_every": 1})
    except UserError as error:
        results["refused"]["vqgan"] = str(error)


def gradients_do_not_leak(backend: dict, folder: Path) -> None:
    """Check that the generator's pass through the frozen discriminator leaves a gradient at its input only."""
    trainer = build_trainer(folder / "frozen", **EVERYTHING, **backend)
    image = trainer.next_micro_batches()[0].requires_grad_()
    trainer.discriminator.frozen(image).sum().backward()
    assert image.grad is not None and float(image.grad.abs().sum()) > 0
    assert all(p.grad is None or not p.grad.any() for p in trainer.discriminator.module.parameters())
    assert all(p.requires_grad for p in trainer.discriminator.module.parameters())


def exchanges(backend: dict, folder: Path, results: dict) -> None:
    """Return calls and bytes of DDP's gradient exchange in one optimizer step of 4 micro-batches, per network."""
    trainer = build_trainer(folder / "exchange", grad_accum_every=4, batch_size=2, **backend)
    counted = {name: [0, 0] for name in trainer.engines}

    def hook(name, bucket):
        counted[name][0] += 1
        counted[name][1] += bucket.buffer().numel() * bucket.buffer().element_size()
        return (
            torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0] / 2)
        )

    for name, engine in trainer.engines.items():
        engine.wrapped.register_comm_hook(name, hook)
    train_steps(trainer, 1)
    results["exchanges"] = counted
    results["sizes"] = {
        name: sum(4 * p.numel() for p in engine.module.parameters()) for name, engine in trainer.engines.items()
    }


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    backend = {"backend": "accelerate"}
    if name == "fsdp2":  # as `accelerate launch` says it
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        os.environ |= {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "500"}
    if name.startswith("zero"):
        shipped = Path(__file__).parents[2] / "deepspeed_configs" / f"{name}.json"
        backend = {"backend": "deepspeed", "deepspeed_config": str(shipped) if name != "zero0" else None}
    if name in SHARDED:
        EVERYTHING["apply_grad_penalty_every"] = 0
    results: dict = {}
    alone = {"ends": lambda: ends(backend, folder, results)}
    plain = {**backend, "apply_grad_penalty_every": 0} if name in SHARDED else backend  # no shard can have it
    alone["codebooks"] = lambda: every_codebook_stays_equal(plain, folder)
    if sys.argv[3:]:
        alone[sys.argv[3]]()
        finish(build_trainer(folder / "last", **plain), folder, results)
        return
    refusals(backend, folder, results)
    parity(backend, folder, results)
    bf16(backend, folder, results)
    resume(backend, folder, results)
    discrete_vae(backend, folder, results)
    autoregressive(backend, folder, results)
    optimizers(backend, folder, results)
    gradients_do_not_leak(backend, folder)
    ends(backend, folder, results)
    for scenario in not_finite.SCENARIOS:
        scenario(folder, **backend)
    if name in SHARDED:
        whole_runs(backend, folder)
        channels_last(backend, folder)
        in_parts(backend, folder)
    if name == "fsdp2":
        reduced_once(backend, folder)
    trainer = build_trainer(folder / "last", **EVERYTHING, **backend)
    flags_and_means(trainer)
    if name == "accelerate":
        linear_splits(backend, folder, results)
        exchanges(backend, folder, results)
        divergence_is_found(backend, folder)
    if name in ("accelerate", "zero2"):
        codebooks_stay_equal(backend, folder, DRAWS)
    finish(trainer, folder, results)


def finish(trainer: Trainer, folder: Path, results: dict) -> None:
    """Write the results, and leave together."""
    if trainer.is_main:
        torch.save(results, folder / "results.pt")
    trainer.backend.barrier()
    trainer.close()


if __name__ == "__main__":
    main()
