"""The model: shapes, codes and back, both players' losses against their formulas, saving, loading and messages."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import hub_mixin
from safetensors.torch import load_file
from scenarios import build_trainer, build_vae
from torch import Tensor

from vqdist import Tokenizer, UserError, VQGanVAE
from vqdist.models.networks.conv import ConvDecoder
from vqdist.models.networks.patch import PatchDiscriminator

QUANTIZERS = {
    "lfq": {"codebook_size": 32},
    "vq": {"codebook_size": 32, "vq_kwargs": {"codebook_dim": 8, "kmeans_init": False}},
    "fsq": {"codebook_size": 256},
    "simvq": {"codebook_size": 32},
    "residual_vq": {"codebook_size": 32, "vq_kwargs": {"codebook_dim": 8, "kmeans_init": False, "num_quantizers": 3}},
}


def build(quantizer: str = "lfq", **options) -> VQGanVAE:
    return build_vae(**{"quantizer": quantizer, **QUANTIZERS[quantizer], **options})


def pixels(batch: int = 2, channels: int = 3, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(3))


# --------------------------------------------------------------------------------------------- shapes and codes


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_shapes(quantizer, channels):
    model, image = build(quantizer, channels=channels), pixels(channels=channels, height=16, width=24)
    levels = (3,) if quantizer == "residual_vq" else ()
    features, codes, aux_loss = model.encode(image)
    assert features.shape == (2, 32, 4, 6)
    assert codes.shape == (2, 4, 6, *levels) and codes.dtype == torch.int64
    assert aux_loss.shape == () and aux_loss.dtype == torch.float32
    assert 0 <= int(codes.min()) and int(codes.max()) < model.codebook_size
    assert model.decode(features).shape == model(image).shape == image.shape
    out = model.autoencoder(image)
    assert out.recon.shape == image.shape and out.indices.shape == codes.shape
    assert out.hidden.shape == (2, 16, 16, 24) and not out.hidden.requires_grad


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_codes_give_back_the_reconstruction(quantizer, channels):
    model, image = build(quantizer, channels=channels).eval(), pixels(channels=channels)
    with torch.no_grad():
        recon, codes = model(image), model.encode(image)[1]
        assert torch.allclose(model.decode_from_ids(codes), recon, atol=1e-6)
        assert torch.allclose(model.decode_from_ids(codes.flatten(1, 2)), recon, atol=1e-6)
        other = (codes + 1) % model.codebook_size
        assert not torch.allclose(model.decode_from_ids(other), recon, atol=1e-3)


def test_facts_about_the_grid():
    model = build(layers=2)
    assert (model.stride, model.layers, model.codebook_size) == (4, 2, 32)
    assert model.get_encoded_fmap_size(64) == 16
    assert model.device == torch.device("cpu")
    assert model.quantizer is model.autoencoder.quantizer


def test_the_networks_are_the_ones_that_are_described():
    model = VQGanVAE(dim=16, codebook_size=64, use_vgg_and_gan=False)
    encoder = [tuple(m.weight.shape) for m in model.autoencoder.encoder if isinstance(m, torch.nn.Conv2d)]
    assert encoder == [(16, 3, 5, 5), (16, 16, 4, 4), (32, 16, 4, 4), (64, 32, 4, 4), (128, 64, 4, 4)]
    decoder = [tuple(m.weight.shape) for m in model.autoencoder.decoder.net if isinstance(m, torch.nn.ConvTranspose2d)]
    assert decoder == [(128, 64, 4, 4), (64, 32, 4, 4), (32, 16, 4, 4), (16, 16, 4, 4)]
    assert model.autoencoder.last_layer.weight.shape == (3, 16, 1, 1)
    assert model.quantizer.name == "lfq"


# ------------------------------------------------------------------------------------------------------ losses


def features_loss(recon: Tensor, image: Tensor) -> Tensor:
    """Return the perceptual loss with `SmallFeatures`, written out."""
    from scenarios import SmallFeatures

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    views = [SmallFeatures()((x - mean[:, None, None]) / std[:, None, None]) for x in (recon, image)]
    return (views[0] - views[1]).square().mean()


def generator_formula(model: VQGanVAE, image: Tensor, perceptual: bool, hinge: bool, l2: bool) -> Tensor:
    """reconstruction + quantizer + perceptual + weight * adversarial, the weight a ratio at the last layer."""
    out = model.autoencoder(image)
    difference = out.recon - image
    recon_loss = difference.square().mean() if l2 else difference.abs().mean()
    perceptual_loss = features_loss(out.recon, image) if perceptual else torch.zeros(())
    logits = model.discriminator(out.recon)
    adversarial = -logits.mean() if hinge else -torch.log(torch.sigmoid(logits)).mean()
    last = model.autoencoder.last_layer.weight
    reference = perceptual_loss if perceptual else recon_loss
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reference, adversarial)]
    return recon_loss + out.aux_loss + perceptual_loss + norms[0] / norms[1] * adversarial


@pytest.mark.parametrize("quantizer", ["lfq", "vq", "simvq"])
@pytest.mark.parametrize(
    "perceptual, hinge, l2", [(True, True, False), (True, False, True), (False, True, True), (False, False, False)]
)
def test_generator_loss_is_its_formula(quantizer, perceptual, hinge, l2):
    vgg = {} if perceptual else {"vgg": None, "perceptual": "none"}
    model = build(quantizer, use_hinge_loss=hinge, l2_recon_loss=l2, **vgg)
    expected = generator_formula(copy.deepcopy(model), pixels(), perceptual, hinge, l2)
    loss, recon = copy.deepcopy(model)(pixels(), return_loss=True, return_recons=True)
    assert loss.shape == () and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(recon, copy.deepcopy(model).autoencoder(pixels()).recon)
    assert copy.deepcopy(model)(pixels(), return_loss=True).item() == loss.item()


@pytest.mark.parametrize("perceptual", [True, False])
def test_generator_loss_without_a_discriminator(perceptual):
    model = build("fsq", use_gan=False, **({} if perceptual else {"vgg": None, "perceptual": "none"}))
    recon = model(pixels())
    expected = (recon - pixels()).abs().mean() + (features_loss(recon, pixels()) if perceptual else 0)
    assert model(pixels(), return_loss=True).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("hinge", [True, False])
@pytest.mark.parametrize("penalty", [True, False])
def test_discriminator_loss_is_its_formula(hinge, penalty):
    model = build("fsq", use_hinge_loss=hinge)
    image, recon = pixels().requires_grad_(), model(pixels()).detach()
    real, fake = model.discriminator(image), model.discriminator(recon)
    if hinge:
        expected = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    else:
        expected = -torch.log(torch.sigmoid(real)).mean() - torch.log(1 - torch.sigmoid(fake)).mean()
    if penalty:
        slope = torch.autograd.grad(real.sum(), image)[0].flatten(1).norm(dim=1)
        expected = expected + 10 * (slope - 1).square().mean()
    loss, returned = model(pixels(), return_discr_loss=True, return_recons=True, add_gradient_penalty=penalty)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(returned, recon)


def test_the_gradient_penalty_is_there_unless_it_is_turned_off():
    model = build("fsq")
    with_penalty = model(pixels(), return_discr_loss=True)
    assert with_penalty > model(pixels(), return_discr_loss=True, add_gradient_penalty=False)


def has_gradient(module: torch.nn.Module) -> list[bool]:
    return [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters()]


def test_each_loss_moves_its_own_network():
    model = build("fsq")
    model(pixels(), return_loss=True).backward()
    assert all(has_gradient(model.autoencoder)) and not any(has_gradient(model.discriminator))
    assert all(p.requires_grad for p in model.discriminator.parameters())
    model = build("fsq")
    model(pixels(), return_discr_loss=True).backward()
    assert all(has_gradient(model.discriminator)) and not any(has_gradient(model.autoencoder))


@pytest.mark.parametrize("hinge", [True, False])
@pytest.mark.parametrize("vgg", [{}, {"vgg": None, "perceptual": "none"}], ids=["perceptual", "reconstruction"])
@pytest.mark.parametrize("quantizer", ["lfq", "vq", "fsq"])
def test_what_the_trainer_backpropagates_has_the_gradients_of_the_loss(tmp_path, quantizer, vgg, hinge):
    model = {**QUANTIZERS[quantizer], **vgg, "use_hinge_loss": hinge}
    trainer = build_trainer(tmp_path, quantizer=quantizer, model=model)
    plain = copy.deepcopy(trainer.model)
    value = plain(pixels(), return_loss=True)
    value.backward()
    out = trainer.generator(pixels())
    surrogate, parts = trainer.generator_loss(pixels(), out)
    trainer.generator.backward(surrogate)
    gradients = dict(trainer.model.autoencoder.named_parameters())
    for name, parameter in plain.autoencoder.named_parameters():
        assert torch.allclose(gradients[name].grad, parameter.grad, atol=1e-6), name
    total = sum(parts[name] for name in ("recon_loss", "aux_loss", "perceptual_loss") if name in parts)
    total = total + parts["adversarial_weight"] * parts["adversarial_loss"]
    assert total.item() == pytest.approx(value.item(), rel=1e-5)


# ----------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_what_is_saved_is_loaded(quantizer, tmp_path, capfd):
    model = build(quantizer, channels=1)
    for _ in range(2):
        model(pixels(channels=1))  # an EMA codebook moves
    model.save_pretrained(tmp_path / "export")
    loaded = VQGanVAE.from_pretrained(tmp_path / "export")
    assert not loaded.training and not any(module.training for module in loaded.modules())
    model.eval()
    with torch.no_grad():
        assert torch.equal(loaded.encode(pixels(channels=1))[1], model.encode(pixels(channels=1))[1])
        assert torch.equal(loaded(pixels(channels=1)), model(pixels(channels=1)))
    assert capfd.readouterr().out == ""


def test_the_files_of_an_export(tmp_path):
    build("vq").save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["dim"], config["quantizer"], config["codebook_size"], config["layers"]) == (16, "vq", 32, 2)
    assert config["vq_kwargs"] == {"codebook_dim": 8, "kmeans_init": False}
    assert "vgg" not in config or config["vgg"] is None
    saved, live = load_file(tmp_path / "model.safetensors"), build("vq").autoencoder.state_dict()
    assert saved.keys() == {f"autoencoder.{name}" for name in live}


def test_prefixed_options_survive_saving(tmp_path):
    build_vae(quantizer="vq", vq_kwargs={"kmeans_init": False}, vq_codebook_dim=4).save_pretrained(tmp_path)
    loaded = VQGanVAE.from_pretrained(tmp_path, vgg=None)
    assert loaded.quantizer.inner.codebook.shape[-1] == 4
    VQGanVAE.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert VQGanVAE.from_pretrained(tmp_path / "again").quantizer.inner.codebook.shape[-1] == 4


def test_arguments_replace_the_saved_ones(tmp_path):
    build(use_gan=False, use_hinge_loss=False).save_pretrained(tmp_path)
    assert VQGanVAE.from_pretrained(tmp_path).discriminator is None
    changed = VQGanVAE.from_pretrained(str(tmp_path), use_gan=True, perceptual="none")
    assert changed.discriminator is not None and changed.perceptual_loss() is None and not changed.training
    with torch.no_grad():
        assert torch.equal(changed(pixels()), build(use_gan=False).eval()(pixels()))


def test_weights_of_another_shape_are_not_loaded_in_part(tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"holds no model that can be loaded .*Missing key"):
        VQGanVAE.from_pretrained(tmp_path, encdec_num_resnet_blocks=2)


@pytest.mark.parametrize(
    "path, message",
    [
        (
            "{tmp}/absent",
            r"^no such run, export or file: .*/absent; expected a run folder, ",
        ),
        ("absent", r"^no such run, export or file: absent; expected a run folder, one with config.json"),
        ("./absent/export", r"^no such run, export or file: absent/export; expected"),
        ("runs/e/export", r"^no such run, export or file: runs/e/export; expected"),
        (
            "absent/export",
            r"^absent/export is no folder here, and no model of that name was found on the Hugging Face",
        ),
        ("{tmp}", r"^/.* has no config.json; expected a folder that save_pretrained wrote, as RUN/export$"),
    ],
)
def test_nothing_to_load_is_one_line(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        VQGanVAE.from_pretrained(path.format(tmp=tmp_path), local_files_only=True)
    assert "\n" not in str(error.value)


def test_push_to_hub_uploads_the_export(monkeypatch):
    uploads = []

    class FakeHub:
        def __init__(self, token):
            assert token == "secret"

        def create_repo(self, repo_id, private, exist_ok):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, **_):
            uploads.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            assert all(name.startswith("autoencoder.") for name in load_file(folder_path / "model.safetensors"))
            assert "image-tokenizer" in (folder_path / "README.md").read_text()
            return "https://example.org/commit"

    monkeypatch.setattr(hub_mixin, "HfApi", FakeHub)
    assert build().push_to_hub("someone/tokenizer", token="secret") == "https://example.org/commit"
    assert uploads == [("someone/tokenizer", ["README.md", "config.json", "model.safetensors"])]


@pytest.mark.parametrize("kind", ["httpx.ConnectError", "builtins.ConnectionResetError", "builtins.TimeoutError"])
def test_push_to_hub_without_the_hub_is_one_line(kind, monkeypatch):
    module, name = kind.split(".")  # httpx is the hub's, since its version 1
    error = getattr(pytest.importorskip(module), name)("[Errno -2] Name or service not known")

    class Unreachable:
        def __init__(self, token):
            raise error

    monkeypatch.setattr(hub_mixin, "HfApi", Unreachable)
    with pytest.raises(UserError, match="someone/tokenizer could not be uploaded to the Hugging Face Hub") as raised:
        build().push_to_hub("someone/tokenizer")
    assert type(error).__name__ in str(raised.value) and "\n" not in str(raised.value)


def test_push_to_hub_refuses_a_name_that_there_cannot_be():
    with pytest.raises(UserError, match="'a name' cannot be the name of a repository"):
        build().push_to_hub("a name")


def test_a_model_card_says_what_is_known_and_names_no_licence(tmp_path):
    build().save_pretrained(tmp_path / "plain")
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "More Information Needed" not in card and "license" not in card and "mit" not in card.split("---")[1]
    assert 'VQGanVAE.from_pretrained("' in card and "| codebook_size | `" in card and "library_name: vqdist" in card
    build().save_pretrained(tmp_path / "chosen", model_card_kwargs={"license": "cc-by-4.0"})
    assert "license: cc-by-4.0" in (tmp_path / "chosen" / "README.md").read_text()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_copy_is_equal_and_its_own(quantizer, duplicate):
    model = build(quantizer)
    model(pixels())
    twin = duplicate(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    with torch.no_grad():
        twin.autoencoder.last_layer.weight.zero_()
    assert bool(model.autoencoder.last_layer.weight.abs().sum() > 0)
    losses = [copy.deepcopy(vae)(pixels(), return_loss=True) for vae in (model, duplicate(model))]
    assert torch.equal(*losses)


def test_the_perceptual_network_is_no_part_of_the_model():
    model = build()
    names = {name.partition(".")[0] for name in model.state_dict()}
    assert names == {"autoencoder", "discriminator"}
    assert {name for name, _ in model.named_children()} == names
    model.train()
    features = model.perceptual_loss()
    assert not any(module.training for module in features._hidden) and list(features.parameters()) == []


# ---------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda vae: vae(torch.zeros(2, 1, 16, 16)),
            r"^images of shape \(2, 1, 16, 16\) were given; \(batch, 3, height",
        ),
        (lambda vae: vae(torch.zeros(3, 16, 16)), r"^images of shape \(3, 16, 16\) were given"),
        (
            lambda vae: vae.encode(torch.zeros(2, 3, 16, 18)),
            r"^image side 18 is not a multiple of 4 \(2 \*\* 2 layers\)$",
        ),
        (
            lambda vae: vae.decode_from_ids(torch.zeros(2, 15, dtype=torch.long)),
            r"^15 codes do not make a square; give",
        ),
        (
            lambda vae: vae(pixels(), return_loss=True, return_discr_loss=True),
            r"are both set; ask for one player's loss",
        ),
        (
            lambda vae: build(use_gan=False)(pixels(), return_discr_loss=True),
            r"^return_discr_loss is set but this model has no discriminator; build it with use_gan=True$",
        ),
        (lambda vae: vae.check_training_size(30), r"^image_size 30 is not a multiple of 4 .*; try 28 or 32$"),
        (
            lambda vae: vae.check_training_size(4),
            r"^image_size 4 is too small for discr_layers 2, .*use discr_layers 1 or",
        ),
        (
            lambda vae: build(layers=1).check_training_size(2),
            r"^image_size 2 is too small .*at least 8; use use_gan false$",
        ),
    ],
)
def test_a_mistake_is_one_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call(build())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("discr_layers, smallest", [(1, 4), (2, 8), (3, 16)])
def test_the_smallest_image_of_the_discriminator(discr_layers, smallest):
    model = build(layers=1, discr_layers=discr_layers)
    model.check_training_size(smallest)
    assert model.discriminator(pixels(height=smallest, width=smallest)).shape == (2, 1, 1, 1)
    with pytest.raises(UserError, match="too small"):
        model.check_training_size(smallest - 2)


@pytest.mark.parametrize("player", ["return_loss", "return_discr_loss"])
def test_each_player_learns(player):
    """A loop of one's own, against an opponent that stands still."""
    model = build("fsq", use_hinge_loss=True, use_gan=player == "return_discr_loss")
    network = model.autoencoder if player == "return_loss" else model.discriminator
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        loss = model(pixels(), **{player: True})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# ------------------------------------------------------------------------------------------- parts of somebody else


