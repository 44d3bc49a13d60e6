"""rFID over ranks against the extractor's bare forward: the cost of rounding, gathering and the distances.

Both sides see the same images with the network of FID, whose weights are as they are drawn. The bare side calls it on
8-bit batches; the other does what `vqdist evaluate --features inception` does with the images and reconstructions of
each batch: features, FID, spatial FID, KID, inception score, precision and recall.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import Row, ratio, run_json

SIDE, BATCH = 64, 16
TARGET = 1.1
RANKS = (1, 2)


def extractor_of(folder: Path):
    """Return FID's Inception with weights as they are drawn, equal on every rank."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from vqdist.evaluation.extractors import load_extractor

    class Bare(FeatureExtractorInceptionV3):
        def load_state_dict(self, *arguments, **options):
            """Stay as drawn."""

    path = folder / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    torch.save(Bare("bare", ["2048"], feature_extractor_weights_path=str(path)).state_dict(), path)
    return load_extractor(str(path), channels=3, image_size=SIDE)


def batches_of(seed: int, count: int, rank: int) -> list[Tensor]:
    """Return this rank's share of so many images, (b, 3, 64, 64) in [0, 1]."""
    rng = torch.Generator().manual_seed(1000 * seed + rank)
    return list(torch.rand(count, 3, SIDE, SIDE, generator=rng).split(BATCH))


def worker(count: int, rounds: int) -> None:
    """Print the seconds of both sides on rank 0; every rank measures its share of the images by turns."""
    from vqdist.backends import create_backend
    from vqdist.evaluation.features import FeatureSet
    from vqdist.evaluation.fidelity import fidelity

    torch.set_num_threads(1)
    backend = create_backend("accelerate" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "local")
    with tempfile.TemporaryDirectory() as folder:
        extractor = extractor_of(Path(folder)).to(backend.device)
    share = count // backend.world_size
    images, again = (batches_of(seed, share, backend.rank) for seed in (1, 2))
    eight_bits = [(batch * 255).round().byte() for part in (images, again) for batch in part]

    @torch.no_grad()
    def bare() -> None:
        for batch in eight_bits:
            extractor.network.network(batch)

    def rfid() -> None:
        sets = [FeatureSet(extractor, backend, share * backend.world_size) for _ in range(2)]
        for looked, part in zip(sets, (images, again), strict=True):
            for batch in part:
                looked.add(batch)
        fidelity(*(looked.over_ranks() for looked in sets))

    seconds: dict[str, list[float]] = {"bare": [], "rfid": []}
    for _ in range(rounds):
        for name, side in (("bare", bare), ("rfid", rfid)):
            backend.barrier()
            began = time.perf_counter()
            side()
            backend.barrier()
            seconds[name].append(time.perf_counter() - began)
    if backend.is_main:
        print(json.dumps(seconds))
    backend.close()


def run(quick: bool = False) -> list[Row]:
    """Return a row for one process and one for two, the median of three rounds."""
    count, rounds = (64, 1) if quick else (256, 3)
    rows = []
    for ranks in RANKS:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        module = ["-m", "benchmarks.rfid", str(count), str(rounds)]
        seconds = run_json([sys.executable, *launcher, *module], timeout=1800)
        detail = (
            f"{min(seconds['rfid']):.1f} against {min(seconds['bare']):.1f} s, 2 x {count} images, the fastest of each"
        )
        value = ratio(seconds["rfid"], seconds["bare"])
        rows.append(Row(f"rFID / the extractor's forward on {ranks} ranks", value, at_most=TARGET, detail=detail))
    return rows


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]))
