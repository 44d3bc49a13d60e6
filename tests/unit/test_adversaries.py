"""Orders of updates, LeCAM, R1, and the time before the discriminator's start, in the trainer."""

from __future__ import annotations

import copy

import not_finite
import pytest
import torch
from scenarios import build_adversary, build_trainer, weights_of
from torch import Tensor, nn

from vqdist import UserError, VQGanVAETrainer
from vqdist.models.networks.levels import ImageConv2d

PATCHGAN = {"discriminator": {"class_path": "patchgan", "init_args": {"width": 8, "layers": 1}}, "discr_layers": 4}


def moved(trainer: VQGanVAETrainer, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in weights_of(trainer).items() if not torch.equal(tensor, before[name])}


def noted(trainer: VQGanVAETrainer, monkeypatch) -> list[tuple[str, Tensor, Tensor]]:
    """Note each pass through the discriminator: which, its input, and its first weight at that time."""
    passes: list[tuple[str, Tensor, Tensor]] = []
    engine = trainer.critic
    frozen, called = engine.frozen, type(engine).__call__

    def note(kind: str, image: Tensor) -> None:
        passes.append((kind, image.detach().clone(), next(engine.module.parameters()).detach().clone()))

    monkeypatch.setattr(engine, "frozen", lambda image: (note("generator", image), frozen(image))[1])
    monkeypatch.setattr(
        type(engine),
        "__call__",
        lambda self, *args, **kw: (self is engine and note("discriminator", args[0]), called(self, *args, **kw))[1],
    )
    return passes


PLAIN = {"apply_grad_penalty_every": 0, "batch_size": 2, "lr": 1e-2, "augment": False}


def test_the_generator_goes_first_with_the_old_discriminator_on_the_same_reconstruction(tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, **PLAIN)
    passes = noted(trainer, monkeypatch)
    trainer.train_step()
    assert [kind for kind, *_ in passes] == ["generator", "discriminator"]
    assert torch.equal(passes[0][1], passes[1][1][2:]) and torch.equal(passes[0][2], passes[1][2])


def test_the_discriminator_goes_first_and_the_generator_meets_the_new_one(tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, update_order="discriminator_first", **PLAIN)
    passes = noted(trainer, monkeypatch)
    trainer.train_step()
    assert [kind for kind, *_ in passes] == ["discriminator", "generator"]
    assert torch.equal(passes[1][1], passes[0][1][2:]) and not torch.equal(passes[0][2], passes[1][2])


def test_a_fresh_reconstruction_is_of_the_updated_generator(tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, fresh_reconstruction=True, grad_accum_every=2, **PLAIN)
    passes = noted(trainer, monkeypatch)
    trainer.train_step()
    assert [kind for kind, *_ in passes] == ["generator"] * 2 + ["discriminator"] * 2
    assert not torch.equal(passes[0][1], passes[2][1][2:])
    image, recon = passes[2][1].chunk(2)
    with torch.no_grad():
        assert torch.equal(trainer.generator.module(image).recon, recon)


# Before the start


@pytest.mark.parametrize("early", ["skip", "zero_loss"])
def test_before_its_start_the_discriminator_rests_or_only_its_statistics_move(early, tmp_path):
    options = {"discriminator_start": 2, "discriminator_before_start": early, "lecam_weight": 1.0}
    trainer = build_trainer(tmp_path, model={**PATCHGAN, "use_hinge_loss": True}, **options, **PLAIN)
    before = weights_of(trainer)
    numbers = trainer.train_step()
    own = {name for name in moved(trainer, before) if not name.startswith(("generator.", "ema."))}
    optimizer = trainer.critic.optimizer
    if early == "skip":
        assert own == set() and not optimizer.state and "discr_loss" not in numbers
    else:
        statistics = {
            f"discriminator.main.3.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
        }
        assert own == {*statistics, "lecam_averages"}
        assert int(trainer.critic.module.main[3].num_batches_tracked) == 3  # the generator's pass, real and fake
        assert {int(state["step"]) for state in optimizer.state.values()} == {1}
        assert numbers["adversarial_weight"] == 0 and numbers["adaptive_weight"] > 0 and numbers["discr_loss"] > 0
    trainer.train_step()
    before = weights_of(trainer)
    trainer.train_step()
    assert "discriminator.main.0.weight" in moved(trainer, before)


def test_a_generator_is_trained_alike_before_the_start(tmp_path):
    options = {"discriminator_start": 2, **PLAIN}
    skipped, zero = (
        build_trainer(tmp_path / early, discriminator_before_start=early, **options) for early in ("skip", "zero_loss")
    )
    for trainer in (skipped, zero):
        trainer.train_step()
    ours, theirs = weights_of(skipped), weights_of(zero)
    assert all(torch.allclose(ours[name].float(), theirs[name].float(), atol=1e-7) for name in ours)


# LeCAM and R1


def test_a_dropped_update_leaves_lecams_averages(tmp_path):
    trainer = build_trainer(tmp_path, lecam_weight=1.0, on_nonfinite="skip", **PLAIN)
    trainer.train_step()
    before = trainer.lecam.averages.clone()
    assert before.abs().sum() > 0
    not_finite.spoil_images(trainer, range(2, 3))
    trainer.train_step()
    assert torch.equal(trainer.lecam.averages, before)
    trainer.train_step()
    assert trainer.lecam.averages.isfinite().all() and not torch.equal(trainer.lecam.averages, before)


