"""A DeepSpeed configuration as vqdist takes it: what only DeepSpeed decides; whatever else it says is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vqdist.errors import UserError
from vqdist.files import read_json
from vqdist.names import unknown

OWNED_BY_THE_RUN = {
    "train_batch_size": "batch_size, grad_accum_every and the number of processes",
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "grad_accum_every",
    "gradient_clipping": "max_grad_norm and discr_max_grad_norm",
    "optimizer": "optimizer, lr, discr_optimizer and discr_lr",
    "scheduler": "lr_schedule and warmup_steps",
    "fp16": "precision",
    "bf16": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "communication_data_type": "precision",
    "tensorboard": "trackers",
    "wandb": "trackers",
    "compile": "compile",
    "bfloat16": "precision",
    "managed_gradient_accumulation": "grad_accum_every",
    "autotuning": "batch_size",
    "csv_monitor": "trackers",
}
# what DeepSpeed would take without a word and vqdist could not honour: key -> the reason
REFUSED_KEYS = {
    "zero_force_ds_cpu_optimizer": "the optimizer is that of --trainer.optimizer",
    "zero_allow_untested_optimizer": "vqdist itself says which optimizer each stage can hold",
    "gradient_allreduce_op": "gradients are always averaged over processes",
    "dataloader_drop_last": "the images come from vqdist's own loader",
    "checkpoint": "checkpoints are vqdist's own, which any number of processes reads",
    "activation_checkpointing": "the networks do not call it",
}
REFUSED_ZERO_KEYS = {
    "cpu_offload": 'its new name is "offload_optimizer": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": 'its new name is "offload_optimizer": {"device": "cpu", "pin_memory": true}',
    "cpu_offload_param": "weights are not offloaded",
    "offload_param": "weights are not offloaded",
    "zenflow": "its late updates are not those of the algorithm",
    "compute_grad_norm": "the norm of gradients is always measured",
    "legacy_stage1": "DeepSpeed has dropped it",
    "elastic_checkpoint": "checkpoints are vqdist's own",
    "load_from_fp32_weights": "checkpoints are vqdist's own",
}


def read_config(config: str | dict | None) -> dict[str, Any]:
    """Return the content of a DeepSpeed configuration, checked for what the run owns and for what cannot work here."""
    if config is None:
        return {}
    where = f"deepspeed_config {config}" if isinstance(config, (str, Path)) else "deepspeed_config"
    content = _read_json(Path(config), where) if isinstance(config, (str, Path)) else dict(config)
    for key, owner in OWNED_BY_THE_RUN.items():
        if key in content:
            raise UserError(f"{where} sets {key!r}, which belongs to the run; remove it there and use {owner}")
    _refuse_keys(content, REFUSED_KEYS, where)
    _refuse_unknown_keys(content, _known_keys(), where)
    zero = content.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f'{where}: zero_optimization is {zero!r}; an object is expected, as {{"stage": 2}}')
    _refuse_keys(zero, REFUSED_ZERO_KEYS, f"{where}: zero_optimization")
    _refuse_unknown_keys(zero, _known_zero_keys(), f"{where}: zero_optimization")
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise UserError(f"{where}: zero_optimization.stage is {stage!r}; use 0, 1, 2 or 3")
    _refuse_foreign_offload(zero, stage, where)
    return content


def _refuse_keys(content: dict[str, Any], reasons: dict[str, str], where: str) -> None:
    for key, reason in reasons.items():
        if key in content:
            raise UserError(f"{where} sets {key!r}, which cannot be used here: {reason}; remove it")


def _refuse_foreign_offload(zero: dict[str, Any], stage: int, where: str) -> None:
    """Raise `UserError` for offload but that of the optimizer's state to the host's memory under ZeRO 1 and 2."""
    offload = zero.get("offload_optimizer")
    if offload is None:
        return
    where = f"{where}: zero_optimization.offload_optimizer"
    if not isinstance(offload, dict) or offload.get("device") != "cpu":
        raise UserError(f'{where} is {offload!r}; {{"device": "cpu"}} is the one that works, or remove it')
    if stage not in (1, 2):
        raise UserError(f"{where} needs ZeRO stage 1 or 2 and the stage is {stage}; change one of them")
    for key in offload.keys() - {"device", "pin_memory"}:
        raise UserError(f"{where} sets {key!r}, which has no effect with device 'cpu'; only pin_memory has; remove it")


def _read_json(path: Path, where: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{where} is not a file; the shipped ones are in deepspeed_configs/")
    return read_json(path)


def _known_zero_keys() -> list[str]:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    return [*fields, *(field.alias for field in fields.values() if field.alias)]


def _known_keys() -> list[str]:
    """Return the top-level keys of a DeepSpeed configuration: DeepSpeed itself ignores any other."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

    named = [value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)]
    return [*named, ZERO_OPTIMIZATION, *_SECTIONS]


_SECTIONS = (
    *("activation_checkpointing", "aio", "autotuning", "comms_logger", "communication_data_type", "compile"),
    *("flops_profiler", "monitor", "nebula", "tensorboard", "wandb", "csv_monitor", "zero_allow_untested_optimizer"),
)


def _refuse_unknown_keys(content: dict[str, Any], known: list[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise unknown("key", key, known, of=where)
