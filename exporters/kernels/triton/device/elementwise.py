"""Code of `elementwise.py`."""

from arkinfer.exporters.kernels.triton.device.language import jit, tl


@jit
def swiglu(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_up + row * (2 * WIDTH) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, (gate / (1.0 + tl.exp(-gate)) * up).to(tl.float16), mask=inside)


@jit
def take_rows(x, rows, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    source = tl.load(rows + row)
    tl.store(out + row * WIDTH + column, tl.load(x + source * WIDTH + column, mask=inside), mask=inside)


@jit
def scale(x, WIDTH: tl.constexpr, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # logits of a whole prompt exceed 2^31 elements
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = x + row * WIDTH + column
    tl.store(place, tl.load(place, mask=inside) * FACTOR, mask=inside)
