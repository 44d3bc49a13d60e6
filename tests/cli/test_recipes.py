"""Every recipe of launch/recipes: its options, what its head says of it, and two steps of it.

The small ones run as they are. The field's standard runs are built whole, and run shrunken, with all on that is on in
them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import ROOT, torchrun
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vqdist import VAR, DiscreteVAE, Prior, Tokenizer, VQGanVAE
from vqdist.cli import main
from vqdist.cli.models import MODELS
from vqdist.cli.train import OF_START, TOP_LEVEL, train_options
from vqdist.models.presets import PRESETS
from vqdist.models.published import write_published
from vqdist.schedules import learning_rate, temperature
from vqdist.trainers.config import build_config

RECIPES = {path.stem: path for path in sorted((ROOT / "launch" / "recipes").glob("*.yaml"))}

TRAINING_IMAGES = 1_281_167 - 12_812  # of ImageNet, without those held back

# What makes a whole recipe a run of some seconds; no mechanism is turned off. Of a published network the parts of its
# preset are made smaller, and VGG16 has random weights.
SMALLER: dict[str, dict[str, Any]] = {
    "taming": {"ch": 32, "num_res_blocks": 1},
    "magvit2": {"ch": 32, "num_res_blocks": 1},
    "maskgit": {"hidden_channels": 32, "num_res_blocks": 1},
    "gradient_vq": {"codebook_size": 32},
    "ibq": {"codebook_size": 32},
    "multiscale_vq": {"codebook_size": 32, "v_patch_nums": [1, 2, 3, 4]},
    "magvit2_lfq": {"codebook_size": 32},
    "titok": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "heads": 2},
}
SMALLER["titok_proxy"] = {**SMALLER["titok"], "proxy_codebook_size": 12}
# the tokenizer whose codes TiTok's first stage predicts, and whose decoder the second one takes
TARGET = {"hidden_channels": 32, "channel_mult": [1, 1, 1, 1], "num_res_blocks": 1}
SMALL_PIXEL = {"dim": 8, **TARGET}
WITH_TARGET = {"class_path": "proxy_codes", "init_args": {"tokenizer": "TARGET"}}
FIVE_BITS = {"z_channels": 5}
WITH_VGG16 = {"class_path": "lpips", "init_args": {"weights": "VGG16"}}


def small(preset: str, kind: str, weight: float, start: int | None = None, size: int = 32) -> str:
    """Arguments for a small model of a preset's parts, whose discriminator joins in the second step."""
    published, given = PRESETS[preset], {}
    for name in ("encoder", "decoder", "quantizer"):
        part = getattr(published, name)
        given[name] = {**part, "init_args": {**part["init_args"], **SMALLER[part["class_path"]]}}
    if published.family == "open_magvit2":
        given["encoder"]["init_args"] |= FIVE_BITS
    if given["decoder"]["init_args"].get("pixel"):
        given["decoder"]["init_args"]["pixel"] = SMALL_PIXEL
    given["terms"] = [{"class_path": "reconstruction", "init_args": {"kind": kind, "weight": weight}}, WITH_VGG16]
    given["terms"] = [WITH_TARGET] if published.discriminator is None else given["terms"]
    parts = " ".join(f"--model.{name} {shlex.quote(json.dumps(part))}" for name, part in given.items())
    joins = "" if start is None else f" --trainer.discriminator_start {start}"
    return f"--image_size {size} --trainer.batch_size 2 {parts}{joins}"


