"""The pictures of docs/report.md: the page of runs in a headless Chromium, at the size of a desk and of a phone.

bash tests/browser/install.sh
python -m tests.browser.screenshots RUN [RUN ...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from browser.chromium import PHONE, Browser

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"


def main() -> None:
    """Write docs/images/report_*.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        page = Path(folder) / "page.html"
        subprocess.run([sys.executable, "-m", "vqdist", "report", *runs, "--html", str(page)], check=True)
        browser.open(f"file://{page}", (1100, 700))
        browser.picture(IMAGES / "report_curves.png")
        browser.open(f"file://{page}", PHONE, "dark")
        browser.value("document.getElementById('pictures').scrollIntoView()")
        browser.settle()
        browser.picture(IMAGES / "report_phone.png")


if __name__ == "__main__":
    main()
