"""Images in the forms that a tokenizer takes: each becomes what a run would have trained on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vqdist import ImageDataset, Tokenizer, UserError, VQGanVAE
from vqdist.cli import main
from vqdist.data.config import View


def build(*, channels: int = 3, image_size=16, resample: str = "bicubic") -> Tokenizer:
    torch.manual_seed(4)
    model = VQGanVAE(dim=16, layers=2, channels=channels, use_vgg_and_gan=False, quantizer="lfq", codebook_size=32)
    model.image_size, model.resample = image_size, resample
    return Tokenizer(model)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def oriented() -> tuple[Image.Image, dict]:
    picture = Image.fromarray(noise(30, 44, 3))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    return picture, {"exif": exif}


def palette() -> tuple[Image.Image, dict]:
    picture = Image.fromarray(noise(20, 31, 3)).quantize(8)
    return picture, {"transparency": 2}


FILES = {
    "colour.png": lambda: (Image.fromarray(noise(40, 57, 3)), {}),
    "photo.jpg": lambda: (Image.fromarray(noise(33, 32, 3)), {"quality": 80}),
    "grey.png": lambda: (Image.fromarray(noise(24, 50)), {}),
    "deep.png": lambda: (Image.fromarray(noise(24, 50).astype(np.uint16) * 257), {}),
    "alpha.png": lambda: (Image.fromarray(noise(25, 25, 4)), {}),
    "grey_alpha.png": lambda: (Image.fromarray(noise(25, 21, 2), "LA"), {}),
    "bits.png": lambda: (Image.fromarray(noise(25, 21) > 100), {}),
    "turned.jpg": oriented,
    "palette.png": palette,
    "cmyk.tif": lambda: (Image.fromarray(noise(25, 21, 4), "CMYK"), {}),
    "small.png": lambda: (Image.fromarray(noise(5, 7, 3)), {}),
    "right.png": lambda: (Image.fromarray(noise(16, 16, 3)), {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, make in FILES.items():
        picture, options = make()
        picture.save(folder / name, **options)
    return folder


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("size", "resample"), [(16, "bicubic"), ((12, 20), "lanczos")])
def test_files_become_what_a_run_sees(folder, channels, size, resample):
    tokenizer = build(channels=channels, image_size=size, resample=resample)
    options = {"channels": channels, "augment": False, "view": View(resample=resample)}
    dataset = ImageDataset(str(folder), size, **options)
    expected = torch.stack([dataset[index] for index in range(len(dataset))])
    paths = [dataset.name(index) for index in range(len(dataset))]
    assert torch.equal(tokenizer.preprocess(paths), expected)
    assert torch.equal(tokenizer.preprocess([Image.open(path) for path in paths]), expected)
    assert torch.equal(tokenizer.encode(paths), tokenizer.encode(expected))


def test_each_form_of_the_same_pixels_is_the_same_image():
    tokenizer, pixels = build(), noise(40, 57, 3)
    picture, floats = Image.fromarray(pixels), pixels / 255
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = [picture, pixels, floats, floats.astype("float32"), floats.transpose(2, 0, 1), tensor, tensor / 255]
    forms += [np.ascontiguousarray(pixels[::-1])[::-1], picture.convert("RGBA"), pixels.transpose(2, 0, 1)]
    made = tokenizer.preprocess(forms)
    assert made.shape == (len(forms), 3, 16, 16) and made.dtype == torch.float32
    assert all(torch.equal(one, made[0]) for one in made)
    for form in forms:
        assert torch.equal(tokenizer.preprocess(form), made[:1])
    batch = tokenizer.preprocess([pixels[None].repeat(2, axis=0), [tensor[None], picture]])
    assert torch.equal(batch, made[:4])


def test_floats_of_the_right_size_are_not_rounded():
    tokenizer, images = build(), torch.rand(2, 3, 16, 16)
    assert torch.equal(tokenizer.preprocess(images), images)
    assert torch.equal(tokenizer.preprocess(images.permute(0, 2, 3, 1).numpy()), images)
    assert torch.equal(tokenizer.preprocess(list(images.double())), images)
    assert not torch.equal(tokenizer.preprocess(images[..., :12]), images)


def test_grey_arrays_are_images_of_one_channel():
    tokenizer, pixels = build(channels=1), noise(16, 16)
    expected = torch.from_numpy(pixels)[None, None] / 255
    assert torch.equal(tokenizer.preprocess(pixels), expected)
    assert torch.equal(tokenizer.preprocess(pixels[None]), expected)
    assert torch.equal(tokenizer.preprocess(pixels[..., None]), expected)


def test_every_method_takes_them_and_the_way_back(folder):
    tokenizer, picture = build(), Image.open(folder / "photo.jpg")
    batch = tokenizer.preprocess(picture)
    codes = tokenizer.encode(folder / "photo.jpg")
    assert torch.equal(codes, tokenizer.encode(batch)) and codes.shape == (1, 16)
    reconstructed = tokenizer.reconstruct(picture)
    assert torch.equal(reconstructed, tokenizer.decode(codes)) and torch.equal(tokenizer(picture), reconstructed)
    (back,) = tokenizer.to_pil(reconstructed)
    assert (back.mode, back.size) == ("RGB", (16, 16))
    assert torch.allclose(tokenizer.preprocess(back), reconstructed, atol=0.5 / 255 + 1e-6)
    assert tokenizer.to_pil(build(channels=1).preprocess(picture))[0].mode == "L"


MISTAKES = [
    ({}, r"^a dict is no image; give a PIL image, the path"),
    (None, "^a NoneType is no image"),
    (b"bytes", "^a bytes is no image"),
    ([torch.rand(3, 16, 16), 5], "^image 1: an int is no image"),
    ([], "^no images were given"),
    ("nowhere/cat.jpg", r"^no such file: nowhere/cat.jpg; check the path"),
    ("/", "^/ is a folder, and an image is expected"),
    (__file__, "^cannot decode the image .*test_inputs.py .*; give another file$"),
    (np.zeros((2, 2, 2, 2, 2)), r"^an array of shape \(2, 2, 2, 2, 2\) was given"),
    (np.zeros((16, 16, 2)), r"^an array of shape \(16, 16, 2\) was given"),
    (np.zeros((16, 16), dtype=np.int64), "^an array of int64 was given; uint8 from 0 to 255 or floats"),
    (np.full((16, 16, 3), 255.0), r"^floats from 255 to 255 were given; expected \[0, 1\]"),
    (np.full((16, 16, 3), np.nan), "^floats from nan to nan were given"),
    ([torch.rand(16, 16)], r"^a tensor of shape \(16, 16\) was given"),
    ([torch.zeros(3, 16, 16, dtype=torch.int64)], "^a tensor of torch.int64 was given"),
    (Image.new("RGB", (0, 4)), r"has no pixels \(0 x 4\)"),
]


@pytest.mark.parametrize(("given", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_what_is_no_image_is_one_line(given, message):
    with pytest.raises(UserError, match=message) as error:
        build().encode(given)
    assert "\n" not in str(error.value) and "on_bad_image" not in str(error.value)


def test_a_file_that_breaks_off_is_named(folder, tmp_path):
    path = tmp_path / "cut.jpg"
    path.write_bytes((folder / "photo.jpg").read_bytes()[:-300])
    for given in (path, Image.open(path)):
        with pytest.raises(UserError, match=r"cannot decode the image .*cut.jpg .*; give another file$"):
            build().encode(given)


@pytest.mark.parametrize("images", [{}, torch.zeros(3, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)])
def test_only_batches_become_pictures(images):
    with pytest.raises(UserError, match=r"was given; images \(b, c, h, w\) in \[0, 1\] are expected"):
        build().to_pil(images)


# ------------------------------------------------------------------------------------------- from a run's files


def test_an_export_says_how_images_are_resized(folder, tmp_path):
    build(resample="lanczos").save_pretrained(tmp_path / "lanczos")
    build().save_pretrained(tmp_path / "bicubic")
    assert json.loads((tmp_path / "lanczos" / "config.json").read_text())["resample"] == "lanczos"
    assert "resample" not in json.loads((tmp_path / "bicubic" / "config.json").read_text())
    loaded = [Tokenizer.from_pretrained(tmp_path / name) for name in ("lanczos", "bicubic")]
    assert [tokenizer.resample for tokenizer in loaded] == ["lanczos", "bicubic"]
    of_both = [tokenizer.preprocess(folder / "colour.png") for tokenizer in loaded]
    assert not torch.equal(*of_both)


def test_a_run_exports_the_filter_that_its_images_took(tmp_path, folder):
    run = tmp_path / "run"
    options = "--image_size 16 --model.dim 16 --model.layers 2 --model.codebook_size 32 --model.use_vgg_and_gan false"
    training = f"--out {run} --trainer.num_train_steps 1 --trainer.batch_size 2 --data.resample lanczos"
    rest = "--trainer.validate_every 0 --data.valid_frac 0 --data.num_workers 0"
    assert main(f"train vqgan --data {folder} {options} {training} {rest}".split()) == 0
    assert Tokenizer.from_pretrained(run).resample == "lanczos"


@pytest.mark.parametrize("resample", ["bicubic", "lanczos"])
def test_commands_take_one_picture(folder, tmp_path, resample, capsys):
    """One file is data, and is resized as the run did."""
    tokenizer, picture = build(resample=resample), str(folder / "photo.jpg")
    tokenizer.save_pretrained(tmp_path / "export")
    common = [str(tmp_path / "export"), "--data", picture]
    assert main(["reconstruct", *common, "--out", str(tmp_path / "sheet.png")]) == 0
    assert Image.open(tmp_path / "sheet.png").size == (2 * 18 + 2, 18 + 2)  # the original, and beside it the other
    capsys.readouterr()
    assert main(["evaluate", *common]) == 0
    numbers = json.loads(capsys.readouterr().out)
    image = tokenizer.preprocess(picture)
    assert numbers["l1"] == pytest.approx(float((tokenizer(image) - image).abs().mean()), rel=1e-4)
    assert main(["encode", *common, "--out", str(tmp_path / "codes")]) == 0
    stored = np.load(tmp_path / "codes" / "codes_00000.npy")
    assert np.array_equal(stored, tokenizer.encode(picture).numpy())
