// The canonical form of a selective scan as the native kernels see it: jax_sscan/canonical.py, in
// C++.
//
// One Problem serves forward and backward, CPU and GPU. ParseForward and ParseBackward fill it from
// the arguments of an XLA custom call and check every shape and dtype, so that a kernel may trust
// what it gets; a failed check becomes an XLA error that names the call, the argument, what was
// expected and what came.
#pragma once

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace jax_sscan {

namespace ffi = ::xla::ffi;
using ffi::DataType;

// An operand or result; absent ones have no data.
struct Array {
  void* data = nullptr;
  DataType dtype = DataType::INVALID;
  explicit operator bool() const { return data != nullptr; }
};

// Also the struct of cotangents, where segment_ids is absent.
struct Operands {
  Array u, delta, A, B, C, D, z, delta_bias, initial_state, segment_ids;
};

struct Problem {
  int64_t batch, dim, length, dstate, groups;
  int64_t chunk;  // steps between two saved states
  // Equal parts of the batch, each with weights of its own (vmap): A, D, delta_bias and fixed B and
  // C have instances * dim rows, and so have their cotangents.
  int64_t instances;
  bool delta_softplus, reverse;
  // Layout "bld", or a single step, which both layouts store alike; otherwise "bdl".
  bool channel_last;
  bool B_varies, C_varies;  // along the sequence; otherwise (dim, dstate)
  bool has_segments;
  int64_t restart_every = 0;  // steps after which the state restarts by itself; 0: never
  DataType state;             // of A, of the states and of the accumulators: F32, F64, C64 or C128
  Operands operands;
  Array workspace;  // a result: bytes, as many as the Python side asked for
  int64_t workspace_bytes;

  // Once the length is known.
  void SetLayout(bool bld) { channel_last = bld || length == 1; }

  int64_t num_chunks() const { return (length + chunk - 1) / chunk; }
  int64_t group_dim() const { return dim / groups; }
  int64_t instance(int64_t row) const { return row / (batch / instances); }
};

// A problem of these sizes and flags, without arrays.
inline Problem MakeProblem(int64_t batch, int64_t dim, int64_t length, int64_t dstate,
                           int64_t groups, int64_t chunk, int64_t instances, bool bld,
                           bool B_varies, bool C_varies, bool has_segments, DataType state) {
  Problem p{};
  p.batch = batch;
  p.dim = dim;
  p.length = length;
  p.dstate = dstate;
  p.groups = groups;
  p.chunk = chunk;
  p.instances = instances;
  p.SetLayout(bld);
  p.B_varies = B_varies;
  p.C_varies = C_varies;
  p.has_segments = has_segments;
  p.state = state;
  return p;
}

// Absent where nobody asked for them: the last state; and what backward needs, the states on
// entering each chunk but the first in processing order, (batch, num_chunks - 1, dstate, dim), and,
// where there is a gate, the output before it, y + D u, of the dtype of out.
struct Forward : Problem {
  Array out, last_state, states, ungated;
};

struct Backward : Problem {
  Array states, ungated, out_cotangent, last_state_cotangent;
  Operands cotangents;  // results; of the same shapes and dtypes as the operands
};

// The static flags of a call, as attributes.
struct Attributes {
  bool delta_softplus, reverse, channel_last;
  int64_t chunk, groups, instances;
};

ffi::ErrorOr<Forward> ParseForward(const Attributes& attributes, ffi::RemainingArgs args,
                                   ffi::RemainingRets rets);
ffi::ErrorOr<Backward> ParseBackward(const Attributes& attributes, ffi::RemainingArgs args,
                                     ffi::RemainingRets rets);

}  // namespace jax_sscan

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_sscan::Attributes, StructMember<bool>("delta_softplus"),
                                      StructMember<bool>("reverse"),
                                      StructMember<bool>("channel_last"),
                                      StructMember<int64_t>("chunk"),
                                      StructMember<int64_t>("groups"),
                                      StructMember<int64_t>("instances"));
