"""Three steps of the projects' own trainers: the same losses, and the same weights afterwards.

The order of updates, what `discriminator_start` means, the weights of all terms and the images are theirs. Where there
are two players, plain SGD takes the place of Adam, which blows the rounding of zero gradients up.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from fixtures import arguments, file_of_losses, in_unit_range, tensors, values, weights
from test_networks import titok_sizes
from torch import Tensor

from vqdist import Term, VQGanVAE, VQGanVAETrainer

# an L1 loss of images in [0, 1] is half of that in [-1, 1], and an L2 loss a quarter
TWICE, FOUR_TIMES = 2.0, 4.0
WITHOUT_PENALTY = {"apply_grad_penalty_every": 0, "use_ema": False, "optimizer": "sgd", "augment": False}
# what the options of each project are, beside its networks
PROJECTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "taming_vqgan": (
        {"discr_loss": "hinge", "gen_loss": "hinge"},
        {
            "lr": 1e-2,
            "adversarial_weight": 0.8,
            "adaptive_weight_form": "taming",
            "fresh_reconstruction": True,
            "discriminator_start": 1,
            "discriminator_before_start": "zero_loss",
        },
    ),
    "llamagen_vq": (
        {"discr_loss": "hinge", "gen_loss": "hinge"},
        {
            "lr": 1e-2,
            "max_grad_norm": 1.0,
            "discr_max_grad_norm": 1.0,
            "adversarial_weight": 0.5,
            "adaptive_weight": False,
            "discr_loss_weight": 0.5,
            "discriminator_start": 1,  # their losses get the number of the step from 1, and 2 to start with
            "discriminator_before_start": "zero_loss",
        },
    ),
    "ibq": (
        {"discr_loss": "hinge", "gen_loss": "non_saturating"},
        {
            "lr": 1e-2,
            "adversarial_weight": 0.1,
            "adaptive_weight": False,
            "lecam_weight": 0.05,
            "update_order": "discriminator_first",
            "discriminator_start": 1,
        },
    ),
    "open_magvit2": (
        {"discr_loss": "hinge", "gen_loss": "non_saturating"},
        {
            "lr": 1e-3,
            "adversarial_weight": 0.1,
            "adaptive_weight": False,
            "lecam_weight": 0.05,
            "discriminator_start": 1,
            "discriminator_before_start": "zero_loss",
        },
    ),
}


def quantizer_of(name: str, given: dict) -> dict[str, Any]:
    """Return the quantizer of a project as its fixture was built."""
    if name == "taming_vqgan":
        return {
            "class_path": "gradient_vq",
            "init_args": {"codebook_size": given["n_embed"], "codebook_loss": "legacy"},
        }
    if name == "llamagen_vq":
        options = {"codebook_size": given["codebook_size"], "beta": given["commit_loss_beta"], "l2_norm": True}
        return {"class_path": "gradient_vq", "init_args": {**options, "entropy_weight": given["entropy_loss_ratio"]}}
    if name == "ibq":
        return {"class_path": "ibq", "init_args": {"codebook_size": given["n_embed"], "entropy_weight": 0.05}}
    options = {"codebook_size": given["n_embed"], "entropy_weight": 0.1, "commitment_weight": 0.25}
    return {"class_path": "magvit2_lfq", "init_args": options}


def model_of(name: str) -> VQGanVAE:
    """Return a project's model with the weights of its fixture."""
    given = arguments(name)
    if name == "open_magvit2":
        config = given["ddconfig"]
        network = {key: config[key] for key in ("ch", "ch_mult", "num_res_blocks")}
        encoder = {"class_path": "magvit2", "init_args": {**network, "z_channels": config["z_channels"]}}
        decoder = {"class_path": "magvit2", "init_args": network}
    else:
        keys = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution", "z_channels")
        config = {"attn_resolutions": [8], "resolution": 16, **given, **given.get("ddconfig", {})}
        network = {key: config[key] for key in keys}
        width = given.get("embed_dim", given.get("codebook_embed_dim"))
        encoder = {"class_path": "taming", "init_args": {**network, "embed_dim": width}}
        decoder = {"class_path": "taming", "init_args": network}
    loss = given["loss"]
    critic = {"width": loss.get("disc_ndf", loss.get("disc_dim")), "layers": loss["disc_num_layers"]}
    pixels = {"kind": "l2", "weight": FOUR_TIMES} if name == "llamagen_vq" else {"kind": "l1", "weight": TWICE}
    vae = VQGanVAE(
        encoder=encoder,
        decoder=decoder,
        quantizer=quantizer_of(name, given),
        discriminator={"class_path": "patchgan", "init_args": critic},
        terms=[
            {"class_path": "reconstruction", "init_args": pixels},
            {"class_path": "lpips", "init_args": {"weights": str(file_of_losses(name))}},
        ],
        **PROJECTS[name][0],
    )
    levels = len(config["ch_mult"])
    vae.discriminator.load_state_dict(weights(name, "loss.discriminator."))
    of_network = {key: tensor for key, tensor in weights(name).items() if not key.startswith("loss.")}
    vae.autoencoder.load_state_dict({ours(key, levels): tensor for key, tensor in of_network.items()})
    return vae


