// What the CUDA kernels offer to the XLA handlers.
#pragma once

#include "cuda/plan.h"
#include "cuda/vendor.h"

namespace jax_sscan::gpu {

Error LaunchForward(const Forward& p, Stream stream);
Error LaunchBackward(const Backward& p, Stream stream);

// The pass before the walk over the spans of plan, into the Pieces of its workspace.
Error LaunchPieces(const Forward& p, const Plan& plan, void* ends, void* sum_delta, Stream stream);
Error LaunchPieces(const Backward& p, const Plan& plan, void* ends, void* sum_delta, Stream stream);

// What the walk of all blocks left, added up.
Error LaunchSums(const Backward& p, const Plan& plan, const BackwardWorkspace& workspace,
                 Stream stream);

}  // namespace jax_sscan::gpu
