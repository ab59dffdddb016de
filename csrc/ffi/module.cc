// jax_sscan._native: the one extension module of the package. Python reads build_info() to learn
// what this binary contains before it registers anything with XLA.

#include <nanobind/nanobind.h>

#include "xla/ffi/api/c_api.h"

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
  info["cuda"] = false;
  return info;
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("build_info", &BuildInfo, "How this binary was built, and what it contains.");
}
