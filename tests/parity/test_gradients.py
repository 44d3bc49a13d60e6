"""Each loss of the projects' training, and the gradient of every weight by it, against what their own code gave."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import (
    FOLDER,
    arguments,
    file_of_losses,
    gradient_norms,
    in_unit_range,
    largest,
    tensors,
    values,
    weights,
)
from safetensors.torch import load_file
from test_training import PROJECTS, TWICE, trainer_of
from torch import Tensor, nn

from vqdist import VQGanVAE, VQGanVAETrainer, sampling
from vqdist.metrics import RunningMeans
from vqdist.models.networks.patchgan import PatchGAN
from vqdist.models.published import family_named, read_published, read_to_train
from vqdist.models.published.critics import Critic
from vqdist.objectives import LPIPS
from vqdist.objectives.frozen import IMAGENET_MEAN, IMAGENET_STD

CLOSE = {"rel": 1e-5, "abs": 1e-5}
BEFORE = torch.tensor([0.05, -0.04])  # the averages of LeCAM before each loss
NORMS = {"llamagen_vq": ("grad_norms_generator_fixed_after_start", "grad_norms_discriminator")}
OF_OTHERS = ("grad_norms_generator_after_start", "grad_norms_discriminator_after_start")


def begun(name: str, folder: Path) -> tuple[VQGanVAETrainer, Tensor]:
    """Return a trainer after `discriminator_start`, and the fixture's images."""
    trainer = trainer_of(name, folder)
    trainer.progress.step = 3
    if trainer.lecam is not None:
        trainer.lecam.averages.copy_(BEFORE)
    return trainer, in_unit_range(tensors(name)["in.image"])


def check_norms(found: dict[str, float], expected: dict[str, float | None], *, rel: float = 1e-4) -> None:
    """Compare norms of gradients; those of biases before a norm are rounding, and about 0."""
    there = {name: norm for name, norm in expected.items() if norm is not None}
    assert found.keys() == there.keys()
    wrong = {
        name: (found[name], norm) for name, norm in there.items() if found[name] != pytest.approx(norm, rel, 1e-5)
    }
    assert not wrong


def theirs(family: str, network: nn.Module) -> dict[str, float]:
    """Return norms of gradients by the project's names of tensors."""
    grads = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
    return {name: float(grad.norm()) for name, grad in family_named(family).theirs(grads).items()}


@pytest.mark.parametrize("name", PROJECTS)
def test_losses_of_the_generator(name, tmp_path):
    trainer, image = begun(name, tmp_path)
    expected, means = values(name), RunningMeans()
    with trainer.generator.micro_step(last=True):
        out = trainer.generator(image)
        trainer._generator_backward(image, out, means)
    line = {key: float(value) for key, value in means.means().items()}
    pixels = 4.0 if name == "llamagen_vq" else TWICE
    total = pixels * line["recon_loss"] + line["lpips_loss"] + line["aux_loss"]
    total += line["adversarial_weight"] * line["adversarial_loss"]
    if name == "llamagen_vq":
        after = {"g/total_loss": expected["fixed_after_start"]["generator_total"], "g/p_loss": expected["p_loss"]}
        assert pixels * line["recon_loss"] == pytest.approx(expected["rec_loss"], **CLOSE)
    else:
        after = expected["after_start"]
    if name == "open_magvit2":  # the entropy's share is 0.1 of it, as the trainer takes it, and their loss 0.1 too
        assert line["aux_loss"] == pytest.approx(
            0.1 * after["g/entropy_loss"] + 0.25 * after["g/commit_loss"], **CLOSE
        )
    assert line["lpips_loss"] == pytest.approx(after.get("g/p_loss", after.get("g/perceptual_loss")), **CLOSE)
    assert total == pytest.approx(after["g/total_loss"], **CLOSE)
    check_norms(theirs(name, trainer.generator.module), expected[NORMS.get(name, OF_OTHERS)[0]])


@pytest.mark.parametrize("name", PROJECTS)
def test_losses_of_the_discriminator(name, tmp_path):
    trainer, image = begun(name, tmp_path)
    expected, means = values(name), RunningMeans()
    with torch.no_grad():
        recon = trainer.generator(image).recon
    trainer._discriminator_pass(image, recon, means, last=True)
    line = {key: float(value) for key, value in means.means().items()}
    if name == "llamagen_vq":
        total = expected["fixed_after_start"]["discriminator_total"]
        assert 0.5 * line["discr_loss"] == pytest.approx(total, **CLOSE)
    else:
        after = expected["after_start"]
        total = line["discr_loss"] + 0.05 * line.get("lecam_loss", 0.0)
        assert total == pytest.approx(after["disc_total"], **CLOSE)
        assert line["real_logits"] == pytest.approx(after["d/logits_real"], **CLOSE)
        assert line["fake_logits"] == pytest.approx(after["d/logits_fake"], **CLOSE)
        if trainer.lecam is not None:
            assert line["lecam_loss"] == pytest.approx(after["d/lecam_loss"], **CLOSE)
            assert trainer.lecam.averages.tolist() == pytest.approx(after["lecam_ema_after"], **CLOSE)
    check_norms(gradient_norms(trainer.critic.module), expected[NORMS.get(name, OF_OTHERS)[1]])


