// Runs the CUDA kernels over small problems with random data, for compute-sanitizer, which does not
// get on with a Python process around them:
//
//     nvcc -std=c++17 -arch=native -lineinfo -Icsrc -I$(jaxlib)/include -o sanitize_cuda \
//         tests/native/sanitize_cuda.cu csrc/cuda/*.cu csrc/cuda/plan.cc
//     compute-sanitizer --tool memcheck ./sanitize_cuda
//     compute-sanitizer --tool racecheck ./sanitize_cuda
//
// With -DJAX_SSCAN_LONG_SPAN=8, also with the pass before spans that looks for what is forgotten.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/scan.h"

using namespace jax_sscan;

namespace {

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

struct Config {
  int64_t batch, dim, length, dstate, groups;
  DataType u, B, state;
  bool channel_last, reverse, B_varies, C_varies, segments, optional;
};

// Arrays of their exact sizes, so that a step beyond one is seen; but in words, which memcheck
// takes a copy of half a word for.
class Arrays {
 public:
  ~Arrays() {
    for (void* p : all_) cudaFree(p);
  }

  Array Make(int64_t count, DataType dtype, float scale = 1.0f) {
    const int64_t parts = ffi::ToReal(dtype) == dtype ? 1 : 2;
    const int64_t width = static_cast<int64_t>(ffi::ByteWidth(ffi::ToReal(dtype)));
    std::vector<char> host(count * parts * width);
    for (int64_t i = 0; i < count * parts; ++i) {
      const float x = scale * normal_(random_);
      if (width == 4) {
        if (dtype == DataType::S32)
          reinterpret_cast<int32_t*>(host.data())[i] = static_cast<int32_t>(i / 5);
        else
          reinterpret_cast<float*>(host.data())[i] = scale < 0 ? -std::fabs(x) : x;
      } else {
        // bfloat16 by truncation; small enough that it is also a fair float16.
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        reinterpret_cast<uint16_t*>(host.data())[i] = static_cast<uint16_t>(bits >> 16);
      }
    }
    Array array{nullptr, dtype};
    Check(cudaMalloc(&array.data, (host.size() + 3) / 4 * 4), "cudaMalloc");
    all_.push_back(array.data);
    Check(cudaMemcpy(array.data, host.data(), host.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
    return array;
  }

  Array Bytes(int64_t bytes) {
    Array array{nullptr, DataType::U8};
    if (!bytes) return array;
    Check(cudaMalloc(&array.data, bytes), "cudaMalloc");
    all_.push_back(array.data);
    return array;
  }

 private:
  std::mt19937 random_{0};
  std::normal_distribution<float> normal_;
  std::vector<void*> all_;
};

void Run(const Config& c) {
  Arrays arrays;
  Problem p = MakeProblem(c.batch, c.dim, c.length, c.dstate, c.groups, gpu::kTile, 1,
                          c.channel_last, c.B_varies, c.C_varies, c.segments, c.state);
  p.delta_softplus = c.optional, p.reverse = c.reverse;
  const int64_t sequence = p.batch * p.dim * p.length, weight = p.dim * p.dstate;
  const int64_t varying = p.batch * p.groups * p.length * p.dstate, state = p.batch * weight;
  const DataType projection = gpu::IsComplex(p) ? c.state : c.B;
  auto matrix = [&](bool varies) {
    return varies ? arrays.Make(varying, projection) : arrays.Make(weight, c.state);
  };
  Operands& o = p.operands;
  o.u = arrays.Make(sequence, c.u);
  o.delta = arrays.Make(sequence, c.u, 0.1f);
  o.A = arrays.Make(weight, c.state, -1.0f);
  o.B = matrix(c.B_varies);
  o.C = matrix(c.C_varies);
  if (c.segments) o.segment_ids = arrays.Make(p.batch * p.length, DataType::S32);
  if (c.optional) {
    o.D = arrays.Make(p.dim, DataType::F32);
    o.z = arrays.Make(sequence, c.u);
    o.delta_bias = arrays.Make(p.dim, DataType::F32);
    o.initial_state = arrays.Make(state, c.state);
  }

  Forward forward{};
  static_cast<Problem&>(forward) = p;
  forward.out = arrays.Make(sequence, c.u);
  forward.states = arrays.Make(state * ((p.length - 1) / gpu::kTile), c.state);
  if (!forward.states.data) forward.states = arrays.Bytes(1), forward.states.dtype = c.state;
  if (o.z) forward.ungated = arrays.Make(sequence, c.u);
  if (c.optional) forward.last_state = arrays.Make(state, c.state);
  forward.workspace_bytes = gpu::ForwardWorkspace::Enough(p);
  forward.workspace = arrays.Bytes(forward.workspace_bytes);
  Check(gpu::LaunchForward(forward, nullptr), "forward");

  Backward backward{};
  static_cast<Problem&>(backward) = p;
  backward.states = forward.states, backward.ungated = forward.ungated;
  backward.out_cotangent = arrays.Make(sequence, c.u);
  if (c.optional) backward.last_state_cotangent = arrays.Make(state, c.state);
  Operands& ct = backward.cotangents;
  ct.u = arrays.Make(sequence, c.u);
  ct.delta = arrays.Make(sequence, c.u);
  ct.A = arrays.Make(weight, c.state);
  ct.B = matrix(c.B_varies);
  ct.C = matrix(c.C_varies);
  if (c.optional) {
    ct.D = arrays.Make(p.dim, DataType::F32);
    ct.z = arrays.Make(sequence, c.u);
    ct.delta_bias = arrays.Make(p.dim, DataType::F32);
    ct.initial_state = arrays.Make(state, c.state);
  }
  backward.workspace_bytes = gpu::BackwardWorkspace::Enough(p);
  backward.workspace = arrays.Bytes(backward.workspace_bytes);
  Check(gpu::LaunchBackward(backward, nullptr), "backward");
  Check(cudaDeviceSynchronize(), "a kernel");
}

}  // namespace

int main() {
  constexpr DataType kF32 = DataType::F32, kBf16 = DataType::BF16, kF16 = DataType::F16;
  int count = 0;
  for (bool channel_last : {false, true})
    for (bool optional : {false, true}) {
      const Config configs[] = {
          {2, 24, 50, 16, 1, kF32, kF32, kF32, channel_last, false, true, true, false, optional},
          {2, 24, 50, 16, 3, kBf16, kBf16, kF32, channel_last, true, true, true, false, optional},
          {1, 130, 33, 5, 1, kF16, kF16, kF32, channel_last, false, true, true, false, optional},
          {1, 7, 600, 16, 1, kF32, kF32, kF32, channel_last, false, true, true, false, optional},
          {1, 6, 800, 16, 1, kBf16, kBf16, kF32, channel_last, true, true, true, false, optional},
          {2, 16, 24, 64, 1, kBf16, kBf16, kF32, channel_last, false, true, true, false, optional},
          {2, 10, 20, 64, 1, kBf16, kBf16, kF32, channel_last, false, true, true, false, optional},
          {1, 4, 20, 150, 2, kF32, kF32, kF32, channel_last, false, true, true, false, optional},
          {2, 24, 50, 16, 1, kBf16, kF32, kF32, channel_last, false, true, true, false, optional},
          {2, 24, 50, 16, 1, kBf16, kBf16, kF32, channel_last, true, true, true, true, optional},
          {1, 6, 800, 20, 1, kF32, kF32, kF32, channel_last, false, true, true, true, optional},
          {1, 6, 800, 16, 1, kF16, kF32, kF32, channel_last, true, true, true, true, optional},
          {2, 9, 40, 17, 3, kBf16, kF32, kF32, channel_last, false, true, true, true, optional},
          {2, 9, 600, 16, 1, kF32, kF32, kF32, channel_last, true, false, true, true, optional},
          {2, 5, 40, 3, 1, kF32, kF32, kF32, channel_last, false, true, false, false, optional},
          {1, 5, 18, 300, 1, kF32, kF32, kF32, channel_last, false, false, false, true, optional},
          {2, 6, 40, 16, 2, kF32, kF32, DataType::C64, channel_last, true, true, true, true,
           optional},
          {1, 6, 600, 20, 1, kBf16, kF32, DataType::C64, channel_last, false, true, false, false,
           optional},
          {1, 3, 20, 70, 1, kF32, kF32, DataType::C64, channel_last, false, true, true, false,
           optional},
          {3, 5, 1, 16, 1, kF32, kF32, kF32, channel_last, false, true, true, false, optional},
      };
      for (const Config& config : configs) Run(config), ++count;
    }
  // Enough blocks for the kernels of large problems, and for several teams to a block, of equal
  // spans and of others.
  Run({64, 256, 16, 16, 1, kBf16, kBf16, kF32, true, false, true, true, false, true}), ++count;
  Run({140, 24, 40, 16, 1, kBf16, kBf16, kF32, true, true, true, true, false, true}), ++count;
  Run({2, 480, 1100, 16, 1, kF32, kF32, kF32, false, false, true, true, false, true}), ++count;
  // Teams that have a multiprocessor each to themselves, of 32 channels, 40 in spans, and 48.
  Run({1, 600, 300, 16, 1, kBf16, kBf16, kF32, true, false, true, true, false, true}), ++count;
  Run({2, 520, 500, 16, 1, kBf16, kBf16, kF32, true, false, true, true, true, true}), ++count;
  Run({1, 5300, 100, 16, 1, kF32, kF32, kF32, false, true, true, true, true, true}), ++count;
  // The same of 40 with an odd number of tiles, and without segments.
  Run({1, 5200, 324, 16, 1, kBf16, kBf16, kF32, true, false, true, true, false, true}), ++count;
  // Spans, the pass before which loads 16 bytes at a time.
  Run({1, 72, 800, 16, 1, kBf16, kBf16, kF32, true, true, true, true, false, true}), ++count;
  std::printf("%d problems\n", count);
}
