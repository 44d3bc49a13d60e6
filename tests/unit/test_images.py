"""Every kind of image file ends up with the right numbers, and a broken one is named."""

import io
import struct
import warnings
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from vqdist.data.images import (
    BadImageError,
    convert_channels,
    image_to_tensor,
    open_image,
    tensor_to_image,
)
from vqdist.data.views import resize_and_crop
from vqdist.errors import UserError

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def pixels(image):
    """All pixels of an image in reading order."""
    array = np.asarray(image)
    return [tuple(map(int, np.atleast_1d(pixel))) for row in array for pixel in row]


def through_file(tmp_path, image, extension, **options):
    path = tmp_path / f"image.{extension}"
    image.save(path, **options)
    return open_image(path)


def row_of(mode, values):
    image = Image.new(mode, (len(values), 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    return image


# ------------------------------------------------------------------------------------------- modes


def test_grey_is_repeated_in_colour_and_opaque(tmp_path):
    image = through_file(tmp_path, row_of("L", [0, 100, 255]), "png")
    assert pixels(convert_channels(image, 1)) == [(0,), (100,), (255,)]
    assert pixels(convert_channels(image, 3)) == [(0, 0, 0), (100, 100, 100), (255, 255, 255)]
    assert pixels(convert_channels(image, 4)) == [(0, 0, 0, 255), (100, 100, 100, 255), (255, 255, 255, 255)]


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "webp"])
def test_rgb_to_grey_is_luma(tmp_path, extension):
    options = {"lossless": True} if extension == "webp" else {}
    image = through_file(tmp_path, row_of("RGB", [RED, GREEN, BLUE, WHITE]), extension, **options)
    assert pixels(convert_channels(image, 3)) == [RED, GREEN, BLUE, WHITE]
    assert pixels(convert_channels(image, 1)) == [(76,), (150,), (29,), (255,)]  # 0.299, 0.587, 0.114 of 255
    assert pixels(convert_channels(image, 4)) == [(*RED, 255), (*GREEN, 255), (*BLUE, 255), (*WHITE, 255)]


def test_one_bit(tmp_path):
    image = through_file(tmp_path, row_of("1", [0, 1]), "png")
    assert image.mode == "1"
    assert pixels(convert_channels(image, 1)) == [(0,), (255,)]
    assert pixels(convert_channels(image, 3)) == [BLACK, WHITE]
    assert pixels(convert_channels(image, 4)) == [(*BLACK, 255), (*WHITE, 255)]


def palette_image():
    image = row_of("P", [0, 1, 2])
    image.putpalette([*RED, *GREEN, *BLUE])
    return image


@pytest.mark.parametrize("extension", ["png", "gif", "bmp", "tif"])
def test_palette(tmp_path, extension):
    image = through_file(tmp_path, palette_image(), extension)
    assert pixels(convert_channels(image, 3)) == [RED, GREEN, BLUE]
    assert pixels(convert_channels(image, 1)) == [(76,), (150,), (29,)]
    assert pixels(convert_channels(image, 4)) == [(*RED, 255), (*GREEN, 255), (*BLUE, 255)]


@pytest.mark.parametrize("extension", ["png", "gif"])
def test_palette_with_a_transparent_colour(tmp_path, extension):
    image = through_file(tmp_path, palette_image(), extension, transparency=1)
    assert pixels(convert_channels(image, 3)) == [RED, WHITE, BLUE]
    assert [pixel[3] for pixel in pixels(convert_channels(image, 4))] == [255, 0, 255]
    assert pixels(convert_channels(image, 1)) == [(76,), (255,), (29,)]


def test_palette_with_alpha_for_each_colour(tmp_path):
    image = through_file(tmp_path, palette_image(), "png", transparency=bytes([255, 128, 0]))
    assert [pixel[3] for pixel in pixels(convert_channels(image, 4))] == [255, 128, 0]
    assert pixels(convert_channels(image, 3)) == [RED, (127, 255, 127), WHITE]


@pytest.mark.parametrize("mode, key", [("L", 9), ("RGB", (9, 9, 9)), ("1", 0)])
def test_a_transparent_colour_without_palette(tmp_path, mode, key):
    values = [0, 1] if mode == "1" else [key, 7 if mode == "L" else (7, 7, 7)]
    image = through_file(tmp_path, row_of(mode, values), "png", transparency=key)
    assert image.mode == mode
    assert [pixel[3] for pixel in pixels(convert_channels(image, 4))] == [0, 255]
    assert pixels(convert_channels(image, 3))[0] == WHITE
    assert pixels(convert_channels(image, 1))[0] == (255,)


