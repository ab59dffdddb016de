// jax_sscan._cuda: the CUDA implementation. Importing it starts nothing and needs no driver.
#include "ffi/cuda_handlers.h"
#include "ffi/module.h"

NB_MODULE(_cuda, m) {
  nanobind::dict info;
  info["compiler"] = JAX_SSCAN_CUDA_COMPILER;
  info["target"] = JAX_SSCAN_CUDA_ARCHITECTURES;
  jax_sscan::DefineModule(
      m,
      {jax_sscan::CudaForwardHandler(), jax_sscan::CudaBackwardHandler(),
       jax_sscan::CudaForwardWorkspaceBytes,
       [](const jax_sscan::Problem& p, bool) { return jax_sscan::CudaBackwardWorkspaceBytes(p); }},
      info);
}
