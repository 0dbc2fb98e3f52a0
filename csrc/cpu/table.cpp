// The table of this instruction set's kernels.
#include "kernels.h"

#define HNET_STR2(x) #x
#define HNET_STR(x) HNET_STR2(x)
#define HNET_CAT2(a, b) a##b
#define HNET_CAT(a, b) HNET_CAT2(a, b)

namespace hnet {
namespace HNET_ISA {
void route_fwd(Dtype, const RouteFwd&, int);
void route_bwd(Dtype, const RouteBwd&, int);
void pool_fwd(Dtype, const Pool&, int);
void pool_bwd(Dtype, const Pool&, int);
void dechunk_fwd(Dtype, const Dechunk&, int);
void dechunk_bwd(Dtype, const Dechunk&, int);
void ema_fwd(Dtype, const Ema&, int);
void ema_bwd(Dtype, const Ema&, int);
void route_step(Dtype, const RouteStep&, int);
void dechunk_step(Dtype, const DechunkStep&, int);
void rms_norm_fwd(Dtype, const RmsNorm&, int);
void rms_norm_bwd(Dtype, const RmsNorm&, int);
void gated_conv_fwd(Dtype, const GatedConv&, int);
void gated_conv_bwd(Dtype, const GatedConv&, int);
void attention_fwd(Dtype, const Attention&, int);
void attention_bwd(Dtype, const Attention&, int);
void swiglu_fwd(Dtype, const SwiGLU&, int);
void swiglu_bwd(Dtype, const SwiGLU&, int);
void cross_entropy_fwd(Dtype, const CrossEntropy&, int);
void cross_entropy_bwd(Dtype, const CrossEntropy&, int);
void rows_sum(const RowsSum&, int);
void rows_gradient(const RowsGradient&, int);
void rows_adamw(const RowsAdamW&, int);
void linear(const Linear&, const float*, int64_t, float*, int);
void step(StepModel&, const StepCall&, int);
void sample(const Sample&);
}  // namespace HNET_ISA

const Kernels& HNET_CAT(kernels_, HNET_ISA)() {
  static const Kernels table = {
      HNET_STR(HNET_ISA),  HNET_ISA::route_fwd, HNET_ISA::route_bwd, HNET_ISA::pool_fwd,   HNET_ISA::pool_bwd,    HNET_ISA::dechunk_fwd,
      HNET_ISA::dechunk_bwd, HNET_ISA::ema_fwd, HNET_ISA::ema_bwd,   HNET_ISA::route_step, HNET_ISA::dechunk_step,
      HNET_ISA::rms_norm_fwd, HNET_ISA::rms_norm_bwd, HNET_ISA::gated_conv_fwd, HNET_ISA::gated_conv_bwd,
      HNET_ISA::attention_fwd, HNET_ISA::attention_bwd, HNET_ISA::swiglu_fwd, HNET_ISA::swiglu_bwd,
      HNET_ISA::cross_entropy_fwd, HNET_ISA::cross_entropy_bwd, HNET_ISA::rows_sum, HNET_ISA::rows_gradient, HNET_ISA::rows_adamw,
      HNET_ISA::linear, HNET_ISA::step, HNET_ISA::sample,
  };
  return table;
}

}  // namespace hnet
