"""`vqdist train MODEL`, for every model of the table."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
import shutil
import textwrap
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from vqdist.cli.chosen import Choice, choices
from vqdist.cli.defaults import NOTE, as_begun, measured
from vqdist.cli.loading import loading
from vqdist.cli.mistakes import together
from vqdist.cli.models import MODELS, TrainedModel, load_class, model_entry
from vqdist.cli.parsing import IMAGES, MODEL_HELP, add_trust_option, check_images, make_parser, parse
from vqdist.cli.parts import Parts
from vqdist.data.config import CODES
from vqdist.errors import UserError
from vqdist.files import read_json
from vqdist.leaving import LeaveAtOnce
from vqdist.locations import check_given
from vqdist.parts import Registry, Spec
from vqdist.stopping import Stopped, UntilTheEnd

# options of the trainer's configuration that stand at the top level, and their name there
TOP_LEVEL = {
    "results_folder": "out",
    "backend": "backend",
    "deepspeed_config": "deepspeed_config",
    "dist_timeout": "dist_timeout",
    "seed": "seed",
}
# likewise, of the trainers whose configuration has them
OF_TOKENIZER = ("image_size", "data.image_size", "codebook_size", "model.codebook_size")
OF_START = ("init_from", "family", "peer_config", "init_optimizer", "trust_code")
SWITCHES = ("trust_code", "init_optimizer")
# of the others: a string or null
KINDS = {"backend": str, "dist_timeout": float, "seed": int, **dict.fromkeys(SWITCHES, bool)}


def train(arguments: list[str]) -> int:
    """Train a model: `vqdist train vqgan --data DIR --image_size 64 --out RUN`; again to resume."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    name = arguments[0]
    with UntilTheEnd():
        with LeaveAtOnce():
            names: set[str] = set()
            options = train_options(name, arguments[1:], names)
            refuse_mistakes(model_entry(name), options, parts_of(name))
            trainer = make_trainer(model_entry(name), options, names)
        return _train(trainer)


def _overview() -> str:
    lines = "\n".join(f"  {name:<12} {entry.title}" for name, entry in MODELS.items())
    return (
        f"usage: vqdist train MODEL [options]\n\nmodels:\n{lines}\n\nMODEL may also be the import path of a class of "
        "your own, my_module.MyModel.\n`vqdist train MODEL --help` lists its options."
    )


def train_options(name: str, arguments: list[str], names: set[str] | None = None):
    """Return the configuration that `vqdist train NAME ARGUMENTS` trains with, yet unchecked by model and trainer.

    Args:
        name: of the model.
        arguments: of the command line.
        names: where given, the options that somebody says are added to it.
    """
    entry = model_entry(name)
    for argument in arguments if entry.over_tokenizer else ():
        if (given := argument.partition("=")[0]).removeprefix("--") in OF_TOKENIZER:
            raise UserError(f"{given} is the tokenizer's own; leave it out")
    return parse(train_parser(name), arguments, entry.aliases, parts_of(name), _choices(entry), names)


def _choices(entry: TrainedModel) -> dict[str, Choice]:
    """Return the options that are chosen where nobody says them: by others, or as they were found by measuring."""
    found = choices(*entry.options(), entry.defaults)
    if entry.was_measured:
        return found | as_begun()
    return found | measured(load_class(entry.config)) if entry.is_measured else found


def parts_of(name: str) -> dict[str, Registry[Any]]:
    """Return the options of `vqdist train NAME` that take a part, and its kind."""
    model_class, config_class = model_entry(name).options()
    of_model = getattr(model_class, "part_options", {})
    taken = inspect.signature(model_class).parameters
    of_training = config_class.part_options()
    return {
        **{f"model.{option}": registry for option, registry in of_model.items() if option in taken},
        **{f"{group}.{option}": registry for (group, option), registry in of_training.items()},
    }


