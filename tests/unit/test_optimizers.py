"""Optimizers as parts: what is built of an option, groups of weights, what a checkpoint keeps, and each mistake."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from foreign.my_optimizer import Lion
from scenarios import (
    OPTIMIZERS,
    build_ar_trainer,
    build_trainer,
    optimizer_options,
    train_steps,
    trained_and_evaluated,
)
from torch import nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from vqdist.backends.base import Capabilities
from vqdist.backends.local import LocalBackend
from vqdist.backends.optimizer import check_optimizer, is_elementwise
from vqdist.cli import main
from vqdist.errors import UserError
from vqdist.trainers.optimizers import MuonWithAdamW, OptimizerOptions, adamw_8bit, make_optimizer, muon

CPU = torch.device("cpu")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 4), nn.Embedding(5, 4))


def built(given, module: nn.Module | None = None, **options) -> Optimizer:
    said = frozenset(options.keys() & {"betas", "weight_decay", "fused"})
    return make_optimizer(module or network(), OptimizerOptions(given, 1e-3, said=said, **options), CPU)


# ------------------------------------------------------------------------------------------------- what is built


@pytest.mark.parametrize(
    "given, options, expected",
    [
        (None, {}, Adam),
        (None, {"weight_decay": 0.1}, AdamW),
        ("sgd", {}, SGD),
        ("torch.optim.NAdam", {}, NAdam),
        (NAdam, {}, NAdam),
        (lambda groups: SGD(groups, momentum=0.5), {}, SGD),
        ({"class_path": "foreign.my_optimizer.Lion", "init_args": {"cautious_after": 7}}, {}, Lion),
        ("muon", {}, MuonWithAdamW),
    ],
)
def test_an_optimizer_is_given_by_name_path_class_or_function(given, options, expected):
    assert type(built(given, **options)) is expected


def test_arguments_come_from_the_part_or_from_the_run():
    group = built({"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.8, 0.9], "eps": 1e-6}}).param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.9), 1e-6, 0.0)
    assert built("adamw", betas=[0.5, 0.6]).param_groups[0]["betas"] == (0.5, 0.6)
    assert built(Lion).param_groups[0]["betas"] == (0.9, 0.99)  # its own default, not Adam's
    assert built("sgd", fused=True).param_groups[0]["fused"]


@pytest.mark.parametrize("given", [None, {"class_path": "adamw", "init_args": {"weight_decay": 0.1}}])
def test_matrices_decay_and_biases_do_not(given):
    groups = built(given, weight_decay=0.1).param_groups if given is None else built(given).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [group["names"] for group in groups] == [["0.weight", "2.weight", "3.weight"], ["0.bias", "2.bias"]]


class Slow(nn.Linear):
    """A layer with a rate of its own."""

    def parameter_groups(self):
        return [{"params": [self.weight], "lr_scale": 0.1}, {"params": [self.bias], "weight_decay": 0.3}]


def test_a_network_says_rates_and_decay_of_its_own_weights():
    module = nn.Sequential(nn.Linear(2, 2), Slow(2, 2))
    groups = built(None, module, weight_decay=0.1).param_groups
    said = [(group["names"], group["lr_scale"], group["weight_decay"]) for group in groups]
    assert said == [
        (["0.weight"], 1.0, 0.1),
        (["0.bias"], 1.0, 0.0),
        (["1.weight"], 0.1, 0.1),
        (["1.bias"], 1.0, 0.3),
    ]
    engine = LocalBackend(device="cpu").prepare(module, built(SGD, module), max_grad_norm=None)
    before = [weight.detach().clone() for weight in module.parameters()]
    engine.backward(engine(torch.ones(1, 2)).sum())
    gradients = [weight.grad.clone() for weight in module.parameters()]
    engine.step(lr=1.0)
    gradients[-1] += 0.3 * before[-1]  # SGD's decay is in the gradient
    for weight, old, gradient, rate in zip(module.parameters(), before, gradients, (1, 1, 0.1, 1), strict=True):
        torch.testing.assert_close(weight.detach(), old - rate * gradient)


@pytest.mark.parametrize("channels_last", [False, True])
def test_muon_takes_hidden_matrices_and_kernels_and_adamw_the_rest(channels_last):
    module = network()
    module.head = nn.Linear(4, 2)
    if channels_last:
        module.to(memory_format=torch.channels_last)
    expected = [weight.detach().clone() for weight in module.parameters()]
    optimizer = built("muon", module, weight_decay=0.1)
    hidden = [name for group in optimizer.hidden for name in group["names"]]
    rest = [name for group in optimizer.adamw.param_groups for name in group["names"]]
    assert hidden == ["0.weight", "2.weight"]
    assert rest == ["3.weight", "head.weight", "0.bias", "2.bias", "head.bias"]
    names = dict(module.named_parameters())
    twins = {name: old.clone(memory_format=torch.contiguous_format) for name, old in zip(names, expected, strict=True)}
    flat = {name: nn.Parameter(twins[name].flatten(1)) for name in hidden}
    others = {name: nn.Parameter(twins[name]) for name in rest}
    muon = torch.optim.Muon(flat.values(), lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    decay = [{"params": [others[name]], "weight_decay": 0.1 * (others[name].ndim > 1)} for name in rest]
    adamw = AdamW(decay, lr=1e-3)
    for step in range(3):
        for name, weight in names.items():
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            twin = flat.get(name, others.get(name))
            twin.grad = weight.grad.reshape(twin.shape).clone()
        optimizer.step(), muon.step(), adamw.step()
    for name, weight in names.items():
        torch.testing.assert_close(weight, {**flat, **others}[name].view(weight.shape), rtol=0, atol=0)
    assert len(optimizer.state) == len(names)
    assert [name for name, p in names.items() if "momentum_buffer" in optimizer.state[p]] == hidden


def test_8_bit_moments_train_as_whole_ones_do_but_for_their_rounding():
    target = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    losses = {}
    for given in ({"class_path": "adamw_8bit", "init_args": {"min_8bit_size": 64}}, "adamw"):
        torch.manual_seed(0)
        module = nn.Linear(48, 48)
        optimizer = built(given, module, weight_decay=0.1)
        for _ in range(60):
            loss = (module(target) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[type(optimizer).__name__] = float(loss.detach())
        if given != "adamw":
            moments = {name: optimizer.state[weight] for name, weight in module.named_parameters()}
            assert moments["weight"]["state1"].dtype == moments["weight"]["state2"].dtype == torch.uint8
            assert moments["bias"]["state1"].dtype == torch.float32  # fewer than min_8bit_size
            assert all(bool(moments["weight"][kind].any()) for kind in ("state1", "state2"))
    assert losses["AdamW8bit"] < 1 and losses["AdamW8bit"] == pytest.approx(losses["AdamW"], rel=0.02)
    assert losses["AdamW8bit"] != losses["AdamW"]


# ------------------------------------------------------------------------------------------------- what is refused

WRONG = [
    ({"optimizer": "adamx"}, r"^there is no optimizer 'adamx'; nearest: adam.*; there are adam, adamw, sgd, muon"),
    ({"optimizer": "torch.optim.AdmW"}, r"^optimizer torch.optim.AdmW: torch.optim has no 'AdmW'; nearest: AdamW"),
    ({"optimizer": "torch.nn.Linear"}, r"^optimizer torch.nn.Linear is no Optimizer; derive it from"),
    ({"optimizer": 3}, r"^optimizer 3 is not possible; give a string, a dictionary or null$"),
    ({"optimizer": {"class_path": "sgd", "init_args": {"lr": 1}}}, r"^init_args of optimizer set 'lr', which lr says"),
    ({"optimizer": "sgd", "adam_betas": [0.5, 0.9]}, r"^adam_betas \[0.5, 0.9\] does nothing, because optimizer sgd"),
    (
        {"optimizer": "foreign.my_optimizer.Lion", "fused_adam": True},
        r"^fused_adam True does nothing, because optimizer Lion does not take fused",
    ),
    (
        {"optimizer": {"class_path": "adamw", "init_args": {"betas": [0.5, 0.9]}}, "adam_betas": [0.5, 0.8]},
        r"^adam_betas and init_args of optimizer both set 'betas'",
    ),
    (
        {"optimizer": {"class_path": "adamw", "init_args": {"weight_decay": 0.1}}, "weight_decay": 0.2},
        r"^weight_decay and init_args of optimizer both set 'weight_decay'",
    ),
    ({"optimizer": "adam", "weight_decay": 0.2}, r"^weight_decay 0.2 is decoupled .*; give optimizer adamw"),
    ({"discr_optimizer": "sgd", "discr_adam_betas": [0.5, 0.9]}, r"^discr_adam_betas .* because discr_optimizer sgd"),
]


@pytest.mark.parametrize("options, message", WRONG)
def test_a_wrong_option_is_one_line_before_anything_begins(tmp_path, options, message):
    with pytest.raises(UserError, match=message) as error:
        build_trainer(tmp_path / "run", **options)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"class_path": "sgd", "init_args": {"momentm": 1}},
            r"^optimizer sgd has no argument 'momentm'; nearest: mom",
        ),
        (
            {"class_path": "sgd", "init_args": {"nesterov": True}},
            r"^optimizer sgd cannot be built .ValueError: Nesterov momentum requires",
        ),
        (SGD([torch.zeros(1)]), r"^optimizer is a built SGD; give its class or a function"),
        (lambda groups: 3, r"is no Optimizer"),
        (lambda groups: SGD(groups[0]["params"][1:]), r"leaves out 1 weights, 0.weight is the first"),
    ],
)
def test_an_optimizer_that_cannot_be_built_is_one_line(given, message):
    with pytest.raises(UserError, match=message):
        built(given)


@pytest.mark.parametrize(
    "groups, message",
    [
        (lambda own: [{"params": [own, own]}], "parameter_groups name 0.weight twice"),
        (lambda own: [{"params": [nn.Parameter(torch.zeros(1))]}], "parameter_groups of 0 names a weight that is not"),
        (lambda own: [{"params": [own], "lr_scale": -1}], "lr_scale -1 of parameter_groups is not possible"),
    ],
)
def test_groups_are_the_networks_own_weights(groups, message):
    layer = nn.Linear(2, 2)
    layer.parameter_groups = lambda: groups(layer.weight)
    with pytest.raises(UserError, match=message):
        built(None, nn.Sequential(layer))


class InParts(LocalBackend):
    """Stands for ZeRO 2: each process updates a part of every weight."""

    capabilities = Capabilities(any_optimizer=False)


def test_where_weights_are_cut_only_elementwise_optimizers_are_possible():
    backend = InParts(device="cpu")
    for given in (None, "sgd", "torch.optim.NAdam", "torch.optim.RMSprop", "foreign.my_optimizer.Lion"):
        check_optimizer(built(given), backend)
    for given in ("muon", "adamw_8bit", "torch.optim.Adafactor"):
        with pytest.raises(
            UserError, match=r"cannot be used on local, where each process updates a part .*; use adamw"
        ):
            check_optimizer(built(given), backend)
    with pytest.raises(UserError, match=r"AdamWScheduleFree cannot be used on local, .* evaluates other weights than"):
        check_optimizer(built("schedule_free"), backend)
    with pytest.raises(UserError, match=r"Adagrad cannot be used on local, where .* makes its state when it is built"):
        check_optimizer(built("torch.optim.Adagrad"), backend)
    with pytest.raises(UserError, match=r"LBFGS cannot be used: its step needs closure"):
        check_optimizer(torch.optim.LBFGS([torch.zeros(1)]), LocalBackend(device="cpu"))


@pytest.mark.parametrize("name, package", [("adamw_8bit", "bitsandbytes"), ("schedule_free", "schedulefree")])
def test_a_package_that_is_missing_is_one_line(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, {"bitsandbytes": "bitsandbytes.optim"}.get(package, package), None)
    with pytest.raises(
        UserError, match=rf"^optimizer {name} needs {package} .*; install it with pip install 'vqdist\[optimizers\]'$"
    ):
        built(name)


def test_8_bit_moments_where_there_is_no_update_for_the_device_are_one_line(monkeypatch):
    def fail(*_arguments, **_keywords):
        raise NotImplementedError("Could not run 'bitsandbytes::optimizer_update_8bit_blockwise'\nwith arguments")

    monkeypatch.setattr("bitsandbytes.optim.AdamW8bit.step", fail)
    with pytest.raises(
        UserError, match=r"^optimizer adamw_8bit cannot be used on cpu: .*NotImplementedError: .*or use adamw$"
    ):
        built("adamw_8bit")


def test_a_subclass_or_a_function_says_itself_whether_it_is_elementwise():
    class Mine(Adam):
        pass

    def factory(groups):
        return Mine(groups)

    assert not is_elementwise(built(Mine)) and not is_elementwise(built(factory))
    factory.elementwise = True
    assert is_elementwise(built(factory))


# ------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "optimizer", [*OPTIMIZERS, *(f"torch.optim.{name}" for name in ("Adagrad", "ASGD", "Rprop", "Adafactor"))]
)
def test_a_run_is_resumed_to_the_bit(optimizer, tmp_path):
    options = optimizer_options(optimizer) if optimizer in OPTIMIZERS else {"optimizer": optimizer}
    straight = trained_and_evaluated(build_ar_trainer(tmp_path / "straight", **options), 4)
    first = build_ar_trainer(tmp_path / "stopped", **options)
    train_steps(first, 2)
    first.save(first.run_folder / "checkpoints" / "step_00000002")
    second = build_ar_trainer(tmp_path / "stopped", **options)
    assert second.step == 2
    assert {kind for state in second.engine.optimizer.state.values() for kind in state} == {
        kind for state in first.engine.optimizer.state.values() for kind in state
    }
    for name, tensor in trained_and_evaluated(second, 2).items():
        assert torch.equal(tensor, straight[name]), name


def test_numbers_of_state_and_groups_are_in_the_record(tmp_path):
    trainer = build_ar_trainer(tmp_path, **optimizer_options("counting"))
    train_steps(trainer, 3)
    trainer.save(tmp_path / "saved")
    record = json.loads((tmp_path / "saved" / "model" / "optimizer.json").read_text())
    assert record["optimizer"] == "foreign.my_optimizer.Counting"
    assert record["groups"] == [{"updates": 3}, {"updates": 3}]
    assert set(record["numbers"].values()) == {3} and "updates/start.weight" in record["numbers"]


def test_a_checkpoint_of_another_optimizer_is_one_line(tmp_path):
    trainer = build_ar_trainer(tmp_path, optimizer="sgd")
    trainer.train_step()
    trainer.save(tmp_path / "checkpoints" / "step_00000001")
    with pytest.raises(UserError, match=r"another configuration \(trainer.optimizer: 'sgd' -> None\)"):
        build_ar_trainer(tmp_path)
    with pytest.raises(
        UserError, match=r"state of optimizer torch.optim.sgd.SGD and this run has torch.*Adam; resume"
    ):
        build_ar_trainer(tmp_path, allow_config_change=True)


def test_a_checkpoint_from_before_the_choice_holds_adams_state(tmp_path):
    trainer = build_ar_trainer(tmp_path)
    trainer.train_step()
    trainer.save(tmp_path / "saved")
    (tmp_path / "saved" / "model" / "optimizer.json").unlink()
    trainer.engine.load(tmp_path / "saved" / "model")
    other = build_ar_trainer(tmp_path / "other", optimizer="sgd")
    with pytest.raises(UserError, match=r"holds the state of optimizer torch.optim.adam.Adam and this run has"):
        other.engine.load(tmp_path / "saved" / "model")


@pytest.mark.parametrize("earlier", [True, False], ids=["a record of before", "an older version goes on"])
def test_a_run_is_resumed_by_a_version_that_has_its_optimizer_elsewhere(earlier, tmp_path, monkeypatch):
    for times in (earlier, not earlier):
        with monkeypatch.context() as patch:
            for moved in (MuonWithAdamW, muon) if times else ():
                patch.setattr(moved, "__module__", "vqdist.trainers.optimizers")
            trainer = build_ar_trainer(tmp_path, optimizer=muon)
            trainer.train_step()
            trainer.save(tmp_path / "checkpoints" / f"step_0000000{trainer.step}")
    assert trainer.step == 2
    with pytest.raises(UserError, match="another configuration"):
        build_ar_trainer(tmp_path, optimizer=adamw_8bit)


class Keeping(Lion):
    """Keeps something in its state, or in its groups, after an update."""

    def __init__(self, groups, keep):
        super().__init__(groups)
        self.keep = keep

    def step(self, closure=None):
        super().step()
        self.keep(self)


@pytest.mark.parametrize(
    "keep, message",
    [
        (lambda it: next(iter(it.state.values())).update(history=[1]), "it keeps a list as its state 'history'"),
        (lambda it: it.state["all"].update(count=1), "it keeps state under 'all', which is no weight"),
        (
            lambda it: it.param_groups[0].update(history=[{}]),
            "it changes 'history' of a group of weights, which is a list",
        ),
    ],
)
def test_state_that_cannot_be_saved_ends_the_run_at_its_first_step(keep, message, tmp_path):
    trainer = build_ar_trainer(tmp_path, optimizer=lambda groups: Keeping(groups, keep))
    with pytest.raises(UserError, match=f"state of optimizer Keeping cannot be saved: {message}"):
        trainer.train_step()


def test_options_of_a_schedule_are_refused_where_they_do_nothing(tmp_path):
    for options, message in [
        ({"lr_min_ratio": 0.1}, "^lr_min_ratio 0.1 does nothing, because lr_schedule is constant"),
        ({"lr_schedule": "cosine", "lr_decay_share": 0.5}, "^lr_decay_share 0.5 .* because lr_schedule is cosine"),
        ({"lr_schedule": lambda step, total_steps: 1.0, "lr_min_ratio": 0.1}, "because lr_schedule is a function"),
        (
            {"lr_schedule": {"class_path": "wsd", "init_args": {"min_ratio": 0.2}}, "lr_min_ratio": 0.1},
            "^lr_min_ratio and init_args of lr_schedule both set 'min_ratio'",
        ),
        ({"discr_lr_schedule": "cosin"}, "^there is no lr_schedule 'cosin'; nearest: cosine"),
    ]:
        with pytest.raises(UserError, match=message):
            build_trainer(tmp_path / "run", **options)


def test_the_discriminators_own_schedule_counts_from_its_start(tmp_path):
    options = {"num_train_steps": 12, "discriminator_start": 2, "lr_schedule": "cosine", "lr": 1.0, "discr_lr": 0.5}
    own = {"discr_lr_schedule": {"class_path": "linear"}, "discr_lr_warmup_steps": 2}
    trainer = build_trainer(tmp_path / "own", **options, **own)
    rates = []
    for trainer.progress.step in (2, 3, 4, 8, 12):
        rates.append(trainer.discr_learning_rate())
    assert rates == [0.25, 0.5, 0.5, 0.25, 0.0]
    shared = build_trainer(tmp_path / "shared", **options)
    shared.progress.step = 6
    assert shared.discr_learning_rate() == 0.5 * shared.learning_rate(1.0)


def test_without_a_discriminator_its_options_are_refused(tmp_path):
    own = {
        "discr_optimizer": "sgd",
        "discr_adam_betas": [0.5, 0.9],
        "discr_weight_decay": 0.1,
        "discr_lr_schedule": "linear",
        "discr_lr_warmup_steps": 3,
    }
    for name, value in own.items():
        with pytest.raises(UserError, match=f"^{name} .* does nothing, because the model has no discriminator"):
            build_trainer(tmp_path / "run", model={"use_gan": False}, **{name: value})


def test_an_own_optimizer_and_schedule_come_from_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "data: {folder: 'synthetic:32', image_size: 16}\n"
        "model: {dim: 16, layers: 2, discr_layers: 2, perceptual: none}\n"
        "trainer:\n"
        "  num_train_steps: 2\n"
        "  batch_size: 4\n"
        "  optimizer: {class_path: foreign.my_optimizer.Lion, init_args: {cautious_after: 1, betas: [0.9, 0.95]}}\n"
        "  discr_optimizer: torch.optim.NAdam\n"
        "  lr_schedule: {class_path: foreign.my_schedule.halved, init_args: {after: 0.5}}\n"
    )
    assert main(["train", "vqgan", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]) == 0
    written = json.loads((tmp_path / "run" / "config.json").read_text())["trainer"]
    assert written["optimizer"]["init_args"] == {"cautious_after": 1, "betas": [0.9, 0.95]}
    assert (written["discr_optimizer"], written["lr_schedule"]["class_path"]) == (
        "torch.optim.NAdam",
        "foreign.my_schedule.halved",
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line["lr"] for line in lines if "lr" in line][-1]
    assert last == pytest.approx(1e-3 / 2)  # of the command's own, halved
    record = tmp_path / "run" / "checkpoints" / "step_00000002" / "generator" / "optimizer.json"
    assert json.loads(record.read_text())["optimizer"] == "foreign.my_optimizer.Lion"


def test_the_discriminator_has_an_optimizer_of_its_own(tmp_path):
    spec = {"class_path": "adamw", "init_args": {"betas": [0.7, 0.8], "weight_decay": 0.2}}
    trainer = build_trainer(tmp_path / "own", optimizer=spec, discr_optimizer="sgd")
    assert [type(engine.optimizer) for engine in trainer.engines.values()] == [AdamW, SGD]
    trainer = build_trainer(tmp_path / "same", optimizer=spec, discr_adam_betas=[0.0, 0.9], discr_weight_decay=0.0)
    groups = [engine.optimizer.param_groups[0] for engine in trainer.engines.values()]
    assert [group["betas"] for group in groups] == [(0.7, 0.8), (0.0, 0.9)]
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]
