"""`vqdist inspect`: facts of runs, exports and files of other projects, the picture of an image, and mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scenarios import build_trainer

from vqdist import Prior, Tokenizer, VQGanVAE
from vqdist.cli import main
from vqdist.models.presets import PRESETS, Preset
from vqdist.tracking.code_picture import GAP, TITLE, as_map, code_picture, colour_of

SMALL = {"dim": 16, "layers": 2, "use_vgg_and_gan": False}


FILLED = {"vq_kwargs": {"kmeans_init": False}}


def saved(folder: Path, image_size: int | None = 16, **options) -> Path:
    torch.manual_seed(0)
    model = VQGanVAE(
        **{**SMALL, "quantizer": "fsq", "codebook_size": 16, "quantizer_kwargs": {"levels": [4, 4]}, **options}
    )
    model.image_size = image_size
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("inspected") / "export")


@pytest.fixture
def inspect(capsys):
    """Run the command, and give what it prints."""

    def run(*arguments, code: int = 0) -> str:
        assert main(["inspect", *map(str, arguments)]) == code
        printed = capsys.readouterr()
        return printed.out if code == 0 else printed.err

    return run


def rows(printed: str) -> dict[str, str]:
    """Return the rows that are printed, by name."""
    pairs = [
        line.split("  ", 1) if not line.startswith("  ") else line[2:].split("  ", 1) for line in printed.splitlines()
    ]
    return {name.strip(): value.strip() for name, value in pairs}


def test_an_export_says_size_codes_and_hash(export, inspect):
    tokenizer = Tokenizer.from_pretrained(export)
    facts = json.loads(inspect(export, "--json"))
    learnt = {part: count.get("parameters", 0) for part, count in facts["parameters"].items()}
    assert list(learnt)[:3] == ["encoder", "quantizer", "decoder"]
    assert sum(learnt.values()) == sum(weight.numel() for weight in tokenizer.network.parameters())
    assert facts["codes"] == {"shape": [4, 4], "positions": 16, "levels": 1, "codebook_size": 16, "bits": 64.0}
    assert (facts["kind"], facts["image_size"], facts["channels"]) == ("export", [16, 16], 3)
    assert facts["tokenizer_hash"] == tokenizer.fingerprint() and facts["codes_hash"] == tokenizer.codes_fingerprint()
    found = rows(inspect(export))
    assert found["codes"] == "4 x 4, each one of 16: 64 bits an image"
    assert found["parameters"] == f"{sum(learnt.values()):,}" and found["encoder"] == f"{learnt['encoder']:,}"
    assert found["licence"].startswith("none named")


def test_a_run_says_how_far_it_is_and_what_was_measured(tmp_path, inspect, capsys):
    with build_trainer(tmp_path / "run", num_train_steps=2, save_model_every=2) as trainer:
        trainer.train()
    size = trainer.config.image_size
    assert main(["evaluate", str(tmp_path / "run"), "--data", "synthetic:8"]) == 0
    measured = json.loads(capsys.readouterr().out)
    facts = json.loads(inspect(tmp_path / "run", "--json"))
    assert (facts["kind"], facts["step"], facts["steps"]) == ("run", 2, 2)
    assert facts["image_size"] == [size, size] and facts["evaluation"]["psnr"] == measured["psnr"]
    assert facts["parameters"]["discriminator"]["parameters"] == sum(
        weight.numel() for weight in trainer.model.discriminator.parameters()
    )
    found = rows(inspect(tmp_path / "run"))
    assert found["run"].endswith("VQGanVAE, step 2 of 2")
    assert found["evaluated"].startswith("at step 2: ") and f"psnr {measured['psnr']:.4g}" in found["evaluated"]


def test_the_head_of_the_model_card_names_the_licence(tmp_path, inspect):
    folder = saved(tmp_path / "named")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("---\n", "---\nlicense: cc-by-4.0\n", 1))
    assert rows(inspect(folder))["licence"] == "cc-by-4.0"
    for broken in ("---\nlicense: [\n---\n", "---", "\xff"):
        (folder / "README.md").write_text(broken)
        assert rows(inspect(folder))["licence"].startswith("none named")


def test_a_file_is_said_to_have_the_shapes_of_a_preset_and_not_to_be_it(tmp_path, inspect, monkeypatch):
    vae = VQGanVAE(dim=16, layers=2, quantizer="lfq", codebook_size=16, use_vgg_and_gan=False)
    vae.image_size = 16
    vae.save_pretrained(tmp_path / "export")
    assert main(["convert", str(tmp_path / "export"), "--to", "muse_vqgan", "--out", str(tmp_path / "vae.pt")]) == 0
    inspect(tmp_path / "export")  # what convert has printed
    found = rows(inspect(tmp_path / "vae.pt", "--image_size", "16"))
    assert "preset" not in found and found["licence"].startswith("nothing in the file names one")
    own = vae.configuration()
    small = replace(
        PRESETS["muse_vqgan_dim256_65536"],
        **{name: {"class_path": "conv", "init_args": {"width": 16, "layers": 2}} for name in ("encoder", "decoder")},
        quantizer={"class_path": "lfq", "init_args": {"codebook_size": own["codebook_size"]}},
        numbers="rFID 1.5",
        licence="theirs",
        image_size=16,
    )
    assert isinstance(small, Preset)
    monkeypatch.setitem(PRESETS, "small", small)
    found = rows(inspect(tmp_path / "vae.pt", "--image_size", "16"))
    assert found["file of family muse_vqgan"].endswith("vae.pt: VQGanVAE")
    assert found["preset"].startswith("has the shapes of small: ")
    assert found["if it is that file"] == "rFID 1.5; licence: theirs"
    assert found["licence"].startswith("nothing in the file names one")  # anybody's training has these shapes
    facts = json.loads(inspect(tmp_path / "vae.pt", "--image_size", "16", "--json"))
    assert facts["shapes_of_preset"]["name"] == "small" and "preset" not in facts and facts["licence"] != "theirs"
    # of one's own weights the licence is one's own, however they are built
    found = rows(inspect(tmp_path / "export"))
    assert found["preset"].startswith("has the shapes of small: ") and found["licence"].startswith("none named")


def test_a_prior_has_the_hash_of_its_tokenizer(export, tmp_path, inspect):
    tokenizer = Tokenizer.from_pretrained(export)
    Prior(tokenizer, dim=16, depth=1, heads=2, dim_head=32, num_classes=3).save_pretrained(tmp_path / "prior")
    facts = json.loads(inspect(tmp_path / "prior", "--json"))
    assert facts["tokenizer_hash"] == tokenizer.fingerprint() and facts["classes"] == 3
    assert facts["codes"]["positions"] == 16 and "encoder" not in facts["parameters"]
    said = inspect(tmp_path / "prior", "--image", __file__, code=2)
    assert "holds a Prior, which makes no codes of images; give its tokenizer" in said


# ------------------------------------------------------------------------------------------- the picture


def panel(picture: Image.Image, number: int, side: int) -> np.ndarray:
    """Return the pixels of a panel (h, w, 3)."""
    left = GAP + number * (side + GAP)
    return np.asarray(picture)[TITLE : TITLE + side, left : left + side]


def test_an_image_becomes_one_picture(export, tmp_path, inspect, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save("photo.png")
    assert inspect(export, "--image", "photo.png") == "inspection.png\n"
    picture = Image.open("inspection.png")
    assert np.array_equal(panel(picture, 0, 256)[8::16, 8::16], pixels)
    tokenizer = Tokenizer.from_pretrained(export)
    codes = tokenizer.encode("photo.png")
    shown = (tokenizer.decode(codes)[0].permute(1, 2, 0).numpy() * 255 + 0.5).astype(np.uint8)
    assert np.array_equal(panel(picture, 1, 256)[8::16, 8::16], shown)
    expected = [[colour_of(code) for code in row] for row in codes.reshape(4, 4).tolist()]
    assert panel(picture, 3, 256)[32::64, 32::64].tolist() == [[list(colour) for colour in row] for row in expected]
    used = {tuple(colour) for colour in panel(picture, 4, 256)[-1]} - {(245, 245, 245)}
    assert used == {colour_of(code) for code in codes.unique().tolist()}


@pytest.mark.parametrize(
    "options",
    [
        {"quantizer": "residual_vq", "codebook_size": 8, "quantizer_kwargs": {"num_quantizers": 3}, **FILLED},
        {
            "quantizer": "multiscale_vq",
            "codebook_size": 8,
            "quantizer_kwargs": {"v_patch_nums": [1, 2, 4], "kmeans_init": False},
        },
        {"channels": 1},
        {"channels": 4},
    ],
    ids=lambda options: str(options.get("quantizer", options)),
)
def test_every_kind_of_codes_and_colours_is_drawn(tmp_path, options, inspect):
    kind = {} if "quantizer" in options else {"quantizer": "fsq", "quantizer_kwargs": {"levels": [4, 4]}}
    folder = saved(tmp_path / "export", **{"quantizer_kwargs": {}, **kind, **options})
    Image.new("RGBA", (20, 16), (250, 3, 99, 128)).save(tmp_path / "photo.png")
    out = tmp_path / "new" / "picture.png"
    assert inspect(folder, "--image", tmp_path / "photo.png", "--out", out).strip() == str(out)
    assert Image.open(out).size == (5 * (256 + GAP) + GAP, 256 + TITLE + GAP)


def test_levels_are_tiles_and_rows_of_codes_nearly_squares():
    assert as_map(torch.arange(32)).shape == (4, 8) and as_map(torch.arange(7)).shape == (1, 7)
    maps = [torch.full((2, 2), code) for code in (0, 1, 2)]
    picture = code_picture(torch.zeros(3, 64, 128), torch.zeros(3, 64, 128), maps, 8)
    at = GAP + 3 * (512 + GAP)
    corners = [picture.getpixel((at + x, TITLE + y)) for x, y in ((4, 4), (300, 4), (4, 200), (300, 200))]
    assert corners == [*map(colour_of, (0, 1, 2)), (245, 245, 245)]


# ------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nowhere"], "nowhere"),
        (["EXPORT", "--image", "gone.jpg"], "no such file: gone.jpg; --image takes an image"),
        (["EXPORT", "--image", __file__], "test_inspect.py"),
        (["EXPORT", "--out", "a.png"], "--out a.png is given but --image is not"),
        (["EXPORT", "--image", __file__, "--out", "a.jpg"], "--out a.jpg is not the name of a PNG file"),
        (["EXPORT", "--image", __file__, "--json"], "give one of the two"),
        (["EXPORT", "--family", "ibq"], "--family is for files of other projects"),
        (["EXPORT", "--image_size", "15"], "image_size 15 is not a multiple of 4"),
        ([__file__], "test_inspect.py"),
    ],
    ids=lambda value: " ".join(value[1:3])[:30] or "other" if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(export, inspect, arguments, said):
    line = inspect(*(str(export) if word == "EXPORT" else word for word in arguments), code=2)
    assert line.startswith("vqdist: error: ") and line.count("\n") == 1 and said in line


def test_a_run_without_a_checkpoint_is_one_line(tmp_path, inspect):
    (tmp_path / "metrics.jsonl").touch()
    assert "has no export/ yet; train it to its first checkpoint" in inspect(tmp_path, code=2)


def test_a_tokenizer_that_does_not_say_its_size_is_still_described(tmp_path, inspect):
    folder = saved(tmp_path / "small", image_size=None)
    facts = json.loads(inspect(folder, "--json"))
    assert "codes" not in facts and "image_size" not in facts and facts["parameters"]["encoder"]
    assert json.loads(inspect(folder, "--json", "--image_size", "8"))["codes"]["positions"] == 4
    said = inspect(folder, "--image", __file__, code=2)
    assert "does not say on which image size it was trained; give image_size" in said


def test_mistakes_are_said_without_torch():
    code = "import sys\nfrom vqdist.cli import main\nmain(['inspect', 'nowhere'])\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False\n"
