// Times the CUDA kernels without Python: what to tune them with, and to run under ncu.
//
//     nvcc -std=c++17 -arch=native -O3 -lineinfo -Icsrc -I$(jaxlib)/include -o kernels \
//         benchmarks/kernels.cu csrc/cuda/*.cu csrc/cuda/plan.cc
//     ./kernels [batch dim length dstate [bf16|f32|mixed [bld|bdl [segments] [ordered]]]]
//     ncu --set full --import-source yes -k regex:BackwardKernel -s 2 -c 1 ./kernels 8 1536 2048 16
//
// Random data with softplus, D, bias and gate; "mixed" is bf16 with delta, B and C in f32, and
// segments are of 100 steps; A is from -1 to -16 at random or, "ordered", about -1, -2, ... -N, as
// Mamba begins; microseconds of a launch, the median of 7 CUDA graphs of 10 launches. Without
// arguments, the shapes of docs/performance.md.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "cuda/scan.h"

namespace jax_sscan {
namespace {

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Normal numbers, or those of A: -1 to -16, or about -1, -2, ... for so many states in order.
__global__ void Fill(void* to, int64_t count, bool is_float, uint32_t seed, float mean, float size,
                     bool is_A, int64_t ordered) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  uint64_t bits = (i + 1) * 0x9E3779B97F4A7C15ull + seed * 0xBF58476D1CE4E5B9ull;
  bits = (bits ^ bits >> 31) * 0x94D049BB133111EBull;
  bits ^= bits >> 29;
  const float first = (static_cast<uint32_t>(bits) + 1.0f) / 4294967808.0f;
  const float second = static_cast<uint32_t>(bits >> 32) / 4294967296.0f;
  float x = sqrtf(-2.0f * logf(first)) * cospif(2.0f * second) * size + mean;
  if (is_A) x = ordered ? -(1.0f + i % ordered) * expf(0.1f * x) : -expf(second * 2.77f);
  if (is_float)
    static_cast<float*>(to)[i] = x;
  else
    static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(gpu::ToBfloats(x, 0.0f));
}

class Arrays {
 public:
  ~Arrays() {
    for (void* p : all_) cudaFree(p);
  }
  Array Make(int64_t count, DataType dtype, float mean = 0.0f, float size = 1.0f, bool is_A = false,
             int64_t ordered = 0) {
    const Array array{Bytes(count * static_cast<int64_t>(ffi::ByteWidth(dtype))), dtype};
    if (count)
      Fill<<<static_cast<unsigned>((count + 255) / 256), 256>>>(
          array.data, count, dtype == DataType::F32, ++seed_, mean, size, is_A, ordered);
    return array;
  }
  void* Bytes(int64_t bytes) {
    void* data;
    Check(cudaMalloc(&data, std::max<int64_t>(bytes, 1)), "cudaMalloc");
    all_.push_back(data);
    return data;
  }

 private:
  uint32_t seed_ = 0;
  std::vector<void*> all_;
};

double Microseconds(const std::function<gpu::Error(gpu::Stream)>& launch) {
  constexpr int kLaunches = 10, kRuns = 7;
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t program;
  cudaEvent_t before, after;
  Check(cudaStreamCreate(&stream), "cudaStreamCreate");
  Check(launch(stream), "a launch");  // loads the kernels, which a graph cannot
  Check(cudaStreamSynchronize(stream), "a kernel");
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  for (int i = 0; i < kLaunches; ++i) Check(launch(stream), "a launch");
  Check(cudaStreamEndCapture(stream, &graph), "capture");
  Check(cudaGraphInstantiate(&program, graph, 0), "cudaGraphInstantiate");
  Check(cudaEventCreate(&before), "cudaEventCreate");
  Check(cudaEventCreate(&after), "cudaEventCreate");
  std::vector<double> times;
  for (int run = -1; run < kRuns; ++run) {
    Check(cudaEventRecord(before, stream), "cudaEventRecord");
    Check(cudaGraphLaunch(program, stream), "cudaGraphLaunch");
    Check(cudaEventRecord(after, stream), "cudaEventRecord");
    Check(cudaStreamSynchronize(stream), "a graph");
    float milliseconds;
    Check(cudaEventElapsedTime(&milliseconds, before, after), "cudaEventElapsedTime");
    if (run >= 0) times.push_back(milliseconds * 1000.0 / kLaunches);  // the first one warms up
  }
  cudaEventDestroy(before), cudaEventDestroy(after);
  cudaGraphExecDestroy(program), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
  std::sort(times.begin(), times.end());
  return times[kRuns / 2];
}

struct Shape {
  int64_t batch, dim, length, dstate;
};

struct Dtypes {
  const char* name;
  DataType sequence, projection;  // delta is stored as B and C are
};
constexpr Dtypes kDtypes[] = {{"bf16", DataType::BF16, DataType::BF16},
                              {"f32", DataType::F32, DataType::F32},
                              {"mixed", DataType::BF16, DataType::F32}};

void Run(const Shape& shape, const Dtypes& dtypes, bool channel_last, bool segments, bool ordered) {
  const DataType dtype = dtypes.sequence, projection = dtypes.projection;
  Arrays arrays;
  Problem p = MakeProblem(shape.batch, shape.dim, shape.length, shape.dstate, 1, gpu::kTile, 1,
                          channel_last, true, true, segments, DataType::F32);
  p.delta_softplus = true;
  const int64_t sequence = p.batch * p.dim * p.length, weight = p.dim * p.dstate;
  const int64_t varying = p.batch * p.length * p.dstate;
  Operands& o = p.operands;
  o.u = arrays.Make(sequence, dtype), o.delta = arrays.Make(sequence, projection, -4.0f);
  o.A = arrays.Make(weight, DataType::F32, 0.0f, 1.0f, true, ordered ? p.dstate : 0);
  o.B = arrays.Make(varying, projection), o.C = arrays.Make(varying, projection);
  o.D = arrays.Make(p.dim, DataType::F32), o.z = arrays.Make(sequence, dtype);
  o.delta_bias = arrays.Make(p.dim, DataType::F32, 0.0f, 0.1f);
  if (segments) {
    std::vector<int32_t> ids(p.batch * p.length);
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i % p.length / 100);
    o.segment_ids = {arrays.Bytes(ids.size() * sizeof(int32_t)), DataType::S32};
    Check(cudaMemcpy(o.segment_ids.data, ids.data(), ids.size() * sizeof(int32_t),
                     cudaMemcpyHostToDevice),
          "cudaMemcpy");
  }

