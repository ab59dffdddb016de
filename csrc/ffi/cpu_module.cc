// jax_sscan._cpu: the native CPU implementation.
#include "ffi/cpu_handlers.h"
#include "ffi/module.h"

#if defined(__clang__)
constexpr char kCompiler[] = "Clang " __clang_version__;
#elif defined(__GNUC__)
constexpr char kCompiler[] = "GCC " __VERSION__;
#else
constexpr char kCompiler[] = "unknown";
#endif

NB_MODULE(_cpu, m) {
  nanobind::dict info;
  info["compiler"] = kCompiler;
  info["target"] = jax_sscan::CpuTarget();
  jax_sscan::DefineModule(m,
                          {jax_sscan::CpuForwardHandler(), jax_sscan::CpuBackwardHandler(),
                           [](const jax_sscan::Problem&) { return int64_t{0}; },
                           [](const jax_sscan::Problem& p, bool has_states) {
                             return jax_sscan::CpuWorkspaceBytes(p, has_states);
                           }},
                          info);
}
