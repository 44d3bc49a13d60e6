"""DeepSpeed: one native engine per network, ZeRO 0, 1 and 2, and 3 with `zero3.py`.

DeepSpeed 0.19 hooks the outputs of its engines, so a gradient may pass an engine's output once per forward. Losses
that need more (adaptive weight, gradient penalty, the generator's loss through the discriminator) are written so that
they never do: see `VQGanVAETrainer`. Weights stay float32 and bf16 is autocast, so every checkpoint holds the same
tensors.
"""

from __future__ import annotations

import difflib
import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vqdist.backends import state
from vqdist.backends.base import Engine
from vqdist.backends.build_ops import find_stale_lock, prepare_environment
from vqdist.backends.distributed import DistributedBackend, group_timeout
from vqdist.backends.local import autocast_for, frozen_weights
from vqdist.backends.sharding import without_weights
from vqdist.errors import UserError
from vqdist.files import read_json

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
prepare_environment()

try:
    import deepspeed
    from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_fp32_param, safe_set_full_optimizer_state
except ModuleNotFoundError as error:
    raise UserError(
        f"backend 'deepspeed' needs a package that is not installed ({error.name}); install it with "
        "pip install 'vqdist[deepspeed]'"
    ) from error

OWNED_BY_THE_RUN = {
    "train_batch_size": "batch_size, grad_accum_every and the number of processes",
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "grad_accum_every",
    "gradient_clipping": "max_grad_norm and discr_max_grad_norm",
    "optimizer": "lr and discr_lr",
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
    "zero_force_ds_cpu_optimizer": "the optimizer is always torch's Adam",
    "zero_allow_untested_optimizer": "the optimizer is always torch's Adam, which DeepSpeed has tested",
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


class DeepSpeedEngine(Engine):
    """A `deepspeed.DeepSpeedEngine` behind the contract.

    Args:
        engine: what `deepspeed.initialize` returned; it divides the loss by the accumulation and clips by itself.
        backend: gives the device and the ranks.
        precision: for the forward with frozen weights, which does not go through DeepSpeed.
    """

    def __init__(self, engine: Any, backend: DeepSpeedBackend, precision: str):
        self.engine = engine
        self.backend = backend
        self.precision = precision
        self.module = engine.module
        self.zero_stage = engine.zero_optimization_stage()
        self.double_backward = False  # its output hooks raise, or at stage 1 give wrong weights without a word

    def __call__(self, *args, **kwargs):
        return self.engine(*args, **kwargs)

    def frozen(self, *args, **kwargs):
        with frozen_weights(self.module), autocast_for(self.backend.device, self.precision):
            return self.module(*args, **kwargs)

    def micro_step(self, *, last: bool):
        # ZeRO 2 partitions gradients and so exchanges on every micro-batch whatever is said here
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, *, lr: float) -> Tensor:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        norm = self._stage_0_norm() if self.zero_stage == 0 else None
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        return torch.as_tensor(float("nan") if norm is None else norm, device=self.backend.device).detach()

    def _stage_0_norm(self) -> Tensor:
        gradients = [p.grad.norm() for p in self.module.parameters() if p.grad is not None]
        return torch.stack(gradients).norm()

    def save(self, folder: Path) -> None:
        optimizer = self._optimizer_tensors()
        if self.backend.is_main:
            state.save_tensors(folder / state.WEIGHTS, self.module.state_dict())
            state.save_tensors(folder / state.OPTIMIZER, optimizer)

    def load(self, folder: Path) -> None:
        device = self.backend.device
        state.load_weights(self, folder / state.WEIGHTS, device)
        tensors = state.load_tensors(folder / state.OPTIMIZER, device)
        if self.zero_stage == 0:
            state.load_optimizer_tensors(self.module, self.engine.basic_optimizer, tensors)
            return
        for parameter in self.module.parameters():
            safe_set_full_fp32_param(parameter, parameter.detach())
        if tensors:
            self._load_partitions(tensors)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        """Whole optimizer state by parameter name, gathered from the ranks' partitions."""
        basic = self.engine.basic_optimizer
        if self.zero_stage == 0:
            return state.optimizer_tensors(self.module, basic)
        if not basic.state:
            return {}
        partition = next(iter(basic.state.values()))
        self._link_states()
        tensors = {}
        for name, parameter in self.module.named_parameters():
            for kind, value in partition.items():
                whole = value if kind == "step" else safe_get_full_optimizer_state(parameter, kind)
                tensors[f"{kind}/{name}"] = torch.as_tensor(whole, dtype=torch.float32)
        return tensors

    def _link_states(self) -> None:
        """Let each parameter know its part of the optimizer's state: of several groups of parameters, as weight decay
        makes them, DeepSpeed does so after the first has made its first step, when the others have no state yet."""
        self.engine.optimizer._hp_optimizer_states_linked = False
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _load_partitions(self, tensors: dict[str, Tensor]) -> None:
        """Fill this rank's partition of the optimizer state, which DeepSpeed makes on the first step only."""
        zero = self.engine.optimizer
        kinds = dict.fromkeys(key.partition("/")[0] for key in tensors)
        step = next(value for key, value in tensors.items() if key.startswith("step/"))
        for partition in zero.single_partition_of_fp32_groups:
            zero.optimizer.state[partition] = {
                kind: state.place_step(zero.optimizer, step, partition.device)
                if kind == "step"
                else torch.zeros_like(partition)
                for kind in kinds
            }
        self._link_states()
        for name, parameter in self.module.named_parameters():
            for kind in kinds:
                if kind != "step":
                    safe_set_full_optimizer_state(parameter, tensors[f"{kind}/{name}"], kind)


