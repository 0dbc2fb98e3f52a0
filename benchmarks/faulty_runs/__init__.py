"""Tiny models really trained with one fault each, and with none: what `hnet diagnose` finds, what it misses.

    python -m benchmarks.faulty_runs [--only NAME ...] [--runs DIR]     # about ten minutes on 2 cores

Runs that are in DIR already are only judged again. `faults` is the table of them, `texts` writes what they read,
`drivers` bends the trainer where no key of a config can, `judge` tells found from missed. Results go to
benchmarks/results/faulty_runs.json, and from there into docs/diagnose.md (`python -m benchmarks.table`).
"""
