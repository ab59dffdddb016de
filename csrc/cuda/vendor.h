// Everything that is CUDA's own, so that the kernels themselves also build for HIP: types, streams,
// launches, shuffles of an explicit width and fast intrinsics.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace jax_sscan::gpu {

using Stream = cudaStream_t;

// Lanes that the kernels treat as one unit. HIP wavefronts of 64 hold two of them.
constexpr int kWarp = 32;

using Error = cudaError_t;
constexpr Error kSuccess = cudaSuccess;
inline Error LastError() { return cudaGetLastError(); }
inline const char* Describe(Error error) { return cudaGetErrorString(error); }

#ifdef __CUDACC__  // not for the handlers, which the host's compiler builds

// Two neighbours in memory by one instruction, where the compiler might make two of it.
__device__ inline void StoreTogether(float* to, float x, float y) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x), "f"(y) : "memory");
}

// What `createpolicy.fractional.L2` makes of the whole of an access: its lines are the last, or the
// first, to leave the L2 cache.
constexpr uint64_t kEvictLast = 0x14F0000000000000, kEvictFirst = 0x12F0000000000000;

// Stores what a later kernel reads, which is to find it in the cache, and loads it for the last
// time.
__device__ inline void StoreForLater(float* to, float x) {
  asm volatile("st.global.L2::cache_hint.f32 [%0], %1, %2;" ::"l"(to), "f"(x), "l"(kEvictLast)
               : "memory");
}
__device__ inline void LoadLastTime(const float* from, float (&to)[4]) {
  asm volatile("ld.global.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], %5;"
               : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
               : "l"(from), "l"(kEvictFirst)
               : "memory");
}
__device__ inline void LoadLastTime(const float* from, float (&to)[1]) { to[0] = *from; }

// 2^x, within 2 ulp; results below the smallest normal number are 0.
__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, within 1 ulp; 0 for infinity.
__device__ inline float Reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float ShuffleXor(float x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask, kWarp);
}

// Which of the 32 lanes of the calling warp hold true.
__device__ inline uint32_t Ballot(bool x) { return __ballot_sync(0xffffffffu, x); }

__device__ inline float2 FromBfloats(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
__device__ inline uint32_t ToBfloats(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return __bfloat16_as_ushort(pair.x) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
}
__device__ inline float2 FromHalves(uint32_t pair) {
  return {__half2float(__ushort_as_half(static_cast<uint16_t>(pair))),
          __half2float(__ushort_as_half(static_cast<uint16_t>(pair >> 16)))};
}
__device__ inline uint32_t ToHalves(float x, float y) {
  const __half2 pair = __floats2half2_rn(x, y);
  return __half_as_ushort(pair.x) | static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
}

// threadIdx.x, asked for anew, so that no register holds it until then.
__device__ inline int ThreadAnew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// x, so that what comes of it is reckoned anew, and held in no register until then.
__device__ inline int Anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A barrier for kThreads of a block, who may stand in different places of the code. Those who meet
// elsewhere before everyone has left it need another kPlace.
template <int kThreads, int kPlace = 1>
__device__ inline void Meet() {
  asm volatile("bar.sync %0, %1;" ::"n"(kPlace), "n"(kThreads) : "memory");
}

// The same, where the code does not know how many meet, or where.
__device__ inline void Meet(int threads, int place) {
  asm volatile("bar.sync %0, %1;" ::"r"(place), "r"(threads) : "memory");
}

// The same for one warp, at a place of its own.
__device__ inline void MeetWarp(int place) {
  asm volatile("bar.sync %0, %1;" ::"r"(place), "n"(kWarp) : "memory");
}

// Lanes see what others of their warp wrote, and copied and waited for, to shared memory.
__device__ inline void MeetLanes() { __syncwarp(); }

// As Meet, at its first place. Whether any of them says so.
template <int kThreads>
__device__ inline bool MeetAny(bool x) {
  int any;
  asm volatile(
      "{ .reg .pred mine, one;\n"
      "setp.ne.s32 mine, %1, 0;\n"
      "bar.red.or.pred one, 1, %2, mine;\n"
      "selp.s32 %0, 1, 0, one; }"
      : "=r"(any)
      : "r"(static_cast<int>(x)), "n"(kThreads)
      : "memory");
  return any;
}

// Copies `bytes` there are of kBytes (4, 8 or 16), then zeros, to shared memory without a register;
// there once the same thread has called SendCopies and, as late as it can, WaitForCopies, which
// does not wait for the last kSentLater that were sent. The whole line goes to the L2 cache: where
// time is last, the next tiles are in it.
template <int kBytes>
__device__ inline void CopyAsync(void* to, const void* from, int bytes) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16)  // past the L1 cache
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
                 "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2, %3;" ::"r"(shared), "l"(from),
                 "n"(kBytes), "r"(bytes)
                 : "memory");
}
// The same for a pair of words or of half words, without a branch.
__device__ inline void CopyPairAsync(void* to, const void* from, bool words, bool exists) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile(
      "{ .reg .pred words;\n"
      "setp.ne.s32 words, %2, 0;\n"
      "@words cp.async.ca.shared.global.L2::128B [%0], [%1], 8, %3;\n"
      "@!words cp.async.ca.shared.global.L2::128B [%0], [%1], 4, %3; }" ::"r"(shared),
      "l"(from), "r"(static_cast<int>(words)), "r"(exists ? (words ? 8 : 4) : 0)
      : "memory");
}
__device__ inline void SendCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kSentLater = 0>
__device__ inline void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kSentLater) : "memory");
}

// A kernel that was launched early begins once all blocks of the one before it in the stream have
// said so, or have ended.
__device__ inline void LetNextBegin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// What the one before wrote is there, and that one has ended.
__device__ inline void WaitForBefore() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Of the current device: shared memory that a block can have at most, and multiprocessors.
inline int AttributeOfDevice(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}
inline int64_t SharedBytesOfBlock() {
  return AttributeOfDevice(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}
inline int64_t Multiprocessors() { return AttributeOfDevice(cudaDevAttrMultiProcessorCount); }

// early: the kernel waits itself for the one before it, see WaitForBefore, where the GPU knows how.
template <typename... Parameters, typename... Arguments>
inline Error LaunchKernel(void (*kernel)(Parameters...), int64_t blocks, int threads, int bytes,
                          Stream stream, bool early, const Arguments&... arguments) {
  Error error = kSuccess;
  if (bytes > 48 * 1024)  // more than needs no asking
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early && AttributeOfDevice(cudaDevAttrComputeCapabilityMajor) >= 9;
  if (error == kSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != kSuccess) LastError();  // or who asks next would be told of it again
  return error;
}

#endif  // __CUDACC__

}  // namespace jax_sscan::gpu
