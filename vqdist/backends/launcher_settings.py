"""Settings of `accelerate launch` that no backend would follow: errors, never ignored."""

from __future__ import annotations

import os

from vqdist.errors import UserError

# What `accelerate launch` says of its configuration and flags: variable -> (key there, its neutral value, the owner).
OWNED_VARIABLES = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", "1", "--trainer.grad_accum_every"),
    "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", "none", "--trainer.max_grad_norm"),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", "no", "--trainer.compile"),
    "ACCELERATE_DYNAMO_MODE": ("dynamo_mode", "default", "--trainer.compile"),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": ("dynamo_use_fullgraph", "false", "--trainer.compile"),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": ("dynamo_use_dynamic", "false", "--trainer.compile"),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": (
        "dynamo_use_regional_compilation",
        "false",
        "--trainer.compile",
    ),
    "ACCELERATE_DOWNCAST_BF16": ("downcast_bf16", "false", "--trainer.precision"),
    "XLA_DOWNCAST_BF16": ("downcast_bf16", "0", "--trainer.precision"),
    "XLA_USE_BF16": ("mixed_precision", "0", "--trainer.precision"),
    "ACCELERATE_USE_MEGATRON_LM": ("megatron_lm_config", "false", "--backend deepspeed for what must be sharded"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("parallelism_config", "false", "num_processes: all are data parallel"),
}


def refuse_launcher_settings(backend: str, precision: str) -> None:
    """Raise `UserError` for what the Accelerate configuration says and this backend would not do.

    Args:
        backend: "local", "accelerate" or "deepspeed".
        precision: what the run says of it.
    """
    if _is_true("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "the Accelerate configuration says distributed_type DEEPSPEED: one Accelerator keeps one DeepSpeed "
            "engine, a GAN needs two; use distributed_type MULTI_GPU there (or torchrun) and `--backend deepspeed "
            "--deepspeed_config FILE`"
        )
    if backend != "accelerate" and _is_true("ACCELERATE_USE_FSDP"):
        raise UserError(
            f"the Accelerate configuration says distributed_type FSDP and the backend is {backend!r}, which does not "
            "do that; use `--backend accelerate`, or distributed_type MULTI_GPU there"
        )
    for variable, (key, neutral, owner) in OWNED_VARIABLES.items():
        value = os.environ.get(variable, neutral)
        if value.lower() != neutral:
            raise UserError(
                f"the Accelerate configuration says {key} {value!r} ({variable}), which belongs to the run; remove it "
                f"there and use {owner}"
            )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        raise UserError(
            f"the Accelerate configuration says mixed_precision {asked!r} and the run says precision {precision!r}; "
            "precision belongs to the run: set mixed_precision: 'no' there and --trainer.precision here"
        )


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
