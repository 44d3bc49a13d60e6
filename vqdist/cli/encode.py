"""`vqdist encode RUN`: the codes of a set of images by a run's tokenizer, stored for the second stage."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vqdist.cli.loading import loading
from vqdist.cli.parsing import MODEL_HELP, add_trust_option, make_parser, parse
from vqdist.data.config import MAX_BAD_FRAC, View
from vqdist.data.specs import check_spec
from vqdist.errors import UserError, printable
from vqdist.locations import check_given

# a rank that has written its last shard waits in an exchange for those that have one more
EXCHANGE_TIMEOUT = 7 * 24 * 60.0  # minutes; one that is silent is given up after --dist_timeout


def encode(arguments: list[str]) -> int:
    """Store the codes of images: `vqdist encode RUN --data DIR --out codes/`; again to go on."""
    options = parse(_parser(), arguments)
    with loading("torch and the run"):
        _check(options)
        from vqdist.allocator import keep_freed_memory
        from vqdist.backends import create_backend
        from vqdist.backends.peers import naming_lost_peers
        from vqdist.encoding import CodeWriter
        from vqdist.precision import allow_tf32

        tokenizer, dataset = _open(options)
    writer = CodeWriter(tokenizer, dataset, options.out, batch_size=options.batch_size, shard_size=options.shard_size)
    backend = create_backend(options.backend, dist_timeout=options.dist_timeout, exchange_timeout=EXCHANGE_TIMEOUT)
    keep_freed_memory(backend.device)
    allow_tf32(backend.device)  # codes as those that training makes of the same images
    with naming_lost_peers(), _progress_bar(backend) as progress:
        numbers = writer.write(backend, num_workers=options.num_workers, progress=progress)
    if backend.is_main:
        _report(options.out, numbers)
    backend.close()
    return 0


def _parser():
    parser = make_parser("vqdist encode", "Store the codes of all images of --data by a run's tokenizer.")
    parser.add_argument("run", type=str, help=MODEL_HELP)
    parser.add_argument(
        "--data.folder", type=str | dict[str, Any], required=True, help="Images, as for train (short: --data)."
    )
    parser.add_argument(
        "--out", type=str, required=True, help="Folder for the codes; one begun by this command goes on."
    )
    parser.add_argument(
        "--data.image_size",
        type=int | list[int] | None,
        default=None,
        help="Side in pixels, or [height, width] (short: --image_size); by default the run's.",
    )
    parser.add_argument(
        "--data.on_bad_image",
        type=str,
        default="raise",
        help="What to do with a file that cannot be decoded (short: --on_bad_image): `raise`, or `skip`, which puts "
        "the next good image in its place.",
    )
    parser.add_argument(
        "--data.max_bad_frac",
        type=float,
        default=MAX_BAD_FRAC,
        help="Largest share of the images that `skip` may pass over, but at least one (short: --max_bad_frac).",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="Images per batch of one process.")
    parser.add_argument("--shard_size", type=int, default=8192, help="Images per file of codes.")
    parser.add_argument(
        "--num_workers",
        type=int | None,
        default=None,
        help="Loader processes of each rank; by default up to 4, as the cores allow. 0 loads in the process itself.",
    )
    parser.add_argument("--backend", type=str, default="auto", help="`auto`, `local`, `accelerate` or `deepspeed`.")
    parser.add_argument(
        "--dist_timeout",
        type=float,
        default=10.0,
        help="Minutes that a process waits for another that is silent before it gives up.",
    )
    add_trust_option(parser)
    return parser


def _check(options) -> None:
    from vqdist.backends import resolve_backend

    resolve_backend(options.backend)
    for name, least in (("batch_size", 1), ("shard_size", 1), ("num_workers", 0)):
        number = getattr(options, name)
        if number is not None and number < least:
            raise UserError(f"{name} {number} is not possible; it must be at least {least}")
    if not 0 <= options.data.max_bad_frac <= 1:
        raise UserError(f"max_bad_frac {options.data.max_bad_frac} is not possible; give a share from 0 to 1")
    if not 0 < options.dist_timeout <= 525_600:  # a year
        raise UserError(f"dist_timeout {options.dist_timeout} is not possible; it must be above 0 and at most 525600")
    if not options.out:
        raise UserError("--out is empty; give the folder for the codes")
    if isinstance(options.data.folder, str) and options.data.folder.startswith("codes:"):
        raise UserError(f"--data {options.data.folder} are codes already; give the images that they were made of")
    check_spec(options.data.folder)
    check_given(options.run)

    from vqdist.encoding import check_folder

    check_folder(Path(options.out).expanduser(), options.data.folder)


def _open(options):
    """Return the tokenizer of a run, and its view of the images."""
    from vqdist.data.dataset import ImageDataset
    from vqdist.models.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(options.run, options.data.image_size, trust_code=options.trust_code)
    dataset = ImageDataset(
        options.data.folder,
        tokenizer.image_size,
        channels=tokenizer.channels,
        augment=False,
        view=View(resample=tokenizer.resample),
        on_bad_image=options.data.on_bad_image,
        max_bad_frac=options.data.max_bad_frac,
    )
    return tokenizer, dataset


@contextmanager
def _progress_bar(backend):
    """Yield a function to call after every batch: it draws rank 0's bar and names the images that are replaced."""
    from tqdm import tqdm

    with tqdm(desc="encode", unit="image", disable=not (backend.is_main and sys.stderr.isatty())) as bar:

        def progress(images: int, *, of: int, replaced: list[str]) -> None:
            for name in replaced:
                bar.write(f"skipped an image that cannot be decoded: {printable(name)}", file=sys.stderr)
            bar.total = of
            bar.update(images)

        yield progress


def _report(out: str, numbers: dict) -> None:
    if not numbers["encoded"]:
        print(
            f"{out} is finished: {numbers['count']} images in {numbers['shards']} shards; nothing to do",
            file=sys.stderr,
        )
    if numbers["replaced"]:
        print(
            f"{numbers['replaced']} images could not be decoded; each has the codes of the next good image and its "
            "own label",
            file=sys.stderr,
        )
    if (few := numbers.pop("few")) is not None:
        print(f"warning: {few}", file=sys.stderr)
    print(json.dumps(numbers))
