// The CUDA part of the native module, on the emulator. Built and used by test_cuda_emulated.py.
#include "cuda/bindings.h"
#include "cuda_emulator.h"

PYBIND11_MODULE(cuda_emulated, m) {
  hnet::cuda::bind(m);
  m.def("set_resident_blocks", [](int64_t n) { emulator::resident = n; });
}
