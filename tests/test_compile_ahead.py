"""What benchmark/compile_ahead.py counts in a compiled program."""

import jax
import jax.numpy as jnp

from benchmark.compile_ahead import count

PROGRAM = """HloModule program

%add_one (x: f32[8,1024]) -> f32[8,1024] {
  %x = f32[8,1024]{1,0} parameter(0)
  %one = f32[] constant(1)
  %ones = f32[8,1024]{1,0} broadcast(%one), dimensions={}
  ROOT %sum = f32[8,1024]{1,0} add(%x, %ones)
}

%update (all: f32[20,8,1024], new: f32[1,8,1024], i: s32[]) -> f32[20,8,1024] {
  %all = f32[20,8,1024]{2,1,0} parameter(0)
  %new = f32[1,8,1024]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %updated = f32[20,8,1024]{2,1,0} dynamic-update-slice(%all, %new, %i, %zero, %zero)
}

%body (carry: (f32[8,1024], bf16[8])) -> (f32[8,1024], bf16[8]) {
  %carry = (f32[8,1024]{1,0}, bf16[8]{0}) parameter(0)
  %y = f32[8,1024]{1,0} get-tuple-element(%carry), index=0
  %z = bf16[8]{0} get-tuple-element(%carry), index=1
  %more = f32[8,1024]{1,0} fusion(%y), kind=kLoop, calls=%add_one
  ROOT %out = (f32[8,1024]{1,0}, bf16[8]{0}) tuple(%more, %z)
}

ENTRY %main (p: f32[20,8,1024], q: f32[8,1024], i: s32[]) -> f32[20,8,1024] {
  %p = f32[20,8,1024]{2,1,0} parameter(0)
  %q = f32[8,1024]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %start = (f32[8,1024]{1,0}, bf16[8]{0}) tuple(%q, %q)
  %loop = (f32[8,1024]{1,0}, bf16[8]{0}) while(%start), condition=%c, body=%body, config={"known_trip_count":{"n":"5"}}
  %w = f32[8,1024]{1,0} get-tuple-element(%loop), index=0
  %v = f32[1,8,1024]{2,1,0} bitcast(%w)
  %sum = f32[1,8,1024]{2,1,0} all-reduce(%v), replica_groups={}
  ROOT %result = f32[20,8,1024]{2,1,0} fusion(%p, %sum, %i), kind=kLoop, calls=%update
}
"""


def test_counts():
    """A loop as often as it turns; of an array that is updated in place what is read and written, not the whole."""
    size = 8 * 1024 * 4
    moved, _, kernels, all_reduces = count(PROGRAM)
    assert kernels == 5 + 1 + 1 and all_reduces == 1
    assert moved == 5 * 2 * size + 2 * size + 2 * size + 4


def test_counts_of_a_real_program():
    """The compiler's own text: 16 products of matrices that depend on each other."""
    x = jnp.ones((256, 256))
    compiled = jax.jit(lambda x: jax.lax.fori_loop(0, 16, lambda i, y: jnp.tanh(y @ x), x)).lower(x).compile()
    moved, by_convolutions, kernels, _ = count(compiled.as_text())
    assert by_convolutions == 0
    assert 16 * 3 * x.nbytes <= moved <= 16 * 8 * x.nbytes and 16 <= kernels <= 16 * 8


TPU_PROGRAM = """HloModule program

%convolve (x: f32[64,8], y: f32[64,8]) -> f32[64,8] {
  %x = f32[64,8]{1,0:T(8,128)S(1)} parameter(0)
  %y = f32[64,8]{1,0:T(8,128)} parameter(1)
  %convolution = f32[64,8]{1,0:T(8,128)} convolution(%x, %y), window={size=1x1}
  ROOT %sum = f32[64,8]{1,0:T(8,128)} add(%convolution, %y)
}

%below_20 (i: s32[]) -> pred[] {
  %i = s32[]{:T(128)} parameter(0)
  %end = s32[]{:T(128)} constant(20)
  ROOT %is_below = pred[]{:T(512)} compare(%i, %end), direction=LT
}

%next (i: s32[]) -> s32[] {
  %i = s32[]{:T(128)S(6)} parameter(0)
  ROOT %after = s32[]{:T(128)S(6)} negate(%i)
}

ENTRY %main (p: f32[64,8], q: f32[256,8]) -> f32[64,8] {
  %p = f32[64,8]{1,0:T(8,128)} parameter(0)
  %q = f32[256,8]{1,0:T(8,128)} parameter(1)
  %copy-start = (f32[64,8]{1,0:T(8,128)S(1)}, f32[64,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %copy-done = f32[64,8]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %s = ((f32[256,8]{1,0:T(8,128)}), f32[16,8]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%q), slice={[0:16], [0:8]}
  %slice-done = f32[16,8]{1,0:T(8,128)S(1)} slice-done(%s)
  %zero = s32[]{:T(128)S(6)} constant(0)
  %loop = s32[]{:T(128)S(6)} while(%zero), condition=%below_20, body=%next
  %on_chip = f32[64,8]{1,0:T(8,128)S(1)} negate(%copy-done)
  ROOT %result = f32[64,8]{1,0:T(8,128)} fusion(%on_chip, %p), kind=kOutput, calls=%convolve
}
"""


def test_counts_of_a_tpu_program():
    """What lies in memory on the chip moves no bytes; a kernel that convolves and adds is a convolution."""
    array = 64 * 8 * 4
    moved, by_convolutions, kernels, _ = count(TPU_PROGRAM)
    assert (moved, by_convolutions, kernels) == (array + array / 4 + 2 * array, 2 * array, 4 + 20)