def test_losses_of_gumbel(monkeypatch):
    """With the fixture's noise in the place of the draw; the published trainer is taming's."""
    name = "taming_gumbel"
    found, expected, given = tensors(name), values(name), arguments(name)
    model = read_published(FOLDER / name / "weights.safetensors", peer_config=FOLDER / name / "config.json").train()
    model.quantizer.temperature = given["tau"]
    noise = found["in.gumbel_noise"].permute(0, 2, 3, 1)
    monkeypatch.setattr(sampling, "gumbel_noise", lambda shape, device: noise)
    image = in_unit_range(found["in.image"])
    critic = PatchGAN(8, layers=2)
    critic.load_state_dict(weights(name, "loss.discriminator."))
    out = model.network(image)
    lpips = LPIPS(weights=str(file_of_losses(name)))(out.recon, image, out)
    nll = TWICE * (out.recon - image).abs().mean() + lpips
    adversarial, last = -critic(out.recon).mean(), model.network.last_layer.weight
    of_nll, of_critic = (torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (nll, adversarial))
    gain = 0.5  # of a last layer that gives images in [0, 1]: both gradients, and not the published constant
    weight = 0.8 * (gain * of_nll.norm() / (gain * of_critic.norm() + 1e-4)).clamp(0, 1e4)
    after = expected["after_start"]
    assert out.aux_loss.item() == pytest.approx(expected["kl_loss"], **CLOSE)
    assert lpips.item() == pytest.approx(after["g/p_loss"], **CLOSE)
    assert nll.item() == pytest.approx(after["g/nll_loss"], **CLOSE)
    (nll + weight.detach() * adversarial + out.aux_loss).backward()
    check_norms(theirs(name, model.network), expected[OF_OTHERS[0]], rel=1e-3)


class StandIn(nn.Module):
    """The network in the place of VGG16 that the fixture was made with: muse shows it images in [0, 1] as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.Flatten())

    def forward(self, image: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, n)."""
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        return self.c(image * deviation + mean)


def of_muse() -> tuple[VQGanVAE, Tensor, dict[str, Any]]:
    """Return muse's model with the discriminator in its file, the images, and the values."""
    read, critic = read_to_train(FOLDER / "muse_vqgan" / "vae.0.pt")
    assert isinstance(critic, Critic)
    features = StandIn()
    held = load_file(FOLDER / "muse_vqgan" / "losses.safetensors")
    features.load_state_dict({name.removeprefix("vgg_stand_in."): one.float() for name, one in held.items()})
    own = {name: value for name, value in read.configuration().items() if name != "use_vgg_and_gan"}
    model = VQGanVAE(**{**own, "discriminator": critic.part, "vgg": features})
    model.autoencoder.load_state_dict(read.autoencoder.state_dict())
    model.discriminator.load_state_dict(critic.tensors)
    return model.train(), tensors("muse_vqgan")["in.image"], values("muse_vqgan")


def test_logits_of_muse_are_those_of_its_file():
    model, image, _ = of_muse()
    found = tensors("muse_vqgan")
    with torch.no_grad():
        assert largest(model.discriminator(image), found["out.logits_real"]) < 1e-5
        assert largest(model.discriminator(found["out.recon_eval"]), found["out.logits_fake"]) < 1e-5


def test_losses_of_muse():
    model, image, expected = of_muse()
    out = model.autoencoder(image)
    assert out.aux_loss.item() == pytest.approx(expected["aux_loss"], **CLOSE)
    loss = model(image, return_loss=True)
    assert loss.item() == pytest.approx(expected["generator_loss"], **CLOSE)
    loss.backward()
    check_norms(theirs("muse_vqgan", model.network), expected["grad_norms_generator"], rel=1e-3)


def test_losses_of_muses_discriminator():
    model, image, expected = of_muse()
    loss = model(image, return_discr_loss=True)
    assert loss.item() == pytest.approx(expected["discriminator_loss_with_penalty"], rel=1e-5)
    loss.backward()
    norms = gradient_norms(model.discriminator)
    for name, norm in expected["grad_norms_discriminator"].items():
        layer = re.fullmatch(r"layers\.(\d)\.(\d)\.(.*)", name)
        own = name.replace("to_logits", "head")
        if layer is not None:
            own = f"body.{max(3 * int(layer[1]) - 1, 0) + int(layer[2])}.{layer[3]}"
        assert norms[own] == pytest.approx(norm, rel=1e-4, abs=1e-3), name
