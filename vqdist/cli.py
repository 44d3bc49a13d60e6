"""The `vqdist` command. What an option means is written once: at the configuration or the model it belongs to."""

from __future__ import annotations

import difflib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vqdist.errors import RanksDiverged, UserError
from vqdist.files import read_json
from vqdist.version import __version__

# short names of the options that every run has
ALIASES = {
    "--data": "--data.folder",
    "--image_size": "--data.image_size",
    "--on_bad_image": "--data.on_bad_image",
}
# options of the trainer's configuration that stand at the top level, and their name there
TOP_LEVEL = {
    "results_folder": "out",
    "backend": "backend",
    "deepspeed_config": "deepspeed_config",
    "seed": "seed",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code: 0, or 2 with one line on standard error for a user's mistake."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # `deepspeed` hands each process its rank as an argument as well as in the environment
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank=")]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"vqdist {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    try:
        return _command(name)(rest)
    except (UserError, RanksDiverged) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print(
            "vqdist: interrupted; the same command resumes from the newest checkpoint, if there is one",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:  # whoever read standard output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that may not be read: the system's words name it
        return _fail(str(error))


def _overview() -> str:
    lines = "\n".join(f"  {name:<12} {command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items())
    return (
        "usage: vqdist COMMAND [options]\n\nDistributed training of image tokenizers.\n\ncommands:\n"
        f"{lines}\n\n`vqdist COMMAND --help` explains a command; `vqdist --version` prints the version."
    )


def _command(name: str) -> Callable[[list[str]], int]:
    if name not in COMMANDS:
        raise UserError(f"there is no command {name!r}; {_nearest(name, COMMANDS)}, see `vqdist --help`")
    return COMMANDS[name]


def _nearest(name: str, known: Any) -> str:
    """The known names that are most like this one, also by their last part: `lr` is near `trainer.lr`."""
    known = [option for option in known if option != "help"]
    ends = {option.rpartition(".")[2]: option for option in known}
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    close += [ends[end] for end in difflib.get_close_matches(name.rpartition(".")[2], ends, n=3, cutoff=0.6)]
    if close:
        return f"nearest: {', '.join(dict.fromkeys(close))}"
    return f"known: {', '.join(known)}" if len(known) < 10 else "see --help"


def _fail(message: str) -> int:
    from vqdist.backends.environment import rank_of_launcher

    rank = rank_of_launcher()
    # before the ranks know of each other all make the same mistake and one says it; later it is this one's own
    if rank == 0:
        print(f"vqdist: error: {message}", file=sys.stderr)
    elif _in_process_group():
        print(f"vqdist: error: rank {rank}: {message}", file=sys.stderr)
    else:
        time.sleep(2)  # a launcher ends the others when one exits: rank 0 first says what is wrong
    return 2


def _in_process_group() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


# ----------------------------------------------------------------------------------------- train


def train(arguments: list[str]) -> int:
    """Train a model: `vqdist train vqgan --data DIR --image_size 64 --out RUN`; again to resume."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: vqdist train MODEL [options]\n\nmodels:\n  vqgan        VQGAN image tokenizer\n\n`vqdist train "
              "MODEL --help` lists its options.")  # fmt: skip
        return 0
    if arguments[0] != "vqgan":
        raise UserError(f"there is no model {arguments[0]!r} to train; {_nearest(arguments[0], ['vqgan'])}")
    options = _parse(train_parser(), arguments[1:])
    return _train_vqgan(options)


def train_parser():
    """The options of `vqdist train vqgan`, derived from `VQGanVAE` and `VQGanTrainerConfig`."""
    import dataclasses
    from argparse import SUPPRESS

    from vqdist.data.config import DataConfig
    from vqdist.models.vqgan import VQGanVAE
    from vqdist.trainers.vqgan import VQGanTrainerConfig

    parser = _parser("vqdist train vqgan", "Train a VQGAN. A run that is in the folder `--out` is resumed.")
    data = {field.name for field in dataclasses.fields(DataConfig)}
    top = {field.name: field for field in dataclasses.fields(VQGanTrainerConfig) if field.name in TOP_LEVEL}
    for name, option in TOP_LEVEL.items():
        kind = int if name == "seed" else str if name == "backend" else str | None
        default = None if name == "results_folder" else top[name].default
        parser.add_argument(f"--{option}", type=kind, default=default, help=_field_doc(VQGanTrainerConfig, name))
    parser.usage = "vqdist train vqgan --data IMAGES --image_size PIXELS --out RUN [options]"
    parser.add_class_arguments(DataConfig, "data", help="The images (short: --data, --image_size, --on_bad_image)")
    parser.add_class_arguments(VQGanVAE, "model", skip={"vgg", "kwargs"}, help="The networks and their losses")
    parser.add_class_arguments(VQGanTrainerConfig, "trainer", skip={*data, *TOP_LEVEL}, help="The training")
    for (
        action
    ) in parser._actions:  # `--data FILE` and the like: `--config` reads files, and --data is short for the folder
        if action.dest in ("data", "model", "trainer"):
            action.help = SUPPRESS
    return parser


def _field_doc(config_class: type, name: str) -> str:
    """The line under a field of a configuration."""
    import docstring_parser

    documented = (
        param
        for cls in config_class.__mro__
        if cls is not object
        for param in docstring_parser.parse_from_object(cls).params
    )
    return next(param.description for param in documented if param.arg_name == name)


def _train_vqgan(options) -> int:
    from vqdist.models.vqgan import VQGanVAE
    from vqdist.seeding import seed_everything
    from vqdist.trainers.vqgan import VQGanVAETrainer

    if options.out is None:
        raise UserError("--out is missing; give the run folder, as in --out runs/a")
    if options.data.folder is None:
        raise UserError("--data is missing; give an image folder, or digits, synthetic, torchvision:NAME, wds:, hf:")
    seed_everything(options.seed, "weights")
    vae = VQGanVAE(**_plain(options.model))
    top = {name: getattr(options, option) for name, option in TOP_LEVEL.items()}
    trainer = VQGanVAETrainer(vae, **_plain(options.data), **_plain(options.trainer), **top)
    numbers = trainer.train()
    if trainer.is_main:
        _print_summary(trainer, numbers)
    trainer.close()
    return 0


def _print_summary(trainer, numbers: dict[str, float]) -> None:
    width = max(map(len, [*numbers, "reconstructions"]))
    print(f"\n{trainer.step} steps on {trainer.backend.name}, {trainer.position} images")
    for name, value in numbers.items():
        print(f"  {name:<{width}}  {value:.4g}" if isinstance(value, float) else f"  {name:<{width}}  {value}")
    print(f"  {'reconstructions':<{width}}  {trainer.picture_path}")
    print(f"  {'model':<{width}}  {trainer.run_folder / 'export'}")


# ----------------------------------------------------------------------------------------- evaluate, reconstruct


def evaluate(arguments: list[str]) -> int:
    """Measure a tokenizer's reconstructions of a set of images; one JSON object on standard output."""
    from vqdist.backends import create_backend
    from vqdist.evaluation import evaluate_reconstruction

    parser = _run_parser("vqdist evaluate", "Measure a run's reconstructions over all images of --data.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images per batch of one process.")
    parser.add_argument("--num_workers", type=int, default=0, help="Loader processes of each rank.")
    parser.add_argument("--backend", type=str, default="auto", help="`auto`, `local`, `accelerate` or `deepspeed`.")
    options = _parse(parser, arguments)
    if options.batch_size < 1 or options.num_workers < 0:
        raise UserError(
            f"batch_size {options.batch_size} and num_workers {options.num_workers} are not possible; they must be at "
            "least 1 and 0"
        )
    vae, dataset, image_size = _open_run(options)
    backend = create_backend(options.backend)
    vae.to(backend.device)
    batches = _batches(dataset, options, backend)
    numbers = evaluate_reconstruction(vae.autoencoder, batches, backend, image_size=image_size)
    if backend.is_main:
        print(json.dumps(numbers))
    backend.close()
    return 0


def reconstruct(arguments: list[str]) -> int:
    """Draw originals beside their reconstructions: `vqdist reconstruct RUN --data DIR --out grid.png`."""
    import torch

    from vqdist.evaluation import reconstruct as reconstruct_images
    from vqdist.tracking import save_sheet

    parser = _run_parser("vqdist reconstruct", "Draw images of --data beside a run's reconstructions of them.")
    parser.add_argument("--out", type=Path, default=Path("reconstructions.png"), help="PNG file to write.")
    parser.add_argument("--num_images", type=int, default=16, help="Images to draw, the first of --data.")
    options = _parse(parser, arguments)
    vae, dataset, _ = _open_run(options)
    count = min(options.num_images, len(dataset))
    if count < 1:
        raise UserError(f"num_images {options.num_images} is not possible; it must be at least 1")
    if options.out.suffix.lower() != ".png":
        raise UserError(f"--out {options.out} is not the name of a PNG file; give one that ends in .png")
    images, skipped = zip(*(dataset.fetch(0, index) for index in range(count)), strict=True)
    images = torch.stack(images)
    for name in sum(skipped, ()):
        print(f"skipped an image that cannot be decoded: {name}", file=sys.stderr)
    save_sheet(torch.stack([images, reconstruct_images(vae.autoencoder, images)], dim=1), options.out)
    print(options.out)
    return 0


def _run_parser(program: str, description: str):
    """What `evaluate` and `reconstruct` share: a run, images, and how to load them."""
    parser = _parser(program, description)
    parser.add_argument("run", type=str, help="Run folder, or a folder that save_pretrained wrote.")
    parser.add_argument("--data.folder", type=str, required=True, help="Images, as for train (short: --data).")
    parser.add_argument(
        "--data.image_size",
        type=int | None,
        default=None,
        help="Side in pixels (short: --image_size); by default the run's.",
    )
    parser.add_argument(
        "--data.on_bad_image", type=str, default="raise", help="`raise` or `skip` (short: --on_bad_image)."
    )
    return parser


def _open_run(options):
    """The exported model of a run, its view of the images, and their size."""
    from vqdist.data.dataset import ImageDataset
    from vqdist.models.vqgan import VQGanVAE

    run = Path(options.run)
    if not run.is_dir():
        raise UserError(f"no such run folder: {run}")
    folder = run / "export" if (run / "export").is_dir() else run
    if not (folder / "model.safetensors").is_file():
        raise UserError(
            f"{run} has no export/ with config.json and model.safetensors; train it to its first checkpoint"
        )
    image_size = options.data.image_size
    image_size = _trained_image_size(run) if image_size is None else image_size
    vae = VQGanVAE.from_pretrained(folder)
    vae.check_image_size(image_size)
    dataset = ImageDataset(
        options.data.folder,
        image_size,
        channels=vae.channels,
        augment=False,
        on_bad_image=options.data.on_bad_image,
    )
    return vae, dataset, image_size


def _trained_image_size(run: Path) -> int:
    path = run / "config.json"
    content = read_json(path) if path.is_file() else {}
    if "image_size" not in content.get("trainer", {}):
        raise UserError(f"{run} does not say on which image size it was trained; give --image_size")
    return content["trainer"]["image_size"]


def _batches(dataset, options, backend):
    import torch
    from tqdm import tqdm

    from vqdist.data.loader import valid_loader

    loader = valid_loader(
        dataset,
        torch.arange(len(dataset)),
        batch_size=options.batch_size,
        rank=backend.rank,
        world_size=backend.world_size,
        num_workers=options.num_workers,
    )
    for batch in tqdm(loader, desc="evaluate", unit="batch", disable=not (backend.is_main and sys.stderr.isatty())):
        for name in batch.bad:
            print(f"skipped an image that cannot be decoded: {name}", file=sys.stderr)
        yield batch.image.to(backend.device)


# ----------------------------------------------------------------------------------------- doctor


def doctor(arguments: list[str]) -> int:
    """Say what this machine has, what works, and what mends the rest."""
    from vqdist.doctor import run

    _parse(_parser("vqdist doctor", doctor.__doc__), arguments)
    return run()


COMMANDS = {"train": train, "evaluate": evaluate, "reconstruct": reconstruct, "doctor": doctor}


# ----------------------------------------------------------------------------------------- parsing


def _parser(program: str, description: str):
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=program, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with these options; the command line goes first.")
    return parser


def _parse(parser, arguments: list[str]):
    """Parse; whatever is wrong becomes one line that names the nearest option."""
    from jsonargparse import ArgumentError

    known = [action.dest for action in parser._actions]
    arguments = _configurations_first([_unaliased(argument) for argument in arguments])
    for argument in arguments:
        option = argument.split("=")[0]
        if option.startswith("--") and not _is_known(option[2:], known):
            raise UserError(f"there is no option {option}; {_nearest(option[2:], known)}")
    try:
        return parser.parse_args(arguments)
    except (ArgumentError, UnicodeDecodeError) as error:
        raise UserError(_one_line(str(error), known)) from error


def _configurations_first(arguments: list[str]) -> list[str]:
    """`--config FILE` before all else, so that the command line goes before the file wherever it stands."""
    first, rest = [], list(arguments)
    while (place := next((i for i, a in enumerate(rest) if a.split("=")[0] == "--config"), None)) is not None:
        length = 1 if "=" in rest[place] else 2
        first += rest[place : place + length]
        del rest[place : place + length]
    return [*first, *rest]


def _is_known(option: str, known: list[str]) -> bool:
    """Options of dictionaries (model.vq_kwargs.decay) are known by their dictionary."""
    parts = option.split(".")
    return option == "help" or any(
        ".".join(parts[:count]) in known for count in range(len(parts), 0, -1) if count != 1 or len(parts) == 1
    )


def _unaliased(argument: str) -> str:
    option, equals, value = argument.partition("=")
    return ALIASES.get(option, option) + equals + value


def _one_line(message: str, known: list[str]) -> str:
    """jsonargparse's message on one line, with the nearest option where it names one that is not there."""
    import re

    message = " ".join(message.split())
    if (required := re.search(r"arguments are required: (.*)", message)) is not None:
        short = {option: name for name, option in ALIASES.items()}  # people know the short names
        options = (f"--{name}" for name in required[1].split(", "))
        return f"missing: {', '.join(short.get(option, option) for option in options)}"
    for pattern in (
        r"[Gg]roup '(?P<group>[\w.]+)' does not accept option '(?P<name>[\w.]+)'",
        r"(?P<group>)Option '(?P<name>[\w.]+)' is not accepted",
        r"(?P<group>)[Kk]ey '(?P<name>[\w.]+)' is not expected",
        r"(?P<group>)Unrecognized arguments: --(?P<name>[\w.]+)",
    ):
        if (unknown := re.search(pattern, message)) is not None:
            name = ".".join(filter(None, (unknown["group"], unknown["name"])))
            return f"{message}; {_nearest(name, known)}"
    return message


def _plain(namespace) -> dict[str, Any]:
    return namespace.as_dict()