def train_parser(name: str):
    """Return a parser of the options of `vqdist train NAME`, derived from the classes of both."""
    entry = model_entry(name)
    program = f"vqdist train {name}"
    needed = "" if "data.image_size" in entry.defaults else " --image_size PIXELS"
    needed = " --tokenizer RUN" if entry.over_tokenizer else needed
    parser = make_parser(program, _description(entry), _epilog(entry))
    parser.usage = f"{program} --data IMAGES{needed} --out RUN [options]"
    model_class, config_class = entry.options()
    if entry.over_tokenizer:
        parser.add_argument(
            "--tokenizer",
            type=str | None,
            default=None,
            help=f"Tokenizer, which stays as it is: {MODEL_HELP}",
        )
        add_trust_option(parser)
    _add_top_level(parser, config_class)
    _add_groups(parser, entry, model_class, config_class)
    _set_defaults(parser, entry)
    _name_the_parts(parser, parts_of(name))
    of_others = _choices(entry)
    for action in parser._actions:
        if action.dest in of_others and of_others[action.dest].words:
            action.chosen = of_others[action.dest].words  # --help says it
    return parser


def _name_the_parts(parser, parts: Parts) -> None:
    """Let --help list the names of each kind of part."""
    for action in parser._actions:
        if action.dest in parts:
            names = ", ".join(f"`{name}`" for name in parts[action.dest])
            action.help = f"{action.help} Names: {names or 'none yet'}; --{action.dest}.help NAME says what one takes."


def _description(entry: TrainedModel) -> str:
    stored = "\n--data also takes codes:FOLDER, what `vqdist encode` wrote." if entry.over_tokenizer else ""
    more = f"\nThe {entry.aliases_title}, work too; the end of this text lists them." if entry.aliases else ""
    return f"Train a {entry.title}. A run that is in the folder `--out` is resumed.{stored}{more}"


def _add_top_level(parser, config_class: type) -> None:
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for name, option in {**TOP_LEVEL, **{name: name for name in OF_START if name in fields}}.items():
        default = None if name == "results_folder" else fields[name].default
        parser.add_argument(
            f"--{option}", type=KINDS.get(name, str | None), default=default, help=_field_docs(config_class)[name]
        )


def _add_groups(parser, entry: TrainedModel, model_class: type, config_class: type) -> None:
    from vqdist.data.config import DataConfig

    data = {field.name for field in dataclasses.fields(DataConfig)}
    given = {"image_size"} if entry.over_tokenizer else set()  # by the tokenizer
    parser.add_class_arguments(DataConfig, "data", skip=given, help="The images")
    skip = {"image_size", *entry.no_options}  # the data's image_size is the model's, too
    parser.add_class_arguments(model_class, "model", skip=skip, help="The networks and their losses")
    parser.add_class_arguments(config_class, "trainer", skip={*data, *TOP_LEVEL, *OF_START}, help="The training")


@functools.cache
def _field_docs(config_class: type) -> dict[str, str]:
    """Return the line under each field of a configuration, with those of its bases; parsing them takes a while."""
    import docstring_parser

    docs: dict[str, str] = {}
    for cls in reversed(config_class.__mro__[:-1]):  # but for object
        docs |= {param.arg_name: param.description or "" for param in docstring_parser.parse_from_object(cls).params}
    return docs


def _set_defaults(parser, entry: TrainedModel) -> None:
    """Set the entry's defaults; an option that has one is not required."""
    from argparse import SUPPRESS

    parser.set_defaults(dict(entry.defaults))
    for action in parser._actions:
        if action.dest in entry.defaults:
            action.required = False
        # `--data FILE` and the like: `--config` reads files, and --data is short for the folder
        if action.dest in ("data", "model", "trainer"):
            action.help = SUPPRESS


def _epilog(entry: TrainedModel) -> str | None:
    """Return the end of `--help`: why defaults are others than in Python, and the aliases."""
    return _indented("", NOTE) if entry.is_measured else _aliases_help(entry)


