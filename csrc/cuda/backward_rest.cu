// Backward with segments, of mixed dtypes and odd sizes, of more than 16 states, on GPUs with
// little shared memory, and of everything else; and the regular kernel of float32 that spills, 8 to
// 52 bytes: its blocks of 128 channels leave stagers neither registers nor shared memory to spare.
#include "cuda/backward.cuh"

namespace jax_sscan::gpu {
namespace {

template <Elements kElements, Layout kLayout>
Error LaunchShape(const Backward& p, const Plan& plan, const BackwardWorkspace& workspace,
                  Stream stream) {
  const auto launch = [&](auto kernel) { return kernel(p, plan, workspace, stream); };
  if (!IsRegular(kElements) || p.has_segments) {
    if (plan.state_groups > 1)
      return launch(Launch<float, 2, 8, 2, 384, 128, true, kElements, kLayout, true>);
    return launch(Launch<float, 2, 8, 2, 384, 128, false, kElements, kLayout, true>);
  }
  if constexpr (IsRegular(kElements)) {
    if (plan.state_groups > 1)
      return launch(Launch<float, 2, 8, 2, 384, 128, true, kElements, kLayout>);
    if constexpr (kElements == Elements::kFloat) {
      if (plan.walkers == 256) {
        if constexpr (kLayout == Layout::kTimeLast)
          if (plan.in_quads)
            return launch(Launch<float, 4, 4, 2, 256, 128, false, kElements, kLayout, false, true>);
        return launch(Launch<float, 4, 4, 2, 256, 128, false, kElements, kLayout>);
      }
    }
    return launch(Launch<float, 4, 4, 2, 128, 0, false, kElements, kLayout>);
  }
  return kSuccess;
}

template <typename Number, int kStates, int kLanes>
Error LaunchGeneral(const Backward& p, const Plan& plan, const BackwardWorkspace& workspace,
                    Stream stream) {
  constexpr Elements kElements = Elements::kGeneral;
  constexpr Layout kLayout = Layout::kAny;
  const auto launch = plan.state_groups > 1
                          ? Launch<Number, kStates, kLanes, 1, 384, 96, true, kElements, kLayout>
                          : Launch<Number, kStates, kLanes, 1, 416, 0, false, kElements, kLayout>;
  return launch(p, plan, workspace, stream);
}

}  // namespace

Error LaunchBackwardRest(const Backward& p, const Plan& plan, const BackwardWorkspace& workspace,
                         Stream stream) {
  if (plan.elements == Elements::kGeneral)
    return IsComplex(p) ? LaunchGeneral<Complex, 1, 16>(p, plan, workspace, stream)
                        : LaunchGeneral<float, 2, 8>(p, plan, workspace, stream);
  return LaunchFor<Elements::kFloat, Elements::kBfloat, Elements::kHalf, Elements::kMixed,
                   Elements::kOdd>(plan.elements, p.channel_last, [&](auto storage) {
    return LaunchShape<storage.kElements, storage.kLayout>(p, plan, workspace, stream);
  });
}

}  // namespace jax_sscan::gpu
