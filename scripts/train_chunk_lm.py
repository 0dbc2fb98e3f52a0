"""`python -m scripts.train_chunk_lm`: another name of `hnet train-chunk-lm`, for people who know it by this one."""

import sys

from hnet.cli import main

if __name__ == "__main__":
    main(["train-chunk-lm", *sys.argv[1:]], prog_name="hnet")
