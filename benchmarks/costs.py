"""docs/costs.md: per recipe parameters, floating-point operations, memory and GPU hours, by a rule and not by a clock.

    python -m benchmarks.costs

Networks are built on torch's meta device and counted there, so that no number of the page depends on the machine.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.worker import count_parameters
from vqdist import VAR, DiscreteVAE, Prior, Tokenizer, VQGanVAE
from vqdist.cli.train import train_options
from vqdist.models.presets import PRESETS
from vqdist.models.vq_ar import VQImageAutoregressiveAutoencoder

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {path.stem: path for path in sorted((ROOT / "launch" / "recipes").glob("*.yaml"))}
PAGE = ROOT / "docs" / "costs.md"
PEAK = {"bf16": 312e12, "fp32": 156e12}  # of an A100, a second: bfloat16, and TF32
USED = 0.3  # share of the peak that is assumed
STATED = {  # by the authors, in papers, READMEs and configurations: parameters, and how they trained
    "imagenet_vqgan_f16_1024": ("72.1 M", "batch 12 a GPU"),
    "imagenet_vqgan_f16_16384": ("76.1 M", "batch 12 a GPU"),
    "ldm_vq_f8": ("67.7 M", None),
    "llamagen_vq16": ("71.9 M", "batch 128, 40 epochs"),
    "llamagen_b_prior": ("110.9 M", "batch 256, 300 epochs"),
    "imagenet_multiscale_vq": ("108.9 M", None),
    "var_d16": ("310 M", "batch 768, 200 epochs"),
    "ibq_16384": ("111 M", "batch 4 x 64 GPUs, 330 epochs"),
    "imagenet_lfq_2e18": (None, "batch 8 x 32 GPUs, 270 epochs"),
    "maskgit_vqgan": ("54.5 M", None),
    "titok_l32_stage1": (None, "batch 32 x 8 GPUs, 1,000,000 steps"),
    "titok_l32_stage2": (None, "500,000 steps"),
}


@dataclass
class Pass:
    """One forward pass of a network for one image.

    Attributes:
        flops: floating-point operations, two a multiplication with its addition.
        saved: bytes that the backward pass needs of it, in float32.
    """

    flops: float = 0.0
    saved: float = 0.0

    def __add__(self, other: Pass) -> Pass:
        return Pass(self.flops + other.flops, self.saved + other.saved)


@dataclass
class Cost:
    """A recipe's costs.

    Attributes:
        parameters: of the networks that are trained, the generator's first.
        flops: of the training of one image: forward, backward and all networks.
        bytes_per_gpu: of weights, gradients, Adam, the average and what is saved for the backward pass.
        images: of the whole run; None where the recipe does not say the size of its data.
        hours: A100 hours of all GPUs together.
    """

    parameters: list[int]
    flops: float
    bytes_per_gpu: float
    images: float | None
    hours: float | None


def head(name: str) -> str:
    """Return the comments that a recipe begins with, each paragraph as one line."""
    lines = RECIPES[name].read_text(encoding="utf-8").splitlines()
    text = "\n".join(lines[: next(place for place, line in enumerate(lines) if not line.startswith("#"))])
    return re.sub(r"\n#   +", " ", text)


def options_of(name: str) -> tuple[str, Any]:
    """Return the model that a recipe trains, and its options as the command line reads them."""
    line = re.search(
        rf"vqdist train (\w+ .*?launch/recipes/{name}\.yaml.*?)(?: {{2,}}|$| on \d| or | from )", head(name), re.M
    )
    if line is None:
        raise ValueError(f"the head of {name} has no line that starts it")
    model, *rest = shlex.split(line[1])
    rest[rest.index("--config") + 1] = str(RECIPES[name])
    return model, train_options(model, rest)


# --------------------------------------------------------------------------------------- counting


def passed(call: Callable[..., Any], *inputs: Tensor, training: bool = True) -> Pass:
    """Count one call on meta tensors.

    Args:
        call: a network, or a function of networks.
        *inputs: tensors on the meta device, of one image.
        training: whether a backward pass is to come.
    """
    kept: dict[int, int] = {}
    weights = {
        weight.untyped_storage()._cdata
        for module in _modules(call)
        for weight in (*module.parameters(), *module.buffers())
    }

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training), hooks:
        out = call(*inputs)
    del out
    return Pass(counter.get_total_flops(), sum(kept.values()))


def passed_as_fake(network: nn.Module, *inputs: Tensor) -> Pass:
    """Count one call of a network that the meta device cannot run, by tensors that only pretend to be on a CPU.

    There weights count as saved, too: those of one image are the difference between two images and one.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        one, two = (
            passed(network, *(mode.from_tensor(given.repeat(times, *[1] * (given.ndim - 1))) for given in inputs))
            for times in (1, 2)
        )
    return Pass(one.flops, two.saved - one.saved)


