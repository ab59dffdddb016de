// Backward with segments, of mixed dtypes and odd sizes, of more than 16 states, on GPUs with
// little shared memory, and of everything else.
#include "cuda/backward.cuh"

namespace jax_sscan::gpu {
namespace {

template <Elements kElements, Layout kLayout>
BackwardLauncher Launcher(const Plan& plan, bool has_segments) {
  if constexpr (IsRegular(kElements)) {
    if (!has_segments) {
      if (plan.state_groups > 1) return Launch<float, 2, 8, 2, 384, 128, true, kElements, kLayout>;
      return Launch<float, 4, 4, 2, 128, 0, false, kElements, kLayout>;
    }
  }
  if (plan.state_groups > 1)
    return Launch<float, 2, 8, 2, 384, 128, true, kElements, kLayout, true>;
  return Launch<float, 2, 8, 2, 384, 128, false, kElements, kLayout, true>;
}

template <typename Number, int kStates, int kLanes>
BackwardLauncher GeneralLauncher(const Plan& plan) {
  constexpr Elements kElements = Elements::kGeneral;
  constexpr Layout kLayout = Layout::kAny;
  return plan.state_groups > 1
             ? Launch<Number, kStates, kLanes, 1, 384, 96, true, kElements, kLayout>
             : Launch<Number, kStates, kLanes, 1, 416, 0, false, kElements, kLayout>;
}

BackwardLauncher LauncherOf(const Backward& p, const Plan& plan) {
  if (plan.elements == Elements::kGeneral)
    return IsComplex(p) ? GeneralLauncher<Complex, 1, 16>(plan)
                        : GeneralLauncher<float, 2, 8>(plan);
  return ForPlain(plan.elements, p.channel_last, [&](auto storage) {
    return Launcher<storage.kElements, storage.kLayout>(plan, p.has_segments);
  });
}

}  // namespace

Error LaunchBackwardRest(const Backward& p, const Plan& plan, const BackwardWorkspace& workspace,
                         Stream stream) {
  return LauncherOf(p, plan)(p, plan, workspace, stream);
}

}  // namespace jax_sscan::gpu
