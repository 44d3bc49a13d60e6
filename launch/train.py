"""`vqdist train` as a file, for launchers that start a script: the same arguments, the same training.

    torchrun --nproc_per_node 8 launch/train.py vqgan --config RECIPE --out RUN
    accelerate launch --config_file accelerate_configs/gpu_8.yaml launch/train.py vqgan --config RECIPE --out RUN
    deepspeed launch/train.py vqgan --config RECIPE --out RUN --backend deepspeed \
        --deepspeed_config deepspeed_configs/zero2.json

The `--local_rank` that DeepSpeed's launcher adds has no effect: ranks come from the environment.
"""

import sys

from vqdist.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
