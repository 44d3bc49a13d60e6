"""Bytes that two processes exchange in one optimizer step of four micro-batches, counted by torch's profiler.

Each collective over gloo is an event with the shape and type of its tensor. An all-reduce's tensor is counted
once; the halves of one that DeepSpeed's ZeRO does apart (reduce here, gather there) count half each, of the whole
tensor, as they carry half the bytes in a ring. So the least that data parallel training needs is one copy of the
trainable parameters, whatever the way.

usage of the two ranks: torchrun ... -m benchmarks.traffic BACKEND ZERO QUANTIZER[,QUANTIZER] FOLDER, where ZERO is
the JSON of DeepSpeed's `zero_optimization`, {} for accelerate
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Row, build_trainer, build_vae, run_json, torchrun

ACCUMULATION = 4
TOLERANCE = 1.02  # times one copy of the trainable parameters and the codebook statistics
# Small networks: bytes need no width, and the codebook's share shows.
MODEL = {"dim": 16, "layers": 2, "discr_layers": 3}
# Share of an all-reduce's bytes that each collective carries for a tensor of the same (whole) size.
SHARE = {"all_reduce": 1.0, "reduce": 0.5, "broadcast": 0.5, "reduce_scatter": 0.5, "all_gather": 0.5}
ITEM_SIZES = {"float": 4, "double": 8, "int": 4, "long int": 8, "c10::BFloat16": 2, "c10::Half": 2, "bool": 1}


def count_step(trainer, folder: Path) -> dict[str, dict[str, float]]:
    """Return calls and bytes of each collective in one optimizer step of this rank."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        trainer.train_step()
    path = folder / f"trace_{trainer.backend.rank}.json"
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    counted: dict[str, dict[str, float]] = defaultdict(lambda: {"calls": 0, "bytes": 0, "as_all_reduce": 0})
    for event in events:
        name = str(event.get("name"))
        if event.get("ph") == "X" and name.startswith("gloo:"):
            operation = name.removeprefix("gloo:")
            size = sum(_sizes(event["args"]))
            # the event of a gather holds this rank's part of the whole
            whole = size * (trainer.backend.world_size if operation == "all_gather" else 1)
            counted[operation]["calls"] += 1
            counted[operation]["bytes"] += whole
            counted[operation]["as_all_reduce"] += whole * SHARE[operation]
    return dict(counted)


def _sizes(arguments: dict[str, Any]) -> list[int]:
    """Bytes of each tensor of an event."""
    return [
        math.prod(shape) * ITEM_SIZES[kind]
        for shape, kind in zip(arguments["Input Dims"], arguments["Input type"], strict=True)
        if kind in ITEM_SIZES
    ]


def expected_bytes(trainer) -> dict[str, int]:
    """Return what one step has to exchange, from the networks' sizes alone."""
    parameters = {name: _parameter_bytes(engine.module) for name, engine in trainer.engines.items()}
    quantizer = trainer.generator.module.quantizer
    statistics = quantizer.codebook_size  # lfq: how probable each code is on average
    if quantizer.name == "vq":  # uses of each code, and the sum of the vectors that use it
        statistics += quantizer.inner.codebook.numel()
    last = trainer.generator.module.last_layer.weight
    return {
        **parameters,
        "codebook statistics": 4 * statistics * ACCUMULATION,
        "adaptive weight": 4 * 2 * last.numel() * ACCUMULATION,
    }


def _parameter_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


def ranks(backend: str, zero: dict[str, Any], quantizers: list[str], folder: Path) -> dict[str, Any]:
    """Return what each quantizer's training exchanges; runs on every rank."""
    results = {}
    for quantizer in quantizers:
        vae = build_vae(quantizer, **MODEL)
        options: dict[str, Any] = {"backend": backend, "grad_accum_every": ACCUMULATION, "batch_size": 4}
        if backend == "deepspeed":
            options["deepspeed_config"] = {"zero_optimization": zero}
        trainer = build_trainer(vae, folder / quantizer, apply_grad_penalty_every=3, num_workers=0, **options)
        trainer.train_step()  # DDP makes its buckets anew after the first step, and this one logs
        trainer.train_step()
        plain = count_step(trainer, folder)
        trainer.progress.step = 3  # one with a gradient penalty, for which nothing more may be exchanged
        with_penalty = count_step(trainer, folder)
        results[quantizer] = {"counted": plain, "with_penalty": with_penalty, "expected": expected_bytes(trainer)}
    if trainer.is_main:
        print(json.dumps(results), flush=True)
    trainer.backend.barrier()
    trainer.close()
    return results


def measure(backend: str, zero: dict[str, Any], quantizers: str = "lfq,vq") -> dict[str, Any]:
    """Start two ranks and give what rank 0 counted, by quantizer."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["-m", "benchmarks.traffic", backend, json.dumps(zero), quantizers, folder]
        return run_json(torchrun(arguments))


def total(counted: dict[str, dict[str, float]]) -> float:
    """Bytes of all collectives, as those of all-reduces."""
    return sum(operation["as_all_reduce"] for operation in counted.values())


def run(quick: bool = False) -> list[Row]:
    """Rows of the table."""
    zero_1 = {"stage": 1, "use_multi_rank_bucket_allreduce": False}
    zero_2 = {"stage": 2, "use_multi_rank_bucket_allreduce": False}
    runtimes = [
        ("accelerate", {}),
        ("deepspeed", {"stage": 0}),
        ("deepspeed", {"stage": 1}),
        ("deepspeed", zero_1),
        ("deepspeed", {"stage": 2}),
        ("deepspeed", zero_2),
    ]
    rows = []
    for backend, zero in runtimes[:1] if quick else runtimes:
        for quantizer, result in measure(backend, zero).items():
            expected = result["expected"]
            needed = sum(expected.values()) - expected["adaptive weight"]
            calls = ", ".join(
                f"{value['calls']:.0f} {name} {value['bytes']:,.0f}" for name, value in result["counted"].items()
            )
            parts = ", ".join(f"{name} {size:,}" for name, size in expected.items())
            # ZeRO 2 keeps no whole gradient to accumulate in, so it exchanges on each micro-batch by design; and by
            # DeepSpeed's default ZeRO 1 and 2 reduce whole gradients to every rank and gather the weights as well
            bounded = zero.get("stage", 0) == 0 or zero == zero_1
            target = TOLERANCE if bounded else None
            name = backend + (f" ZeRO {zero['stage']}" if zero else "")
            name += " without use_multi_rank_bucket_allreduce" if len(zero) > 1 else ""
            what = f"{name}, {quantizer}: bytes exchanged / (parameters + codebook statistics)"
            detail = f"bytes of {calls}; needed: {parts}"
            rows.append(Row(what, total(result["counted"]) / needed, at_most=target, detail=detail))
    return rows


if __name__ == "__main__":
    ranks(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3].split(","), Path(sys.argv[4]))
