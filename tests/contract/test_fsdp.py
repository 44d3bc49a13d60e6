"""Facts of FSDP that are read from the Accelerate configuration, and cuts of networks; test_distributed.py trains."""

from __future__ import annotations

import pytest
import torch
from scenarios import build_prior, build_vae
from torch import nn
from torch.distributed.fsdp import FSDPModule

from vqdist.backends.accelerate import AccelerateBackend
from vqdist.backends.fsdp import Sharding, not_by_accelerate, sharding_asked_for
from vqdist.backends.sharding import ShardedEngine, Shards, without_weights
from vqdist.errors import UserError

# what `accelerate launch` exports for accelerate_configs/fsdp2.yaml, defaults included
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
    "FSDP_MIN_NUM_PARAMS": "1000000",
}


@pytest.fixture
def launched(monkeypatch):
    """Set these variables besides, as the launcher would."""

    def set_variables(**more: str) -> None:
        for name, value in {**LAUNCHED, **more}.items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_nothing_is_sharded_unless_it_is_asked_for(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert sharding_asked_for() is None


def test_the_configuration_is_followed(launched):
    launched()
    assert sharding_asked_for() == Sharding(reshard_after_forward=True, min_num_params=1_000_000)
    launched(FSDP_RESHARD_AFTER_FORWARD="false", FSDP_AUTO_WRAP_POLICY="NO_WRAP")
    assert sharding_asked_for() == Sharding(reshard_after_forward=False)
    launched(FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_TRANSFORMER_CLS_TO_WRAP="Attention, FeedForward")
    assert sharding_asked_for() == Sharding(classes=("Attention", "FeedForward"))


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("FSDP_VERSION", "1", "fsdp_version 1; vqdist shards by FSDP2: set fsdp_version: 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params true, which vqdist does not do; remove it"),
        ("FSDP_SHARDING_STRATEGY", "HYBRID_SHARD", "fsdp_sharding_strategy HYBRID_SHARD"),
        ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT", "fsdp_state_dict_type SHARDED_STATE_DICT"),
        ("FSDP_BACKWARD_PREFETCH", "BACKWARD_PRE", "fsdp_backward_prefetch BACKWARD_PRE"),
        ("FSDP_FORWARD_PREFETCH", "true", "fsdp_forward_prefetch true"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing true"),
        ("FSDP_IGNORED_MODULES", "encoder", "fsdp_ignored_modules encoder"),
        ("FSDP_RESHARD_AFTER_FORWARD", "FULL_SHARD", "fsdp_reshard_after_forward is full_shard"),
        ("FSDP_AUTO_WRAP_POLICY", "MY_WRAP", "fsdp_auto_wrap_policy is MY_WRAP"),
        ("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP", "fsdp_transformer_layer_cls_to_wrap names no class"),
        ("FSDP_MIN_NUM_PARAMS", "0", "fsdp_min_num_params is 0"),
        ("FSDP_MIN_NUM_PARAMS", "1e6", "fsdp_min_num_params is 1e6"),
    ],
)
def test_what_is_not_done_is_refused(launched, variable, value, message):
    launched(**{variable: value})
    with pytest.raises(UserError, match=message):
        sharding_asked_for()


def test_accelerate_itself_does_not_hear_of_it(launched, monkeypatch):
    launched()
    with not_by_accelerate():
        import os

        assert "ACCELERATE_USE_FSDP" not in os.environ
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


def test_the_class_that_a_sharded_model_gets_is_no_model_of_somebody_else():
    """`fully_shard` derives a class for each that it meets; the run's type of model must not change by that."""
    model = build_prior()
    derived = type("FSDPPrior", (FSDPModule, type(model)), {})
    assert derived.model_type == "prior"
    assert type("Own", (type(model),), {}).model_type.endswith(".Own")


def test_one_process_has_nothing_to_shard(launched):
    launched()
    backend = AccelerateBackend()
    network = nn.Linear(3, 1)
    engine = backend.prepare(network, torch.optim.Adam(network.parameters()), max_grad_norm=None)
    assert engine.local is engine.module is network
    backend.close()


def test_blocks_are_members_of_lists_with_enough_weights():
    network = nn.Module()
    network.layers = nn.ModuleList([nn.Linear(10, 10), nn.Linear(2, 2), nn.Sequential(nn.Linear(10, 10), nn.ReLU())])
    network.head = nn.Linear(10, 100)
    big, _small, nested = network.layers
    assert list(Sharding(min_num_params=100).blocks(network)) == [big, nested[0]]
    assert list(Sharding(min_num_params=111).blocks(network)) == []
    assert list(Sharding(classes=("Sequential",)).blocks(network)) == [nested]
    assert list(Sharding().blocks(network)) == []


def test_no_block_is_a_child_whose_parent_reads_its_weights():
    """A subclass of Sequential has a forward of its own; DiscreteVAE's encoder multiplies with a child's weight."""

    class Reader(nn.Sequential):
        def forward(self, x):
            return x @ self[0].weight

    assert list(Sharding(min_num_params=1).blocks(nn.ModuleList([Reader(nn.Linear(4, 4))]))) != []
    assert list(Sharding(min_num_params=1).blocks(Reader(nn.Linear(4, 4)))) == []


@pytest.mark.parametrize("build", [build_prior, build_vae])
def test_a_copy_without_weights_has_names_shapes_and_buffers(build):
    network = build()
    empty = without_weights(network)
    assert [name for name, _ in empty.named_parameters()] == [name for name, _ in network.named_parameters()]
    assert all(parameter.is_meta for parameter in empty.parameters())
    for (name, buffer), (other, copied) in zip(network.named_buffers(), empty.named_buffers(), strict=True):
        assert name == other and torch.equal(buffer, copied) and buffer is not copied


def test_a_buffer_with_two_names_is_saved_and_filled_under_both():
    """A codebook that residual levels share; of one rank, so that nothing is exchanged."""

    class OfOneRank(ShardedEngine):
        gather = cut = staticmethod(lambda _name, tensor: tensor)
        local = named_optimizer_state = __call__ = micro_step = backward = load = None

    network = nn.Module()
    network.first = network.second = nn.BatchNorm1d(3)
    empty = without_weights(network)
    engine = OfOneRank(empty)
    engine.local = Shards(
        {name: weight.detach() for name, weight in network.named_parameters()}, dict(network.named_buffers())
    )
    assert engine.local.named_whole_buffers().keys() < empty.state_dict().keys()
    saved = {name: tensor.clone() for name, tensor in engine.named_tensors()}
    assert saved.keys() == network.state_dict().keys()
    for tensor in saved.values():
        tensor += 1
    engine.fill(saved)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