def _aliases_help(entry: TrainedModel) -> str | None:
    """Return the section of `--help` on aliases: what each stands for, and which mean something else now."""
    if not entry.aliases:
        return None
    lines = [f"{entry.aliases_title}:"]
    for name, alias in entry.aliases.items():
        lines.append(f"  --{name:<22}{'the same' if name == alias.option else f'= {alias}'}")
    lines += [f"  --{'local_rank':<22}the launcher's, without effect: ranks come from the environment"]
    lines += ["", "where they mean something else than in train_vae:"]
    lines += [_indented(f"  --{name:<22}", alias.note) for name, alias in entry.aliases.items() if alias.note]
    return "\n".join([*lines, "", _indented("", entry.aliases_note)])


def _indented(start: str, text: str) -> str:
    """Text that goes on below itself, not below its start."""
    width = shutil.get_terminal_size().columns - 2
    return textwrap.fill(start + text, width, subsequent_indent=" " * len(start), break_on_hyphens=False)


def refuse_mistakes(entry: TrainedModel, options, parts: Parts) -> None:
    """Raise one `UserError` for all mistakes that can be seen without torch, which takes seconds to import."""
    from vqdist.backends import resolve_backend
    from vqdist.trainers.config import make_config

    config_class, out = load_class(entry.config), options.out or "."  # that there is none is said once
    others = [(option, registry) for option, registry in parts.items() if option not in IMAGES]
    together(
        lambda: _refuse_missing(entry, options),
        *(partial(check_images, options, option) for option in IMAGES),
        lambda: resolve_backend(options.backend),
        *(partial(_refuse_unknown_part, registry, options.get(option)) for option, registry in others),
        lambda: make_config(config_class, {**_trainer_options(entry, options), "results_folder": out}).check_values(),
        lambda: _check_perceptual(options),
        *([lambda: _check_tokenizer(options)] if entry.over_tokenizer else []),
    )


def _check_perceptual(options) -> None:
    """Raise `UserError` for a perceptual loss whose file of weights is not there."""
    given = options.get("model.perceptual")
    if not isinstance(given, str):  # an object that an export recorded, or a model that has none
        return
    kind, _, file = given.rpartition(":")
    if (kind or file.endswith((".pth", ".pt", ".safetensors"))) and not Path(file).expanduser().is_file():
        raise UserError(
            f"no such file: {file}, which --model.perceptual {given} names for its weights; check the path, or train "
            "without: --model.perceptual none"
        )


def _check_tokenizer(options) -> None:
    if not options.tokenizer:
        raise UserError("--tokenizer is missing; give the run of a tokenizer, as in --tokenizer runs/digits")
    check_given(options.tokenizer)


def _refuse_unknown_part(registry: Registry[Any], given: Any) -> None:
    for part in given if isinstance(given, list) else [given]:
        if isinstance(part, (str, dict)):
            registry.refuse_unknown(Spec.of(part, registry.kind).target)


def _of_start(entry: TrainedModel) -> list[str]:
    return [field.name for field in dataclasses.fields(load_class(entry.config)) if field.name in OF_START]


def _trainer_options(entry: TrainedModel, options) -> dict[str, Any]:
    top = {name: getattr(options, option) for name, option in TOP_LEVEL.items()}
    top |= {name: getattr(options, name) for name in _of_start(entry)}
    return {**options.data.as_dict(), **options.trainer.as_dict(), **top}


def make_trainer(entry: TrainedModel, options, names: Collection[str] = ()):
    """Return the trainer of these options; a run that is in their folder is resumed.

    Args:
        entry: of the model.
        options: as `train_options` gives them.
        names: of the options that somebody says, as against defaults.
    """
    with loading(f"torch and {entry.trainer.partition(':')[2]}"):
        from vqdist.seeding import seed_everything

        model_class, trainer_class = entry.load()
    model_options = options.model.as_dict()
    if getattr(options, "init_from", None) is not None:
        if entry.model != MODELS["vqgan"].model:
            raise UserError(
                f"--init_from gives the class of the model, too, and {model_class.__name__} is another; give vqgan"
            )
        given: Any = _set_options(model_class, model_options, names)
        return trainer_class(given, **_trainer_options(entry, options))
    if "image_size" in inspect.signature(model_class).parameters:
        model_options["image_size"] = options.data.image_size
    if entry.over_tokenizer:
        model_options["tokenizer"] = _open_tokenizer(options)
    seed_everything(options.seed, "weights")
    model = _build(model_class, model_options)
    return trainer_class(model, **_trainer_options(entry, options))