FEW_SAMPLES = "--trainer.batch_size 4 --trainer.num_images_save 4"
SHRUNK = {
    "imagenet_vqgan_f16_1024": small("taming_vqgan_f16_1024", "l1", 2.0, start=1),
    "imagenet_vqgan_f16_16384": small("taming_vqgan_f16_16384", "l1", 2.0),
    "ldm_vq_f8": small("ldm_vq_f8", "l1", 2.0),
    "llamagen_vq16": small("llamagen_vq16", "l2", 4.0, start=1),
    "imagenet_multiscale_vq": small("var_vqvae", "l2", 4.0, start=1, size=64),
    "imagenet_lfq_2e18": small("open_magvit2_256_262144", "l1", 2.0),
    "ibq_16384": small("ibq_16384", "l1", 2.0),
    "maskgit_vqgan": small("maskgit_vqgan_f16_1024", "l2", 1.0, start=1),
    "titok_bl64": small("titok_bl64_vq8k", "l2", 1.0, start=1),
    "titok_l32_stage1": small("titok_l32_stage1", "l2", 1.0),
    "titok_l32_stage2": small("titok_l32", "l2", 1.0, start=1) + " --trainer.init_pixel_from TARGET",
    "dalle_dvae": (
        "--image_size 32 --model.num_tokens 32 --model.codebook_dim 8 --model.hidden_dim 16 "
        "--model.num_resnet_blocks 1 --trainer.batch_size 1 --trainer.num_images_save 4"
    ),
    "llamagen_b_prior": f"--model.dim 64 --model.depth 1 --model.heads 2 --model.dim_head 32 {FEW_SAMPLES}",
    "var_d16": f"--model.depth 1 --model.dim 64 --model.heads 2 --trainer.sample_top_k 16 {FEW_SAMPLES}",
}
EVERY_SHRUNK = (
    "--data synthetic:100 --data.num_workers 0 --trainer.epochs null --trainer.num_train_steps 2 --trainer.log_every 1"
)
OTHER_DATA = {"mnist_vq_ar": "--data digits"}  # which are here, where a recipe asks for a download

# recipes of a preset, and the file of tensor names and shapes that the project's own code gave; tensors that no
# optimizer sees
PUBLISHED = {
    "imagenet_vqgan_f16_1024": "taming_vqgan_f16_1024",
    "imagenet_vqgan_f16_16384": "taming_vqgan_f16_16384",
    "ldm_vq_f8": "ldm_vq_f8_16384",
    "llamagen_vq16": "llamagen_vq16",
    "imagenet_multiscale_vq": "var_vqvae",
    "imagenet_lfq_2e18": "open_magvit2_256_262144",
    "ibq_16384": "ibq_16384",
    "maskgit_vqgan": "maskgit_vqgan_f16_1024",
    "titok_bl64": "titok_bl64_vq8k",
    "titok_l32_stage1": "titok_l32",  # without the pixel decoder that the second stage adds
    "titok_l32_stage2": "titok_l32",
}
BUFFERS = ("quantize.codebook_used", "quantize.ema_vocab_hit_SV")

# numbers that only a run with the mechanism on has
LOGGED = {
    "vqgan": {"recon_loss", "lpips_loss", "aux_loss", "adversarial_loss", "discr_loss", "discriminator_grad_norm"},
    "dvae": {"recon_loss", "kl_loss", "kl_weight", "temperature"},
    "prior": {"loss", "accuracy"},
    "var": {"loss", "nll_scale_4"},
}


FIRST_STAGE = {"proxy_loss", "aux_loss", "generator_grad_norm"}


def head(name: str) -> str:
    """Return the comments that a recipe begins with."""
    lines = RECIPES[name].read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def arguments(name: str) -> list[str]:
    """Return what follows `vqdist train` in the line of the head that starts this recipe."""
    line = re.search(rf"^#   vqdist train (.* launch/recipes/{name}\.yaml .*)$", head(name), re.MULTILINE)
    assert line, f"the head of {name} has no line that starts it"
    return shlex.split(line[1])


def model_of(name: str) -> str:
    return arguments(name)[0]


@functools.cache
def options(name: str, *more: str):
    """Return the recipe as the command line reads it, with further arguments."""
    model, *rest = arguments(name)
    rest[rest.index("--config") + 1] = str(RECIPES[name])
    return train_options(model, [*rest, *more])


def preset_of(name: str) -> str | None:
    return options(name).model.get("preset") if model_of(name) == "vqgan" else None


def value_of(name: str, flag: str) -> str | None:
    given = arguments(name)
    return given[given.index(flag) + 1] if flag in given else None


def tokenizer_recipe(name: str) -> str | None:
    """Return the recipe of the tokenizer that this recipe's line is over."""
    run = value_of(name, "--tokenizer")
    return None if run is None else recipe_of(run)


