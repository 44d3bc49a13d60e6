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
from launching import ROOT
from torch import nn

from vqdist import VAR, DiscreteVAE, Prior, Tokenizer, VQGanVAE
from vqdist.cli import main
from vqdist.cli.models import MODELS
from vqdist.cli.train import TOP_LEVEL, train_options
from vqdist.models.quantizers import build_quantizer
from vqdist.schedules import temperature
from vqdist.trainers.config import build_config

RECIPES = {path.stem: path for path in sorted((ROOT / "launch" / "recipes").glob("*.yaml"))}

TRAINING_IMAGES = 1_281_167 - 12_812  # of ImageNet, without those held back

# What makes a whole recipe a run of a second; no mechanism is turned off but, in all but one, VGG16.
NO_VGG = "--model.perceptual none"
SMALL_VQGAN = "--image_size 32 --model.dim 16 --model.codebook_size 32 --trainer.batch_size 2"
ONE_BLOCK = "--model.encdec_num_resnet_blocks [1,1,1,1]"
JOINS = "--trainer.discriminator_start 0"
FEW_SAMPLES = "--trainer.batch_size 4 --trainer.num_images_save 4"
SHRUNK = {
    "imagenet_vqgan_f16_1024": f"{SMALL_VQGAN} {ONE_BLOCK} --model.vq_kwargs.codebook_dim 8 {JOINS} {NO_VGG}",
    "imagenet_vqgan_f16_16384": f"{SMALL_VQGAN} {ONE_BLOCK} --model.vq_kwargs.codebook_dim 8 {NO_VGG}",
    "llamagen_vq16": f"{SMALL_VQGAN} {ONE_BLOCK} --model.vq_kwargs.codebook_dim 4 {JOINS} --model.perceptual VGG16",
    "imagenet_lfq_2e18": f"{SMALL_VQGAN} {ONE_BLOCK} {NO_VGG}",
    "imagenet_multiscale_vq": (
        f"{SMALL_VQGAN} {ONE_BLOCK} --image_size 64 --model.encdec_layer_mults [1,2,4,1] "
        f"--model.quantizer_kwargs.v_patch_nums [1,2,3,4] {JOINS} {NO_VGG}"
    ),
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

# numbers that only a run with the mechanism on has
LOGGED = {
    "vqgan": {"recon_loss", "aux_loss", "adversarial_loss", "discr_loss", "discriminator_grad_norm"},
    "dvae": {"recon_loss", "kl_loss", "kl_weight", "temperature"},
    "prior": {"loss", "accuracy"},
    "var": {"loss", "nll_scale_4"},
}


def head(name: str) -> str:
    """The comments that a recipe begins with."""
    lines = RECIPES[name].read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def arguments(name: str) -> list[str]:
    """What follows `vqdist train` in the line of the head that starts this recipe."""
    line = re.search(rf"^#   vqdist train (.* launch/recipes/{name}\.yaml .*)$", head(name), re.MULTILINE)
    assert line, f"the head of {name} has no line that starts it"
    return shlex.split(line[1])


def model_of(name: str) -> str:
    return arguments(name)[0]


@functools.cache
def options(name: str, *more: str):
    """The recipe as the command line reads it, with further arguments."""
    model, *rest = arguments(name)
    rest[rest.index("--config") + 1] = str(RECIPES[name])
    return train_options(model, [*rest, *more])


def value_of(name: str, flag: str) -> str | None:
    given = arguments(name)
    return given[given.index(flag) + 1] if flag in given else None


def tokenizer_recipe(name: str) -> str | None:
    """The recipe of the tokenizer that this recipe's line is over."""
    run = value_of(name, "--tokenizer")
    return None if run is None else next(other for other in RECIPES if value_of(other, "--out") == run)


def part(name: str, title: str) -> str:
    """A paragraph of a head, on one line: what follows `# Title: ` up to the next."""
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
    assert "Computed: " in part(name, "Hardware")
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
    dalle = options("dalle_dvae")
    assert dalle.model.kl_div_loss_weight == pytest.approx(6.6 / 192 * 2 * 0.1**2, rel=0.03)
    falling = {"start": dalle.trainer.starting_temp, "rate": dalle.trainer.anneal_rate, "lowest": 0}
    assert temperature(150_000, **falling) == pytest.approx(dalle.trainer.temp_min, rel=1e-3) == 1 / 16


def test_codes_are_replaced_only_far_below_their_mean_use():
    """At the mean, half of the codes are below it at any time."""
    for name, codes_an_image in (("llamagen_vq16", 256), ("imagenet_multiscale_vq", 680)):
        chosen = options(name)
        gpus = int(re.search(r"x (\d+) GPUs", part(name, "Global batch"))[1])
        mean = chosen.trainer.batch_size * gpus * codes_an_image / chosen.model.codebook_size
        threshold = under(chosen.model.as_dict(), "threshold_ema_dead_code")[0]
        assert threshold <= 0.1 * mean and f"has {mean:.0f} on average" in RECIPES[name].read_text()


def advice(name: str) -> list[str]:
    """The options that a head offers in passing, those that stand together as one."""
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
    return [parameters(vae.autoencoder), parameters(vae.discriminator)]


@pytest.mark.parametrize("name", SHRUNK)
def test_the_whole_model_has_as_many_parameters_as_said(name):
    said = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\d", part(name, "Parameters"))]
    assert counted(name) == said


def test_var_is_as_wide_as_its_depth_says_and_its_codes_as_vars():
    chosen = options("imagenet_multiscale_vq")
    with torch.device("meta"):
        quantizer = VQGanVAE(**chosen.model.as_dict()).quantizer
    assert (quantizer.dim, quantizer.codebook_size) == (32, 4096)
    assert sum(side**2 for side in quantizer.scales) == 680
    assert chosen.data.image_size == 16 * quantizer.scales[-1]


def test_the_memory_of_2_to_the_18_codes_is_as_said():
    """What autograd keeps of the entropy loss, by pairs of a position and a code; and the two ways to less of it."""
    said = part("imagenet_lfq_2e18", "Memory")
    bytes_a_pair = int(re.search(r"(\d+) bytes for each pair", said)[1])
    codes, chosen = 2**18, options("imagenet_lfq_2e18")
    an_image = bytes_a_pair * codes * (chosen.data.image_size // 16) ** 2
    assert f"{an_image / 1e9:.1f} GB an image" in said
    assert f"{an_image * chosen.trainer.batch_size / 1e9:.0f} GB for a batch of {chosen.trainer.batch_size}" in said

    whole = bytes_kept_of_lfq(2**12)  # fewer codes, but as many bytes for each pair
    assert 12 < whole / (4 * 64 * 2**12) < bytes_a_pair
    assert bytes_kept_of_lfq(2**12, frac_per_sample_entropy=0.25) < 0.5 * whole
    assert bytes_kept_of_lfq(2**6, num_codebooks=2) < 0.2 * whole


def bytes_kept_of_lfq(codebook_size: int, **changes: Any) -> int:
    """Bytes that the recipe's quantizer keeps of four maps of 8 x 8 features."""
    chosen = {**options("imagenet_lfq_2e18").model.lfq_kwargs, **changes}
    quantizer = build_quantizer("lfq", dim=16, codebook_size=codebook_size, **chosen).train()
    return bytes_kept(lambda: quantizer(torch.rand(4, 16, 8, 8, requires_grad=True)))


def bytes_kept(forward: Callable[[], Any]) -> int:
    """Bytes of the tensors that a forward pass keeps for its backward pass."""
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()  # kept until the sum is taken: freed memory would be counted once for two tensors
    del result
    return sum(storages.values())


# ------------------------------------------------------------------------------------------------------ two steps

# A tokenizer and a prior over it; the others differ in options, which are read on every push.
ON_PUSH = ("digits_vqgan", "digits_prior")


def nightly(names: Iterable[str]) -> list:
    return [name if name in ON_PUSH else pytest.param(name, marks=pytest.mark.nightly) for name in names]


@pytest.fixture(scope="module")
def vgg16_file(tmp_path_factory) -> str:
    """VGG16 with random weights: nothing is downloaded."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg16") / "vgg16.pth"
    torch.save({f"features.{key}": value for key, value in vgg16(weights=None).features.state_dict().items()}, path)
    return str(path)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, vgg16_file) -> Callable[[str], tuple[Path, str]]:
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
        short = "--trainer.num_train_steps 2 --trainer.epochs null --data.num_workers 0"
        more = f"{EVERY_SHRUNK} {SHRUNK[name]}" if name in SHRUNK else f"{short} {OTHER_DATA.get(name, '')}"
        return [*given, *shlex.split(more.replace("VGG16", vgg16_file))]

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


@pytest.mark.parametrize("name", nightly(SHRUNK))
def test_a_shrunken_run_has_all_that_the_whole_one_has(name, run_of):
    run, _ = run_of(name)
    logged = set().union(*lines_of(run))
    expected = LOGGED[model_of(name)] | ({"perceptual_loss"} if name == "llamagen_vq16" else set())
    expected = expected | ({"adaptive_weight"} if options(name).trainer.get("adaptive_weight") else set())
    assert expected <= logged, expected - logged
    shrunk = set(re.findall(r"--([\w.]+)", f"{EVERY_SHRUNK} {SHRUNK[name]}"))
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
    assert main(["train", *given, *shlex.split(SHRUNK["llamagen_vq16"]), "--model.perceptual", "none"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "imagenet/train" in error
