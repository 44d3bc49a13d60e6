"""Views of an image: crop, flip and resize are functions of (image, rng), and Pillow's own resize where both exist."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from source_files import message_of

from vqdist.data.config import STILL, View
from vqdist.data.dataset import ImageDataset
from vqdist.data.images import image_to_tensor
from vqdist.data.sources import Source
from vqdist.data.views import FILTERS, apply_view, random_area_box, random_box, resize_and_crop

WIDE, TALL = (120, 70), (53, 97)


def picture(size, seed=0):
    """Smooth noise: large enough differences between places, no more than a level between roundings."""
    small = np.random.RandomState(seed).randint(0, 256, (size[1] // 8 + 2, size[0] // 8 + 2, 3)).astype(np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def difference(one, other):
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


def view_of(view, size=WIDE, image_size=32, seed=0):
    return apply_view(picture(size), image_size, view, rng(seed), flip=view.flip)


# ------------------------------------------------------------------------------------------------- the default


@pytest.mark.parametrize("size", [WIDE, TALL, (32, 32)])
def test_the_default_is_the_centre_and_the_flip_of_before(size):
    image = picture(size)
    fit = min(size) / 32
    left, top = (size[0] - 32 * fit) / 2, (size[1] - 32 * fit) / 2
    expected = image.resize((32, 32), Image.Resampling.BICUBIC, box=(left, top, size[0] - left, size[1] - top))
    for seed in range(8):
        mirrored = torch.rand((), generator=rng(seed)).item() < 0.5
        wanted = ImageOps.mirror(expected) if mirrored else expected
        assert difference(apply_view(image, 32, STILL, rng(seed), flip=True), wanted) == 0
        found = image_to_tensor(image, image_size=32, channels=3, rng=rng(seed))
        assert torch.equal((found * 255).round().byte(), torch.from_numpy(np.asarray(wanted).copy()).permute(2, 0, 1))
    assert difference(apply_view(image, 32, View(crop="random", shorter_side=(2, 2)), None, flip=True), expected) == 0


@pytest.mark.parametrize("name, value", [("bicubic", 3), ("bilinear", 2), ("lanczos", 1)])
def test_filters_are_those_of_pillow(name, value):
    square = picture((64, 64))
    assert FILTERS[name] == value
    for shown in (
        resize_and_crop(square, 24, name),
        apply_view(square, 24, View(crop="random", resample=name), rng(), flip=False),
        apply_view(
            square, 24, View(crop="resized", crop_area=(1, 1), crop_aspect=(1, 1), resample=name), rng(), flip=False
        ),
    ):
        assert difference(shown, square.resize((24, 24), Image.Resampling(value))) == 0
    assert len({resize_and_crop(square, 24, other).tobytes() for other in FILTERS}) == 3


# ------------------------------------------------------------------------------------------------- random crops


@pytest.mark.parametrize("image_size", [32, (24, 40)])
@pytest.mark.parametrize("size", [WIDE, TALL])
@pytest.mark.parametrize("resample", FILTERS)
def test_a_random_crop_is_a_crop_of_the_whole_image_resized(size, image_size, resample):
    """One resampling gives what a resize of all and a cut at whole pixels gives, but for a rounding of each pass."""
    view, image = View(crop="random", shorter_side=(1.0, 1.25), resample=resample), picture(size)
    rows, columns = (image_size, image_size) if isinstance(image_size, int) else image_size
    for seed in range(6):
        left, top, right, bottom = random_box(size, image_size, view, rng(seed))
        across, down = round(size[0] * columns / (right - left)), round(size[1] * rows / (bottom - top))
        x, y = left * across / size[0], top * down / size[1]
        assert abs(x - round(x)) < 1e-6 and abs(y - round(y)) < 1e-6
        whole = image.resize((across, down), FILTERS[resample])
        cut = whole.crop((round(x), round(y), round(x) + columns, round(y) + rows))
        shown = image.resize((columns, rows), FILTERS[resample], box=random_box(size, image_size, view, rng(seed)))
        assert cut.size == (columns, rows) and difference(shown, cut) <= 2


def shorter_sides(view, size=(1000, 700), image_size=64):
    """Return the shorter sides before the crop, of many draws."""
    boxes = [random_box(size, image_size, view, rng(seed)) for seed in range(300)]
    return {round(min(size) * image_size / (bottom - top), 6) for _, top, _, bottom in boxes}


def test_the_shorter_side_is_drawn_from_its_range_both_ends_included():
    assert shorter_sides(View(crop="random")) == {64}
    assert shorter_sides(View(crop="random", shorter_side=(1.125, 1.125))) == {72}  # VAR's
    assert shorter_sides(View(crop="random", shorter_side=(1, 1.25))) == set(range(64, 81))  # LlamaGen's
    assert shorter_sides(View(crop="random", shorter_side=(1.1, 1.1)), image_size=60) == {66}  # not 67 by a rounding


def test_a_random_crop_reaches_every_place_and_stays_within_the_image():
    view = View(crop="random", shorter_side=(1.0, 1.25))
    boxes = np.array([random_box(WIDE, 32, view, rng(seed)) for seed in range(2000)])
    assert boxes.min() >= 0 and boxes[:, 2].max() <= WIDE[0] + 1e-9 and boxes[:, 3].max() <= WIDE[1] + 1e-9
    assert boxes[:, 0].min() == 0 and boxes[:, 2].max() == pytest.approx(WIDE[0])
    assert boxes[:, 1].min() == 0 and boxes[:, 3].max() == pytest.approx(WIDE[1])
    middle = ((boxes[:, 0] + boxes[:, 2]) / 2).mean()
    assert middle == pytest.approx(WIDE[0] / 2, abs=1.5)


def test_a_resized_crop_has_areas_and_ratios_of_its_ranges():
    view, size = View(crop="resized", crop_area=(0.2, 0.5), crop_aspect=(0.5, 2.0)), (400, 300)
    boxes = np.array([random_area_box(size, 32, view, rng(seed)) for seed in range(1000)])
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, ratios = across * down / math.prod(size), across / down
    assert 0.197 < areas.min() < 0.21 and 0.49 < areas.max() < 0.503
    assert 0.495 < ratios.min() < 0.53 and 1.9 < ratios.max() < 2.02
    assert areas.mean() == pytest.approx(0.35, abs=0.01) and np.log(ratios).mean() == pytest.approx(0, abs=0.05)
    assert boxes.min() == 0 and boxes[:, 2].max() == 400 and boxes[:, 3].max() == 300
    assert np.array_equal(boxes, boxes.round())


def test_where_no_resized_crop_fits_the_largest_of_a_possible_ratio_is_in_the_centre():
    whole = View(crop="resized", crop_area=(1, 1), crop_aspect=(0.75, 4 / 3))
    assert random_area_box((400, 100), 32, whole, rng()) == pytest.approx(
        (400 / 2 - 200 / 3, 0, 400 / 2 + 200 / 3, 100)
    )
    assert random_area_box((90, 300), 32, whole, rng()) == pytest.approx((0, 90, 90, 210))


RANDOM = {
    "random": View(crop="random", shorter_side=(1.0, 1.5)),
    "resized": View(crop="resized"),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_view_is_a_function_of_image_and_rng(name):
    views = [view_of(RANDOM[name], seed=seed) for seed in range(12)]
    state = torch.get_rng_state()
    assert [view_of(RANDOM[name], seed=seed).tobytes() for seed in range(12)] == [view.tobytes() for view in views]
    assert torch.equal(state, torch.get_rng_state())  # the run's generator is not touched
    assert len({view.tobytes() for view in views}) == 12
    assert {view.size for view in views} == {(32, 32)}


@pytest.mark.parametrize("name", RANDOM)
def test_the_same_place_is_shown_mirrored_or_not(name):
    flipped = View(**{**vars(RANDOM[name]), "flip": True})
    still = View(**{**vars(RANDOM[name]), "flip": False})
    for seed in range(10):
        place = picture(WIDE).resize((32, 32), Image.Resampling.BICUBIC, box=_box(name, still, seed, skip=False))
        assert difference(view_of(still, seed=seed), place) == 0
        place = picture(WIDE).resize((32, 32), Image.Resampling.BICUBIC, box=_box(name, flipped, seed, skip=True))
        mirrored = torch.rand((), generator=rng(seed)).item() < 0.5
        assert difference(view_of(flipped, seed=seed), ImageOps.mirror(place) if mirrored else place) == 0


def _box(name, view, seed, *, skip):
    """Return the box of a seed, drawn after the flip if there is one."""
    chance = rng(seed)
    if skip:
        torch.rand((), generator=chance)
    return {"random": random_box, "resized": random_area_box}[name](WIDE, 32, view, chance)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"crop": "centre"}, "crop 'centre' is not known"),
        ({"resample": "nearest"}, "resample 'nearest' is not known"),
        ({"shorter_side": (0.8, 1.0)}, "shorter_side (0.8, 1.0) is not possible; it must be at least 1"),
        ({"shorter_side": (1.5, 1.0)}, "shorter_side (1.5, 1.0) is not possible; give the lowest"),
        ({"shorter_side": 1.25}, "shorter_side 1.25 is not possible; give the lowest"),
        ({"crop_area": (0.0, 1.0)}, "crop_area (0.0, 1.0) is not possible"),
        ({"crop_area": (0.5, 1.5)}, "crop_area (0.5, 1.5) is not possible"),
        ({"crop_aspect": (1.0,)}, "crop_aspect (1.0,) is not possible; give the lowest"),
        ({"crop_aspect": (0.5, math.inf)}, "crop_aspect (0.5, inf) is not possible"),
    ],
)
def test_views_that_cannot_be(given, words):
    assert words in message_of(View, **given)


# ------------------------------------------------------------------------------------------------- datasets


@pytest.mark.parametrize("name", RANDOM)
def test_a_dataset_looks_by_seed_epoch_and_index_only(name):
    images = ImageDataset("synthetic:6", 16, view=RANDOM[name], seed=3)
    again = ImageDataset("synthetic:6", 16, view=RANDOM[name], seed=3)
    epochs = [torch.stack([images[epoch, index] for index in range(6)]) for epoch in range(3)]
    assert torch.equal(epochs[1], torch.stack([again[1, index] for index in range(6)]))
    assert not any(torch.equal(epochs[0], epochs[epoch]) for epoch in (1, 2))
    assert not torch.equal(epochs[0][0], ImageDataset("synthetic:6", 16, view=RANDOM[name], seed=4)[0])


def test_images_that_are_not_to_be_mirrored_are_cropped_all_the_same():
    view = View(crop="random", shorter_side=(1.5, 1.5))
    digits = ImageDataset("digits", 28, channels=1, view=view)
    still = ImageDataset("digits", 28, channels=1, view=View(crop="random", shorter_side=(1.5, 1.5), flip=False))
    assert torch.equal(digits[1, 5], still[1, 5])
    assert not torch.equal(digits[1, 5], ImageDataset("digits", 28, channels=1)[1, 5])


def test_what_a_view_cannot_do_is_refused():
    class Tensors(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return torch.zeros(3, 16, 16)

    for given in ({"crop": "random"}, {"resample": "lanczos"}):
        assert "does nothing, because the dataset gives tensors" in message_of(
            ImageDataset, Tensors(), 16, view=View(**given)
        )
    images = ImageDataset("synthetic:2", 16, augment=False)
    for source in (images, "synthetic:2"):
        message = message_of(ImageDataset, source, 16, augment=source is images, view=View(crop="resized"))
        assert "crop resized does nothing, because the images are not augmented" in message


def test_a_source_from_before_there_were_views_is_read_as_it_was():
    class Old(Source):
        def __len__(self):
            return 2

        def tensor(self, index, *, image_size, channels, rng=None):
            return torch.full((channels, image_size, image_size), float(index))

    assert ImageDataset(Old(), 16)[1].eq(1).all()


# ------------------------------------------------------------------------------------------------- publications


def centre(image, view):
    return apply_view(image, 32, view, None, flip=False)


@pytest.mark.parametrize("size", [(301, 203), (150, 433), (64, 64), (63, 90), (32, 47), (20, 31)])
def test_the_centre_of_adm_is_halved_by_boxes_first(size):
    image = picture(size)
    halved = image
    while min(halved.size) >= 64:
        halved = (
            halved.reduce(2)
            if all(side % 2 == 0 for side in halved.size)
            else halved.resize((halved.width // 2, halved.height // 2), Image.Resampling.BOX)
        )
    fit = 32 / min(halved.size)
    resized = np.asarray(halved.resize([round(side * fit) for side in halved.size], Image.Resampling.BICUBIC))
    top, left = ((side - 32) // 2 for side in resized.shape[:2])
    # Pillow's own halving rounds another way
    assert difference(centre(image, View(center="adm")), resized[top : top + 32, left : left + 32]) <= 1


@pytest.mark.parametrize("size", [(301, 203), (150, 433), (32, 47), (20, 31), (333, 71)])
def test_the_centre_of_torchvision_is_that_of_its_transforms(size):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    theirs = Compose([Resize(32, InterpolationMode.BICUBIC, antialias=True), CenterCrop(32)])
    assert difference(centre(picture(size), View(center="torchvision")), theirs(picture(size))) == 0


def test_the_centre_of_albumentations_is_between_pixels_alone():
    """OpenCV's bilinear: the place of pixel i is (i + 1/2) * scale - 1/2, and two pixels around it count."""
    image = picture((150, 96))
    pixels, scale = np.asarray(image).astype(float), 96 / 32
    width = round(150 * 32 / 96)

    def along(values, count, axis):
        places = ((np.arange(count) + 0.5) * values.shape[axis] / count - 0.5).clip(0, values.shape[axis] - 1)
        low = np.floor(places).astype(int)
        share = (places - low).reshape([-1 if number == axis else 1 for number in range(3)])
        high = np.minimum(low + 1, values.shape[axis] - 1)
        return np.take(values, low, axis) * (1 - share) + np.take(values, high, axis) * share

    resized = along(along(pixels, 32, 0), width, 1)[:, (width - 32) // 2 :][:, :32]
    found = centre(image, View(center="albumentations", resample="bilinear"))
    assert scale == 3 and difference(found, resized.round()) <= 1
    assert difference(found, centre(image, View(resample="bilinear"))) > 3
    grey = centre(image.convert("L"), View(center="albumentations", resample="bilinear"))
    assert grey.mode == "L" and grey.size == (32, 32)


def test_an_image_of_the_size_is_its_own_centre():
    for name, resample in (("adm", "bicubic"), ("torchvision", "bicubic"), ("albumentations", "bilinear")):
        assert difference(centre(picture((32, 32)), View(center=name, resample=resample)), picture((32, 32))) == 0


def test_a_publications_centre_has_its_filter_and_is_square():
    assert "resample lanczos is given but center adm is of bicubic" in message_of(
        View, center="adm", resample="lanczos"
    )
    assert "give one side" in message_of(ImageDataset, "synthetic:3", (16, 32), view=View(center="adm"))
    assert (
        View(center="adm").described() != View().described() == "shorter side resized (bicubic, antialiased), centre"
    )
