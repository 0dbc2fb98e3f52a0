#pragma once
#include <pybind11/pybind11.h>

namespace hnet::cuda {

// Adds cuda_route_fwd, cuda_route_step, cuda_dechunk_step and their constant cuda_scratch to the module.
void bind(pybind11::module_& m);

}  // namespace hnet::cuda
