"""The tour: attention on your own words or your own array, step by step, then its proof on this machine.

python -m jattn [TEXT | FILE.txt | FILE.npy] [--out Y.npy] [--save PICTURE.png|.svg] [--heads N] [--seed S] [--causal]
"""

import os
import sys

from jattn.tour.command import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `python -m jattn | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
