"""The perceptual loss with random weights from a file: nothing is downloaded."""

import copy
import urllib.error

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchvision.models import vgg16

from vqdist.errors import UserError
from vqdist.objectives.perceptual import IMAGENET_MEAN, IMAGENET_STD, PerceptualLoss


@pytest.fixture(scope="module")
def layers():
    torch.manual_seed(0)
    with torch.device("meta"):
        layers = vgg16(weights=None).features
    layers = layers.to_empty(device="cpu")
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return layers.requires_grad_(False)


@pytest.fixture(scope="module")
def weights_file(layers, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    weights = {f"features.{key}": tensor for key, tensor in layers.state_dict().items()}
    torch.save({**weights, "classifier.0.bias": torch.zeros(4)}, path)
    return path


@pytest.fixture(scope="module")
def loss(weights_file):
    return PerceptualLoss.build(str(weights_file))


def by_hand(layers, recon, image):
    """Mean squared error at each ReLU in front of a pooling, averaged."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    x, y = ((tensor - mean) / std for tensor in (recon, image))
    errors = []
    for layer in layers:
        if isinstance(layer, nn.MaxPool2d):
            errors.append((x - y).square().mean())
        x, y = layer(x), layer(y)
    assert len(errors) == 5
    return sum(errors) / 5


def pair(channels=3, size=32):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(2, channels, size, size, generator=generator) for _ in range(2)]


def test_equals_the_formula(loss, layers):
    recon, image = pair()
    assert torch.allclose(loss(recon, image), by_hand(layers, recon, image), rtol=1e-5)
    assert loss(image, image).item() == 0


def test_the_same_from_safetensors_and_without_the_prefix(loss, layers, tmp_path):
    save_file(layers.state_dict(), tmp_path / "vgg16.safetensors")
    assert torch.equal(PerceptualLoss.build(tmp_path / "vgg16.safetensors")(*pair()), loss(*pair()))


def test_grey_is_repeated_and_alpha_left_out(loss):
    grey, colour = pair(1), pair(3)
    assert torch.equal(loss(*grey), loss(*[image.repeat(1, 3, 1, 1) for image in grey]))
    assert torch.equal(loss(*colour), loss(*[torch.cat([image, image[:, :1]], 1) for image in colour]))


def test_gradient_reaches_the_reconstruction_only(loss):
    recon, image = (tensor.requires_grad_() for tensor in pair())
    loss(recon, image).backward()
    assert recon.grad.abs().sum() > 0 and image.grad is None
    assert all(parameter.grad is None for parameter in loss._hidden[0].parameters())


def test_shows_in_no_parameters_or_state_dict_and_stays_frozen(weights_file):
    owner = nn.Module()
    owner.loss = PerceptualLoss.build(weights_file)
    owner.train().requires_grad_(True)
    hidden = owner.loss._hidden[0]
    assert not list(owner.parameters()) and not list(owner.buffers()) and not owner.state_dict()
    assert not any(module.training for module in hidden.modules())
    assert not any(parameter.requires_grad for parameter in hidden.parameters())
    owner.load_state_dict({})
    owner.double()
    assert {tensor.dtype for tensor in hidden.state_dict().values()} == {torch.float64}
    assert copy.deepcopy(owner).loss(*pair()).dtype == torch.float32


def test_dropout_in_a_network_of_ones_own_is_off_and_its_output_compared():
    torch.manual_seed(0)
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Flatten())
    loss = PerceptualLoss.build(own).train()
    recon, image = pair()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    conv = own[0]
    assert torch.allclose(loss(recon, image), F.mse_loss(conv((recon - mean) / std), conv((image - mean) / std)))


def test_runs_under_autocast_with_a_float32_loss(loss):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = loss(*pair())
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(loss(*pair()).item(), rel=0.05) and low.item() != loss(*pair()).item()


@pytest.mark.parametrize("spec", [None, "none"])
def test_none_is_no_loss(spec):
    assert PerceptualLoss.build(spec) is None


def test_small_and_odd_images(loss):
    assert loss(*pair(size=28)).item() > 0 and loss(*pair(size=16)).item() > 0
    with pytest.raises(UserError, match="8 x 8 pixels; VGG16 needs at least 16 x 16: .*--model.perceptual none"):
        loss(*pair(size=8))
    with pytest.raises(UserError, match="2 channels; expected 1, 3 or 4"):
        loss(*pair(channels=2))
    with pytest.raises(UserError, match="expected equal shapes"):
        loss(pair()[0], pair(size=28)[0])


def test_offline_names_both_ways_out(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError) as error:
        PerceptualLoss.build("vgg16")
    message = str(error.value)
    assert "--model.perceptual /path/to/vgg16.pth" in message and "--model.perceptual none" in message
    assert "no route to host" in message and "\n" not in message


def test_vgg16_takes_torchvisions_weights(monkeypatch, weights_file, loss, tmp_path):
    def download(url, path, *args, **kwargs):
        assert "vgg16-397923af" in url
        torch.save(torch.load(weights_file), path)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert torch.equal(PerceptualLoss.build("vgg16")(*pair()), loss(*pair()))


def test_weights_that_do_not_fit_are_named(layers, tmp_path):
    weights = layers.state_dict()
    del weights["28.bias"]
    torch.save({**weights, "0.weight": torch.zeros(64, 1, 3, 3)}, tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"a.pth does not hold the weights of VGG16: features.0.weight, features.28.bias"
    ):
        PerceptualLoss.build(tmp_path / "a.pth")


def test_files_that_are_no_weights_are_named(tmp_path):
    with pytest.raises(UserError, match="vgg19 is neither vgg16, lpips, .* nor a file"):
        PerceptualLoss.build("vgg19")
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(UserError, match=f"{name} cannot be read as weights .*expected a state dict"):
            PerceptualLoss.build(tmp_path / name)
    torch.save(nn.Linear(1, 1), tmp_path / "module.pth")
    with pytest.raises(UserError, match="module.pth cannot be read as weights"):
        PerceptualLoss.build(tmp_path / "module.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="it holds a list"):
        PerceptualLoss.build(tmp_path / "list.pth")


def test_an_image_size_below_what_vgg16_needs_is_refused_before_anything_is_loaded():
    from vqdist import VQGanVAE

    vae = VQGanVAE(dim=16, layers=2, discr_layers=1, codebook_size=64, perceptual="/no/such/file.pth")
    with pytest.raises(UserError, match="image_size 8 is too small for the perceptual loss, whose VGG16 needs 16"):
        vae.check_training_size(8)