def _modules(call: Any) -> list[nn.Module]:
    found = [
        call,
        getattr(call, "__self__", None),
        *(cell.cell_contents for cell in getattr(call, "__closure__", None) or ()),
    ]
    return [one for one in found if isinstance(one, nn.Module)]


def image_of(size: int, channels: int = 3) -> Tensor:
    """Return an image of a size on the meta device."""
    return torch.zeros(1, channels, size, size, device="meta")


def perceptual_passes(terms: list[dict[str, Any]], size: int) -> tuple[Pass, Pass, int]:
    """Return one pass of all perceptual networks, one of a network that only looks at the images, and their size."""
    compared, looked, parameters = Pass(), Pass(), 0
    for term in terms:
        with torch.device("meta"):
            if term["class_path"] == "lpips":
                network: nn.Module = torchvision.models.vgg16(weights=None).features[:30]
                compared += passed(network, image_of(size).requires_grad_())
            elif term["class_path"] == "convnext_s":
                network = torchvision.models.convnext_small(weights=None).eval()
                compared += passed(network, image_of(224).requires_grad_())
            elif term["class_path"] == "proxy_codes":
                network = VQGanVAE(preset="maskgit_vqgan_f16_1024", use_vgg_and_gan=False).autoencoder.encoder
                looked += passed(network, image_of(size), training=False)
            else:
                continue
        parameters += count_parameters([network])
    return compared, looked, parameters


def cost_of_vqgan(name: str, chosen: Any) -> tuple[list[int], float, float, int]:
    """Return parameters, operations of an image, saved bytes of an image, and weights that are not trained."""
    size, trainer = chosen.data.image_size, chosen.trainer
    arguments = chosen.model.as_dict()
    terms = [term if isinstance(term, dict) else {"class_path": term} for term in arguments["terms"] or []]
    if not terms and arguments["perceptual"] not in (None, "none"):
        terms = [{"class_path": "lpips"}]
    with torch.device("meta"):
        vae = VQGanVAE(**{**arguments, "terms": None})
    network, critic = vae.autoencoder, vae.discriminator
    image = image_of(size, arguments["channels"])
    encoded = passed(network.encoder, image)
    with torch.no_grad():
        features = network.encoder(image)
    proxy = {"with_proxy": True} if network.gives_proxy else {}
    decoder = network.decoder
    decoded = passed(lambda given: decoder(given, **proxy), features.requires_grad_())
    compared, looked, other = perceptual_passes(terms, size)
    is_frozen = "encoder" in (trainer.freeze or [])
    flops = (1 if is_frozen else 3) * encoded.flops + 3 * decoded.flops + 3 * compared.flops + looked.flops
    saved = (0 if is_frozen else encoded.saved) + decoded.saved + compared.saved
    parameters = [count_parameters([network])]
    if critic is not None:
        judged = passed(critic, image_of(size, arguments["channels"]).requires_grad_())
        steps = steps_of(name, chosen)
        share = 1.0 if not steps else max(0.0, 1 - (trainer.discriminator_start or 0) / steps)
        flops += 8 * judged.flops * share
        saved += 2 * judged.saved
        parameters.append(count_parameters([critic]))
    return parameters, flops, saved, other


