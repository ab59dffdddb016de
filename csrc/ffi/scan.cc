#include "ffi/scan.h"

#include <initializer_list>
#include <string>
#include <vector>

namespace jax_sscan {
namespace {

constexpr int kOperands = 10;
constexpr const char* kNames[kOperands] = {
    "u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "segment_ids"};

using Shape = std::vector<int64_t>;

std::string ToString(const Shape& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

// Reads and checks the buffers of one call; the first failed check is kept.
class Reader {
 public:
  Reader(const char* call, ffi::RemainingArgs args, ffi::RemainingRets rets)
      : call_(call), args_(args), rets_(rets) {}

  bool Count(size_t args, size_t rets) {
    if (args_.size() != args || rets_.size() != rets) {
      Fail("takes " + std::to_string(args) + " operands and " + std::to_string(rets) +
           " results, got " + std::to_string(args_.size()) + " and " +
           std::to_string(rets_.size()));
    }
    return !failed_;
  }

  ffi::AnyBuffer Arg(size_t index) { return *args_.get<ffi::AnyBuffer>(index); }

  Shape ArgShape(size_t index) {
    auto dims = Arg(index).dimensions();
    return Shape(dims.begin(), dims.end());
  }

  // An absent operand travels as an empty vector.
  bool Absent(size_t index) { return ArgShape(index) == Shape{0}; }

  Array Arg(size_t index, const char* name, const Shape& shape,
            std::initializer_list<DataType> dtypes) {
    return Check(Arg(index), name, shape, dtypes);
  }

  Array Ret(size_t index, const char* name, const Shape& shape,
            std::initializer_list<DataType> dtypes) {
    return Check(**rets_.get<ffi::AnyBuffer>(index), name, shape, dtypes);
  }

  // A result that nobody asked for is an empty vector too.
  Array OptionalRet(size_t index, const char* name, const Shape& shape,
                    std::initializer_list<DataType> dtypes) {
    auto dims = (**rets_.get<ffi::AnyBuffer>(index)).dimensions();
    return Shape(dims.begin(), dims.end()) == Shape{0} ? Array{} : Ret(index, name, shape, dtypes);
  }

  // The last result of every call.
  void Workspace(Problem& p) {
    const size_t index = rets_.size() - 1;
    p.workspace_bytes = static_cast<int64_t>((**rets_.get<ffi::AnyBuffer>(index)).size_bytes());
    p.workspace = Ret(index, "workspace", {p.workspace_bytes}, {DataType::U8});
  }

  void Fail(const std::string& what) {
    if (!failed_) message_ = std::string(call_) + ": " + what;
    failed_ = true;
  }

  bool failed() const { return failed_; }
  ffi::Error error() const { return ffi::Error::InvalidArgument(message_); }

 private:
  Array Check(ffi::AnyBuffer buffer, const char* name, const Shape& shape,
              std::initializer_list<DataType> dtypes) {
    auto dims = buffer.dimensions();
    Shape came(dims.begin(), dims.end());
    if (came != shape) {
      Fail(std::string(name) + " must have shape " + ToString(shape) + ", got " + ToString(came));
    }
    bool allowed = false;
    for (DataType dtype : dtypes) allowed |= dtype == buffer.element_type();
    if (!allowed) {
      Fail(std::string(name) + " has an unsupported dtype (XLA type " +
           std::to_string(static_cast<int>(buffer.element_type())) + ")");
    }
    return Array{buffer.untyped_data(), buffer.element_type()};
  }

  const char* call_;
  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  bool failed_ = false;
  std::string message_;
};

struct Shapes {
  Shape sequence, weight, B, C, vector, state, segments, states;
};

// Reads the operands, which both calls have in front, and the shapes that everything else is held
// to.
Shapes ParseOperands(Reader& reader, const Attributes& attributes, Problem& p) {
  p.delta_softplus = attributes.delta_softplus;
  p.reverse = attributes.reverse;
  p.chunk = attributes.chunk;
  p.groups = attributes.groups;
  p.instances = attributes.instances;
  Shape u = reader.ArgShape(0), A = reader.ArgShape(2);
  if (u.size() != 3 || A.size() != 2 || p.chunk < 1 || p.groups < 1 || p.instances < 1) {
    reader.Fail("u must have 3 axes and A 2, got shapes " + ToString(u) + " and " + ToString(A));
    return {};
  }
  p.batch = u[0];
  p.dim = u[attributes.channel_last ? 2 : 1];
  p.length = u[attributes.channel_last ? 1 : 2];
  p.SetLayout(attributes.channel_last);
  p.dstate = A[1];
  if (p.batch < 1 || p.dim < 1 || p.length < 1 || p.dstate < 1 || p.dim % p.groups ||
      p.batch % p.instances) {
    reader.Fail("batch, dim, length and dstate must be at least 1 and groups (" +
                std::to_string(p.groups) + ") divide dim, instances (" +
                std::to_string(p.instances) + ") batch; got u " + ToString(u) + " and A " +
                ToString(A));
    return {};
  }
  p.state = reader.Arg(2).element_type();
  const DataType real = ffi::ToReal(p.state);
  const bool is_complex = real != p.state;
  p.B_varies = reader.Arg(3).dimensions().size() == 4;
  p.C_varies = reader.Arg(4).dimensions().size() == 4;
  p.has_segments = !reader.Absent(kOperands - 1);

  Shapes shapes;
  shapes.sequence = u;
  shapes.weight = {p.instances * p.dim, p.dstate};
  Shape varying = attributes.channel_last ? Shape{p.batch, p.length, p.groups, p.dstate}
                                          : Shape{p.batch, p.groups, p.dstate, p.length};
  shapes.B = p.B_varies ? varying : shapes.weight;
  shapes.C = p.C_varies ? varying : shapes.weight;
  shapes.vector = {p.instances * p.dim};
  shapes.state = {p.batch, p.dim, p.dstate};
  shapes.segments = {p.batch, p.length};
  shapes.states = {p.batch, p.num_chunks() - 1, p.dstate, p.dim};

  Array* arrays[kOperands] = {
      &p.operands.u,          &p.operands.delta,      &p.operands.A,
      &p.operands.B,          &p.operands.C,          &p.operands.D,
      &p.operands.z,          &p.operands.delta_bias, &p.operands.initial_state,
      &p.operands.segment_ids};
  const Shape* expected[kOperands] = {
      &shapes.sequence, &shapes.sequence, &shapes.weight, &shapes.B,     &shapes.C,
      &shapes.vector,   &shapes.sequence, &shapes.vector, &shapes.state, &shapes.segments};
  for (int i = 0; i < kOperands; ++i) {
    if (i >= 5 && reader.Absent(i)) continue;
    const bool sequence = i == 0 || i == 1 || i == 6;
    const bool varying_real = !is_complex && ((i == 3 && p.B_varies) || (i == 4 && p.C_varies));
    if (sequence || varying_real) {
      *arrays[i] = reader.Arg(i, kNames[i], *expected[i],
                              {DataType::F32, DataType::BF16, DataType::F16, DataType::F64});
    } else if (i == 2) {
      *arrays[i] = reader.Arg(i, kNames[i], *expected[i],
                              {DataType::F32, DataType::F64, DataType::C64, DataType::C128});
    } else if (i == 5 || i == 7) {
      *arrays[i] = reader.Arg(i, kNames[i], *expected[i], {real});
    } else if (i == 9) {
      *arrays[i] = reader.Arg(i, kNames[i], *expected[i], {DataType::S32});
    } else {
      *arrays[i] = reader.Arg(i, kNames[i], *expected[i], {p.state});
    }
  }
  return shapes;
}

}  // namespace

ffi::ErrorOr<Forward> ParseForward(const Attributes& attributes, ffi::RemainingArgs args,
                                   ffi::RemainingRets rets) {
  Reader reader("jax_sscan forward", args, rets);
  Forward p{};
  if (!reader.Count(kOperands, 5)) return ffi::Unexpected(reader.error());
  Shapes shapes = ParseOperands(reader, attributes, p);
  if (!reader.failed()) {
    p.out = reader.Ret(0, "out", shapes.sequence,
                       {DataType::F32, DataType::BF16, DataType::F16, DataType::F64});
    p.last_state = reader.OptionalRet(1, "last_state", shapes.state, {p.state});
    p.states = reader.OptionalRet(2, "states", shapes.states, {p.state});
    p.ungated = reader.OptionalRet(3, "ungated", shapes.sequence, {p.out.dtype});
    if (p.ungated && !p.operands.z) reader.Fail("ungated is a result only where there is z");
    reader.Workspace(p);
  }
  if (reader.failed()) return ffi::Unexpected(reader.error());
  return p;
}

ffi::ErrorOr<Backward> ParseBackward(const Attributes& attributes, ffi::RemainingArgs args,
                                     ffi::RemainingRets rets) {
  Reader reader("jax_sscan backward", args, rets);
  Backward p{};
  if (!reader.Count(kOperands + 4, kOperands)) return ffi::Unexpected(reader.error());
  Shapes shapes = ParseOperands(reader, attributes, p);
  if (!reader.failed()) {
    p.states = reader.Arg(kOperands, "states", shapes.states, {p.state});
    p.out_cotangent = reader.Arg(kOperands + 2, "out_cotangent", shapes.sequence,
                                 {DataType::F32, DataType::BF16, DataType::F16, DataType::F64});
    const Operands& o = p.operands;
    if (o.z)
      p.ungated = reader.Arg(kOperands + 1, "ungated", shapes.sequence, {p.out_cotangent.dtype});
    else if (!reader.Absent(kOperands + 1))
      reader.Fail("ungated is an operand only where there is z");
    if (!reader.Absent(kOperands + 3))
      p.last_state_cotangent =
          reader.Arg(kOperands + 3, "last_state_cotangent", shapes.state, {p.state});
    auto like = [&](int index, const Array& operand, const Shape& shape) {
      return operand ? reader.Ret(index, kNames[index], shape, {operand.dtype}) : Array{};
    };
    p.cotangents = {like(0, o.u, shapes.sequence),
                    like(1, o.delta, shapes.sequence),
                    like(2, o.A, shapes.weight),
                    like(3, o.B, shapes.B),
                    like(4, o.C, shapes.C),
                    like(5, o.D, shapes.vector),
                    like(6, o.z, shapes.sequence),
                    like(7, o.delta_bias, shapes.vector),
                    like(8, o.initial_state, shapes.state),
                    Array{}};
    reader.Workspace(p);
  }
  if (reader.failed()) return ffi::Unexpected(reader.error());
  return p;
}

}  // namespace jax_sscan