def test_cmyk(tmp_path):
    values = [(0, 255, 255, 0), (255, 0, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0)]
    image = through_file(tmp_path, row_of("CMYK", values), "tif")
    assert image.mode == "CMYK"
    assert pixels(convert_channels(image, 3)) == [RED, GREEN, BLACK, WHITE]
    assert pixels(convert_channels(image, 4)) == [(*RED, 255), (*GREEN, 255), (*BLACK, 255), (*WHITE, 255)]
    assert pixels(convert_channels(image, 1)) == [(76,), (150,), (0,), (255,)]


def test_cmyk_jpeg(tmp_path):
    image = through_file(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "jpg", quality=100)
    assert image.mode == "CMYK"
    assert np.abs(np.asarray(convert_channels(image, 3)).astype(int) - RED).max() <= 3


def test_alpha_is_composited_on_white(tmp_path):
    image = through_file(tmp_path, row_of("RGBA", [(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)]), "png")
    assert pixels(convert_channels(image, 3)) == [RED, WHITE, (204, 204, 204)]
    assert pixels(convert_channels(image, 1)) == [(76,), (255,), (204,)]
    assert pixels(convert_channels(image, 4)) == [(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)]


def test_grey_with_alpha(tmp_path):
    image = through_file(tmp_path, row_of("LA", [(100, 255), (100, 0), (0, 51)]), "png")
    assert image.mode == "LA"
    assert pixels(convert_channels(image, 1)) == [(100,), (255,), (204,)]
    assert pixels(convert_channels(image, 3)) == [(100, 100, 100), WHITE, (204, 204, 204)]
    assert pixels(convert_channels(image, 4)) == [(100, 100, 100, 255), (100, 100, 100, 0), (0, 0, 0, 51)]


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "RGBX", "YCbCr", "HSV", "LAB"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_rare_modes(mode, channels):
    image = convert_channels(Image.new(mode, (2, 2)), channels)
    assert image.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]


# ------------------------------------------------------------------------------------------- depth

DEEP = [0, 128, 257, 25700, 32768, 65535]
SHALLOW = [0, 0, 1, 100, 128, 255]  # round(value / 257); 32768 / 257 = 127.502


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_16_bit_is_scaled_not_clipped(tmp_path, extension):
    image = through_file(tmp_path, Image.fromarray(np.array([DEEP], dtype=np.uint16)), extension)
    assert image.mode.startswith("I")
    assert pixels(convert_channels(image, 1)) == [(value,) for value in SHALLOW]
    assert pixels(convert_channels(image, 3)) == [(value,) * 3 for value in SHALLOW]
    assert pixels(convert_channels(image, 4)) == [(value, value, value, 255) for value in SHALLOW]


def test_16_bit_big_endian(tmp_path):
    content = np.array([DEEP], dtype=">u2").tobytes()
    image = through_file(tmp_path, Image.frombytes("I;16B", (len(DEEP), 1), content), "tif")
    assert image.mode == "I;16B"
    assert pixels(convert_channels(image, 1)) == [(value,) for value in SHALLOW]


def test_16_bit_with_a_transparent_colour(tmp_path):
    image = Image.fromarray(np.array([[25700, 0]], dtype=np.uint16))
    image = through_file(tmp_path, image, "png", transparency=25700)
    assert pixels(convert_channels(image, 4)) == [(100, 100, 100, 0), (0, 0, 0, 255)]
    assert pixels(convert_channels(image, 1)) == [(255,), (0,)]


@pytest.mark.parametrize("dtype, mode", [(np.int32, "I"), (np.float32, "F")])
def test_32_bit_files_of_16_bit_values(tmp_path, dtype, mode):
    image = through_file(tmp_path, Image.fromarray(np.array([DEEP], dtype=dtype)), "tif")
    assert image.mode == mode
    assert pixels(convert_channels(image, 1)) == [(value,) for value in SHALLOW]


