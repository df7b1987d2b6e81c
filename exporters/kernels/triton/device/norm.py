"""Code of `norm.py`: one block holds a row."""

from arkinfer.exporters.kernels.triton.device.language import jit, tl


@jit
def _write(x, weight, out, row, column, inside, WIDTH: tl.constexpr, EPS: tl.constexpr):
    mean = tl.sum(x * x, axis=0) / WIDTH
    normed = x * tl.rsqrt(mean + EPS) * tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + row * WIDTH + column, normed.to(tl.float16), mask=inside)


@jit
def rms_norm(x, weight, out, WIDTH: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    values = tl.load(x + row * WIDTH + column, mask=inside, other=0.0)
    _write(values, weight, out, row, column, inside, WIDTH, EPS)


@jit
def add_rms_norm(
    residual, delta, weight, out, WIDTH: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = residual + row * WIDTH + column
    values = tl.load(place, mask=inside, other=0.0)
    values += tl.load(delta + row * WIDTH + column, mask=inside, other=0.0) * SCALE
    tl.store(place, values, mask=inside)
    _write(values, weight, out, row, column, inside, WIDTH, EPS)
