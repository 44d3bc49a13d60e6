"""Refusals of the backends before anything starts, and the local one's work."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from launching import ROOT, torchrun
from torch import nn

from vqdist.backends import create_backend, resolve_backend
from vqdist.backends.distributed import DistributedBackend, group_timeout
from vqdist.backends.local import LocalBackend
from vqdist.backends.state import load_tensors, place_step, save_tensors
from vqdist.errors import UserError


def test_auto_is_local_alone_and_accelerate_under_a_launcher(monkeypatch):
    assert resolve_backend("auto") == "local"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert resolve_backend("auto") == "accelerate"
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert resolve_backend("auto") == "accelerate"


def test_local_refuses_to_train_one_model_per_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="would train 4 separate models; use --backend accelerate"):
        create_backend("local")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            "keeps one DeepSpeed engine, a GAN needs two; use distributed_type MULTI_GPU there",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version 1; vqdist shards by FSDP2"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision 'fp16' and the run says precision 'fp32'"),
    ],
)
def test_settings_of_accelerate_that_belong_elsewhere(environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        create_backend("accelerate")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("backend", ["local", "deepspeed"])
@pytest.mark.parametrize(
    ("variable", "message"),
    [
        (
            "ACCELERATE_USE_FSDP",
            "distributed_type FSDP and the backend is '.*', which does not do that",
        ),
        ("ACCELERATE_USE_DEEPSPEED", "distributed_type DEEPSPEED"),
        ("ACCELERATE_DYNAMO_BACKEND", "dynamo_backend 'true' .* use --trainer.compile"),
        ("ACCELERATE_MIXED_PRECISION", "mixed_precision 'true' and the run says precision 'fp32'"),
    ],
)
def test_settings_of_accelerate_are_ignored_by_no_backend(backend, variable, message, monkeypatch):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=message):
        create_backend(backend)
    assert not torch.distributed.is_initialized()


def test_fsdp2_is_a_configuration_of_accelerate():
    with pytest.raises(UserError, match="accelerate launch --config_file accelerate_configs/fsdp2.yaml"):
        create_backend("fsdp2")


@pytest.mark.parametrize("port", ["abc", "-1", "70000"])
def test_a_port_that_is_none(port, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UserError, match=f"MASTER_PORT={port}, which is no port"):
        create_backend("accelerate")


@pytest.mark.parametrize("key", ["gradient_accumulation_steps", "mixed_precision", "cpu", "fsdp_plugin", "log_with"])
def test_accelerate_kwargs_that_belong_to_the_run(key):
    with pytest.raises(UserError, match=f"accelerate_kwargs sets '{key}', which belongs to the run; use "):
        create_backend("accelerate", accelerate_kwargs={key: 1})


def deepspeed_error(config) -> str:
    with pytest.raises(UserError) as error:
        create_backend("deepspeed", deepspeed_config=config)
    assert not torch.distributed.is_initialized()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "owner"),
    [
        ("train_batch_size", "batch_size"),
        ("train_micro_batch_size_per_gpu", "batch_size"),
        ("gradient_accumulation_steps", "grad_accum_every"),
        ("gradient_clipping", "max_grad_norm"),
        ("optimizer", "optimizer"),
        ("scheduler", "lr_schedule"),
        ("fp16", "precision"),
        ("bf16", "precision"),
        ("torch_autocast", "precision"),
        ("wandb", "trackers"),
    ],
)
def test_deepspeed_keys_that_belong_to_the_run(key, owner):
    message = deepspeed_error({key: {}})
    assert f"sets '{key}', which belongs to the run; remove it there and use {owner}" in message


@pytest.mark.parametrize(
    "config",
    [
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": -5}},
        {"comms_logger": {"enabled": "yes please"}},
        {"zero_optimization": {"stage": 1, "round_robin_gradients": "perhaps"}},
    ],
)
def test_values_that_deepspeed_does_not_take(config):
    from vqdist.backends.deepspeed import check_values

    with pytest.raises(UserError, match="DeepSpeed does not take the values of deepspeed_config"):
        check_values({**config, "train_micro_batch_size_per_gpu": 1})


def test_a_typo_in_a_zero_key_is_named_with_the_nearest():
    message = deepspeed_error({"zero_optimization": {"stage": 2, "overlap_com": True}})
    assert "zero_optimization has no key 'overlap_com'; nearest: overlap_comm" in message


def test_a_typo_at_the_top_of_a_deepspeed_file_is_named_with_the_nearest():
    message = deepspeed_error({"zero_optimisation": {"stage": 2}})
    assert "no key 'zero_optimisation'; nearest: zero_optimization" in message


def test_deepspeed_files_that_are_none(tmp_path):
    assert "is not a file; the shipped ones are in deepspeed_configs/" in deepspeed_error(str(tmp_path / "none.json"))
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert "is not valid JSON" in deepspeed_error(str(broken))
    broken.write_text(json.dumps([1]))
    assert "holds a list; a JSON object is expected" in deepspeed_error(str(broken))


def test_a_stale_build_lock_is_named_with_its_remedy(monkeypatch, tmp_path):
    import vqdist.backends.deepspeed as module

    monkeypatch.setattr(module, "find_stale_lock", lambda: tmp_path / "lock")
    assert f"rm {tmp_path / 'lock'}" in deepspeed_error(None)


def test_local_engine_divides_clips_and_reports_the_norm_before_clipping():
    network = nn.Linear(3, 1, bias=False)
    start = network.weight.detach().clone()
    backend = LocalBackend(grad_accum_every=2, device="cpu")
    engine = backend.prepare(network, torch.optim.SGD(network.parameters(), lr=9.0), max_grad_norm=0.5)
    inputs = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    for row, last in ((inputs[:1], False), (inputs[1:], True)):
        with engine.micro_step(last=last):
            engine.backward(engine(row).sum())
    gradient = inputs.sum(dim=0) / 2
    norm = engine.step(lr=0.1)
    assert float(norm) == pytest.approx(float(gradient.norm()))
    expected = start - 0.1 * gradient / gradient.norm() * 0.5
    assert torch.allclose(network.weight, expected, atol=1e-6)
    assert network.weight.grad is None


def test_frozen_forward_reaches_the_input_only():
    network = nn.Linear(3, 1)
    engine = LocalBackend(device="cpu").prepare(network, torch.optim.Adam(network.parameters()), max_grad_norm=None)
    image = torch.ones(1, 3, requires_grad=True)
    engine.frozen(image).sum().backward()
    assert torch.equal(image.grad, network.weight.detach())
    assert network.weight.grad is None and network.weight.requires_grad


class Ranks(DistributedBackend):
    """Only the talk between ranks, whatever the device."""

    name = "accelerate"

    def prepare(self, module, optimizer, *, max_grad_norm):
        raise NotImplementedError


@pytest.mark.parametrize("device, group", [("cpu", None), ("meta", "hosts")])
def test_signals_are_exchanged_in_the_hosts_memory(device, group, monkeypatch):
    """Whatever the device: to read a number from one is to wait for it, on every step. `meta` stands for a GPU."""
    made, exchanged, waited = [], [], []

    class Work:
        def wait(self) -> None:
            waited.append(len(exchanged))

    def all_reduce(tensor, op, group, async_op):
        exchanged.append((tensor.device.type, group, op, async_op))
        tensor.clamp_(min=5)  # what the other rank says
        return Work()

    monkeypatch.setenv("WORLD_SIZE", "2")
    group_of = {"is_initialized": True, "get_rank": 0, "get_world_size": 2, "get_backend_config": "cpu:gloo"}
    for name, value in group_of.items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(dist, "new_group", lambda **options: made.append(options) or "hosts")
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    ranks = Ranks()
    timeout = group_timeout(3, None)
    ranks.adopt_group(torch.device(device), timeout)
    assert [ranks.largest_lately(number) for number in (0, 7, 0)] == [0, 5, 7]
    assert exchanged == [("cpu", group, dist.ReduceOp.MAX, True)] * 3
    assert waited == [2, 3]  # for the exchange before, while the next is under way
    assert made == ([] if group is None else [{"backend": "gloo", "timeout": timeout}])


@pytest.mark.distributed
def test_two_ranks_exchange_signals_whatever_their_device():
    torchrun([str(ROOT / "tests" / "workers" / "signals_worker.py")])


def test_tensors_that_share_storage_are_saved_each_with_its_own(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"whole": whole, "again": whole, "row": whole[1], "column": whole[:, 2], "other": torch.ones(2)}
    save_tensors(tmp_path / "tensors.safetensors", tensors)
    loaded = load_tensors(tmp_path / "tensors.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("fused", [True, False])
def test_adams_step_count_lies_where_adam_looks_for_it(fused):
    weight, step = torch.zeros(2, device="meta"), torch.tensor(3.0)
    optimizer = torch.optim.Adam([torch.zeros(2)], fused=fused)
    placed = place_step(optimizer, step, weight.device)
    assert placed.is_meta == fused and placed is not step
