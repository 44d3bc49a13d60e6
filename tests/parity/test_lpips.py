"""LPIPS against its authors' module and against torchmetrics', forward and gradient; weights that do not fit."""

from __future__ import annotations

import re
import urllib.error

import pytest
import torch
from fixtures import FOLDER, in_unit_range, largest, tensors, weights
from torch import nn
from torchmetrics.functional.image import lpips as torchmetrics_lpips

from vqdist import UserError, VQGanVAE
from vqdist.objectives import LPIPS, ConvNeXtLogits
from vqdist.objectives.lpips import NETS
from vqdist.objectives.named import check_image_size, perceptual_terms

FILE = str(FOLDER / "lpips" / "weights.safetensors")


@pytest.fixture(scope="module")
def published():
    return tensors("lpips")


def test_the_distance_its_slices_and_its_gradient_are_the_authors(published):
    image, recon = (in_unit_range(published[f"in.image_{k}"]) for k in (0, 1))
    recon.requires_grad_()
    loss = LPIPS(FILE)
    distances = loss.distances(recon, image)
    assert largest(distances, published["out.value"].flatten()) < 1e-5
    assert loss(recon, image).item() == pytest.approx(1.2340118885040283, abs=1e-5)
    for k, own in enumerate(loss.network(recon, image)):
        assert largest(own, published[f"out.layer_{k}"].flatten()) < 1e-6
    (gradient,) = torch.autograd.grad(distances.sum(), recon)
    assert largest(gradient / 2, published["out.gradient_image_1"]) < 1e-6  # theirs is of images in [-1, 1]


def test_without_its_linear_layers_it_sums_over_channels(published):
    image, recon = (in_unit_range(published[f"in.image_{k}"]) for k in (0, 1))
    plain = LPIPS(FILE, linear=False).distances(recon, image)
    assert largest(plain, published["out.value_without_linear"].flatten()) < 1e-5


def backbone(net: str) -> dict[str, torch.Tensor]:
    """Random weights of a whole network of torchvision, as a file of it holds them."""
    import torchvision.models

    torch.manual_seed(1)
    with torch.device("meta"):
        layers = getattr(torchvision.models, NETS[net].name)(weights=None).features
    layers = layers.to_empty(device="cpu")
    for layer in layers.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)
    return {f"features.{name}": tensor.detach() for name, tensor in layers.state_dict().items()}


@pytest.mark.parametrize("net, size", [("vgg", (32, 48)), ("alex", (40, 64)), ("squeeze", (33, 48))])
def test_each_net_is_that_of_torchmetrics(net, size, tmp_path):
    state = backbone(net)
    torch.save({**state, "classifier.0.bias": torch.zeros(3)}, tmp_path / "weights.pth")
    reference = torchmetrics_lpips._LPIPS(pnet_rand=True, net=net).eval()
    for name, parameter in reference.net.named_parameters():
        layer = re.sub(r"^slices?\.?\d+\.", "", name)
        parameter.data.copy_(state[f"features.{layer}"])
    torch.manual_seed(2)
    recon, image = torch.rand(2, 3, *size, requires_grad=True), torch.rand(2, 3, *size)
    ours = LPIPS(tmp_path / "weights.pth", net=net).distances(recon, image)
    theirs = reference(recon, image, normalize=True).flatten()
    assert largest(ours, theirs.detach()) < 1e-5 and ours.min() > 0.01
    gradients = [torch.autograd.grad(value.sum(), recon)[0] for value in (ours, theirs)]
    assert largest(*gradients) < 1e-5 * max(1.0, float(gradients[1].abs().max()))


def test_equal_and_black_images_have_a_finite_gradient():
    recon = torch.zeros(1, 3, 16, 16, requires_grad=True)
    loss = LPIPS(FILE)
    for image in (torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)):
        (gradient,) = torch.autograd.grad(loss(recon, image), recon)
        assert gradient.isfinite().all()
    assert loss(recon, recon.detach()).item() == 0


def test_grey_and_alpha_small_images_and_what_shows_of_it():
    loss = LPIPS(FILE).train()
    grey, rgba = torch.rand(2, 2, 1, 16, 16), torch.rand(2, 2, 4, 16, 16)
    assert torch.equal(loss(*grey), loss(*grey.expand(-1, -1, 3, -1, -1)))
    assert torch.equal(loss(*rgba), loss(*rgba[:, :, :3]))
    assert not list(loss.parameters()) and not loss.state_dict() and not loss.network.training
    assert loss.double().distances(*rgba.double()).dtype == torch.float64
    with pytest.raises(UserError, match="image_size 15 is too small for LPIPS, whose vgg16 needs 16"):
        loss(*torch.rand(2, 1, 3, 15, 20))


