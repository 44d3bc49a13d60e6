"""The pictures and outputs of docs/first_tokenizer.md, made by the very commands on that page.

    python -m benchmarks.pictures

The commands write to runs/first, which is removed before. Their pictures go to docs/images, what two of them print to
docs/outputs.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "first_tokenizer.md"
RUNS = ROOT / "runs" / "first"
PICTURES = {
    "first_step_100.png": "tokenizer/results/step_00000100.png",
    "first_step_600.png": "tokenizer/results/step_00000600.png",
    "first_codes.png": "tokenizer/results/step_00000600_codes.png",
    "first_samples.png": "samples.png",
}
OUTPUTS = {"evaluate": "first_evaluate.txt", "report": "first_report.txt"}


def commands() -> list[list[str]]:
    """Return the arguments of each `vqdist` command on the page, in their order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines() if line.startswith("vqdist ")]


def main() -> None:
    """Run the commands, and copy what they made."""
    shutil.rmtree(RUNS, ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for arguments in commands():
        print("vqdist", *arguments, flush=True)
        printed = subprocess.run(
            [sys.executable, "-m", "vqdist", *arguments],
            cwd=ROOT,
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        if arguments[0] in OUTPUTS:
            (ROOT / "docs" / "outputs" / OUTPUTS[arguments[0]]).write_text(printed, encoding="utf-8")
    for name, made in PICTURES.items():
        shutil.copyfile(RUNS / made, ROOT / "docs" / "images" / name)


if __name__ == "__main__":
    main()
