"""`python -m scripts.train_chunk_lm`: another name of `hnet train-chunk-lm`, for people who know it by this one."""

from hnet.cli.main import train_chunk_lm

if __name__ == "__main__":
    train_chunk_lm()
