"""Schedule-free optimizers: their library's own loop, the weights that are evaluated, checkpoints, each mistake."""

from __future__ import annotations

import json

import pytest
import schedulefree
import torch
from scenarios import build_ar_trainer, build_trainer, evaluated_weights, exported_weights, train_steps
from torch import nn

from vqdist import UserError
from vqdist.backends.local import LocalBackend
from vqdist.schedules import learning_rate
from vqdist.trainers.average import OptimizersAverage
from vqdist.trainers.networks import Networks
from vqdist.trainers.optimizers import OptimizerOptions, make_optimizer

OWN = {"lr_schedule": "constant", "use_ema": False, "optimizer": "schedule_free", "lr": 1e-3}
KINDS = {
    "schedule_free": (schedulefree.AdamWScheduleFree, {"betas": (0.8, 0.99), "eps": 1e-7, "r": 0.5}),
    "schedulefree.AdamWScheduleFree": (schedulefree.AdamWScheduleFree, {"warmup_steps": 2, "foreach": False}),
    "schedulefree.RAdamScheduleFree": (schedulefree.RAdamScheduleFree, {"betas": (0.9, 0.95)}),
    "schedulefree.SGDScheduleFree": (schedulefree.SGDScheduleFree, {"momentum": 0.8}),
    "schedulefree.AdamWScheduleFreeReference": (schedulefree.AdamWScheduleFreeReference, {}),  # keeps x itself
}