def _set_options(model_class: type, options: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the options of the model that were given; those of its network are to agree with `--init_from`."""
    defaults = {name: one.default for name, one in inspect.signature(model_class).parameters.items()}
    said = {name.split(".")[1] for name in names if name.startswith("model.")}
    return {name: value for name, value in options.items() if name in said or value != defaults.get(name)}


def _train(trainer) -> int:
    try:
        numbers = trainer.train()
    except Stopped:
        trainer.close()
        raise
    if trainer.is_main:
        _print_summary(trainer, numbers)
    trainer.close()
    return 0


def _refuse_missing(entry: TrainedModel, options) -> None:
    missing = [] if options.out else ["--out is missing; give the run folder, as in --out runs/a"]
    if options.data.folder is None:
        others = "".join(f" (or --{name})" for name, alias in entry.aliases.items() if alias.option == "data.folder")
        sources = "give an image folder, or digits, synthetic, torchvision:NAME, wds:, hf:"
        missing.append(f"--data{others} is missing; {sources}")
    if missing:
        raise UserError("; ".join(missing))


def _build(model_class: type, options: dict[str, Any]):
    try:
        return model_class(**options)
    except (MemoryError, OverflowError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())  # torch has several words for a size beyond all memory
        if not isinstance(error, MemoryError | OverflowError) and not re.search(
            "allocate|memory|overflow", reason, re.IGNORECASE
        ):
            raise
        raise UserError(f"a model of this size does not fit into memory ({reason[:160]}); make it smaller") from error


def _open_tokenizer(options):
    from vqdist.models.tokenizer import Tokenizer

    before = _fingerprint_of_before(options)
    return Tokenizer.from_pretrained(options.tokenizer, fingerprint=before, trust_code=options.trust_code)


def _fingerprint_of_before(options) -> str | None:
    """Return that of the tokenizer of the run so far, or of the stored codes; None of a new run on images."""
    from vqdist.data.codes import read_manifest

    with contextlib.suppress(UserError, AttributeError, KeyError):  # the trainer says what is wrong with them
        configuration = Path(options.out).expanduser() / "config.json"
        if configuration.is_file() and not options.trainer.overwrite:
            return read_json(configuration)["model"].get("tokenizer")
        if options.data.folder.startswith(CODES):
            return read_manifest(Path(options.data.folder.removeprefix(CODES)).expanduser())["tokenizer"]
    return None


def _print_summary(trainer, numbers: dict[str, float]) -> None:
    if trainer.guard.skip:
        numbers = {**numbers, "skipped_steps": trainer.guard.skipped_steps}
    width = max(map(len, [*numbers, trainer.picture_name]))
    print(f"\n{trainer.step} steps on {trainer.backend.name}, {trainer.position} images")
    if trainer.has_ended_early:
        print(f"ended early, of {trainer.num_train_steps}: {trainer.best.reason}")
    for name, value in numbers.items():
        print(f"  {name:<{width}}  {value:.4g}" if isinstance(value, float) else f"  {name:<{width}}  {value}")
    print(f"  {trainer.picture_name:<{width}}  {trainer.picture_path}")
    print(f"  {'model':<{width}}  {trainer.run_folder / 'export'}")
    if trainer.best.is_another:
        print(f"  {'best':<{width}}  {trainer.best.folder}")
    for step in trainer.best.standing.kept_steps & {*trainer.checkpoints.steps()}:
        print(f"  {'checkpoint':<{width}}  {trainer.checkpoints.path(step)}")
    for warning in trainer.report.warnings.values():
        print(f"warning: {warning}")
