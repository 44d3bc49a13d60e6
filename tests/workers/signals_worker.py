"""Run by torchrun from test_backends.py: what one rank says, both hear one call later, wherever their tensors live."""

from __future__ import annotations

import torch
import torch.distributed as dist
from test_backends import Ranks

from vqdist.backends.distributed import group_timeout


def main() -> None:
    dist.init_process_group("gloo")
    for device in ("cpu", "meta"):  # meta stands for a GPU: nothing can be read from it
        ranks = Ranks()
        ranks.adopt_group(torch.device(device), group_timeout(1, None))
        assert (ranks._host_group is None) == (device == "cpu")
        assert ranks._host_group is None or dist.get_backend(ranks._host_group) == "gloo"
        said = [[0, 0, 15, 0], [0, 2, 10, 0]][ranks.rank]
        assert [ranks.largest_lately(number) for number in said] == [0, 0, 2, 15]
    ranks.close()


if __name__ == "__main__":
    main()