def recipe_of(run: str) -> str:
    """Return the recipe whose line makes this run."""
    return next(other for other in RECIPES if value_of(other, "--out") == run)


def part(name: str, title: str) -> str:
    """Return a paragraph of a head, on one line: what follows `# Title: ` up to the next."""
    found = re.search(rf"^# {title}: (.*(?:\n#   .*)*)", head(name), re.MULTILINE)
    assert found, f"the head of {name} does not say: {title}"
    return re.sub(r"\n#\s+", " ", found[1])


# ------------------------------------------------------------------------------------------------------ what they say


def test_the_standard_runs_are_there():
    assert set(SHRUNK) <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_option_is_known_and_possible(name):
    entry, parsed = MODELS[model_of(name)], options(name)
    written = yaml.safe_load(RECIPES[name].read_text())
    assert_contains(parsed.as_dict(), written)
    trainer_class = entry.load()[1]
    top = {option: getattr(parsed, key) for option, key in TOP_LEVEL.items()}
    top |= {option: parsed[option] for option in OF_START if model_of(name) == "vqgan"}
    build_config(trainer_class.config_class, {**parsed.data.as_dict(), **parsed.trainer.as_dict(), **top})


def assert_contains(parsed: dict[str, Any], written: dict[str, Any]) -> None:
    for key, value in written.items():
        if isinstance(value, dict):
            assert_contains(parsed[key], value)
        else:
            assert parsed[key] == value, key


@pytest.mark.parametrize("name", RECIPES)
def test_the_head_says_what_it_is_and_how_it_starts(name):
    first, *_ = head(name).splitlines()
    assert re.match(r"# [A-Z].*", first)
    assert value_of(name, "--out")
    if "tokenizer" in options(name):
        assert tokenizer_recipe(name) is not None


@pytest.mark.parametrize("name", SHRUNK)
def test_the_head_of_a_standard_run_says_where_it_comes_from(name):
    assert re.search(r"arXiv \d{4}\.\d{5}", part(name, "Source"))
    assert re.search(r"FID \d+\.\d+|not given", part(name, "Expected"))
    assert re.search(r"not given|\d+ (A100|V100)|\d+ GPUs", part(name, "Hardware"))
    assert "Computed: " in part(name, "Hardware") or preset_of(name)
    assert part(name, "Differs") and "# The full run was not done" in head(name)


@pytest.mark.parametrize("name", SHRUNK)
def test_the_global_batch_is_as_said(name):
    said = re.match(
        r"(\d+) = batch_size (\d+) x grad_accum_every (\d+) x (\d+) GPUs\..*grad_accum_every",
        part(name, "Global batch"),
    )
    assert said, "the head does not say how its global batch comes about, and what to do with fewer GPUs"
    total, batch_size, accumulation, gpus = map(int, said.groups())
    trainer = options(name).trainer
    assert (batch_size, accumulation) == (trainer.batch_size, trainer.grad_accum_every)
    assert total == batch_size * accumulation * gpus
    assert f"on {gpus} GPUs: the same behind `torchrun --nproc_per_node {gpus} -m`" in head(name)
    launcher = re.search(r"accelerate launch --config_file (\S+)(?: --num_processes (\d+))? -m`", head(name))
    config = yaml.safe_load((ROOT / launcher[1]).read_text())
    assert int(launcher[2] or config["num_processes"]) == gpus


