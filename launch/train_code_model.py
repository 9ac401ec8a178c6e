"""Train on records of code; the guide's second script.

    python launch/train_code_model.py --data FILE --save model.pt --checkpoint-dir checkpoints

The same trainer and defaults as `train_model.py`; by habit it is called with --data and --save.
"""

import sys

from train_model import TEXT_DEFAULTS

from trm_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], TEXT_DEFAULTS))