class Rows(torch.nn.Module):
    """An encoder to a row of five tokens; `layers` is nothing that vqdist's own encoder means by it."""

    dim = 8

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Conv2d(3, 8, 4, stride=4)])
        self.queries = torch.nn.Parameter(torch.randn(5, 8))

    def code_shape(self, image_size: int) -> tuple[int]:
        return (5,)

    def forward(self, image: Tensor) -> Tensor:
        pooled = self.layers[0](image).mean(dim=(2, 3))
        return self.queries + pooled[:, None]


class FromRows(torch.nn.Module):
    """A decoder without a last layer; `dim` is its own width."""

    last_layer = None
    dim = 240

    def __init__(self):
        super().__init__()
        self.to_image = torch.nn.Linear(40, 3 * 16 * 16)

    def forward(self, features: Tensor) -> Tensor:
        return self.to_image(features.flatten(1)).unflatten(1, (3, 16, 16))


@pytest.mark.parametrize(
    "quantizer, shape",
    [({"quantizer": "fsq", "codebook_size": 256}, (2, 5)), ({"quantizer": "residual_vq"}, (2, 5, 4))],
)
def test_codes_may_be_a_row(quantizer, shape, tmp_path):
    options = {"codebook_size": 32, "vq_kwargs": {"kmeans_init": False}} if shape[2:] else {}
    model = VQGanVAE(encoder=Rows(), decoder=FromRows(), use_vgg_and_gan=False, **{**quantizer, **options})
    tokenizer = Tokenizer(model, 16)
    codes = tokenizer.encode(pixels())
    assert codes.shape == shape and (tokenizer.code_shape, tokenizer.num_codes, tokenizer.code_side) == ((5,), 5, None)
    assert tokenizer.decode(codes).shape == (2, 3, 16, 16)
    model.train()(pixels(), return_loss=True).backward()
    assert model.autoencoder.encoder.queries.grad is not None
    with pytest.raises(UserError, match="need not have one stride"):
        _ = model.stride