def test_rates_and_schedules_are_what_the_sources_say():
    global_batch = {name: int(part(name, "Global batch").split()[0]) for name in SHRUNK}
    for name in ("imagenet_vqgan_f16_1024", "imagenet_vqgan_f16_16384"):
        assert options(name).trainer.lr == pytest.approx(4.5e-6 * global_batch[name])
    var = options("var_d16")
    assert var.trainer.lr == pytest.approx(1e-4 * global_batch["var_d16"] / 256)
    assert var.trainer.warmup_steps == pytest.approx(4 * TRAINING_IMAGES / global_batch["var_d16"], rel=0.01)
    assert var.model.dropout == pytest.approx(0.1 * var.model.depth / 24, rel=0.01)
    # SEED-Voken: a tenth after so many epochs
    for name, epochs in (("ibq_16384", [250, 300]), ("imagenet_lfq_2e18", [200, 250])):
        assert options(name).trainer.epochs > epochs[-1]
        for done, factor in ((epochs[0] - 1, 1.0), (epochs[0], 0.1), (epochs[1] - 1, 0.1), (epochs[1], 0.01)):
            rate = learning_rate(0, peak=1.0, schedule=schedule_of(name), warmup_steps=0, total_steps=10, epoch=done)
            assert rate == pytest.approx(factor), (name, done)
    dalle = options("dalle_dvae")
    assert dalle.model.kl_div_loss_weight == pytest.approx(6.6 / 192 * 2 * 0.1**2, rel=0.03)
    falling = {"start": dalle.trainer.starting_temp, "rate": dalle.trainer.anneal_rate, "lowest": 0}
    assert temperature(150_000, **falling) == pytest.approx(dalle.trainer.temp_min, rel=1e-3) == 1 / 16


def schedule_of(name: str) -> dict[str, Any]:
    given = options(name).trainer.lr_schedule
    return given if isinstance(given, dict) else given.as_dict()


def advice(name: str) -> list[str]:
    """Return the options that a head offers in passing, those that stand together as one."""
    text = re.sub(r"\n#\s+", " ", "\n".join(line for line in head(name).splitlines() if "vqdist" not in line))
    return re.findall(r"(?:--(?:data|model|trainer)\.[\w.]+ [\w.-]*\w ?)+", text)


@pytest.mark.parametrize("name", [name for name in SHRUNK if advice(name)])
def test_what_a_head_offers_is_possible(name):
    for given in advice(name):
        chosen = options(name, *given.split())
        assert chosen != options(name), given
        if model_of(name) == "vqgan":
            with torch.device("meta"):
                VQGanVAE(**chosen.model.as_dict())


# ------------------------------------------------------------------------------------------------------ whole models


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def whole_tokenizer(name: str) -> VQGanVAE:
    return VQGanVAE(**options(name).model.as_dict())


def counted(name: str) -> list[int]:
    """Parameters of the networks that a recipe trains, the generator's first."""
    chosen = options(name).model.as_dict()
    if model_of(name) in ("prior", "var"):
        tokenizer = Tokenizer(whole_tokenizer(tokenizer_recipe(name)), 256)
        return [parameters({"prior": Prior, "var": VAR}[model_of(name)](tokenizer, **chosen))]
    with torch.device("meta"):
        if model_of(name) == "dvae":
            return [parameters(DiscreteVAE(**chosen, image_size=options(name).data.image_size))]
        vae = VQGanVAE(**chosen)
    return [parameters(network) for network in (vae.autoencoder, vae.discriminator) if network is not None]


