// Backward of regular elements without segments and with 16 states or fewer, which is what most
// scans are.
#include "cuda/backward.cuh"

namespace jax_sscan::gpu {
namespace {

template <Elements kElements, Layout kLayout>
BackwardLauncher Launcher(const Plan& plan) {
  switch (plan.walkers) {
    case 384:
      return Launch<float, 2, 8, 2, 384, 128, false, kElements, kLayout>;
    case 320:
      return Launch<float, 2, 8, 2, 320, 160, false, kElements, kLayout>;
    case 256:
      if constexpr (kElements == Elements::kFloat && kLayout == Layout::kTimeLast)
        if (plan.in_quads)
          return Launch<float, 4, 4, 2, 256, 128, false, kElements, kLayout, false, true>;
      return Launch<float, 4, 4, 2, 256, 128, false, kElements, kLayout>;
    default:
      return LaunchBackwardRest;
  }
}

BackwardLauncher LauncherOf(const Backward& p, const Plan& plan) {
  if (!IsRegular(plan.elements) || p.has_segments || plan.state_groups > 1)
    return LaunchBackwardRest;
  return ForRegular(plan.elements, p.channel_last, [&](auto storage) {
    return Launcher<storage.kElements, storage.kLayout>(plan);
  });
}

}  // namespace

Error LaunchBackward(const Backward& p, Stream stream) {
  const bool little_shared = SharedBytesOfBlock() < kSharedBytes;
  Plan plan = Plan::Backward(p, ElementsOf(p), little_shared);
  plan.in_quads = InQuads(p);
  const BackwardWorkspace workspace(p, plan);
  char* base = static_cast<char*>(p.workspace.data);
  if (plan.spans > 1) {
    const Error error =
        LaunchPieces(p, plan, base + workspace.ends, base + workspace.sum_delta, stream);
    if (error != kSuccess) return error;
  }
  if (const Error error = LauncherOf(p, plan)(p, plan, workspace, stream); error != kSuccess)
    return error;
  return LaunchSums(p, plan, workspace, stream);
}

}  // namespace jax_sscan::gpu