# Weights


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = weights("lpips")
    narrow = {f"features.{k.split('.', 2)[2]}": v for k, v in state.items() if k.startswith("net.")}
    with pytest.raises(UserError, match="does not hold the weights of vgg16: features.0.weight, .* another shape"):
        LPIPS(narrow)  # the published linear layers are of the wide network
    with pytest.raises(UserError, match=r"linear layers of LPIPS have \[8, 8, 16, 16\] channels"):
        LPIPS({name: tensor for name, tensor in state.items() if not name.startswith("lin4")})
    with pytest.raises(UserError, match="does not hold the weights of alexnet"):
        LPIPS(state, net="alex")
    with pytest.raises(UserError, match="no net of LPIPS 'vgg19'; nearest: vgg"):
        LPIPS(state, net="vgg19")
    with pytest.raises(UserError, match="gone.pth is no file; give a .pth or .safetensors"):
        LPIPS(tmp_path / "gone.pth")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="broken.pth cannot be read as weights"):
        LPIPS(tmp_path / "broken.pth")


@pytest.mark.parametrize("net, url", [("vgg", "vgg16-"), ("alex", "alexnet-owt-"), ("squeeze", "squeezenet1_1-")])
def test_offline_is_one_line_before_the_start_that_says_how_to_give_a_file(net, url, monkeypatch, tmp_path):
    def offline(address, *args, **kwargs):
        assert url in address
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    spec = "lpips" if net == "vgg" else f"lpips-{net}"
    vae = VQGanVAE(dim=16, layers=2, codebook_size=16, use_gan=False, perceptual=spec)
    with pytest.raises(UserError, match=f"no route to host.* --model.perceptual {spec}:/path/to/") as error:
        vae.check_training_size(64)  # a trainer calls it before ranks meet
    assert "\n" not in str(error.value)


# By one word


def test_a_model_takes_lpips_by_one_word():
    vae = VQGanVAE(dim=16, layers=2, codebook_size=16, use_gan=False, perceptual=f"lpips:{FILE}")
    recon, image = torch.rand(2, 2, 3, 16, 16)
    recon.requires_grad_()
    gradient, reference, _, parts = vae.objective().at_the_cut(recon, image, None)
    assert parts["perceptual_loss"].item() == pytest.approx(LPIPS(FILE)(recon, image).item())
    assert torch.equal(gradient, reference)  # of pixels and LPIPS, as published
    assert parts.keys() == {"recon_loss", "perceptual_loss"}


def test_a_size_that_is_too_small_is_refused_before_anything_is_loaded():
    for spec, size in (("lpips", 15), ("lpips-alex", 30), ("lpips-squeeze:x.pth", 16), ("lpips-convnext_s-1-0.1", 15)):
        with pytest.raises(UserError, match=f"image_size {size} is too small for LPIPS"):
            check_image_size(spec, size)
        check_image_size(spec, size + 1)
    check_image_size("convnext_s", 8)


class Logits(nn.Module):
    """Stands for ConvNeXt-S: a mean over pixels and a linear layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, image):
        self.seen = image
        return self.linear(image.mean(dim=(2, 3)))


def test_the_logits_loss_resizes_and_normalises():
    torch.manual_seed(0)
    network = Logits()
    loss = ConvNeXtLogits(network)
    recon, image = torch.rand(2, 2, 3, 40, 64)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    size = {"size": (224, 224), "mode": "bilinear", "antialias": True}
    logits = [network((nn.functional.interpolate(x, **size) - mean) / std) for x in (recon, image)]
    assert loss(recon, image).item() == pytest.approx((logits[0] - logits[1]).square().mean().item(), rel=1e-5)
    assert network.seen.shape == (2, 3, 224, 224)


def test_both_share_their_weights(monkeypatch):
    from vqdist.objectives import named

    monkeypatch.setattr(named, "ConvNeXtLogits", lambda weight: ConvNeXtLogits(Logits(), weight=weight))
    monkeypatch.setattr(named, "LPIPS", lambda weight: LPIPS(FILE, weight=weight))
    terms = perceptual_terms("lpips-convnext_s-1.0-0.25")
    assert [(term.name, term.weight) for term in terms] == [("lpips", 0.8), ("convnext_s", 0.2)]
    with pytest.raises(UserError, match="two weights of 0"):
        perceptual_terms("lpips-convnext_s-0-0")
