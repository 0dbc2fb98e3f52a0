"""GPU kernels in Triton, one file an op. Each holds its kernels, the functions the op calls (same names and arguments
as in `native.py`), and `KERNELS`, which says how every kernel is launched: `aot.py` compiles exactly those."""
