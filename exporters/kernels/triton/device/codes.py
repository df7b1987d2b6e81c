"""Codes of packed weights as factors of a float32 product, at the cost of one AND.

A code left in place in the mantissa of a float32 whose exponent is zero is the subnormal number code * 2^(bit - 149),
and a fused multiply-add takes subnormals at full speed. With the input multiplied by 2^(111 - bit) beforehand (float16
reaches 2^16, so nothing overflows), the product is code * input * 2^-38: exact, and the same for every plane.
"""

from arkinfer.exporters.kernels.triton.device.language import jit, tl

PRODUCT = tl.constexpr(2.0**-38)  # by which products are too small


@jit
def bits_of(words, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Return the codes of a plane as subnormal float32; planes that fit into 23 bits together share a shift."""
    PER: tl.constexpr = 23 // BITS
    if PLANE >= PER:
        words = words >> (PLANE // PER * PER * BITS)
    MASK: tl.constexpr = ((1 << BITS) - 1) << (PLANE % PER * BITS)
    return (words & MASK).to(tl.float32, bitcast=True)


@jit
def raised(x, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Return float32 ``x`` multiplied for its product with ``bits_of`` the plane."""
    PER: tl.constexpr = 23 // BITS
    FACTOR: tl.constexpr = 2.0 ** (111 - PLANE % PER * BITS)
    return x * FACTOR