class Network(nn.Module):
    """Weights with decay and without, a buffer that follows by itself, a frozen weight, and what cannot be copied."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.hidden = self.first(x).tanh()  # kept with its graph
        self.mean.lerp_(self.hidden.detach().mean(dim=0), 0.5)
        return self.second(self.hidden * self.frozen)


def batches():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(5, 3, generator=generator) for _ in range(7)]


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_those_of_the_librarys_own_loop(name):
    cls, arguments = KINDS[name]
    spec = {"class_path": name, "init_args": {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}}
    rates = [learning_rate(step, peak=0.02, schedule="constant", warmup_steps=3, total_steps=7) for step in range(7)]

    module = Network()
    options = OptimizerOptions(spec, 0.02, weight_decay=0.1, said=frozenset(["weight_decay"]))
    optimizer = make_optimizer(module, options, torch.device("cpu"))
    engine = LocalBackend(device="cpu").prepare(module, optimizer, max_grad_norm=None)
    networks = Networks(engine.backend, {"model": engine}, None)

    twin = Network()
    matrices = [twin.first.weight, twin.second.weight]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": [twin.first.bias, twin.second.bias]}]
    bare = cls(groups, lr=0.02, **arguments)
    bare.train()

    for rate, batch in zip(rates, batches(), strict=True):
        engine.backward(engine(batch).square().sum())
        engine.step(lr=rate)
        with networks.averaged() as evaluated:
            assert evaluated is not module
        twin(batch).square().sum().backward()
        for group in bare.param_groups:
            group["lr"] = rate
        bare.step()
        bare.zero_grad()
    trained = {key: value.clone() for key, value in twin.state_dict().items()}
    assert_equal(module.state_dict(), trained)
    bare.eval()
    with networks.averaged() as evaluated:
        assert_equal(evaluated.state_dict(), twin.state_dict())
        assert not torch.equal(evaluated.first.weight, module.first.weight)
        assert torch.equal(evaluated.mean, module.mean) and bool(module.mean.any())
    assert_equal(module.state_dict(), trained)
    assert networks.has_average and all(group["train_mode"] for group in optimizer.param_groups)


def test_tensors_that_a_module_does_not_let_average_are_the_live_ones():
    class Own(Network):
        def is_averaged(self, name, tensor):
            return name.startswith("first")

    module = Own()
    engine = LocalBackend(device="cpu").prepare(
        module, make_optimizer(module, OptimizerOptions("schedule_free", 0.1), torch.device("cpu")), max_grad_norm=None
    )
    average = OptimizersAverage(engine)
    for batch in batches():
        engine.backward(engine(batch).square().sum())
        engine.step(lr=0.1)
    evaluated = average.network()
    assert torch.equal(evaluated.second.weight, module.second.weight)
    assert not torch.equal(evaluated.first.weight, module.first.weight)


@pytest.mark.parametrize("build", [build_trainer, build_ar_trainer], ids=["vqgan", "prior"])
def test_evaluation_and_export_take_the_average_and_training_goes_on_untouched(build, tmp_path):
    due = {"validate_every": 1, "save_results_every": 1, "save_model_every": 1}
    undisturbed = train_steps(build(tmp_path / "undisturbed", **OWN), 4)
    trainer = build(tmp_path / "run", **OWN, **due)
    measured = trainer.train()
    for name, tensor in undisturbed.items():
        assert torch.equal(tensor, dict(trainer.named_tensors())[name]), name
    evaluated, live = evaluated_weights(trainer), trainer.main_engine.module.state_dict()
    assert any(not torch.equal(evaluated[name], live[name]) for name in live)
    exported = {name.removeprefix("autoencoder."): tensor for name, tensor in exported_weights(trainer).items()}
    for name, tensor in evaluated.items():
        assert torch.equal(exported[name], tensor), name
    trainer.main_engine.module.load_state_dict(evaluated)  # and no optimizer that knows another average
    trainer.networks._own = None
    assert trainer.evaluate() == pytest.approx(measured, rel=1e-6)


def test_codebooks_of_the_evaluated_network_are_the_live_ones(tmp_path):
    trainer = build_trainer(tmp_path, quantizer="random_vq", **OWN)
    train_steps(trainer, 3)
    evaluated, live = evaluated_weights(trainer), trainer.generator.module.state_dict()
    buffers = {name for name, _ in trainer.generator.module.named_buffers()} & live.keys()
    assert any("codebook" in name or "embed" in name for name in buffers)
    for name in buffers:
        assert torch.equal(evaluated[name], live[name]), name
    assert all(group["k"] == 3 for group in trainer.discriminator.optimizer.param_groups)  # it is the other player's


def test_a_picture_shows_the_live_and_the_evaluated_reconstruction(tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, **OWN)
    train_steps(trainer, 2)
    shown = []
    monkeypatch.setattr(trainer, "views", lambda images, networks: shown.extend(networks) or [images] * 3)
    trainer.save_pictures(tmp_path / "picture.png")
    assert shown[0] is trainer.generator.module and len(shown) == 2


def test_a_checkpoint_holds_both_points_and_the_numbers_of_the_groups(tmp_path):
    trainer = build_ar_trainer(tmp_path, **OWN, warmup_steps=2)
    train_steps(trainer, 3)
    trainer.save(tmp_path / "saved")
    record = json.loads((tmp_path / "saved" / "model" / "optimizer.json").read_text())
    rates = [5e-4, 1e-3, 1e-3]
    for group in record["groups"]:
        assert group == {"k": 3, "weight_sum": sum(rate**2 for rate in rates), "lr_max": 1e-3, "scheduled_lr": 1e-3}
    kinds = {key.partition("/")[0] for key in trainer.engine.record.load(tmp_path / "saved" / "model", trainer.model)}
    assert kinds == {"z", "exp_avg_sq"}


@pytest.mark.parametrize("optimizer", ["schedulefree.RAdamScheduleFree", "schedulefree.SGDScheduleFree"])
def test_one_of_the_librarys_other_optimizers_is_resumed_to_the_bit(optimizer, tmp_path):
    options = {**OWN, "optimizer": optimizer}
    straight = build_ar_trainer(tmp_path / "straight", **options)
    expected = train_steps(straight, 4)
    first = build_ar_trainer(tmp_path / "stopped", **options)
    train_steps(first, 2)
    first.save(first.run_folder / "checkpoints" / "step_00000002")
    second = build_ar_trainer(tmp_path / "stopped", **options)
    assert_equal(train_steps(second, 2), expected)
    assert_equal(evaluated_weights(second), evaluated_weights(straight))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"use_ema": True},
            r"^optimizer schedule_free averages the weights itself, .*; give --trainer.use_ema false$",
        ),
        ({"lr_schedule": "cosine"}, r"^lr_schedule cosine is not possible with optimizer schedule_free, .* constant"),
        ({"lr_schedule": lambda step, total_steps: 1.0}, r"^lr_schedule function is not possible with optimizer sch"),
        (
            {"optimizer": "adam", "discr_optimizer": "schedule_free", "discr_lr_schedule": "linear"},
            r"^discr_lr_schedule linear is not possible with discr_optimizer schedule_free",
        ),
        (
            {"optimizer": {"class_path": "schedule_free", "init_args": {"warmup_steps": 3}}, "warmup_steps": 2},
            r"^warmup_steps and init_args of optimizer both set a warm-up",
        ),
        (
            {"optimizer": "schedulefree.SGDScheduleFree", "use_ema": True},
            r"^optimizer SGDScheduleFree averages the we",
        ),
        ({"fused_adam": True}, r"^fused_adam True does nothing, because optimizer schedule_free does not take fused"),
    ],
)
def test_options_that_an_average_of_its_own_leaves_no_room_for_are_one_line(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        build_trainer(tmp_path / "run", **{**OWN, **options})
    assert not (tmp_path / "run").exists()


def test_mistakes_that_only_the_built_optimizer_shows_are_one_line(tmp_path):
    class Lacking(torch.optim.SGD):
        def eval(self):
            pass

    for options, message in [
        (
            {"adam_betas": [0.0, 0.9]},
            r"^the first of the betas of optimizer AdamWScheduleFree is 0, .*give one above 0",
        ),
        ({"optimizer": Lacking}, r"^optimizer Lacking has a method eval and none called train"),
        (
            {"optimizer": lambda groups: schedulefree.SGDScheduleFree(groups), "use_ema": True},
            r"^optimizer SGDScheduleFree averages the weights itself",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            build_trainer(tmp_path / "run", **{**OWN, **options})


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
