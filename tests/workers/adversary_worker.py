"""Run by torchrun from test_two_players.py: two ranks of a backend train with each discriminator and its losses.

usage: adversary_worker.py FOLDER [fsdp2 | zero0 | zero1 | zero2]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from launching import ROOT
from scenarios import ADVERSARIES, build_adversary, weights_of


def main() -> None:
    folder = Path(sys.argv[1])
    backend = {"backend": "accelerate"}
    without = {}
    if sys.argv[2:] == ["fsdp2"]:  # as `accelerate launch` says it; no penalty reaches a shard
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        os.environ |= {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "500"}
        without = {"apply_grad_penalty_every": 0, "grad_penalty": "unit_norm"}
    elif len(sys.argv) > 2:
        shipped = ROOT / "deepspeed_configs" / f"{sys.argv[2]}.json"
        backend = {"backend": "deepspeed", "deepspeed_config": str(shipped) if sys.argv[2] != "zero0" else None}
    results = {}
    names = [name for name in ADVERSARIES if len(sys.argv) == 2 or name != "actnorm"]
    for name in names:
        trainer = build_adversary(folder / name, name, **backend, **without)
        for _ in range(4):
            numbers = trainer.train_step()  # with a comparison of the ranks after each
        results[name] = weights_of(trainer)
        results[f"logs_{name}"] = trainer.backend.mean(numbers)
    straight = build_adversary(folder / "straight", "patchgan", save_model_every=2, **backend, **without)
    for _ in range(4):
        straight.train_step()
    resumed = build_adversary(folder / "straight", "patchgan", **backend, **without, allow_config_change=True)
    assert resumed.step == 4
    resumed.load(folder / "straight" / "checkpoints" / "step_00000002")
    assert resumed.step == 2
    for _ in range(2):
        resumed.train_step()
    ours, theirs = weights_of(straight), weights_of(resumed)
    own = resumed.networks.of_rank
    of_ranks = torch.stack([tensor.flatten().sum() for tensor in own.values()])
    equal = all(torch.equal(ours[key], theirs[key]) for key in ours) and all(
        torch.equal(straight.networks.of_rank[key], tensor) for key, tensor in own.items()
    )
    results["resumed_to_the_bit"] = not resumed.backend.any(not equal)
    gathered = resumed.backend.gather(of_ranks)
    results["statistics_differ"] = bool((gathered[0] != gathered[1]).all())
    if straight.is_main:
        torch.save(results, folder / "results.pt")
    straight.backend.barrier()
    straight.close()


if __name__ == "__main__":
    main()