def ours(name: str, levels: int) -> str:
    """Return the name in our autoencoder of a tensor that a project's file calls so."""
    name = re.sub(r"^decoder\.conv_blocks\.(\d+)", lambda found: f"decoder.up.{levels - 1 - int(found[1])}", name)
    name = re.sub(r"^encoder\.conv_blocks\.", "encoder.down.", name)
    name = re.sub(r"\.(down|up)\.(\d+)\.res\.", r".\1.\2.block.", name)
    for number, part in enumerate(("block_1", "attn_1", "block_2")):
        name = re.sub(rf"\.mid\.{number}\.", f".mid.{part}.", name)
    name = re.sub(r"^quant_conv", "encoder.quant_conv", re.sub(r"^post_quant_conv", "decoder.post_quant_conv", name))
    return name.replace("decoder.conv_out.", "decoder.last_layer.").replace("quantize.", "quantizer.")


RUN = {"folder": "synthetic:16", "batch_size": 2, "num_train_steps": 3, "num_workers": 0, "valid_frac": 0.0}
RUN |= {"save_model_every": 0, "save_results_every": 0, "validate_every": 0, "log_every": 1}


def trainer_of(name: str, folder: Path) -> VQGanVAETrainer:
    options = {**RUN, "image_size": 16, **WITHOUT_PENALTY, **PROJECTS[name][1]}
    return VQGanVAETrainer(model_of(name), results_folder=str(folder), **options)


# our name of each of their numbers
NUMBERS = {
    "p_loss": "lpips_loss",
    "perceptual_loss": "lpips_loss",
    "nll_loss": "nll",
    "d_weight": "weight",
    "logits_real": "real_logits",
    "logits_fake": "fake_logits",
    "lecam_loss": "lecam_loss",
    "grad_norm_generator": "generator_grad_norm",
    "grad_norm_discriminator": "discriminator_grad_norm",
}
# their numbers that are compared in three steps; LlamaGen's trainer keeps few
COMPARED = {"taming_vqgan": 15, "llamagen_vq": 5, "ibq": 14, "open_magvit2": 15}


def found(numbers: dict[str, Tensor], name: str) -> dict[str, float]:
    """Return our numbers of a step, and what theirs are made of."""
    line = {key: float(value) for key, value in numbers.items()}
    pixels = FOUR_TIMES if name == "llamagen_vq" else TWICE
    line["nll"] = pixels * line["recon_loss"] + line["lpips_loss"]
    line["weight"] = (
        0.8 * line.get("adaptive_weight", 0.0) if name == "taming_vqgan" else line.get("adversarial_weight", 0.0)
    )
    return line


