"""Run by torchrun from test_freezing.py: two ranks train the decoder alone.

usage: frozen_worker.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from test_freezing import check_decoder_alone

if __name__ == "__main__":
    check_decoder_alone(Path(sys.argv[1]), backend="accelerate")
    print("as expected", flush=True)
