// What the extension module exports of the CUDA kernels.
#pragma once

#include "ffi/scan.h"

namespace jax_sscan {

void* CudaForwardHandler();
void* CudaBackwardHandler();

// Bytes of the workspace results; read the sizes and flags of the problem only.
int64_t CudaForwardWorkspaceBytes(const Problem& p);
int64_t CudaBackwardWorkspaceBytes(const Problem& p);

}  // namespace jax_sscan
