"""Undo promises of the design one by one, each in a copy of the project, and report which test of every push notices.

    python tests/mutations/run.py [NAME ...]

A promise is undone by replacing a piece of the package's text, which must stand in it exactly once. Before that the
named tests pass on the unchanged copy. Exit code 1: a mutant survived, or its piece of text is not there any more.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LEFT_BEHIND = shutil.ignore_patterns(".*", "runs", "build", "dist", "__pycache__", "*.egg-info")
LIMIT = 1800  # seconds for the tests of one mutant


class Promise(NamedTuple):
    """A sentence that the design stands for, how it is undone, and the tests of every push that hold it."""

    says: str
    text: str
    instead: str
    tests: tuple[str, ...]


TWO_RANKS = "test_distributed.py"
PROMISES = {
    "adaptive_weight": Promise(
        "the gradients behind the adaptive weight are averaged over ranks before their norms",
        "of_reference, of_adversarial = self.backend.average(layer.gain * gradients)",
        "of_reference, of_adversarial = gradients",
        (f"{TWO_RANKS}::test_weights_are_those_of_one_process",),
    ),
    "no_sync": Promise(
        "ranks exchange gradients with the last micro-batch only",
        "return nullcontext() if last or self.wrapped is self.module else self.wrapped.no_sync()",
        "return nullcontext()",
        (f"{TWO_RANKS}::test_each_network_exchanges_once_per_step",),
    ),
    "random_state": Promise(
        "a resumed run draws the random numbers that the stopped one would have drawn",
        "seeding.restore_generator_states(states)",
        "pass",
        ("test_checkpoint.py::test_stop_and_resume_equals_straight_to_the_bit",),
    ),
    "freezing": Promise(
        "the generator's loss leaves no gradient in the discriminator",
        "        parameter.requires_grad_(False)\n    try:",
        "        pass\n    try:",
        ("test_backends.py", f"{TWO_RANKS}::test_weights_are_those_of_one_process"),
    ),
    "codebooks": Promise(
        "codebooks that learn by counting are equal over ranks",
        "distributed = is_distributed()\n",
        "distributed = False\n",
        ("test_quantizers.py::test_ranks_stay_equal_on_different_data",),
    ),
    "places": Promise(
        "noise belongs to the image's place in the data order, whichever rank takes it",
        "yield batch._replace(places=places)",
        "shift = sampler.rank * len(places); "  # the place of rank 0's image
        "yield batch._replace(places=range(places.start - shift, places.stop - shift))",
        (f"{TWO_RANKS}::test_a_discrete_vae_is_that_of_one_process",),
    ),
    "commit": Promise(
        "a checkpoint has its name only when it is complete",
        "return target.with_name(target.name + PARTIAL)",
        "return target",
        ("test_checkpoint.py",),
    ),
    "finite": Promise(
        "no tensor that is not finite is committed to a checkpoint",
        "broken = ~torch.stack(list(checked.values()))",
        "broken = torch.zeros(len(checked), dtype=torch.bool, device=self.backend.device)",
        ("test_finite.py",),
    ),
    "clip": Promise(
        "gradients are clipped to their limit",
        "clip_grad_norm_(self.module.parameters(), self.max_grad_norm)",
        'clip_grad_norm_(self.module.parameters(), float("inf"))',
        ("test_options.py::test_option_changes_exactly_the_weights_that_it_is_about",),
    ),
    "average": Promise(
        "the exponential moving average follows the weights on every step",
        "            self.average.update()\n",
        "            pass\n",
        ("test_average.py::test_weights_are_averaged_by_the_formula_and_buffers_copied_at_every_step",),
    ),
}


def found(tests: tuple[str, ...]) -> list[str]:
    """Return the tests with their folders: a file's name is enough to find it."""
    paths = []
    for test in tests:
        name, *rest = test.split("::")
        (path,) = (ROOT / "tests").rglob(name)
        paths.append("::".join([path.relative_to(ROOT).as_posix(), *rest]))
    return paths


def place_of(promise: Promise, root: Path = ROOT) -> Path:
    """Return the file of a checkout that holds the promise's text.

    Raises:
        LookupError: it does not stand there exactly once.
    """
    places = [path for path in sorted((root / "vqdist").rglob("*.py")) if promise.text in path.read_text()]
    if len(places) != 1 or places[0].read_text().count(promise.text) != 1:
        raise LookupError(f"{promise.text!r} stands in {[str(path.relative_to(root)) for path in places]}")
    return places[0]


def failing(copy: Path, tests: list[str]) -> list[str]:
    """Return the tests of a copy that fail, or their errors; the first one is enough."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n0",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not nightly",
        *tests,
    ]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)


def notices(name: str) -> str | None:
    """Return the test that notices when a promise is undone."""
    with tempfile.TemporaryDirectory(prefix=f"vqdist-{name}-") as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=LEFT_BEHIND)
        place = place_of(PROMISES[name], copy)
        place.write_text(place.read_text().replace(PROMISES[name].text, PROMISES[name].instead))
        return next(iter(failing(copy, found(PROMISES[name].tests))), None)


def main(names: list[str]) -> int:
    names = names or list(PROMISES)
    if unknown := [name for name in names if name not in PROMISES]:
        print(f"there is no promise {unknown[0]}; there are: {', '.join(PROMISES)}", file=sys.stderr)
        return 2
    tests = dict.fromkeys(test for name in names for test in found(PROMISES[name].tests))
    if broken := failing(ROOT, list(tests)):
        print(f"{broken[0]} fails as it is", file=sys.stderr)
        return 1
    survived = 0
    for name in names:
        print(f"{name}: {PROMISES[name].says}", flush=True)
        try:
            test = notices(name)
        except LookupError as error:
            test, said = None, f"cannot be undone: {error}"
        else:
            said = f"noticed by {test}" if test else "NOBODY NOTICES"
        survived += test is None
        print(f"    {said}", flush=True)
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
