// Forward with segments, of mixed dtypes and odd sizes, and of everything else.
#include "cuda/forward.cuh"

namespace jax_sscan::gpu {
namespace {

template <Elements kElements, Layout kLayout>
ForwardLauncher Launcher(const Plan& plan) {
  if constexpr (IsRegular(kElements))
    if (plan.alone) return AloneLauncher<kElements, kLayout, true>(plan);
  if (plan.shape.lanes == 16) return Launch<float, 4, 16, 2, 128, kElements, kLayout, true>;
  return Launch<float, 4, 4, 1, 128, kElements, kLayout, true>;
}

ForwardLauncher LauncherOf(const Forward& p, const Plan& plan) {
  if (plan.elements == Elements::kGeneral)
    return IsComplex(p) ? Launch<Complex, 2, 8, 1, 128, Elements::kGeneral, Layout::kAny>
                        : Launch<float, 2, 8, 1, 128, Elements::kGeneral, Layout::kAny>;
  return ForPlain(plan.elements, p.channel_last,
                  [&](auto storage) { return Launcher<storage.kElements, storage.kLayout>(plan); });
}

}  // namespace

Error LaunchForwardRest(const Forward& p, const Plan& plan, const ForwardWorkspace& workspace,
                        Stream stream) {
  return LauncherOf(p, plan)(p, plan, workspace, stream);
}

}  // namespace jax_sscan::gpu
