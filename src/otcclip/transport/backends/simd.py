"""Sixteen float32 lanes as a numba value, so that a kernel says what is vectorised instead of hoping for it.

LLVM lowers `<16 x float>` to whatever the processor has (one AVX-512 register, two of AVX, four of NEON), so
this is portable. Everything here is for use inside `numba.njit` functions; arrays are one-dimensional,
contiguous float32, and nothing checks bounds.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs
# (numba infers the types of its functions)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

LANES = 16
_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
# A product and a sum may become one fused instruction where the processor has it.
_FUSE = ("contract",)


class Lanes(types.Type):
    """The numba type of `<16 x float>`."""

    def __init__(self) -> None:
        super().__init__(name="f32x16")


lanes = Lanes()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Lanes) -> None:
        super().__init__(manager, fe_type, _VECTOR)


def _unary(result: types.Type, x: types.Type, emit: Callable[..., Any]) -> Any:
    @intrinsic
    def operation(typingctx, x_):
        return result(x), lambda context, builder, signature, args: emit(builder, *args)

    return operation


def _binary(result: types.Type, x: types.Type, y: types.Type, emit: Callable[..., Any]) -> Any:
    @intrinsic
    def operation(typingctx, x_, y_):
        return result(x, y), lambda context, builder, signature, args: emit(builder, *args)

    return operation


@intrinsic
def load(typingctx, array, index):
    """`array[index : index + 16]`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(context, builder, signature.args[0], *args), align=4)

    return lanes(array, types.intp), codegen


@intrinsic
def store(typingctx, array, index, value):
    """`array[index : index + 16] = value`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _pointer(context, builder, signature.args[0], *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), codegen


@intrinsic
def fma(typingctx, x, y, z):
    """x·y + z."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(builder.fmul(args[0], args[1], flags=_FUSE), args[2], flags=_FUSE)

    return lanes(lanes, lanes, lanes), codegen


@intrinsic
def divide_by_totals(typingctx, b, z, v, index, s0, s1, s2, s3):
    """z[index + i] = the sum of the lanes of s_i and v[index + i] = b[index + i] / z[index + i], i = 0…3.

    The four sums are folded together: half the instructions of four sums, and one division.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index, (s0, s1, s2, s3) = args[3], args[4:]
        quarters = _halve(builder, 8, _halve(builder, 16, s0, s1), _halve(builder, 16, s2, s3))
        sums = _halve(builder, 2, _halve(builder, 4, quarters))
        four = ir.VectorType(ir.FloatType(), 4)
        weights = builder.load(_pointer(context, builder, signature.args[0], args[0], index, target=four), align=4)
        builder.store(sums, _pointer(context, builder, signature.args[1], args[1], index, target=four), align=4)
        factors = builder.fdiv(weights, sums)
        builder.store(factors, _pointer(context, builder, signature.args[2], args[2], index, target=four), align=4)
        return context.get_dummy_value()

    return types.void(b, z, v, types.intp, lanes, lanes, lanes, lanes), codegen


@intrinsic
def spread(typingctx, array, index):
    """`array[index]` in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(
            builder, builder.load(_pointer(context, builder, signature.args[0], *args, target=ir.FloatType()))
        )

    return lanes(array, types.intp), codegen


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, *, target: Any = _VECTOR) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), target.as_pointer())


