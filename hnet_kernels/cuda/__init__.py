"""CUDA C++ kernels (csrc/cuda/) where launches cost more than bytes, one file an op. Each holds the functions that the
op calls, with the names and arguments of `native.py`. Ops without a kernel here run on Triton's."""