class DeepSpeedBackend(DistributedBackend):
    """One process per device, one DeepSpeed engine per network.

    Args:
        grad_accum_every: micro-batches per optimizer step.
        precision: "fp32" or "bf16".
        dist_timeout: minutes that a rank waits for a peer.
        micro_batch_size: images per process and micro-batch.
        config: path of a DeepSpeed JSON file or its content: what only DeepSpeed decides. None is ZeRO stage 0.
    """

    name = "deepspeed"

    def __init__(
        self,
        *,
        grad_accum_every: int = 1,
        precision: str = "fp32",
        dist_timeout: float = 10.0,
        micro_batch_size: int = 1,
        config: str | dict | None = None,
    ):
        self.config = read_config(config)
        self.grad_accum_every = grad_accum_every
        self.precision = precision
        self.micro_batch_size = micro_batch_size
        _refuse_stale_build_lock()
        for logger in ("DeepSpeed", "deepspeed"):
            logging.getLogger(logger).setLevel(logging.WARNING)
        on_gpu = torch.cuda.is_available()
        self.meet(dist_timeout)
        for variable, value in (("MASTER_ADDR", "127.0.0.1"), ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            os.environ.setdefault(variable, value)
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            auto_mpi_discovery=False,
            timeout=group_timeout(dist_timeout),
            verbose=False,
        )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        self.adopt_group(device, group_timeout(dist_timeout))

    def prepare(self, module: nn.Module, optimizer: Optimizer, *, max_grad_norm: float | None) -> Engine:
        self.broadcast_from_main(module)
        empty = without_weights(module) if self.zero_stage == 3 else None
        config = self._config_for(max_grad_norm)
        _check_values(config)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
        if empty is None:
            return DeepSpeedEngine(engine, self, self.precision)
        from vqdist.backends.zero3 import Zero3Engine

        return Zero3Engine(engine, self, self.precision, empty)

    @property
    def title(self) -> str:
        return f"{self.name} (ZeRO {self.zero_stage})"

    @property
    def compiles(self) -> bool:
        return self.zero_stage < 3

    @property
    def zero_stage(self) -> int:
        """How much DeepSpeed partitions: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too."""
        return self.config.get("zero_optimization", {}).get("stage", 0)

    def _config_for(self, max_grad_norm: float | None) -> dict[str, Any]:
        return {
            **self.config,
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.grad_accum_every,
            "gradient_clipping": max_grad_norm or 0.0,
            "zero_force_ds_cpu_optimizer": False,  # with offload torch's own Adam runs on the host, nothing is built
            # no lower_precision_safe_modules: gradients are exchanged in float32, as on every other backend
            "torch_autocast": {
                "enabled": self.precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
        }


def read_config(config: str | dict | None) -> dict[str, Any]:
    """The content of a DeepSpeed configuration, checked for what the run owns and for what cannot work here."""
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
    """The optimizer's state may live in the host's memory under ZeRO 1 and 2; nothing lives on a disk."""
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
    """The top-level keys of a DeepSpeed configuration: DeepSpeed itself ignores any other."""
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
            nearest = difflib.get_close_matches(key, known, n=3)
            raise UserError(f"{where} has no key {key!r}; nearest: {', '.join(nearest) or 'none'}")


def _check_values(config: dict[str, Any]) -> None:
    """Raise `UserError` for a value that DeepSpeed does not take."""
    try:
        deepspeed.DeepSpeedConfig(config)
    except (AssertionError, TypeError, ValueError) as error:  # of pydantic a ValueError
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"DeepSpeed does not take the values of deepspeed_config: {reason}") from error


def _refuse_stale_build_lock() -> None:
    lock = find_stale_lock()
    if lock is not None:
        raise UserError(
            f"a DeepSpeed build was killed and left {lock}, on which every start would wait for ever; remove it: "
            f"rm {lock}"
        )


def _free_port() -> int:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