def test_a_last_layer_of_any_kernel_gives_the_adaptive_weight_of_autograd(tmp_path):
    class Wide(ConvDecoder):
        def __init__(self):
            super().__init__(16, layers=2, groups=4)
            self.last_layer = torch.nn.Conv2d(16, 3, 3, padding="same", dilation=2)

    trainer = build_trainer(tmp_path, quantizer="fsq", model={"decoder": Wide()})
    plain = copy.deepcopy(trainer.model)
    plain(pixels(), return_loss=True).backward()
    out = trainer.generator(pixels())
    trainer.generator.backward(trainer.generator_loss(pixels(), out)[0])
    gradients = dict(trainer.model.autoencoder.named_parameters())
    for name, parameter in plain.autoencoder.named_parameters():
        assert torch.allclose(gradients[name].grad, parameter.grad, atol=1e-6), name


def test_a_network_given_as_vgg_is_recorded_and_asked_for_when_training_goes_on(tmp_path):
    model = build("fsq")
    model.save_pretrained(tmp_path)
    loaded = VQGanVAE.from_pretrained(tmp_path)
    assert loaded(pixels()).shape == pixels().shape
    with pytest.raises(UserError, match="vgg was given as an object of scenarios.SmallFeatures"):
        loaded(pixels(), return_loss=True)


def test_first_weights_are_drawn_in_the_order_of_the_layers():
    """Then a seed gives the weights of versions before, wherever in the code a layer is made."""
    torch.manual_seed(3)
    critic = PatchDiscriminator(16, layers=2)
    again = copy.deepcopy(critic)
    torch.manual_seed(3)
    for layer in again.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    assert all(torch.equal(one, other) for one, other in zip(critic.parameters(), again.parameters(), strict=True))