def test_full_32_bit_and_unit_floats(tmp_path):
    whole = Image.fromarray(np.array([[0, 2**30, 2**31 - 1]], dtype=np.int32))
    assert pixels(convert_channels(through_file(tmp_path, whole, "tif"), 1)) == [(0,), (128,), (255,)]
    unit = Image.fromarray(np.array([[-1, 0, 0.5, 1, np.nan]], dtype=np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = convert_channels(through_file(tmp_path, unit, "tif"), 1)
    assert pixels(image) == [(0,), (0,), (128,), (255,), (0,)]


@pytest.mark.parametrize("channels", [0, 2, 5])
def test_other_numbers_of_channels_are_refused(channels):
    with pytest.raises(
        UserError, match=rf"^channels {channels} is not possible .* choose 1 \(grey\), 3 .* or 4"
    ) as info:
        convert_channels(Image.new("L", (2, 2)), channels)
    assert not isinstance(info.value, BadImageError)  # a wrong option is never skipped


# -------------------------------------------------------------------------------------- orientation

UPRIGHT = np.array([[10, 20, 30], [40, 50, 60]], dtype=np.uint8)
STORED = {  # how a camera stores UPRIGHT under each orientation
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT, 1),
    7: UPRIGHT[::-1, ::-1].T,
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("extension", ["png", "tif", "webp"])
def test_exif_orientation(tmp_path, orientation, extension):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation])).convert("RGB")
    options = {"lossless": True} if extension == "webp" else {}
    image = through_file(tmp_path, stored, extension, exif=exif, **options)
    assert np.array_equal(np.asarray(image)[..., 0], UPRIGHT)


def test_exif_orientation_of_jpeg(tmp_path):
    corner = np.zeros((16, 32, 3), dtype=np.uint8)
    corner[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(corner, 1)))
    image = through_file(tmp_path, stored, "jpg", exif=exif, quality=100, subsampling=0)
    assert np.abs(np.asarray(image).astype(int) - corner).max() <= 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0neither"])
def test_broken_exif_does_not_spoil_the_pixels(tmp_path, exif):
    image = through_file(tmp_path, Image.new("RGB", (8, 8), RED), "png", exif=exif)
    assert pixels(image) == [RED] * 64


# ------------------------------------------------------------------------------------- broken files


def test_not_an_image(tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("these are words")
    with pytest.raises(BadImageError) as info:
        open_image(path)
    message = str(info.value)
    assert message.startswith(f"cannot decode the image {path} (UnidentifiedImageError: ")
    assert message.endswith("); replace or remove it, or pass over such images with on_bad_image=skip")
    assert "\n" not in message


@pytest.mark.parametrize("extension", ["jpg", "png", "bmp", "tif", "webp"])
def test_truncated(tmp_path, extension):
    path = tmp_path / f"cut.{extension}"
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadImageError, match=f"cannot decode the image .*cut.{extension} "):
        open_image(path)


@pytest.mark.parametrize("compression", ["tiff_deflate", "tiff_lzw", "group4"])
def test_the_library_of_tiffs_says_nothing_by_itself(tmp_path, compression, capfd):
    """It writes each of its errors to the terminal unless it is told not to."""
    noise = np.random.RandomState(0).randint(0, 256, (48, 40), dtype=np.uint8)
    good, path = io.BytesIO(), tmp_path / "odd.tif"
    Image.fromarray(noise).convert("1" if compression == "group4" else "RGB").save(
        good, "TIFF", compression=compression
    )
    for place in range(10, len(good.getvalue()) - 8, 11):
        content = bytearray(good.getvalue())
        content[place : place + 4] = bytes(255 - byte for byte in content[place : place + 4])
        path.write_bytes(content)
        with suppress(BadImageError):
            open_image(path)
    assert capfd.readouterr() == ("", "")


def test_missing_empty_and_folder(tmp_path):
    (tmp_path / "empty.png").touch()
    for name, reason in [("gone.png", "FileNotFoundError"), ("empty.png", "Unidentified"), (".", "IsADirectory")]:
        with pytest.raises(BadImageError, match=reason):
            open_image(tmp_path / name)


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadImageError, match=r"bomb.png \(it has more than 2,000 pixels, PIL's limit"):
        open_image(tmp_path / "bomb.png")


def test_damaged_png_header(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "png")
    content = bytearray(buffer.getvalue())
    content[16:20] = struct.pack(">I", 0xFFFFFFFF)
    (tmp_path / "header.png").write_bytes(content)
    with pytest.raises(BadImageError, match="header.png"):
        open_image(tmp_path / "header.png")


def test_file_objects():
    buffer = io.BytesIO()
    Image.new("L", (2, 2), 7).save(buffer, "png")
    buffer.seek(0)
    image = open_image(buffer)
    buffer.close()
    assert pixels(image) == [(7,)] * 4
    with pytest.raises(BadImageError, match="the image shard.tar:3.jpg "):
        open_image(io.BytesIO(b"no"), name="shard.tar:3.jpg")
    with pytest.raises(BadImageError, match="the image given as a file object"):
        open_image(io.BytesIO(b"no"))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    image = through_file(tmp_path, frames[0], "gif", save_all=True, append_images=frames[1:])
    assert pixels(convert_channels(image, 3)) == [RED] * 16


