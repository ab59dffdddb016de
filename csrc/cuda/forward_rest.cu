// Forward with segments, of mixed dtypes and odd sizes, and of everything else.
#include "cuda/forward.cuh"

namespace jax_sscan::gpu {
namespace {

template <Elements kElements, Layout kLayout>
Error LaunchShape(const Forward& p, const Plan& plan, const ForwardWorkspace& workspace,
                  Stream stream) {
  const auto launch = [&](auto kernel) { return kernel(p, plan, workspace, stream); };
  if constexpr (IsRegular(kElements))
    if (plan.alone) return launch(LaunchAlone<kElements, kLayout, true>);
  if (plan.shape.lanes == 16) return launch(Launch<float, 4, 16, 2, 128, kElements, kLayout, true>);
  return launch(Launch<float, 4, 4, 1, 128, kElements, kLayout, true>);
}

}  // namespace

Error LaunchForwardRest(const Forward& p, const Plan& plan, const ForwardWorkspace& workspace,
                        Stream stream) {
  if (plan.elements == Elements::kGeneral) {
    const auto launch = IsComplex(p)
                            ? Launch<Complex, 2, 8, 1, 128, Elements::kGeneral, Layout::kAny>
                            : Launch<float, 2, 8, 1, 128, Elements::kGeneral, Layout::kAny>;
    return launch(p, plan, workspace, stream);
  }
  return LaunchFor<Elements::kFloat, Elements::kBfloat, Elements::kHalf, Elements::kMixed,
                   Elements::kOdd>(plan.elements, p.channel_last, [&](auto storage) {
    return LaunchShape<storage.kElements, storage.kLayout>(p, plan, workspace, stream);
  });
}

}  // namespace jax_sscan::gpu