def _halve(builder: Any, group: int, x: Any, y: Any = None) -> Any:
    """Of the lanes of x (and then of y), the halves of each group of so many added up."""
    n = x.type.count * (1 if y is None else 2)
    low = [i for i in range(n) if i % group < group // 2]
    masks = [ir.Constant(ir.VectorType(ir.IntType(32), n // 2), [i + at for i in low]) for at in (0, group // 2)]
    return builder.fadd(*(builder.shuffle_vector(x, x if y is None else y, mask) for mask in masks))


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [value] * LANES)


def _ints(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [value] * LANES)


def _larger(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _smaller(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", x, y), x, y)


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), _ints(0))


def _fold(builder: Any, x: Any, combine: Callable[[Any, Any, Any], Any]) -> Any:
    """All lanes combined into one float, halving: 8 + 8, 4 + 4, …"""
    width = LANES
    while width > 1:
        width //= 2
        halves = [
            builder.shuffle_vector(x, x, ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(at, at + width))))
            for at in (0, width)
        ]
        x = combine(builder, *halves)
    return builder.extract_element(x, ir.Constant(ir.IntType(32), 0))


def _polynomial(builder: Any, x: Any, coefficients: Sequence[float]) -> Any:
    """Horner's rule, highest power first."""
    value = _constant(coefficients[0])
    for c in coefficients[1:]:
        value = builder.fadd(builder.fmul(value, x, flags=_FUSE), _constant(c), flags=_FUSE)
    return value


def _exp(builder: Any, x: Any) -> Any:
    """e^x within 2 ulp; e^-87 below that. 2^n·e^r with |r| ≤ ln 2 / 2, ln 2 in two parts, Taylor to r^7."""
    x = _smaller(builder, _larger(builder, x, _constant(-87.0)), _constant(88.0))
    scaled = builder.fmul(x, _constant(1.4426950408889634))
    half = builder.select(builder.fcmp_ordered("<", x, _constant(0.0)), _constant(-0.5), _constant(0.5))
    n = builder.fptosi(builder.fadd(scaled, half), _INTS)  # rounds to nearest, as it truncates
    whole = builder.sitofp(n, _VECTOR)
    r = builder.fadd(builder.fmul(whole, _constant(-0.693359375), flags=_FUSE), x, flags=_FUSE)
    r = builder.fadd(builder.fmul(whole, _constant(2.12194440054690583e-4), flags=_FUSE), r, flags=_FUSE)
    value = _polynomial(builder, r, [1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0])
    power = builder.shl(builder.add(n, _ints(127)), _ints(23))
    return builder.fmul(value, builder.bitcast(power, _VECTOR))


def _log(builder: Any, x: Any) -> Any:
    """ln x for normal x > 0, within 2 ulp of max(|ln x|, ln 2).

    x = 2^n·m with √½ ≤ m < √2; ln m = 2 atanh s, s = (m − 1)/(m + 1), |s| < .172, to s^9.
    """
    bits = builder.bitcast(x, _INTS)
    n = builder.ashr(builder.sub(bits, _ints(0x3F3504F3)), _ints(23))
    m = builder.bitcast(builder.sub(bits, builder.shl(n, _ints(23))), _VECTOR)
    s = builder.fdiv(builder.fsub(m, _constant(1.0)), builder.fadd(m, _constant(1.0)))
    square = builder.fmul(s, s)
    tail = _polynomial(builder, square, [2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0])
    whole = builder.sitofp(n, _VECTOR)
    return builder.fadd(
        builder.fmul(s, tail, flags=_FUSE), builder.fmul(whole, _constant(0.6931471805599453), flags=_FUSE), flags=_FUSE
    )


splat = _unary(lanes, types.float32, _splat)
total = _unary(types.float32, lanes, lambda builder, x: _fold(builder, x, lambda b, low, high: b.fadd(low, high)))
largest = _unary(types.float32, lanes, lambda builder, x: _fold(builder, x, _larger))
smallest = _unary(types.float32, lanes, lambda builder, x: _fold(builder, x, _smaller))
exp = _unary(lanes, lanes, _exp)
log = _unary(lanes, lanes, _log)
add = _binary(lanes, lanes, lanes, lambda builder, x, y: builder.fadd(x, y))
sub = _binary(lanes, lanes, lanes, lambda builder, x, y: builder.fsub(x, y))
mul = _binary(lanes, lanes, lanes, lambda builder, x, y: builder.fmul(x, y))
div = _binary(lanes, lanes, lanes, lambda builder, x, y: builder.fdiv(x, y))
larger = _binary(lanes, lanes, lanes, _larger)
smaller = _binary(lanes, lanes, lanes, _smaller)
