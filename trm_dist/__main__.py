"""`python -m trm_dist`, so `torchrun -m trm_dist train ...` too."""

import sys


def main() -> int:
    """Run the command line and return the exit code."""
    from trm_dist.cli import main as run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