@pytest.mark.parametrize("name", SHRUNK)
def test_the_whole_model_has_as_many_parameters_as_said(name):
    said = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\d", part(name, "Parameters"))]
    assert counted(name) == said


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_as_many_parameters_as_the_published_file(name):
    shapes = json.loads((ROOT / "tests" / "data" / "parity" / "published" / f"{PUBLISHED[name]}.json").read_text())
    if name.endswith("_stage1"):
        shapes = {key: shape for key, shape in shapes.items() if not key.startswith("pixel_")}
    assert counted(name)[0] == sum(math.prod(shape) for key, shape in shapes.items() if key not in BUFFERS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_head_says_what_a_forward_pass_costs(name):
    """Of encoder and decoder, two operations a multiplication with its addition."""
    chosen = options(name)
    with torch.device("meta"), torch.no_grad():
        network = VQGanVAE(**{**chosen.model.as_dict(), "terms": None}).autoencoder
        image = torch.zeros(1, 3, chosen.data.image_size, chosen.data.image_size)
        with FlopCounterMode(display=False) as counter:
            network.decoder(network.encoder(image), **({"with_proxy": True} if network.gives_proxy else {}))
    said = re.search(r"Computed: (\d+\.\d+) TFLOP an image forward", part(name, "Hardware"))
    assert said and float(said[1]) == round(counter.get_total_flops() / 1e12, 2)


def test_every_recipe_of_a_preset_is_compared_with_the_published_file():
    assert {name for name in RECIPES if model_of(name) == "vqgan" and preset_of(name)} == PUBLISHED.keys()


def test_the_table_of_published_runs_is_that_of_the_files():
    rows = re.findall(
        r"^\| `(\w+)` \| .* \| (\d+\.\d) \| .*\|$", (ROOT / "docs" / "field.md").read_text(), re.MULTILINE
    )
    assert {name: float(millions) for name, millions in rows} == {
        name: round(counted(name)[0] / 1e6, 1) for name in PUBLISHED
    }


def test_weights_of_losses_are_those_of_images_from_minus_1_to_1():
    """Half the range halves an L1 loss and quarters an L2 loss; LPIPS takes images of either range."""
    of_1d_tokenizer = {
        "maskgit_vqgan": {"convnext_s": 0.1},
        "titok_bl64": {"lpips": 1.0, "convnext_s": 0.1},  # lpips-convnext_s-1.0-0.1, times 1.1
        "titok_l32_stage2": {"convnext_s": 0.1},
    }
    for name in PUBLISHED.keys() - {"titok_l32_stage1"}:
        pixels, *others = options(name).model.terms
        found = {term["class_path"]: (term.get("init_args") or {}).get("weight", 1.0) for term in others}
        assert found == of_1d_tokenizer.get(name, {"lpips": 1.0}), name
        kind, weight = pixels["init_args"]["kind"], pixels["init_args"].get("weight", 1.0)
        assert weight == (1.0 if name in of_1d_tokenizer else {"l1": 2.0, "l2": 4.0}[kind])  # which has [0, 1], too


def test_var_is_as_wide_as_its_depth_says_and_its_codes_as_vars():
    chosen = options("imagenet_multiscale_vq")
    with torch.device("meta"):
        quantizer = VQGanVAE(**chosen.model.as_dict()).quantizer
    assert (quantizer.dim, quantizer.codebook_size) == (32, 4096)
    assert sum(side**2 for side in quantizer.scales) == 680
    assert chosen.data.image_size == 16 * quantizer.scales[-1]


# ------------------------------------------------------------------------------------------------------ two steps

# A tokenizer, a prior over it, a published run and one of two stages. The others differ in options, which are read on
# every push.
ON_PUSH = ("digits_vqgan", "digits_prior", "llamagen_vq16", "titok_l32_stage1", "titok_l32_stage2")


def nightly(names: Iterable[str]) -> list:
    return [name if name in ON_PUSH else pytest.param(name, marks=pytest.mark.nightly) for name in names]


@pytest.fixture(scope="module")
def vgg16_file(tmp_path_factory) -> str:
    """VGG16 with random weights: nothing is downloaded."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    with torch.device("meta"):  # its classifier would take seconds
        shapes = {name: value.shape for name, value in vgg16(weights=None).features.state_dict().items()}
    weights = {name: torch.randn(shape) * (2 / shape[1:].numel()) ** 0.5 for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("vgg16") / "vgg16.pth"
    torch.save({f"features.{name}": value for name, value in weights.items()}, path)
    return str(path)


@pytest.fixture(scope="module")
def target_file(tmp_path_factory) -> str:
    """Write a MaskGIT-VQGAN as the project does, with 4 x 4 codes for 32 pixels."""
    torch.manual_seed(0)
    model = VQGanVAE(
        encoder={"class_path": "maskgit", "init_args": {**TARGET, "z_channels": 8}},
        decoder={"class_path": "maskgit", "init_args": TARGET},
        quantizer={"class_path": "gradient_vq", "init_args": {"codebook_size": 12, "codebook_loss": "legacy"}},
        use_vgg_and_gan=False,
    )
    path = tmp_path_factory.mktemp("target") / "maskgit.bin"
    write_published(model, "maskgit", path)
    return str(path)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, vgg16_file, target_file) -> Callable[[str], tuple[Path, str]]:
    """Trains a recipe for two steps, over the run of its tokenizer's; the run folder, and what was printed."""
    runs: dict[str, tuple[Path, str]] = {}

    def train(name: str) -> tuple[Path, str]:
        if name not in runs:
            out = tmp_path_factory.mktemp("runs") / name
            runs[name] = out, printed_by(["train", *arguments_of_the_run(name, out)])
        return runs[name]

    def arguments_of_the_run(name: str, out: Path) -> list[str]:
        given = ["synthetic" if word.startswith("FOLDER") else word for word in arguments(name)]
        given[given.index("--config") + 1] = str(RECIPES[name])
        given[given.index("--out") + 1] = str(out)
        if "--tokenizer" in given:
            given[given.index("--tokenizer") + 1] = str(train(tokenizer_recipe(name))[0])
        if "--init_from" in given:
            given[given.index("--init_from") + 1] = str(train(recipe_of(value_of(name, "--init_from")))[0])
        short = "--trainer.num_train_steps 2 --trainer.epochs null --data.num_workers 0"
        more = f"{EVERY_SHRUNK} {SHRUNK[name]}" if name in SHRUNK else f"{short} {OTHER_DATA.get(name, '')}"
        return [*given, *shlex.split(more.replace("VGG16", vgg16_file).replace("TARGET", target_file))]

    train.arguments = arguments_of_the_run  # type: ignore[attr-defined]
    return train


def printed_by(command: list[str]) -> str:
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main(command)
    assert code == 0, errors.getvalue()[-3000:]
    return out.getvalue()


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", nightly(RECIPES))
def test_recipe_trains(name, run_of):
    """By the line in its head, on images that are here, over a tokenizer that was trained for two steps."""
    run, printed = run_of(name)
    assert "2 steps on local" in printed
    numbers = [value for line in lines_of(run) for value in line.values() if isinstance(value, float)]
    assert numbers and all(map(math.isfinite, numbers))
    assert (run / "export" / "config.json").is_file()


@pytest.mark.nightly
@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SHRUNK)
def test_a_shrunken_run_on_two_ranks(name, run_of, tmp_path):
    """The ranks are compared at the end: weights, averages and codebooks are equal, and the export is whole."""
    run_of(name)  # it, and what it begins with
    command = [*run_of.arguments(name, tmp_path / "run"), "--trainer.check_ranks_every", "2"]
    done = torchrun(["-m", "vqdist", "train", *command], timeout=500)
    assert "2 steps on accelerate" in done.stdout
    numbers = [value for line in lines_of(tmp_path / "run") for value in line.values() if isinstance(value, float)]
    assert numbers and all(map(math.isfinite, numbers))
    exported = load_file(tmp_path / "run" / "export" / "model.safetensors")
    alone = load_file(run_of(name)[0] / "export" / "model.safetensors")
    assert {key: one.shape for key, one in exported.items()} == {key: one.shape for key, one in alone.items()}


