"""Searching a run's keys: `hnet sweep sweep.toml`. Optuna (extra `sweep`) chooses, remembers and prunes; the trials are
ordinary runs, each a process with a folder of its own."""
