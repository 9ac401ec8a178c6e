"""Train on records of text, such as the OpenAssistant file; the guide's main script.

    python launch/train_model.py --dataset FILE --checkpoint-dir checkpoints --epochs 15
    torchrun --nproc_per_node=2 --max-restarts=20 launch/train_model.py --dataset FILE ...

It is `trm_dist train` with defaults for text on ordinary machines; every flag is the same.
"""

import sys

from trm_dist.cli import main
from trm_dist.config import Config

TEXT_DEFAULTS = Config().with_values(
    {
        "h_cycles": 2,
        "l_cycles": 2,
        "n_sup": 4,
        "lr": 3e-4,
        "warmup_steps": 200,
        "epochs": 5,
    }
)

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], TEXT_DEFAULTS))