def cost_of_codes(model: str, chosen: Any, name: str) -> tuple[list[int], float, float, int]:
    """Return the same of a model of stored codes."""
    tokenizer = re.search(r"--tokenizer \S*?/(\w+)", head(name))
    made_by = next(one for one in RECIPES if tokenizer and re.search(rf"--out runs/{tokenizer[1]}\b", head(one)))
    _, of_tokenizer = options_of(made_by)
    vae = VQGanVAE(
        **{
            **of_tokenizer.model.as_dict(),
            "use_vgg_and_gan": False,
            "terms": None,
            "discriminator": None,
            "discr_loss": None,
            "gen_loss": None,
        }
    )
    for buffer_name, buffer in vae.named_buffers():
        if buffer_name.endswith("initted"):  # k-means starts have no codes before the first batch
            buffer.fill_(True)
    held = Tokenizer(vae, of_tokenizer.data.image_size)
    generator: Any = {"prior": Prior, "var": VAR}[model](held, **chosen.model.as_dict())
    codes = torch.zeros(1, generator.num_codes, dtype=torch.long)
    found = passed_as_fake(generator.eval(), *generator.inputs(codes, torch.zeros(1, dtype=torch.long)))
    return [count_parameters([generator])], 3 * found.flops, found.saved, 0


def cost_of_other(model: str, chosen: Any) -> tuple[list[int], float, float, int]:
    """Return the same of a discrete VAE or an end-to-end model."""
    arguments = {**chosen.model.as_dict(), "image_size": chosen.data.image_size}
    build: Any = DiscreteVAE if model == "dvae" else VQImageAutoregressiveAutoencoder
    network = build(**arguments)
    image = torch.zeros(1, arguments["channels"], chosen.data.image_size, chosen.data.image_size)
    if model == "vq_ar":
        with torch.no_grad():
            features = network.encoder(image)
        row = features.flatten(2).transpose(1, 2).requires_grad_()
        halves = passed_as_fake(network.encoder, image) + passed_as_fake(Predicts(network), row)
        decoded = passed_as_fake(network.decoder, features.requires_grad_())  # of the codes, and of those predicted
        found = halves + decoded + decoded
    else:
        found = passed_as_fake(network, image)
    return [count_parameters([network])], 3 * found.flops, found.saved, 0


class Predicts(nn.Module):
    """The transformer of an end-to-end model."""

    def __init__(self, model: VQImageAutoregressiveAutoencoder):
        super().__init__()
        self.model = model

    def forward(self, row: Tensor) -> Any:
        """Return what it predicts of codes (b, n, d)."""
        return self.model.predict(row[:, :-1])


def images_in(name: str, chosen: Any) -> float | None:
    """Return the images to train on, as the recipe says how many there are; None where it does not."""
    said = re.search(r"^ *folder:.*?#.*?(\d[\d,]*) (?:MNIST )?images", RECIPES[name].read_text(encoding="utf-8"), re.M)
    return None if said is None else int(said[1].replace(",", "")) * (1 - chosen.data.valid_frac)


def global_batch(name: str, chosen: Any) -> int:
    """Return the images of a step over all GPUs, as the recipe's head says it; one process where it does not."""
    said = re.search(r"Global batch: ([\d,]+) =", head(name))
    return int(said[1].replace(",", "")) if said else chosen.trainer.batch_size * chosen.trainer.grad_accum_every


def steps_of(name: str, chosen: Any) -> float | None:
    """Return the steps of the whole run; None where nobody can say."""
    if chosen.trainer.epochs is None:
        return chosen.trainer.num_train_steps
    images = images_in(name, chosen)
    return None if images is None else chosen.trainer.epochs * images / global_batch(name, chosen)


