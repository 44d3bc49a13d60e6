"""Names of options on the command line: short ones, ends of long ones, and those of other projects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vqdist.errors import UserError
from vqdist.names import unknown


@dataclass(frozen=True)
class Alias:
    """Another name of an option, and what it stands for.

    Attributes:
        option: the option, without dashes.
        value: the option's value, of a bare flag; None if a value follows the name.
        words: the option's word for each word that may follow the name; None if any value may.
        note: what differs from what people may know under this name.
    """

    option: str
    value: str | None = None
    words: Mapping[str, str] | None = None
    note: str = ""

    def resolve(self, name: str, value: str | None) -> str | None:
        """Return the option's value where `--name value` was given; raise `UserError` if there is no such value."""
        if self.value is not None:
            if value is not None:
                raise UserError(f"--{name} takes no value, but {value!r} follows it; it is short for {self}")
            return self.value
        if self.words is None or value is None:
            return value
        if value.lower() not in self.words:
            raise UserError(f"--{name} {value!r} is not known; choose one of {', '.join(self.words)}")
        return self.words[value.lower()]

    @property
    def in_a_file(self) -> str:
        """The same in a configuration file, by dotted option."""
        return self.option if self.value is None else f"{self.option}: {self.value}"

    def __str__(self) -> str:
        return f"--{self.option}" if self.value is None else f"--{self.option} {self.value}"


# each with the options that it may stand for: the first that a command has
SHORT: Mapping[str, tuple[str, ...]] = {
    "data": ("data.folder",),
    "valid": ("data.valid",),
    "image_size": ("data.image_size", "image_size"),
    "codebook_size": ("model.codebook_size", "model.num_tokens"),
    "lr": ("trainer.lr",),
    "batch_size": ("trainer.batch_size", "batch_size"),
    "steps": ("trainer.num_train_steps",),
    "epochs": ("trainer.epochs",),
    "workers": ("data.num_workers", "num_workers"),
    "num_images": ("num_images", "num"),
    "on_bad_image": ("data.on_bad_image",),
    "max_bad_frac": ("data.max_bad_frac",),
}


def short_names(known: Iterable[str]) -> dict[str, Alias]:
    """Return the short names that a command with these options takes; a name means the same in every command."""
    options = set(known)
    found = {name: next((option for option in those if option in options), None) for name, those in SHORT.items()}
    return {name: Alias(option) for name, option in found.items() if option is not None and name != option}


def short_name(option: str, aliases: Mapping[str, Alias]) -> str:
    """Return the name that people know an option by, without dashes."""
    return next((name for name in SHORT if name in aliases and aliases[name].option == option), option)


def full_name(given: str, known: list[str], aliases: Mapping[str, Alias]) -> str:
    """Return the option, or the alias, that a name of the command line means.

    The end of an option's name will do where no other option ends so: `ema_beta` is `trainer.ema_beta`. Options of
    dictionaries (`model.vq_kwargs.decay`) are known by their dictionary, also by its end, and `+` adds to a list.

    Raises:
        UserError: there is no such option, or several end so.
    """
    if given in aliases or _is_known(given, known):
        return given
    parts = given.split(".")
    for count in range(len(parts), 0, -1):
        head, rest = ".".join(parts[:count]), parts[count:]
        plus = "+" if head.endswith("+") else ""
        ends = [option for option in known if option.endswith(f".{head.removesuffix('+')}")]
        if len(ends) > 1:
            long = ", ".join(f"--{option}" for option in ends)
            raise UserError(f"--{given} may be short for {long}; give one of these")
        if ends:
            return ".".join([ends[0] + plus, *rest])
    names = [*(option for option in known if option != "help"), *aliases]
    raise unknown("option", given, names, "; see --help", written=f"--{given}")


def _is_known(option: str, known: Iterable[str]) -> bool:
    parts, options = option.removesuffix("+").split("."), set(known)
    least = min(len(parts), 2)  # a group alone does not make its options known
    return any(".".join(parts[:count]) in options for count in range(least, len(parts) + 1))
