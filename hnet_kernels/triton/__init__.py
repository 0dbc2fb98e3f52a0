"""GPU kernels in Triton, one file an op; `compaction.py` is the second part of `routing.py`. Each holds its kernels,
the functions the op calls (same names and arguments as in `native.py`), and `KERNELS`, which says how every kernel is
launched: `aot.py` compiles exactly those. `common.py` launches them, and keeps what Triton has compiled for such
arguments (tests/kernels/test_triton_launch_cache.py).

What one stage launches, forward and backward, with max_chunks (tests/kernels/test_triton_launches.py counts it):

    route                forward 4: probabilities; budget, in two;        backward 1
                         compaction (2 without a budget, or of T)
    pool (boundary)      forward 1                                        backward 1
    dechunk              forward 1                                        backward 2: positions; chunks
    ratio_loss           forward 1                                        backward 1: a multiplication
    in all               7                                                5

and one more for a logit_bias: filling a tensor with a float, or summing the gradient of a learned one. The gradient of
a residual is written by the dechunk backward. pool by mean or max takes 2 launches forward, and max 3 backward. Nothing
waits for the device, and all shapes are static.

And a Mamba-2 layer between its two projections (`mamba2.py`; tests/kernels/test_mamba2.py counts it): forward 6,
backward 8, and 6 sums over what programs left for the parameters.
"""
