"""Weights & Biases: a run for each run folder, online where it can be reached, else in a folder for `wandb sync`."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from vqdist.files import read_small, write_json
from vqdist.tracking.base import Sink, one_line, warn
from vqdist.tracking.pictures import group_bars

ID_FILE = "wandb.json"
OWN_FOLDER = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-(.+)")
"""Name of a folder that W&B makes for each start of a run: the time, and the run's id."""
# our choices, each with the variable of the environment that goes before it
VARIABLES = {
    "project": "WANDB_PROJECT",
    "name": "WANDB_NAME",
    "dir": "WANDB_DIR",
    "id": "WANDB_RUN_ID",
    "resume": "WANDB_RESUME",
}
# seconds that rank 0 waits for a server or a person, while the other ranks wait for it
PATIENCE = {"init_timeout": 30.0, "login_timeout": 60.0, "finish_timeout": 600.0}


class WandbSink(Sink):
    """Logs to one W&B run, which a resumed run goes on with.

    An argument goes before the environment (WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, WANDB_RUN_GROUP, WANDB_TAGS),
    and the environment before the defaults here. Where the server cannot be reached the run is kept offline, in
    `wandb/` of the run folder, for `wandb sync`.

    Args:
        run_folder: of the run.
        config: shown as the W&B run's configuration.
        project: by default "vqdist".
        entity: user or team; by default the user's.
        name: of the W&B run; by default that of the run folder.
        group: runs that are shown together.
        job_type: kind of run within a group.
        tags: words to find the run by.
        notes: a description.
        mode: `online`, `offline` or `disabled`.
        id: of the W&B run to go on with; by default drawn at random once and kept in wandb.json of the run folder.
        settings: further fields of `wandb.Settings`, as {init_timeout: 120}.
    """

    packages = ("wandb",)
    extra = "tracking"

    def __init__(
        self,
        run_folder: Path,
        config: dict[str, Any] | None = None,
        *,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        mode: str | None = None,
        id: str | None = None,
        settings: dict[str, Any] | None = None,
    ):
        said: dict[str, Any] = {"project": project, "entity": entity, "name": name, "group": group, "tags": tags}
        said |= {"job_type": job_type, "notes": notes, "mode": mode, "id": id}
        said = {key: value for key, value in said.items() if value is not None}
        self.run = _start({**_defaults(run_folder, said), **said, "settings": _settings(settings or {})}, config or {})

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log the numbers; W&B takes a step in when the next one begins."""
        self.run.log(values, step=step)

    def picture(self, step: int, name: str, rows: Tensor, path: Path, columns: int) -> None:
        """Log the sheet as an image."""
        import wandb

        self.run.log({name: wandb.Image(str(path))}, step=step)

    def histogram(self, step: int, name: str, counts: Tensor, path: Path) -> None:
        """Log a histogram of at most 512 bars."""
        import wandb

        self.run.log({name: wandb.Histogram(np_histogram=group_bars(counts))}, step=step)

    def artifact(self, folder: Path) -> None:
        """Upload the folder as an artifact of type model.

        An offline run keeps a copy in its own folder for `wandb sync`; by itself W&B would refer to one in the user's
        home.
        """
        import wandb

        if self.run.offline:
            kept = Path(self.run.dir).parent / "model"
            folder = Path(shutil.copytree(folder, kept, dirs_exist_ok=True))
        artifact = wandb.Artifact(f"model-{self.run.id}", type="model")
        # `wandb sync` may be started anywhere
        artifact.add_dir(str(folder.resolve()), skip_cache=True, policy="immutable")
        self.run.log_artifact(artifact)

    def close(self) -> None:
        """Finish the W&B run; where W&B's own process is gone, leave it nothing to do when this one ends."""
        import wandb

        try:
            self.run.finish()
        except Exception:
            with suppress(Exception):
                wandb.teardown()
            raise


def _start(options: dict[str, Any], config: dict[str, Any]) -> Any:
    """Return a W&B run, an offline one with a warning where an online one cannot start."""
    import wandb

    try:
        return wandb.init(config=config, **options)
    except Exception as error:  # no key, no network, a run that was deleted there: of many types
        if options.get("mode") in ("offline", "disabled") or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
            raise
        warn(
            f"wandb cannot be reached ({one_line(error)}); it goes on offline, and `wandb sync` uploads the run later "
            "(log in with `wandb login`, or set WANDB_MODE=offline to keep it from trying)"
        )
    with suppress(Exception):
        wandb.teardown()  # it holds the id of the failed attempt
    return wandb.init(config=config, **{**options, "mode": "offline"})


def _defaults(run_folder: Path, said: dict[str, Any]) -> dict[str, Any]:
    """Return the environment's choices where it makes them, else ours."""
    chosen = {name: os.environ.get(variable) for name, variable in VARIABLES.items()}
    ours = {"project": "vqdist", "name": run_folder.resolve().name, "dir": str(run_folder), "resume": "allow"}
    if "id" not in said and not chosen["id"]:
        ours["id"] = run_id(run_folder)
    return ours | {name: value for name, value in chosen.items() if value}


def _settings(said: dict[str, Any]) -> dict[str, Any]:
    """Return fields of `wandb.Settings`: those given, and how long to wait where this W&B can be told."""
    import wandb

    known = getattr(wandb.Settings, "model_fields", {})
    ours = {key: seconds for key, seconds in PATIENCE.items() if key in known}
    return {**{key: value for key, value in ours.items() if not os.environ.get(f"WANDB_{key.upper()}")}, **said}


def run_id(run_folder: Path) -> str:
    """Return the id of a run folder's W&B run, drawn at random when first asked for and kept in the folder.

    It is no function of the path, at which another run may come to lie. Folders from before the id was kept say it in
    the names of W&B's own folders in them.
    """
    file = run_folder / ID_FILE
    with suppress(OSError, ValueError, TypeError, KeyError):  # a `UserError` is a ValueError
        kept = json.loads(read_small(file))["id"]
        if isinstance(kept, str) and kept:
            return kept
    found = [match.groups() for path in run_folder.glob("wandb/*") if (match := OWN_FOLDER.fullmatch(path.name))]
    id = max(found)[1] if found else secrets.token_hex(8)
    write_json(file, {"id": id})
    return id