@pytest.mark.parametrize("name", nightly(SHRUNK))
def test_a_shrunken_run_has_all_that_the_whole_one_has(name, run_of):
    run, _ = run_of(name)
    logged = set().union(*lines_of(run))
    expected = FIRST_STAGE
    if not name.endswith("_stage1"):
        adaptive = {"adaptive_weight"} if options(name).trainer.get("adaptive_weight") else set()
        expected = LOGGED[model_of(name)] | adaptive
    assert expected <= logged, expected - logged
    shrunk = {"model.preset", *re.findall(r"--([\w.]+)", f"{EVERY_SHRUNK} {SHRUNK[name]}")}
    used = json.loads((run / "config.json").read_text())
    for option, value in leaves(yaml.safe_load(RECIPES[name].read_text())):
        if option not in shrunk and not option.startswith("data."):
            assert value in under(used, option.rpartition(".")[2]), f"{option} {value} did not reach the run"


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of what a file says."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def under(tree: Any, key: str) -> list[Any]:
    """All values under a key, at any depth."""
    if not isinstance(tree, dict):
        return []
    deeper = [found for value in tree.values() for found in under(value, key)]
    return [value for name, value in tree.items() if name == key] + deeper


def test_a_data_folder_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = arguments("llamagen_vq16")
    given[given.index("--config") + 1] = str(RECIPES["llamagen_vq16"])
    assert main(["train", *given, *shlex.split(SHRUNK["llamagen_vq16"]), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "imagenet/train" in error
