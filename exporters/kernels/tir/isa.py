"""Instruction set levels that kernels are generated for: what differs between them is data here, not code elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arkinfer.exporters.kernels.tir.source import add, bits, intrinsic, splat


@dataclass(frozen=True)
class Isa:
    """One instruction set level; ``targets.probe`` knows by the same names which of them a machine has.

    ``lanes`` is the number of float32 in a vector register; 16 rows of a panel take ``parts`` registers.
    ``tokens_int8`` and ``tokens_float`` say how many tokens, ``panels_int8`` and ``panels_float`` how many panels of a
    matrix product fit into the registers.
    """

    name: str
    target: Mapping[str, Any]
    lanes: int
    product: str  # "vnni", "maddubs", "sdot" or "usdot"
    tokens_int8: int
    panels_int8: int
    tokens_float: int
    panels_float: int

    @property
    def parts(self) -> int:
        """Registers that hold one value for each of the 16 rows of a panel."""
        return 16 // self.lanes

    @property
    def signed_bytes(self) -> bool:
        """Whether 8-bit codes go into ``dot`` as signed: the product has no exact form for unsigned codes over 127."""
        return self.product not in ("vnni", "usdot")

    @property
    def in_place_masks(self) -> bool:
        """Whether codes may stay at their place in the byte (code << 2p), to be shifted back once in the sum."""
        return self.product in ("vnni", "usdot")

    @property
    def pairs(self) -> bool:
        """Whether there is an instruction for the product of two rows with two tokens, eight bytes of each."""
        return self.product == "usdot"

    def dot(self, accumulator: str, pairs: Sequence[tuple[str, str]], limit: int) -> str:
        """Return text for ``accumulator + sum of products`` in exact integers.

        accumulator: int32 x lanes; pairs: (codes, activations), both of 4 * lanes bytes, where lane r sums the products
        of bytes 4r..4r+3. Codes are uint8 in 0..limit, or int8 where ``limit`` is 255 and ``signed_bytes`` holds;
        activations are int8 in -127..127.
        """
        size = 4 * self.lanes
        wide, half, byte = f"int32x{self.lanes}", f"int16x{2 * self.lanes}", f"int8x{size}"
        if self.product == "vnni":
            for codes, x in pairs:
                accumulator = intrinsic(wide, "llvm.x86.avx512.vpdpbusd.512", accumulator, codes, x)
            return accumulator
        if self.product == "usdot":
            for codes, x in pairs:
                accumulator = intrinsic(wide, "llvm.aarch64.neon.usdot", accumulator, codes, x)
            return accumulator
        if self.product == "sdot":
            for codes, x in pairs:
                signed = codes if limit == 255 else bits(byte, codes)
                accumulator = intrinsic(wide, "llvm.aarch64.neon.sdot", accumulator, signed, x)
            return accumulator
        # Pairwise sums saturate at 16 bits. Small codes leave room to add several of them before widening; 8-bit codes
        # give their sign to the activation instead, so that 2 * 128 * 127 fits.
        unsigned = f"uint8x{size}"
        if limit == 255:
            halves = [
                intrinsic(
                    half,
                    "llvm.x86.avx2.pmadd.ub.sw",
                    bits(unsigned, intrinsic(byte, "llvm.abs", codes, "T.bool(False)")),
                    intrinsic(byte, "llvm.x86.avx2.psign.b", x, codes),
                )
                for codes, x in pairs
            ]
            room = 1
        else:
            halves = [intrinsic(half, "llvm.x86.avx2.pmadd.ub.sw", codes, x) for codes, x in pairs]
            room = 32767 // (2 * 127 * limit)
        ones = splat("T.int16(1)", 2 * self.lanes)
        for start in range(0, len(halves), room):
            total = add(*halves[start : start + room])
            accumulator = add(accumulator, intrinsic(wide, "llvm.x86.avx2.pmadd.wd", total, ones))
        return accumulator

    def dot_pairs(self, accumulator: str, codes: str, x: str) -> str:
        """Return text for ``accumulator`` + the products of two rows with two tokens.

        codes: uint8x16, eight bytes of each row; x: int8x16, eight bytes of each token. accumulator: int32x4, the first
        row with both tokens, then the second.
        """
        return intrinsic("int32x4", "llvm.aarch64.neon.usmmla", accumulator, codes, x)


X86_64_V3 = Isa(
    name="x86-64-v3",
    target={"kind": "llvm", "mcpu": "x86-64-v3"},
    lanes=8,
    product="maddubs",
    tokens_int8=4,
    panels_int8=1,
    tokens_float=3,
    panels_float=1,
)
X86_64_V4_VNNI = Isa(
    name="x86-64-v4-vnni",
    target={"kind": "llvm", "mcpu": "x86-64-v4", "mattr": ["+avx512vnni"]},
    lanes=16,
    product="vnni",
    tokens_int8=6,
    panels_int8=2,
    tokens_float=6,
    panels_float=2,
)
# Cortex-A76 is what the code is scheduled for; of its features only those named by the level are used.
AARCH64_DOTPROD = Isa(
    name="aarch64-dotprod",
    target={"kind": "llvm", "mcpu": "cortex-a76", "mattr": ["+dotprod", "+fullfp16"]},
    lanes=4,
    product="sdot",
    tokens_int8=4,
    panels_int8=1,
    tokens_float=3,
    panels_float=1,
)
AARCH64_I8MM = Isa(
    name="aarch64-i8mm",
    target={"kind": "llvm", "mcpu": "cortex-a76", "mattr": ["+dotprod", "+fullfp16", "+i8mm"]},
    lanes=4,
    product="usdot",
    tokens_int8=6,
    panels_int8=1,
    tokens_float=3,
    panels_float=1,
)
ISAS: Mapping[str, Isa] = {isa.name: isa for isa in (X86_64_V3, X86_64_V4_VNNI, AARCH64_DOTPROD, AARCH64_I8MM)}