@pytest.mark.parametrize("form", ["per_logit", "of_means"])
def test_the_weight_of_the_discriminators_loss_is_of_lecam_per_logit_too(form, tmp_path):
    trainer = build_trainer(tmp_path, lecam_weight=1.0, lecam=form, discr_loss_weight=0.0, **PLAIN)
    trainer.train_step()
    before = weights_of(trainer)
    assert trainer.train_step()["lecam_loss"] > 0
    trained = {name for name in moved(trainer, before) if name.startswith("discriminator.")}
    assert bool(trained) == (form == "of_means")


def test_lecams_averages_are_saved_and_resumed(tmp_path):
    straight = build_adversary(tmp_path, "titok", save_model_every=2, batch_size=2)
    for _ in range(4):
        straight.train_step()
    resumed = build_adversary(tmp_path, "titok", save_model_every=2, batch_size=2)
    resumed.load(tmp_path / "checkpoints" / "step_00000002")
    assert resumed.step == 2 and not torch.equal(resumed.lecam.averages, straight.lecam.averages)
    for _ in range(2):
        resumed.train_step()
    ours, theirs = weights_of(straight), weights_of(resumed)
    assert "lecam_averages" in ours and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_r1_comes_at_the_end_of_each_interval_times_its_length(tmp_path):
    trainer = build_trainer(tmp_path, **{**PLAIN, "grad_penalty": "r1", "apply_grad_penalty_every": 2, "lr": 0.0})
    critic = copy.deepcopy(trainer.critic.module)
    seen = []
    take = trainer.take
    trainer.take = lambda batch: seen.append(take(batch)) or seen[-1]
    numbers = [trainer.train_step() for _ in range(4)]
    assert ["gradient_penalty" in line for line in numbers] == [False, True, False, True]
    image = seen[1].requires_grad_()
    (gradient,) = torch.autograd.grad(critic(image).sum(), image)
    expected = 10 / 2 * gradient.square().sum(dim=(1, 2, 3)).mean() * 2
    assert float(numbers[1]["gradient_penalty"]) == pytest.approx(expected.item(), rel=1e-4)


# The last layer


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def with_last_layer(kind: type[nn.Conv2d], folder, **options) -> VQGanVAETrainer:
    from scenarios import QUIET, build_vae

    vae = build_vae("fsq")
    decoder = vae.autoencoder.decoder
    last = kind(decoder.last_layer.in_channels, 3, 1)
    last.load_state_dict(decoder.last_layer.state_dict())
    decoder.last_layer = last
    return VQGanVAETrainer(vae, **{**QUIET, "num_train_steps": 1, "results_folder": str(folder), **options})


@pytest.mark.parametrize("kind", [nn.Conv2d, ImageConv2d])
def test_the_adaptive_weight_is_that_of_autograd_at_the_last_layer(kind, tmp_path):
    trainer = with_last_layer(kind, tmp_path, adaptive_weight_form="taming", adversarial_weight=1.0)
    image = trainer.next_micro_batches()[0]
    network, critic = trainer.generator.module, trainer.critic.module
    out = network(image)
    terms = trainer.objective.whole(out.recon, image, out)
    adversarial = trainer.model.adversarial_loss(critic(out.recon))
    norms = [
        torch.autograd.grad(loss, network.last_layer.weight, retain_graph=True)[0].norm()
        for loss in (terms.reference, adversarial)
    ]
    parts = trainer.generator_loss(image, network(image))[1]
    assert float(parts["adaptive_weight"]) == pytest.approx(float(norms[0] / (norms[1] + 1e-4)), rel=1e-5)


def test_a_last_layer_whose_gradient_is_unknown_is_refused(tmp_path):
    with pytest.raises(UserError, match="Doubled, has a forward of its own.* image_gain .*adaptive_weight false"):
        with_last_layer(Doubled, tmp_path)
    with_last_layer(Doubled, tmp_path, adaptive_weight=False).train_step()


# Mistakes


@pytest.mark.parametrize(
    "options, message",
    [
        ({"update_order": "discriminator_first", "grad_accum_every": 2}, "not possible with grad_accum_every 2"),
        (
            {"update_order": "discriminator_first", "fresh_reconstruction": True},
            "fresh_reconstruction True does",
        ),
        ({"lecam": "of_means"}, "lecam of_means does nothing, because lecam_weight is 0"),
        ({"adaptive_weight": False, "adaptive_weight_form": "taming"}, "adaptive_weight_form taming does nothing"),
        ({"apply_grad_penalty_every": 0, "grad_penalty": "r1"}, "grad_penalty r1 does nothing"),
        ({"discriminator_before_start": "zero_loss"}, "does nothing, because discriminator_start is 0"),
        ({"lecam_weight": {"start": 3}}, "lecam_weight {'start': 3} has no value"),
        ({"adversarial_weight": {"value": 1, "begin": 3}}, "adversarial_weight has no key 'begin'"),
        ({"quantizer_weight": {"value": -1}}, "value of quantizer_weight is -1; it must be at least 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        build_trainer(tmp_path, **options)
