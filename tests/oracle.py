"""An independent float64 oracle for every operation of the package.

It shares no code with ``jax_sscan``: NumPy only, one plain loop over time per recurrence, gradients
by a hand-written reverse loop. Inputs are widened to float64 or complex128, which is exact for all
the dtypes that the package takes.

Every result is a `Bounded`: a value and, beside it, an error scale found by running error analysis.
The scale answers "how far may an honest implementation land from this value, in units of the
machine epsilon of its compute dtype?". Each multiplication, addition and function evaluation is
charged one unit of its result, errors of its operands are carried along by the first-order rules,
and every exponential is also charged the rounding of its argument (exp(x) turns one epsilon of x
into |x| epsilons of the result; kernels round x * log2(e)). So the scale is the problem's own
conditioning, element by element: a gradient that is a difference of large terms is allowed more
than one that is not, and an output of one step is allowed next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]


class Bounded:
    """A float64 or complex128 array with a first-order bound on its rounding error, in epsilons.

    The bound of a complex element holds for the modulus of its error.
    """

    # Let `ndarray * Bounded` fall through to the methods below, not to an object array.
    __array_ufunc__ = None

    def __init__(self, value: Any, error: Any = 0.0) -> None:
        self.value: Array = np.asarray(value)
        self.error: Array = np.broadcast_to(np.asarray(error, np.float64), self.value.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def __add__(self, other: Bounded) -> Bounded:
        value = self.value + other.value
        return Bounded(value, self.error + other.error + np.abs(value))

    def __mul__(self, other: Bounded) -> Bounded:
        value = self.value * other.value
        carried = self.error * np.abs(other.value) + other.error * np.abs(self.value)
        return Bounded(value, carried + np.abs(value))

    def scaled(self, factor: float | Array) -> Bounded:
        """A product with 2, with -1 or with a mask of zeros and ones: exact, so not charged."""
        return Bounded(self.value * factor, self.error * np.abs(factor))

    def __getitem__(self, index: Any) -> Bounded:
        return Bounded(self.value[index], self.error[index])

    def transpose(self, *axes: int) -> Bounded:
        return Bounded(self.value.transpose(*axes), self.error.transpose(*axes))

    def reshape(self, *shape: int) -> Bounded:
        return Bounded(self.value.reshape(*shape), self.error.reshape(*shape))

    def flip(self, axis: int) -> Bounded:
        return Bounded(np.flip(self.value, axis), np.flip(self.error, axis))

    def sum(self, axis: int | tuple[int, ...]) -> Bounded:
        """A sum in any order.

        The terms' own errors add up. Rounding of the partial sums is charged as one more unit of
        the sum of absolute values, which a tree of any width (and a straight loop over terms whose
        signs or roundings are random) keeps within.
        """
        value = self.value.sum(axis)
        return Bounded(value, self.error.sum(axis) + np.abs(self.value).sum(axis))

    def stored(self, dtype: Any, compute: Any) -> Bounded:
        """Rounded to ``dtype`` on the way, where that has fewer bits than the compute dtype."""
        out, unit = ml_dtypes.finfo(dtype), ml_dtypes.finfo(compute)
        if out.bits >= unit.bits:
            return self
        half_ulp = (float(out.eps) * np.abs(self.value) + float(out.smallest_subnormal)) / 2
        return Bounded(self.value, self.error + half_ulp / float(unit.eps))

    @property
    def real(self) -> Bounded:
        return Bounded(self.value.real, self.error)


def _stack(steps: Sequence[Bounded]) -> Bounded:
    return Bounded(np.stack([s.value for s in steps]), np.stack([s.error for s in steps]))


def _exp(x: Bounded) -> Bounded:
    value = np.exp(x.value)
    return Bounded(value, np.abs(value) * (1.0 + x.error + np.abs(x.value)))


def _sigmoid_value(x: Array) -> Array:
    ex = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, ex) / (1.0 + ex)


def _sigmoid(x: Bounded) -> Bounded:
    value = _sigmoid_value(x.value)
    slope = value * _sigmoid_value(-x.value)
    return Bounded(value, value + slope * (np.abs(x.value) + x.error))


def _silu(x: Bounded) -> Bounded:
    return x * _sigmoid(x)


def _silu_slope(x: Bounded) -> Bounded:
    """d silu / dx = s (1 + x (1 - s)), with 1 - s taken as sigmoid(-x) so that it does not
    cancel."""
    return _sigmoid(x) * (Bounded(np.ones(())) + x * _sigmoid(x.scaled(-1.0)))


def _softplus(x: Bounded) -> Bounded:
    linear = x.value > 20.0
    value = np.where(linear, x.value, np.log1p(np.exp(np.minimum(x.value, 20.0))))
    slope = np.where(linear, 1.0, _sigmoid_value(x.value))
    charged = np.where(linear, 0.0, value + slope * np.abs(x.value))
    return Bounded(value, charged + slope * x.error)


def _softplus_slope(x: Bounded) -> Bounded:
    smooth = _sigmoid(x)
    linear = x.value > 20.0
    return Bounded(np.where(linear, 1.0, smooth.value), np.where(linear, 0.0, smooth.error))


def wide(x: Any) -> Array:
    """Any input as float64 or complex128; exact for every dtype that the package takes."""
    x = np.asarray(x)
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def compute_dtype(inputs: Mapping[str, Any]) -> Any:
    """float64 where any input is of that precision, else float32."""
    double = any(np.asarray(x).dtype in (np.float64, np.complex128) for x in inputs.values() if x is not None)
    return np.float64 if double else np.float32


def _reset_after(ids: Any, steps: int, batch: int, reverse: bool) -> Array:
    """(steps, batch): 0 where a position in processing order starts a new segment, else 1.

    The first processed position always continues the initial state.
    """
    keep = np.ones((steps, batch))
    if ids is not None:
        ordered = np.asarray(ids).T[::-1] if reverse else np.asarray(ids).T
        keep[1:] = ordered[1:] == ordered[:-1]
    return keep


@dataclass(frozen=True)
class ScanOptions:
    """The arguments of the scan that are not arrays."""

    delta_softplus: bool = False
    reverse: bool = False
    layout: str = "bdl"


class _Scan:
    """The scan in processing order, time first; keeps what the reverse loop needs."""

    def __init__(self, inputs: Mapping[str, Any], options: ScanOptions) -> None:
        self.inputs = inputs
        self.options = options
        self.time_first = (2, 0, 1) if options.layout == "bdl" else (1, 0, 2)
        self.A = wide(inputs["A"])
        self.dim, self.dstate = self.A.shape
        self.u = self._sequence("u")
        self.steps, self.batch, _ = self.u.shape
        self.is_complex = np.iscomplexobj(self.A)
        self.y_factor = 2.0 if self.is_complex else 1.0
        self.B = self._projection("B")
        self.C = self._projection("C")

        self.raw = self._sequence("delta")
        if inputs.get("delta_bias") is not None:
            self.raw = self.raw + Bounded(wide(inputs["delta_bias"]))
        self.delta = _softplus(self.raw) if options.delta_softplus else self.raw
        self.keep = _reset_after(inputs.get("segment_ids"), self.steps, self.batch, options.reverse)[:, :, None, None]

        self.decay = _exp(self.delta[..., None] * Bounded(self.A))
        self.drive = (self.delta * self.u)[..., None] * self.B
        start = inputs.get("initial_state")
        state = Bounded(np.zeros((self.batch, self.dim, self.dstate), self.A.dtype) if start is None else wide(start))
        before, after = [], []
        for t in range(self.steps):
            state = state.scaled(self.keep[t])
            before.append(state)
            state = self.decay[t] * state + self.drive[t]
            after.append(state)
        self.last_state = state
        if self.steps:
            self.before, self.after = _stack(before), _stack(after)
        else:
            empty = Bounded(np.zeros((0, self.batch, self.dim, self.dstate), self.A.dtype))
            self.before = self.after = empty

        y = (self.C * self.after).sum(-1).real.scaled(self.y_factor)
        if inputs.get("D") is not None:
            y = y + Bounded(wide(inputs["D"])) * self.u
        self.ungated = y
        self.z = self._sequence("z") if inputs.get("z") is not None else None
        self.out = y if self.z is None else y * _silu(self.z)

    def _ordered(self, x: Array) -> Array:
        return x[::-1] if self.options.reverse else x

    def _sequence(self, name: str) -> Bounded:
        return Bounded(self._ordered(wide(self.inputs[name]).transpose(self.time_first)))

    def sequence_out(self, x: Bounded) -> Bounded:
        """(steps, batch, dim) in processing order -> the caller's layout."""
        if self.options.reverse:
            x = x.flip(0)
        return x.transpose(*((1, 2, 0) if self.options.layout == "bdl" else (1, 0, 2)))

    def _is_interleaved(self, name: str) -> bool:
        x = np.asarray(self.inputs[name])
        return self.is_complex and x.dtype.kind != "c" and x.ndim > 2

    def _projection(self, name: str) -> Bounded:
        """B or C as (steps or 1, batch or 1, dim, dstate)."""
        x = wide(self.inputs[name])
        if x.ndim == 2:
            return Bounded(x[None, None])
        if self._is_interleaved(name):
            x = x[..., 0::2] + 1j * x[..., 1::2]
        if x.ndim == 3:
            x = x[:, None] if self.options.layout == "bdl" else x[:, :, None]
        x = x.transpose((3, 0, 1, 2) if self.options.layout == "bdl" else (1, 0, 2, 3))
        return Bounded(self._ordered(np.repeat(x, self.dim // x.shape[2], axis=2)))

    def projection_out(self, name: str, g: Bounded) -> Bounded:
        """Gradient per (step, batch, dim, dstate) -> summed and laid out as the input was."""
        x = np.asarray(self.inputs[name])
        if x.ndim == 2:
            return g.sum((0, 1))
        groups = 1 if x.ndim == 3 else x.shape[1 if self.options.layout == "bdl" else 2]
        g = g.reshape(self.steps, self.batch, groups, self.dim // groups, self.dstate).sum(3)
        if self.options.reverse:
            g = g.flip(0)
        g = g.transpose(*((1, 2, 3, 0) if self.options.layout == "bdl" else (1, 0, 2, 3)))
        if x.ndim == 3:
            g = g[:, 0] if self.options.layout == "bdl" else g[:, :, 0]
        if self._is_interleaved(name):
            # The cotangent c of a complex r + i s pairs as Re(c (dr + i ds)) = Re(c) dr - Im(c) ds.
            pair = np.stack([g.value.real, -g.value.imag], -1)
            error = np.repeat(g.error[..., None], 2, -1)
            g = Bounded(pair, error).reshape(*x.shape)
        return g


def selective_scan(inputs: Mapping[str, Any], options: ScanOptions = ScanOptions()) -> tuple[Bounded, Bounded]:
    """Out in the caller's layout, and the state after the last processed position."""
    scan = _Scan(inputs, options)
    return scan.sequence_out(scan.out), scan.last_state


def ungated_scan(inputs: Mapping[str, Any], options: ScanOptions = ScanOptions()) -> Bounded:
    """What the gate multiplies: the scan and D u."""
    scan = _Scan(inputs, options)
    return scan.sequence_out(scan.ungated)


def selective_scan_gradients(
    inputs: Mapping[str, Any],
    options: ScanOptions,
    out_cotangent: Any,
    last_state_cotangent: Any = None,
) -> dict[str, Bounded]:
    """The cotangent of every floating input, in JAX's convention (transposes, no conjugation)."""
    s = _Scan(inputs, options)
    g = Bounded(s._ordered(wide(out_cotangent).transpose(s.time_first)))
    gradients: dict[str, Bounded] = {}
    if s.z is not None:
        # An implementation may keep what the gate multiplied, in the dtype of the output.
        kept = s.ungated.stored(np.asarray(out_cotangent).dtype, compute_dtype(inputs))
        gradients["z"] = s.sequence_out(g * kept * _silu_slope(s.z))
        g = g * _silu(s.z)

    seed = g[..., None].scaled(s.y_factor)
    towards_state = seed * s.C
    gradients["C"] = s.projection_out("C", seed * s.after)

    shape = (s.batch, s.dim, s.dstate)
    carry = Bounded(np.zeros(shape, s.A.dtype) if last_state_cotangent is None else wide(last_state_cotangent))
    reverse_states = []
    for t in reversed(range(s.steps)):
        state_cotangent = carry + towards_state[t]
        reverse_states.append(state_cotangent)
        carry = (s.decay[t] * state_cotangent).scaled(s.keep[t])
    if inputs.get("initial_state") is not None:
        gradients["initial_state"] = carry
    lam = _stack(reverse_states[::-1]) if s.steps else s.after

    through_decay = lam * s.decay * s.before
    gradients["A"] = (through_decay * s.delta[..., None]).sum((0, 1))
    gradients["B"] = s.projection_out("B", lam * (s.delta * s.u)[..., None])
    into_drive = (lam * s.B).sum(-1).real
    grad_u = into_drive * s.delta
    if inputs.get("D") is not None:
        gradients["D"] = (g * s.u).sum((0, 1))
        grad_u = grad_u + g * Bounded(wide(inputs["D"]))
    gradients["u"] = s.sequence_out(grad_u)

    grad_delta = (through_decay * Bounded(s.A)).sum(-1).real + into_drive * s.u
    if options.delta_softplus:
        grad_delta = grad_delta * _softplus_slope(s.raw)
    gradients["delta"] = s.sequence_out(grad_delta)
    if inputs.get("delta_bias") is not None:
        gradients["delta_bias"] = grad_delta.sum((0, 1))
    return gradients


def selective_state_update(inputs: Mapping[str, Any], dt_softplus: bool = False) -> tuple[Bounded, Bounded]:
    """One decode step from `state`, `x`, `dt`, `A`, `B`, `C` and the optional `D`, `z`,
    `dt_bias`."""
    A = wide(inputs["A"])
    x = Bounded(wide(inputs["x"]))
    dt = Bounded(wide(inputs["dt"]))
    if inputs.get("dt_bias") is not None:
        dt = dt + Bounded(wide(inputs["dt_bias"]))
    if dt_softplus:
        dt = _softplus(dt)

    def per_channel(name: str) -> Bounded:
        p = wide(inputs[name])
        p = p[:, None] if p.ndim == 2 else p
        return Bounded(np.repeat(p, A.shape[0] // p.shape[1], axis=1))

    state = _exp(dt[..., None] * Bounded(A)) * Bounded(wide(inputs["state"]))
    state = state + (dt * x)[..., None] * per_channel("B")
    out = (per_channel("C") * state).sum(-1).real.scaled(2.0 if np.iscomplexobj(A) else 1.0)
    if inputs.get("D") is not None:
        out = out + Bounded(wide(inputs["D"])) * x
    if inputs.get("z") is not None:
        out = out * _silu(Bounded(wide(inputs["z"])))
    return out, state


@dataclass(frozen=True)
class ConvOptions:
    """The arguments of the convolution that are not arrays."""

    silu: bool = False
    layout: str = "bdl"


class _Conv:
    """The convolution over (batch, dim, width - 1 + length): the state's columns, then x's."""

    def __init__(self, inputs: Mapping[str, Any], options: ConvOptions) -> None:
        self.options = options
        x = wide(inputs["x"])
        x = x if options.layout == "bdl" else x.transpose(0, 2, 1)
        self.batch, self.dim, self.length = x.shape
        self.weight = wide(inputs["weight"])
        self.past = self.weight.shape[1] - 1
        start = inputs.get("initial_state")
        history = np.zeros((self.batch, self.dim, self.past)) if start is None else wide(start)
        self.line = np.concatenate([history, x], axis=2)
        # Number the runs of equal ids; the state's columns belong to the run of position 0.
        run = np.zeros((self.batch, self.past + self.length), np.int64)
        if inputs.get("segment_ids") is not None and self.length:
            ids = np.asarray(inputs["segment_ids"])
            run[:, self.past + 1 :] = np.cumsum(ids[:, 1:] != ids[:, :-1], axis=1)
        self.run = run

        bias = inputs.get("bias")
        first = np.zeros(self.dim) if bias is None else wide(bias)
        pre = []
        for t in range(self.length):
            total = Bounded(np.broadcast_to(first, (self.batch, self.dim)))
            for k in range(self.past + 1):
                tap = Bounded(self.line[:, :, t + k] * self.seen(t, k))
                total = total + tap * Bounded(self.weight[:, k])
            pre.append(total)
        self.pre = _stack(pre).transpose(1, 2, 0) if pre else Bounded(np.zeros((self.batch, self.dim, 0)))
        self.out = _silu(self.pre) if options.silu else self.pre
        # What a continuation may still see: the tail of the line, without earlier segments.
        self.tail_seen = (self.run[:, self.length :] == self.run[:, -1:])[:, None].astype(float)
        self.final_state = Bounded(self.line[:, :, self.length :] * self.tail_seen)

    def seen(self, t: int, k: int) -> Array:
        """(batch, 1): 1 where tap k of position t lies in the position's own run."""
        return (self.run[:, t + k] == self.run[:, t + self.past])[:, None].astype(float)

    def lay_out(self, x: Bounded) -> Bounded:
        return x if self.options.layout == "bdl" else x.transpose(0, 2, 1)


def causal_conv1d(inputs: Mapping[str, Any], options: ConvOptions = ConvOptions()) -> tuple[Bounded, Bounded]:
    """Out in the caller's layout, and the last width - 1 inputs that a continuation may see."""
    conv = _Conv(inputs, options)
    return conv.lay_out(conv.out), conv.final_state


def causal_conv1d_gradients(
    inputs: Mapping[str, Any],
    options: ConvOptions,
    out_cotangent: Any,
    final_state_cotangent: Any = None,
) -> dict[str, Bounded]:
    """Cotangents of `x`, `weight` and, where given, `bias` and `initial_state`."""
    conv = _Conv(inputs, options)
    g = wide(out_cotangent)
    seed = Bounded(g if options.layout == "bdl" else g.transpose(0, 2, 1))
    if options.silu:
        seed = seed * _silu_slope(conv.pre)
    value, error = np.zeros(conv.line.shape), np.zeros(conv.line.shape)
    if final_state_cotangent is not None:
        value[:, :, conv.length :] += wide(final_state_cotangent) * conv.tail_seen
    weight = []
    for k in range(conv.past + 1):
        taps = []
        for t in range(conv.length):
            seen = conv.seen(t, k)
            back = seed[:, :, t].scaled(seen) * Bounded(conv.weight[:, k])
            value[:, :, t + k] += back.value
            error[:, :, t + k] += back.error + np.abs(value[:, :, t + k])
            taps.append(seed[:, :, t] * Bounded(conv.line[:, :, t + k] * seen))
        weight.append(_stack(taps).sum((0, 1)) if taps else Bounded(np.zeros(conv.dim)))
    line = Bounded(value, error)
    gradients = {
        "x": conv.lay_out(line[:, :, conv.past :]),
        "weight": _stack(weight).transpose(1, 0),
    }
    if inputs.get("initial_state") is not None:
        gradients["initial_state"] = line[:, :, : conv.past]
    if inputs.get("bias") is not None:
        gradients["bias"] = seed.sum((0, 2))
    return gradients


def causal_conv1d_update(inputs: Mapping[str, Any], silu: bool = False) -> tuple[Bounded, Bounded]:
    """One step from `x` (batch, dim), `state`, `weight` and the optional `bias`."""
    x, state, weight = (wide(inputs[name]) for name in ("x", "state", "weight"))
    line = np.concatenate([state, x[:, :, None]], axis=2)
    out = (Bounded(line) * Bounded(weight)).sum(2)
    if inputs.get("bias") is not None:
        out = out + Bounded(wide(inputs["bias"]))
    return _silu(out) if silu else out, Bounded(line[:, :, 1:])
