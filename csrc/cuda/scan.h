// What the CUDA kernels offer to the XLA handlers.
#pragma once

#include "cuda/plan.h"
#include "cuda/vendor.h"

namespace jax_sscan::gpu {

Error LaunchForward(const Forward& p, Stream stream);
Error LaunchBackward(const Backward& p, Stream stream);

// The states that enter the spans of plan but the first (the adjoints, for a Backward), into carry.
Error LaunchCarries(const Forward& p, const Plan& plan, void* carry, void* sum_delta,
                    Stream stream);
Error LaunchCarries(const Backward& p, const Plan& plan, void* carry, void* sum_delta,
                    Stream stream);

}  // namespace jax_sscan::gpu
