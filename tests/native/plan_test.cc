// How the plan for the GPU cuts problems up (csrc/cuda/plan.cc), which takes no GPU to say.
//
//     plan_test batch dim length bld|bdl segments
//
// prints the forward and the backward kernel for float32 and 16 states: walkers, thin ones,
// channels of a lane, whether alone or in spans. Without arguments it checks plans of drawn
// problems, and prints how many.
#include "cuda/plan.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

namespace jax_sscan::gpu {
namespace {

constexpr Elements kAll[] = {Elements::kGeneral, Elements::kOdd,    Elements::kMixed,
                             Elements::kFloat,   Elements::kBfloat, Elements::kHalf};

void Require(bool condition, const char* what, const Problem& p) {
  if (condition) return;
  std::printf("%s: batch %lld, groups %lld, dim %lld, length %lld, dstate %lld\n", what,
              static_cast<long long>(p.batch), static_cast<long long>(p.groups),
              static_cast<long long>(p.dim), static_cast<long long>(p.length),
              static_cast<long long>(p.dstate));
  std::exit(1);
}

void CheckCover(const Problem& p, const Plan& plan) {
  Require(int64_t{plan.blocks_per_group} * plan.block_channels >= p.group_dim(), "channels", p);
  Require(plan.blocks == p.batch * p.groups * plan.blocks_per_group, "blocks", p);
  Require((plan.tiles - 1) * int64_t{kTile} + plan.last_steps == p.length, "steps", p);
  Require(int64_t{plan.spans} * plan.span_tiles >= plan.tiles, "tiles", p);
  Require((plan.spans - 1) * int64_t{plan.span_tiles} < plan.tiles, "a span without tiles", p);
  Require(int64_t{plan.pieces} * plan.piece_tiles >= plan.span_tiles, "pieces", p);
  Require(plan.state_groups * plan.shape.group() >= p.dstate, "states", p);
}

int CheckDrawn() {
  std::mt19937 random(0);
  auto draw = [&](int64_t most) { return 1 + static_cast<int64_t>(random() % most); };
  int count = 0;
  for (int i = 0; i < 5000; ++i) {
    const int64_t groups = draw(3), length = draw(i % 10 ? 3000 : 300000);
    const Problem p =
        MakeProblem(draw(8), groups * draw(3000), length, draw(i % 3 ? 16 : 300), groups, kTile, 1,
                    random() % 2, i % 7 != 0, true, random() % 2, DataType::F32);
    // XLA is asked for what is enough before dtypes and pointers are known.
    const int64_t forward = ForwardWorkspace::Enough(p), backward = BackwardWorkspace::Enough(p);
    const bool general = !p.B_varies || p.dstate > kMostPlainStates;
    for (Elements elements : kAll) {
      if (general != (elements == Elements::kGeneral)) continue;
      const Plan plan = Plan::Forward(p, elements);
      CheckCover(p, plan);
      Require(ForwardWorkspace(p, plan).bytes <= forward, "forward's workspace", p);
      for (bool little_shared : {false, true}) {
        const Plan back = Plan::Backward(p, elements, little_shared);
        CheckCover(p, back);
        Require(BackwardWorkspace(p, back).bytes <= backward, "backward's workspace", p);
      }
      ++count;
    }
  }
  return count;
}

}  // namespace
}  // namespace jax_sscan::gpu

int main(int count, char** arguments) {
  using namespace jax_sscan;
  using namespace jax_sscan::gpu;
  if (count == 1) {
    std::printf("%d\n", CheckDrawn());
    return 0;
  }
  auto number = [&](int i) { return std::atoll(arguments[i]); };
  const Problem p =
      MakeProblem(number(1), number(2), number(3), 16, 1, kTile, 1,
                  std::string(arguments[4]) == "bld", true, true, number(5) != 0, DataType::F32);
  auto print = [](const Plan& plan) {
    std::printf("%d", plan.walkers);
    if (plan.thin) std::printf("+%d", plan.thin);
    std::printf("x%d%s%s\n", plan.shape.channels, plan.alone ? " alone" : "",
                plan.spans > 1 ? " in spans" : "");
  };
  print(Plan::Forward(p, Elements::kFloat));
  print(Plan::Backward(p, Elements::kFloat, false));
}
