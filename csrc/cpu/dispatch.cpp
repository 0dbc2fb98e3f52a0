// Chooses the instruction set once, at the first call.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace hnet {

static const Kernels& choose() {
  const char* env = std::getenv("HNET_CPU_ISA");
  std::string want = env ? env : "";
#if defined(HNET_HAVE_AVX512) || defined(HNET_HAVE_AVX512_BF16)
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("f16c");
#endif
#ifdef HNET_HAVE_AVX512_BF16
  bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (avx512_bf16 && (want.empty() || want == "avx512_bf16")) return kernels_avx512_bf16();
#endif
#ifdef HNET_HAVE_AVX512
  if (avx512 && (want.empty() || want == "avx512")) return kernels_avx512();
#endif
#ifdef HNET_HAVE_AVX2
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && (want.empty() || want == "avx2")) return kernels_avx2();
#endif
  if (want.empty() || want == "baseline") return kernels_baseline();
  throw std::runtime_error("HNET_CPU_ISA=" + want + " is not one this machine and build can run (baseline, avx2, avx512, avx512_bf16)");
}

const Kernels& kernels() {
  static const Kernels& table = choose();
  return table;
}

}  // namespace hnet