def cost_of(name: str) -> Cost:
    """Return the costs of a recipe."""
    model, chosen = options_of(name)
    if model == "vqgan":
        parameters, flops, saved, other = cost_of_vqgan(name, chosen)
    elif model in ("prior", "var"):
        parameters, flops, saved, other = cost_of_codes(model, chosen, name)
    else:
        parameters, flops, saved, other = cost_of_other(model, chosen)
    halved = 0.5 if chosen.trainer.precision == "bf16" else 1.0
    averaged = 4 * parameters[0] if chosen.trainer.use_ema else 0
    states = 16 * sum(parameters) + averaged + 4 * other
    steps = steps_of(name, chosen)
    images = None if steps is None else steps * global_batch(name, chosen)
    peak = PEAK["bf16" if chosen.trainer.precision == "bf16" else "fp32"]
    hours = None if images is None else images * flops / (USED * peak) / 3600
    return Cost(parameters, flops, states + chosen.trainer.batch_size * saved * halved, images, hours)


# --------------------------------------------------------------------------------------- the page


def authors_hardware(name: str) -> str:
    """Return what the recipe's head says of the authors' machines, or "not stated"."""
    said = re.search(r"Hardware: (.*?)(?: Computed: |\n|$)", head(name))
    text = said[1].strip().rstrip(".") if said else "not given"
    return "not stated" if text.startswith("not given") else text


def row(name: str) -> str:
    """Return a recipe's line of the table."""
    cost = cost_of(name)
    size, training = STATED.get(name, (None, None))
    cells = [
        f"`{name}`",
        " + ".join(f"{count / 1e6:.1f}" for count in cost.parameters),
        f"{cost.flops / 1e12:.3g}",
        f"{cost.bytes_per_gpu / 2**30:.1f}",
        "?" if cost.images is None else f"{cost.images / 1e6:.3g}",
        "?" if cost.hours is None else f"{cost.hours:,.0f}" if cost.hours >= 1 else f"{cost.hours:.1g}",
        size or "not stated",
        training or "not stated",
        authors_hardware(name),
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| recipe | parameters, M | TFLOP an image | GiB a GPU | M images | A100 hours | the authors: parameters | "
    "their training | their machines |"
)


def page() -> str:
    """Return docs/costs.md."""
    rows = "\n".join(row(name) for name in RECIPES)
    return f"""# Costs of the recipes

Nothing on this page was measured on a GPU. `make costs` counts it, by the rule below, and writes the page.

{HEAD}
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

`?` stands where the recipe does not say how many images its data has. "Not stated" means that the paper, the README
and the configuration that the recipe was made from do not say it, or that nobody looked it up.

## The rule

- **Parameters**: of the network that is trained, and behind the plus sign those of its discriminator.
- **TFLOP an image**: torch's counter on one forward pass, two operations a multiplication with its addition. A network
  that is trained costs three forward passes, a frozen encoder one. A perceptual network costs three: the
  reconstruction, the image, and the way back to the reconstruction. A discriminator costs eight from the step at which
  it joins: forward and backward of both halves, and the generator's way through it. Models of codes are counted on
  stored codes. Lookup of codes, entropies, gradient penalties and the optimizer are not counted.
- **GiB a GPU**: weights, gradients and Adam's two moments in float32 (16 bytes a parameter), four bytes more for an
  average, and the tensors that autograd keeps for the backward pass of a GPU's batch; with `precision: bf16` half of
  the latter. Masks of dropout, workspaces, fragments and a tokenizer are not in it. Nothing is sharded: ZeRO and FSDP2
  take less.
- **A100 hours**: images times operations, over {USED:.0%} of the peak of {PEAK["bf16"] / 1e12:.0f} TFLOP/s (with
  `precision: fp32` of {PEAK["fp32"] / 1e12:.0f}, TF32). That share is an assumption, the same for all. Of the two runs
  whose authors state their time, the prior agrees with it, and LlamaGen's tokenizer took nearly twice as long.
  Validation, pictures and reading of images come on top.
- **The authors**: their papers, READMEs and configurations, as the heads of the recipes name them.
"""


def main() -> None:
    """Write the page."""
    assert set(STATED) <= set(RECIPES) and PRESETS
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