@pytest.mark.parametrize("name", PROJECTS)
def test_three_steps_of_the_projects_own_trainer(name, tmp_path):
    theirs = values(name, "training")
    trainer = trainer_of(name, tmp_path)
    image = in_unit_range(tensors(name)["in.image"])
    batches = iter([image, image.flip(-1), image.flip(-2)])
    trainer.next_micro_batches = lambda: [next(batches)]
    close = {"rel": 2e-3, "abs": 1e-4} if name == "open_magvit2" else {"rel": 1e-4, "abs": 2e-6}
    compared = 0
    for step, expected in enumerate(theirs["steps"]):
        line = found(trainer.train_step(), name)
        for key, own in NUMBERS.items():
            if expected.get(key) and own in line:  # theirs are 0 where their discriminator rests
                assert line[own] == pytest.approx(expected[key], **close), (step, key)
                compared += 1
    assert compared == COMPARED[name] and trainer.step == 3
    levels = len(arguments(name).get("ddconfig", arguments(name))["ch_mult"])
    tensors_now = dict(trainer.generator.module.named_parameters())
    critic = dict(trainer.critic.module.named_parameters())
    for key, norm in theirs["parameter_norms_after"].items():
        critics = key.removeprefix("loss.discriminator.")
        tensor = critic[critics] if critics != key else tensors_now[ours(key, levels)]
        assert float(tensor.detach().norm()) == pytest.approx(norm, rel=1e-5), key
    assert len(theirs["parameter_norms_after"]) == len(tensors_now) + len(critic)


class GivenCodes(Term):
    """The fixture's codes in place of those that a target gives."""

    acts_on = "proxy"

    def __init__(self, codes: Tensor):
        super().__init__(name="proxy")
        self.codes = codes

    def forward(self, recon, image, out):
        assert recon is None
        return F.cross_entropy(out.proxy.flatten(2), self.codes)


def test_three_steps_of_titoks_first_stage(tmp_path):
    """Its loss is the cross-entropy of another tokenizer's codes; AdamW as theirs, clipped."""
    name = "titok_stage1"
    theirs, given, found = values(name, "training"), arguments(name), tensors(name)
    encoder = {**titok_sizes(given, "enc"), "token_size": 6, "legacy": True}
    codebook = {"codebook_size": given["vq_model"]["codebook_size"], "beta": 0.25, "l2_norm": True}
    model = VQGanVAE(
        encoder={"class_path": "titok", "init_args": encoder},
        decoder={
            "class_path": "titok_proxy",
            "init_args": {**titok_sizes(given, "dec"), "proxy_codebook_size": 40},
        },
        quantizer={"class_path": "gradient_vq", "init_args": codebook},
        terms=[GivenCodes(found["in.proxy_codes"].long())],
        use_gan=False,
    )
    renamed = {"latent_tokens": "encoder.latent_tokens"}
    ours = {renamed.get(key, key).replace("quantize.", "quantizer."): key for key in weights(name)}
    model.autoencoder.load_state_dict({own: weights(name)[key] for own, key in ours.items()})
    options = {"optimizer": "adamw", "lr": 1e-3, "adam_betas": [0.9, 0.99], "weight_decay": 1e-4, "max_grad_norm": 1.0}
    trainer = VQGanVAETrainer(
        model, results_folder=str(tmp_path), **RUN, image_size=32, use_ema=False, augment=False, **options
    )
    trainer.next_micro_batches = lambda: [found["in.image"]]
    for expected in theirs["steps"]:
        line = {key: float(value) for key, value in trainer.train_step().items()}
        assert line["proxy_loss"] == pytest.approx(expected["cross_entropy"], rel=1e-4)
        assert line["aux_loss"] == pytest.approx(expected["quantizer_loss"], rel=1e-3)
        assert line["generator_grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    now = dict(trainer.generator.module.named_parameters())
    assert len(theirs["parameter_norms_after"]) == len(now)
    for own, key in ours.items():
        # a third of these is the bias of keys, whose gradient is rounding: Adam makes whole steps of it
        close = {"rel": 1e-3 if key.endswith("in_proj_bias") else 1e-4, "abs": 1e-4}
        expected_norm = theirs["parameter_norms_after"][key]
        assert float(now[own].detach().norm()) == pytest.approx(expected_norm, **close), key
