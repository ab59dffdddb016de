// What the extension module exports of the CPU kernels.
#pragma once

#include "ffi/scan.h"

namespace jax_sscan {

void* CpuForwardHandler();
void* CpuBackwardHandler();

// Bytes of the backward call's workspace result; reads the sizes and flags of the problem only.
// has_states says whether there is an initial state or a cotangent of the last one.
int64_t CpuWorkspaceBytes(Problem p, bool has_states);

// The instruction set that the kernels use here: "baseline", "avx2" or "avx512".
const char* CpuTarget();

}  // namespace jax_sscan
