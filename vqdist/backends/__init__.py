"""Runtimes behind one contract: `base.py` says what it is, `local.py` is the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vqdist.backends.environment import check_launch, export_launch, started_by_launcher
from vqdist.backends.launcher_settings import refuse_launcher_settings
from vqdist.errors import UserError

if TYPE_CHECKING:
    from vqdist.backends.base import Backend, Engine

__all__ = ["BACKENDS", "Backend", "Engine", "create_backend", "resolve_backend"]

BACKENDS = ("local", "accelerate", "deepspeed")


def __getattr__(name: str) -> Any:  # the contract imports torch, and which backend it is can be said without
    if name in ("Backend", "Engine"):
        from vqdist.backends import base

        return getattr(base, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def resolve_backend(name: str) -> str:
    """Return the backend that a name stands for: "auto" is accelerate under a launcher and local without one.

    Raises:
        UserError: there is no such backend, or this launch would train separate models.
    """
    check_launch()
    if name == "auto":
        return "accelerate" if started_by_launcher() else "local"
    if name == "horovod":
        raise UserError(
            "backend 'horovod' is not supported; backend 'accelerate' does its job under mpirun, torchrun or "
            "`accelerate launch`"
        )
    if name == "fsdp2":
        raise UserError(
            "backend 'fsdp2' is backend accelerate with distributed_type FSDP in the Accelerate configuration; start "
            "with `accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes N -m vqdist ...`"
        )
    if name not in BACKENDS:
        raise UserError(f"backend {name!r} is not known; choose auto, {', '.join(BACKENDS)}")
    return name


def create_backend(
    name: str,
    *,
    grad_accum_every: int = 1,
    precision: str = "fp32",
    dist_timeout: float = 10.0,
    exchange_timeout: float | None = None,
    micro_batch_size: int = 1,
    accelerate_kwargs: dict[str, Any] | None = None,
    deepspeed_config: str | dict | None = None,
) -> Backend:
    """Start the runtime of this name. Options of another runtime are errors, never ignored."""
    name = resolve_backend(name)
    refuse_launcher_settings(name, precision)
    if accelerate_kwargs and name != "accelerate":
        raise UserError(f"accelerate_kwargs is given but the backend is {name!r}; use --backend accelerate")
    if deepspeed_config is not None and name != "deepspeed":
        raise UserError(f"deepspeed_config is given but the backend is {name!r}; use --backend deepspeed")
    common: dict[str, Any] = {"grad_accum_every": grad_accum_every, "precision": precision}
    if name == "local":
        from vqdist.backends.local import LocalBackend

        return LocalBackend(**common)
    common |= {"dist_timeout": dist_timeout, "exchange_timeout": exchange_timeout}
    export_launch()
    if name == "accelerate":
        from vqdist.backends.accelerate import AccelerateBackend

        return AccelerateBackend(**common, accelerate_kwargs=accelerate_kwargs)
    from vqdist.backends.deepspeed import DeepSpeedBackend

    return DeepSpeedBackend(**common, micro_batch_size=micro_batch_size, config=deepspeed_config)
