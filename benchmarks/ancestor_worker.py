"""One side of the comparison with muse-maskgit-pytorch: trains when told to, and says how long it took.

usage: ancestor_worker.py OPTIONS, where OPTIONS is JSON: {"side": "ancestor" | "vqdist", "images": FOLDER, "runs":
FOLDER, "vgg": "none" | "vgg16", "model": {...}, "trainer": {...}, "threads": N}

Each line of standard input is a number of steps; each is answered by one line of JSON. Runs in either environment, so
it imports neither vqdist nor this package before it knows its side.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

import torch
import torchvision
from torch import nn

VGG16 = torchvision.models.vgg16


def random_vgg16(**_options) -> nn.Module:
    """torchvision's VGG16 with random weights: the same arithmetic, and nothing to download."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return VGG16(weights=None)


def ancestor_step(options: dict) -> Callable[[], object]:
    """A step of muse-maskgit-pytorch's trainer, with every option that costs time at its default."""
    from muse_maskgit_pytorch import VQGanVAE, VQGanVAETrainer

    # It makes its VGG16 in the first forward, after optimizer and EMA, unless it is given one. Given one, it would
    # also train it and average it: that is not its default, so the constructor is what is replaced.
    torchvision.models.vgg16 = random_vgg16
    vgg = None if options["vgg"] == "vgg16" else nn.Identity()
    vae = VQGanVAE(**options["model"], vgg=vgg)
    report_sizes([vae.enc_dec, vae.quantizer], vae.discr)
    never = 10**9  # it saves at step 0 whatever it is told; the warm-up takes that step
    saving = {"save_results_every": never, "save_model_every": never}
    trainer = VQGanVAETrainer(
        vae, folder=options["images"], results_folder=options["runs"], **saving, **options["trainer"]
    )
    return trainer.train_step


def vqdist_step(options: dict) -> Callable[[], object]:
    """A step of vqdist's trainer, with every option that costs time at its default."""
    from benchmarks.common import ONLY_STEPS
    from vqdist import VQGanVAE, VQGanVAETrainer

    vgg = nn.Identity()
    if options["vgg"] == "vgg16":
        vgg = random_vgg16()
        vgg.classifier = nn.Sequential(*vgg.classifier[:-2])  # as the ancestor cuts it
    vae = VQGanVAE(**options["model"], vgg=vgg)
    report_sizes([vae.autoencoder], vae.discriminator)
    trainer = VQGanVAETrainer(
        vae, folder=options["images"], results_folder=options["runs"], **ONLY_STEPS, **options["trainer"]
    )
    return trainer.train_step


def report_sizes(generator: list[nn.Module], discriminator: nn.Module) -> None:
    """First line: parameters of both players, to show that the networks are the same."""
    sizes = [sum(p.numel() for m in modules for p in m.parameters()) for modules in (generator, [discriminator])]
    print(json.dumps(dict(zip(("generator", "discriminator"), sizes))), file=ANSWERS, flush=True)


def main() -> None:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["threads"])
    step = (ancestor_step if options["side"] == "ancestor" else vqdist_step)(options)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            step()
        answer = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(answer), file=ANSWERS, flush=True)
    os._exit(0)  # loader workers need no goodbye


if __name__ == "__main__":
    # both trainers print as they go; the answers keep the real standard output
    ANSWERS = os.fdopen(os.dup(1), "w")
    sys.stdout = open(os.devnull, "w")
    main()
