// What every extension module of the package offers to jax_sscan/backends/native.py: the XLA custom
// calls of its platform, and how much workspace they need.
#pragma once

#include <nanobind/nanobind.h>

#include "ffi/scan.h"

namespace jax_sscan {

struct Module {
  void *forward, *backward;  // handlers
  int64_t (*forward_workspace_bytes)(const Problem&);
  int64_t (*backward_workspace_bytes)(const Problem&, bool has_states);
};

inline void DefineModule(nanobind::module_& m, const Module& module, nanobind::dict info) {
  namespace nb = nanobind;
  info["version"] = JAX_SSCAN_VERSION;
  info["build_type"] = JAX_SSCAN_BUILD_TYPE;
  // Baked in by the headers; a runtime older than this cannot load our handlers.
  info["ffi_api"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.def("build_info", [info] { return info; }, "How this binary was built, and what it contains.");
  m.def(
      "handlers",
      [module] {
        nb::dict handlers;
        handlers["forward"] = nb::capsule(module.forward, "xla._CUSTOM_CALL_TARGET");
        handlers["backward"] = nb::capsule(module.backward, "xla._CUSTOM_CALL_TARGET");
        return handlers;
      },
      "The XLA custom calls, as capsules by name.");
  m.def(
      "workspace_bytes",
      [module](int64_t batch, int64_t dim, int64_t length, int64_t dstate, int64_t groups,
               int64_t chunk, int64_t instances, bool channel_last, bool B_varies, bool C_varies,
               bool has_segments, bool is_complex, bool is_double, bool has_states) {
        const DataType real = is_double ? DataType::F64 : DataType::F32;
        const DataType complex = is_double ? DataType::C128 : DataType::C64;
        const Problem p =
            MakeProblem(batch, dim, length, dstate, groups, chunk, instances, channel_last,
                        B_varies, C_varies, has_segments, is_complex ? complex : real);
        return nb::make_tuple(module.forward_workspace_bytes(p),
                              module.backward_workspace_bytes(p, has_states));
      },
      nb::arg("batch"), nb::arg("dim"), nb::arg("length"), nb::arg("dstate"), nb::arg("groups"),
      nb::arg("chunk"), nb::arg("instances"), nb::arg("channel_last"), nb::arg("B_varies"),
      nb::arg("C_varies"), nb::arg("has_segments"), nb::arg("is_complex"), nb::arg("is_double"),
      nb::arg("has_states"), "Bytes of the workspace results of the forward and backward calls.");
}

}  // namespace jax_sscan