  Forward forward{};
  static_cast<Problem&>(forward) = p;
  forward.out = arrays.Make(sequence, dtype);
  forward.workspace_bytes = gpu::ForwardWorkspace::Enough(p);
  forward.workspace.data = arrays.Bytes(forward.workspace_bytes);
  const double alone = Microseconds([&](auto s) { return gpu::LaunchForward(forward, s); });
  forward.ungated = arrays.Make(sequence, dtype);
  forward.states = arrays.Make(p.batch * ((p.length - 1) / gpu::kTile) * weight, DataType::F32);
  const double saving = Microseconds([&](auto s) { return gpu::LaunchForward(forward, s); });

  Backward backward{};
  static_cast<Problem&>(backward) = p;
  backward.states = forward.states, backward.ungated = forward.ungated;
  backward.out_cotangent = arrays.Make(sequence, dtype);
  Operands& ct = backward.cotangents;
  ct.u = arrays.Make(sequence, dtype), ct.delta = arrays.Make(sequence, projection);
  ct.z = arrays.Make(sequence, dtype), ct.A = arrays.Make(weight, DataType::F32);
  ct.B = arrays.Make(varying, projection), ct.C = arrays.Make(varying, projection);
  ct.D = arrays.Make(p.dim, DataType::F32), ct.delta_bias = arrays.Make(p.dim, DataType::F32);
  backward.workspace_bytes = gpu::BackwardWorkspace::Enough(p);
  backward.workspace.data = arrays.Bytes(backward.workspace_bytes);
  const double back = Microseconds([&](auto s) { return gpu::LaunchBackward(backward, s); });

  const gpu::Plan there = gpu::Plan::Forward(p, gpu::ElementsOf(forward)),
                  home = gpu::Plan::Backward(p, gpu::ElementsOf(backward), false);
  auto describe = [](const gpu::Plan& plan) {
    return "{" + std::to_string(plan.shape.states) + ", " + std::to_string(plan.shape.lanes) +
           ", " + std::to_string(plan.shape.channels) + "} x " + std::to_string(plan.blocks) +
           " blocks x " + std::to_string(plan.spans) + " spans";
  };
  std::printf(
      "(%lld, %lld, %lld, %lld) %s %s%s%s: forward %.0f, saving states %.0f, %s; backward %.0f, "
      "%s\n",
      static_cast<long long>(p.batch), static_cast<long long>(p.dim),
      static_cast<long long>(p.length), static_cast<long long>(p.dstate), dtypes.name,
      channel_last ? "bld" : "bdl", segments ? " segments" : "", ordered ? " ordered" : "", alone,
      saving, describe(there).c_str(), back, describe(home).c_str());
  std::fflush(stdout);
}

}  // namespace
}  // namespace jax_sscan

int main(int count, char** words) {
  using namespace jax_sscan;
  std::vector<Shape> shapes = {{8, 1536, 2048, 16},  {4, 4096, 4096, 16}, {1, 5120, 2048, 16},
                               {1, 2048, 65536, 16}, {32, 768, 1024, 16}, {64, 384, 256, 16},
                               {16, 1536, 512, 16},  {8, 1536, 2048, 64}, {64, 1536, 1, 16},
                               {64, 1536, 16, 16},   {8, 1536, 64, 16},   {1, 1536, 2048, 16},
                               {1, 512, 1048576, 16}};
  auto number = [&](int i) { return static_cast<int64_t>(std::atoll(words[i])); };
  if (count > 4) shapes = {{number(1), number(2), number(3), number(4)}};
  std::vector<Dtypes> dtypes = {kDtypes[0], kDtypes[1]};
  if (count > 5) {
    dtypes.clear();
    for (const Dtypes& some : kDtypes)
      if (words[5] == std::string(some.name)) dtypes = {some};
    if (dtypes.empty()) {
      std::fprintf(stderr, "no such dtypes: %s\n", words[5]);
      return 1;
    }
  }
  std::vector<bool> layouts = {true, false};
  if (count > 6) layouts = {words[6] == std::string("bld")};
  bool segments = false, ordered = false;
  for (int i = 7; i < count; ++i) {
    const std::string word = words[i];
    if (word != "segments" && word != "ordered") {
      std::fprintf(stderr, "neither segments nor ordered: %s\n", words[i]);
      return 1;
    }
    (word == "segments" ? segments : ordered) = true;
  }
  for (const Shape& shape : shapes)
    for (const Dtypes& some : dtypes)
      for (bool channel_last : layouts) Run(shape, some, channel_last, segments, ordered);
}
