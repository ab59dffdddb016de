// jax_sscan._native: the one extension module of the package. Python reads build_info() and
// handlers() to learn what this binary contains before it registers anything with XLA.

#include <nanobind/nanobind.h>

#include "ffi/cpu_handlers.h"
#include "ffi/scan.h"

namespace nb = nanobind;

namespace {

#if defined(__clang__)
constexpr char kCompiler[] = "Clang " __clang_version__;
#elif defined(__GNUC__)
constexpr char kCompiler[] = "GCC " __VERSION__;
#else
constexpr char kCompiler[] = "unknown";
#endif

nb::dict BuildInfo() {
  nb::dict info;
  info["version"] = JAX_SSCAN_VERSION;
  info["compiler"] = kCompiler;
  info["build_type"] = JAX_SSCAN_BUILD_TYPE;
  // Baked in by the headers; a runtime older than this cannot load our handlers.
  info["ffi_api"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  // The platforms for which this binary holds kernels.
  info["cpu"] = true;
  info["cuda"] = false;
  info["cpu_target"] = jax_sscan::CpuTarget();
  return info;
}

nb::dict Handlers() {
  nb::dict cpu;
  cpu["forward"] = nb::capsule(jax_sscan::CpuForwardHandler(), "xla._CUSTOM_CALL_TARGET");
  cpu["backward"] = nb::capsule(jax_sscan::CpuBackwardHandler(), "xla._CUSTOM_CALL_TARGET");
  nb::dict platforms;
  platforms["cpu"] = cpu;
  return platforms;
}

int64_t CpuWorkspaceBytes(int64_t batch, int64_t dim, int64_t length, int64_t dstate,
                          int64_t groups, int64_t chunk, int64_t instances, bool channel_last,
                          bool has_states, bool B_varies, bool C_varies, bool is_complex,
                          bool is_double) {
  jax_sscan::Problem p{};
  p.batch = batch;
  p.dim = dim;
  p.length = length;
  p.dstate = dstate;
  p.groups = groups;
  p.chunk = chunk;
  p.instances = instances;
  p.channel_last = channel_last;
  p.B_varies = B_varies;
  p.C_varies = C_varies;
  using jax_sscan::DataType;
  p.state = is_complex ? (is_double ? DataType::C128 : DataType::C64)
                       : (is_double ? DataType::F64 : DataType::F32);
  return jax_sscan::CpuWorkspaceBytes(p, has_states);
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("build_info", &BuildInfo, "How this binary was built, and what it contains.");
  m.def("handlers", &Handlers, "The XLA custom calls of each platform, as capsules by name.");
  m.def("cpu_workspace_bytes", &CpuWorkspaceBytes, nb::arg("batch"), nb::arg("dim"),
        nb::arg("length"), nb::arg("dstate"), nb::arg("groups"), nb::arg("chunk"),
        nb::arg("instances"), nb::arg("channel_last"), nb::arg("has_states"), nb::arg("B_varies"),
        nb::arg("C_varies"), nb::arg("is_complex"), nb::arg("is_double"),
        "Bytes of the workspace result of the CPU backward call.");
}
