"""Networks and terms of somebody else: what a model reads of them, refuses of them, and records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scenarios import IMAGE_SIZE, build_trainer, build_vae
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vqdist import Term, UserError, VQGanVAE, VQGanVAETrainer, losses
from vqdist.models.autoencoder import ForwardPass
from vqdist.models.networks.conv import ConvEncoder
from vqdist.models.pretrained import load_model_of_any_type
from vqdist.models.tokenizer import Tokenizer
from vqdist.objectives import Objective, Reconstruction
from vqdist.parts import GIVEN_BUILT, UnavailablePart

SPECIFIED = {"class_path": "perceptual", "init_args": {"features": "vgg.pth"}}


class Blocks(nn.Module):
    """An encoder with as many layers as a transformer has: they halve nothing."""

    dim = 16

    def __init__(self):
        super().__init__()
        self.layers = 12
        self.patches = nn.Conv2d(3, 16, 8, stride=8)

    def code_shape(self, image_size: int) -> tuple[int, int]:
        return image_size // 8, image_size // 8

    def forward(self, image: Tensor) -> Tensor:
        return self.patches(image)


class Pixels(nn.Module):
    def __init__(self, channels: int = 3, kernel: int = 3, padding: int | str = 1):
        super().__init__()
        self.up = nn.ConvTranspose2d(16, 8, 8, stride=8)
        self.last_layer = nn.Conv2d(8, channels, kernel, padding=padding)

    def forward(self, features: Tensor) -> Tensor:
        return self.up(features)


class Whole(nn.Module):
    last_layer = None

    def __init__(self, channels: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(16, channels, 8, stride=8)

    def forward(self, features: Tensor) -> Tensor:
        return self.up(features)


class Features(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image


class Flat(Term):
    def forward(self, recon, image, out):
        return recon.square().mean()


class Kept(Term):
    acts_on = "features"

    def forward(self, recon, image, out):
        self.seen = out.features.dtype
        return out.features.square().mean()


class Derived(VQGanVAE):
    pass


def build(**options) -> VQGanVAE:
    own = {"encoder": Blocks(), "decoder": Pixels(), "quantizer": "fsq", "codebook_size": 256}
    return VQGanVAE(**{**own, "use_gan": False, "perceptual": "none", **options})


def test_layers_of_an_encoder_of_ones_own_say_nothing_of_image_sizes():
    model, image = build(), torch.rand(2, 3, 24, 24)
    assert model.layers is None
    assert model(image).shape == image.shape
    assert model.encode(image)[1].shape == (2, 3, 3)
    with pytest.raises(UserError, match="code_shape"):
        _ = model.stride


@pytest.mark.parametrize(
    "decoder, message",
    [
        (lambda: Pixels(channels=1), "gives 1 channels and the images have 3"),
        (lambda: Pixels(kernel=4, padding="same"), r"even size \(4, 4\) and padding 'same'"),
    ],
)
def test_a_last_layer_that_cannot_work_is_refused_when_the_model_is_built(decoder, message):
    with pytest.raises(UserError, match=message):
        build(decoder=decoder())


def test_an_odd_kernel_with_padding_same_is_taken():
    assert build(decoder=Pixels(kernel=5, padding="same"))(torch.rand(1, 3, 16, 16)).shape == (1, 3, 16, 16)


def test_images_of_another_shape_are_not_repeated_to_fit():
    model, image = build(decoder=Whole(channels=1)), torch.rand(2, 3, 16, 16)
    with pytest.raises(
        UserError, match=r"decoder Whole gave .* of shape \(2, 1, 16, 16\); expected .* \(2, 3, 16, 16\)"
    ):
        model(image, return_loss=True)
    recon = torch.rand(2, 1, 16, 16, requires_grad=True)
    with pytest.raises(UserError, match="expected equal shapes"):
        model.objective().at_the_cut(recon, image, None)


def test_a_term_on_features_gets_them_in_float32():
    term = Kept()
    features = torch.rand(1, 4, 2, 2).bfloat16().requires_grad_()
    recon = torch.rand(1, 3, 4, 4, requires_grad=True)
    out = ForwardPass(recon, torch.zeros(1, 2, 2), torch.zeros(()), None, features)
    cut = Objective([Reconstruction(), term]).at_the_cut(recon, torch.rand(1, 3, 4, 4), out)
    assert term.seen == cut.parts["kept_loss"].dtype == torch.float32
    assert torch.autograd.grad(cut.feature_loss, features)[0].any()


class OnBoth(Term):
    """Reads the reconstruction and the features."""

    def forward(self, recon, image, out):
        return ((recon - image).mean() * out.features.square().mean()).square() + out.features.sum() * recon.mean()


class OnBothAsFeatures(OnBoth):
    acts_on = "features"


class OnReconAsFeatures(Term):
    acts_on = "features"

    def forward(self, recon, image, out):
        return (recon - image).square().mean()


@pytest.mark.parametrize("kind", [OnBoth, OnBothAsFeatures, OnReconAsFeatures])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_a_term_gets_its_gradient_at_all_that_it_reads(kind, weight):
    """Cut and put together by the surrogate it trains encoder and decoder as the whole graph does."""
    torch.manual_seed(2)
    encoder, decoder = nn.Linear(6, 5), nn.Linear(5, 12)
    source, image = torch.randn(4, 6), torch.rand(4, 3, 2, 2)
    weights = [*encoder.parameters(), *decoder.parameters()]

    def run():
        features = encoder(source)
        recon = decoder(features).view(4, 3, 2, 2)
        return recon, ForwardPass(recon, torch.zeros(4), torch.zeros(()), None, features)

    objective = Objective([Reconstruction(), kind(weight), Kept(0.2)])
    recon, out = run()
    expected = torch.autograd.grad(objective.whole(recon, image, out).loss, weights)
    recon, out = run()
    cut = objective.at_the_cut(recon.detach().requires_grad_(), image, out)
    found = torch.autograd.grad(losses.surrogate(recon, cut.gradient, cut.feature_loss), weights)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    recon, out = run()
    alone = Objective([Reconstruction(), Kept(0.2)]).whole(recon, image, out).loss
    without = torch.autograd.grad(alone, weights)
    assert not torch.allclose(without[0], expected[0])


@pytest.mark.parametrize(
    "term, reason", [(Kept(reference=True), "it acts on features"), (Flat(0.0, reference=True), "its weight is 0")]
)
def test_a_reference_that_is_never_compared_with_is_refused(term, reason):
    with pytest.raises(UserError, match=f"^reference of term .* does nothing, because {reason}; leave it out$"):
        Objective([Reconstruction(), term])


@pytest.mark.parametrize("name", ["aux", "adversarial", "discr"])
def test_a_term_does_not_hide_a_loss_of_the_trainer(name):
    with pytest.raises(UserError, match=f"called '{name}'"):
        Objective([Reconstruction(), Flat(name=name)])


def test_a_class_is_no_term_and_a_function_has_its_own_name():
    with pytest.raises(UserError, match="term Flat is a class"):
        Objective([Reconstruction(), Flat])
    assert not hasattr(Flat, "name")

    def first(recon, image, out):
        return recon.mean()

    def second_loss(recon, image, out):
        return recon.mean()

    assert [term.name for term in Objective([first, second_loss])] == ["first", "second"]


def test_what_the_quantizers_arguments_say_is_not_said_twice():
    with pytest.raises(UserError, match="codebook_size 1024 is given, and init_args of quantizer say 512"):
        build(quantizer={"class_path": "vq", "init_args": {"codebook_size": 512}}, codebook_size=1024)
    twice = {"class_path": "lfq", "init_args": {"codebook_size": 512}}
    assert build(quantizer=twice, codebook_size=512).codebook_size == 512


# --------------------------------------------------------------------------------------------------- what is recorded


@pytest.mark.parametrize(
    "features, written",
    [
        (Path("vgg.pth"), SPECIFIED),
        (Features(), {"class_path": "perceptual", GIVEN_BUILT: True}),
    ],
)
def test_arguments_are_recorded_as_json_holds_them_or_not_at_all(features, written, tmp_path):
    terms = ["reconstruction", {"class_path": "perceptual", "init_args": {"features": features}}]
    vae = build_vae(terms=terms, vgg=None)
    vae.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["terms"] == ["reconstruction", written]
    again = VQGanVAE.from_pretrained(tmp_path)
    assert again(torch.rand(1, 3, 16, 16)).shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match=r"vgg\.pth is neither|from_pretrained\(\.\.\., terms="):
        again.objective()


def test_an_export_asks_for_the_network_of_its_perceptual_loss_when_it_is_trained(tmp_path):
    build_vae(vgg=Features()).save_pretrained(tmp_path)
    with pytest.raises(UnavailablePart, match=r"Features.*from_pretrained\(\.\.\., vgg="):
        VQGanVAE.from_pretrained(tmp_path).objective()
    assert VQGanVAE.from_pretrained(tmp_path, vgg=Features()).perceptual_loss() is not None
    assert VQGanVAE.from_pretrained(tmp_path, terms=["reconstruction"]).perceptual_loss() is None


def test_a_network_that_fully_shard_has_cut_is_recorded_as_it_was():
    vae = build_vae()
    before = vae.configuration()
    encoder = vae.autoencoder.encoder
    encoder.__class__ = type("FSDPConvEncoder", (FSDPModule, ConvEncoder), {})
    assert vae.configuration() == before
    vae.autoencoder.decoder = Pixels()
    assert vae.configuration()["decoder"] == {"class_path": f"{__name__}.Pixels", GIVEN_BUILT: True}


@pytest.mark.parametrize("older", [True, False])
def test_an_export_of_a_class_of_ones_own_from_before_it_had_a_type(older, tmp_path):
    vae = build_vae()
    vae.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["model_type"] == "vqgan"
    if older:
        del config["buffers"]
        path.write_text(json.dumps(config))
        assert type(Derived.from_pretrained(tmp_path)) is Derived
    else:
        with pytest.raises(UserError, match="holds a model of type 'vqgan'"):
            Derived.from_pretrained(tmp_path)
    assert type(load_model_of_any_type(tmp_path)) is VQGanVAE


def test_a_trained_model_knows_its_image_size(tmp_path):
    trainer = build_trainer(tmp_path, num_train_steps=1)
    trainer.train()
    assert Tokenizer(trainer.model).image_size == IMAGE_SIZE


def test_a_run_of_a_class_of_ones_own_from_before_it_had_a_type_goes_on(tmp_path):
    trainer = build_trainer(tmp_path, num_train_steps=1)
    trainer.train()
    trainer.close()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vqgan"
    trainer.model.__class__ = Derived
    options = {name: value for name, value in vars(trainer.config).items() if value is not None}
    again = VQGanVAETrainer(trainer.model, **{**options, "num_train_steps": 2})
    assert again.step == 1
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == f"{__name__}.Derived"


# --------------------------------------------------------------------------------- set after the model is built

BARE = {"dim": 16, "layers": 2, "quantizer": "lfq", "codebook_size": 32, "perceptual": "none"}


@pytest.mark.parametrize("name", ["encoder", "decoder", "discriminator"])
def test_a_part_that_is_set_later_must_be_one(tmp_path, name):
    """It was an AttributeError of torch, from within the training."""
    vae = VQGanVAE(**BARE)
    setattr(vae if name == "discriminator" else vae.autoencoder, name, nn.Conv2d(3, 1, 4))
    with pytest.raises(UserError, match=f"^{name} Conv2d is no {name} .*; it lacks ") as error:
        VQGanVAETrainer(vae, folder="synthetic:8", image_size=16, batch_size=4, num_train_steps=1)
    assert "\n" not in str(error.value)


class OwnCritic(nn.Conv2d):
    """A discriminator of somebody else."""

    min_image_size = 4

    def __init__(self):
        super().__init__(3, 1, 4)


def test_a_discriminator_that_is_set_later_is_recorded():
    vae = VQGanVAE(**BARE)
    assert vae.configuration()["discriminator"] is None
    vae.discriminator = OwnCritic()
    vae.check_training_size(16)
    assert vae.configuration()["discriminator"]["class_path"].endswith(".OwnCritic")


@pytest.mark.parametrize("given", [nn.Conv2d(3, 8, 3), None, ["lpips"]], ids=["a module", "nothing", "a list"])
def test_perceptual_is_a_name(given):
    """A module was taken without a word, recorded as vgg16, and not read."""
    with pytest.raises(UserError, match=r"^perceptual is a \w+, and a name is expected; .* as vgg, or .* in terms$"):
        VQGanVAE(**{**BARE, "perceptual": given})
