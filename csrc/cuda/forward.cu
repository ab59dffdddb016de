// Forward of regular elements without segments, which is what most scans are. CI takes spills here
// for errors, and in backward.cu, spans.cu and sums.cu.
#include "cuda/forward.cuh"

namespace jax_sscan::gpu {
namespace {

template <Elements kElements, Layout kLayout>
ForwardLauncher Launcher(const Plan& plan) {
  if (plan.alone) return AloneLauncher<kElements, kLayout, false>(plan);
  if (plan.shape.lanes == 16) return Launch<float, 4, 16, 2, 128, kElements, kLayout>;
  if (plan.shape.lanes == 2) return Launch<float, 2, 2, 1, 128, kElements, kLayout>;
  if (plan.shape.channels == 2) return Launch<float, 4, 4, 2, 128, kElements, kLayout>;
  switch (plan.walkers) {
    case 96:
      return Launch<float, 4, 4, 1, 96, kElements, kLayout>;
    case 160:
      return Launch<float, 4, 4, 1, 160, kElements, kLayout>;
    default:
      return Launch<float, 4, 4, 1, 128, kElements, kLayout>;
  }
}

}  // namespace

Error LaunchForward(const Forward& p, Stream stream) {
  Plan plan = Plan::Forward(p, ElementsOf(p));
  plan.in_quads = InQuads(p);
  const ForwardWorkspace workspace(p, plan);
  if (plan.spans > 1) {
    char* base = static_cast<char*>(p.workspace.data);
    const Error error =
        LaunchPieces(p, plan, base + workspace.ends, base + workspace.sum_delta, stream);
    if (error != kSuccess) return error;
  }
  if (!IsRegular(plan.elements) || p.has_segments)
    return LaunchForwardRest(p, plan, workspace, stream);
  const auto launch = ForRegular(plan.elements, p.channel_last, [&](auto storage) {
    return Launcher<storage.kElements, storage.kLayout>(plan);
  });
  return launch(p, plan, workspace, stream);
}

}  // namespace jax_sscan::gpu