# ------------------------------------------------------------------------------------------- tensors


def test_tensor_values_and_layout():
    image = row_of("RGB", [(0, 51, 102), (153, 204, 255)]).resize((2, 2), Image.Resampling.NEAREST)
    tensor = image_to_tensor(image, image_size=2, channels=3)
    assert tensor.dtype == torch.float32 and tensor.is_contiguous()
    expected = torch.tensor([[0.0, 0.6], [0.2, 0.8], [0.4, 1.0]])[:, None].expand(3, 2, 2)
    torch.testing.assert_close(tensor, expected)
    assert image_to_tensor(image, image_size=2, channels=1).shape == (1, 2, 2)
    assert image_to_tensor(image, image_size=2, channels=4)[3].eq(1).all()


def test_same_size_is_untouched():
    noise = np.random.RandomState(0).randint(0, 256, (28, 28), dtype=np.uint8)
    assert np.array_equal(np.asarray(resize_and_crop(Image.fromarray(noise), 28)), noise)


@pytest.mark.parametrize("size", [(60, 20), (20, 60)])
def test_centre_crop(size):
    """Three squares side by side: only the middle one is left."""
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, (20, 0, 40, 20) if size[0] > size[1] else (0, 20, 20, 40))
    assert set(pixels(resize_and_crop(image, 20))) == {GREEN}
    shrunk = np.asarray(resize_and_crop(image, 10)).astype(int)
    assert np.abs(shrunk[2:-2, 2:-2] - GREEN).max() == 0


def test_equal_to_resizing_all_and_cropping():
    noise = np.random.RandomState(0).randint(0, 256, (40, 80), dtype=np.uint8)
    image = Image.fromarray(noise)
    whole = image.resize((40, 20), Image.Resampling.BICUBIC).crop((10, 0, 30, 20))
    assert np.abs(np.asarray(resize_and_crop(image, 20)).astype(int) - np.asarray(whole)).max() <= 1


def test_resize_is_antialiased():
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(resize_and_crop(Image.fromarray(stripes), 8)).astype(int)
    assert np.abs(small[:, 1:-1] - 128).max() <= 3


def test_transparent_colour_does_not_bleed():
    """Left opaque green, right invisible red: no red appears at the border."""
    image = Image.new("RGBA", (64, 64), (0, 255, 0, 255))
    image.paste((255, 0, 0, 0), (31, 0, 64, 64))
    tensor = image_to_tensor(image, image_size=8, channels=4)
    visible = tensor[:, tensor[3] > 0]
    assert ((tensor[3] > 0) & (tensor[3] < 1)).any()
    assert visible[0].max() == 0
    assert visible[1].min() > 0.98


def test_one_pixel_and_thin_images():
    for size in [(1, 1), (1, 500), (500, 1)]:
        tensor = image_to_tensor(Image.new("RGB", size, RED), image_size=16, channels=3)
        assert tensor.shape == (3, 16, 16)
        assert tensor[0].eq(1).all() and tensor[1:].eq(0).all()


def test_mirroring_depends_on_the_generator_only():
    image = row_of("L", [0, 255]).resize((2, 2), Image.Resampling.NEAREST)
    plain = image_to_tensor(image, image_size=2, channels=1)
    views = [
        image_to_tensor(image, image_size=2, channels=1, rng=torch.Generator().manual_seed(seed))
        for seed in range(200)
    ]
    again = [
        image_to_tensor(image, image_size=2, channels=1, rng=torch.Generator().manual_seed(seed))
        for seed in range(200)
    ]
    mirrored = [torch.equal(view, plain.flip(-1)) for view in views]
    assert all(map(torch.equal, views, again))
    assert all(flipped or torch.equal(view, plain) for view, flipped in zip(views, mirrored))
    assert 70 < sum(mirrored) < 130


def test_the_input_is_not_changed():
    image = Image.new("RGBA", (5, 7), (1, 2, 3, 4))
    before = image.tobytes(), image.mode, image.size
    image_to_tensor(image, image_size=3, channels=1, rng=torch.Generator().manual_seed(1))
    assert (image.tobytes(), image.mode, image.size) == before


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tensor_to_image_and_back(channels):
    noise = torch.randint(0, 256, (channels, 6, 6), generator=torch.Generator().manual_seed(0)) / 255
    if channels == 4:
        noise[3] = 1
    torch.testing.assert_close(
        image_to_tensor(tensor_to_image(noise), image_size=6, channels=channels), noise, atol=1e-6, rtol=0
    )
