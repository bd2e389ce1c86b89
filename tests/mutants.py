"""Breaks each formula in turn and runs the tests: `python tests/mutants.py [number or word ...]`.

A test suite must notice mistakes. Every entry of MUTANTS is one small mistake. It is made in a copy
of the sources, built for the best instruction set of this machine, and the tests of the functions
are run on it. Each must be caught; the exit status says whether all were.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bnfast import _core

ROOT = Path(__file__).parents[1]
ISA = _core.isas()[-1]
OTHERS = [name for name in _core.config()["isas_built"] if name != ISA]
TESTS = [
    f"tests/test_{name}.py"
    for name in (
        *("moments", "functional_forward", "functional_backward", "numerics", "half"),
        *("batch_variance", "masked", "virtual_batches", "batch_renorm"),
        *("activations", "layers", "layers_backward", "layers_state"),
        *("inference", "tiling", "written_in_turn", "partial_batches", "float_environment"),
        *("threads", "threads_calls", "threads_default", "forks"),
    )
]

# file, text in it (once), replacement
MUTANTS = [
    # the statistics
    ("src/moments.inc.h", "*sum = add(*sum, d);", "*sum = d;"),
    ("src/moments.inc.h", "*square = fmadd(d, d, *square);", "*square = fmadd(d, x, *square);"),
    ("src/moments.inc.h", "return pivot + sum / n;", "return sum / n;"),
    ("src/moments.inc.h", "square - sum * (sum / n)", "square"),
    (
        "src/moments.inc.h",
        "load_wide_part(x, n, d8_set1(pivot))",
        "load_wide_part(x, n, d8_set1(0.0))",
    ),
    (
        "src/moments.inc.h",
        "d8_select_le(sub(value, value), zero, value, zero)",
        "value",
    ),
    ("src/lanes.h", "a - a == 0 ? a : 0.0", "a"),
    ("src/moments.inc.h", "(sizeof(T) < sizeof(double) ? 1 : 2)", "1"),
    (
        "src/moments.inc.h",
        "for (; rows > 0; rows--, x += stride)",
        "for (; rows > 1; rows--, x += stride)",
    ),
    ("src/lanes.h", "to->second[to_lane] += from->", "to->second[to_lane] = from->"),
    (
        "src/lanes.h",
        "about[i % WIDE_LANES] = sums[c / WIDE_LANES].about[c % WIDE_LANES]",
        "about[i % WIDE_LANES] = 0",
    ),
    # those of a training call: which pivots are good enough
    ("src/batch_moments.inc.h", "#define MOST_OFF 0.5", "#define MOST_OFF 1e6"),
    ("src/batch_moments.inc.h", "#define LEAST_VARIANCE 1e-30", "#define LEAST_VARIANCE 0.0"),
    ("src/batch_moments.inc.h", " && m2 < INFINITY", ""),
    ("src/batch_moments.inc.h", "&mean[c], &m2[c]))", "&mean[c], &m2[c]) || true)"),
    ("src/batch_moments.inc.h", "if (!again[i])", "if (true)"),
    ("src/batch_moments.inc.h", "again[i] = !NAME(settle)(", "again[i] = false && !NAME(settle)("),
    # what is written while the next group is summed
    ("src/moments_and_apply.inc.h", "writer->params, ++writer->c", "writer->params, writer->c"),
    ("src/moments_and_apply.inc.h", "writer->plane += writer->w.o->shape.inner;", ""),
    ("src/moments_and_apply.inc.h", "i + 8 * LANES <= writer->plane", "i <= writer->plane"),
    ("src/moments_and_apply.inc.h", "writer->stop - writer->i, writer->p", "0, writer->p"),
    ("src/driver.c", "group == first", "group == 0"),
    ("src/driver.c", "write_tile(call, 0, end - 1);", ""),
    # sums over trees
    ("src/sums.inc.h", "fmadd(b.l, b.f, mul(a.l, a.f))", "fmadd(b.l, b.l, mul(a.l, a.f))"),
    ("src/sums.inc.h", "add(s.first, widen(t.first))", "widen(t.first)"),
    ("src/sums.inc.h", "count > 1 ? a->n : a->last", "a->n"),
    ("src/sums.inc.h", "count > 2 ? a->n : a->last", "a->n"),
    ("src/sums.inc.h", "a->count - a->fewer", "a->count"),
    ("src/sums.inc.h", "next ? next : 4 * LANES", "4 * LANES"),
    ("src/sums.inc.h", "length <= 4 * LANES && o + 1 < tile.outer1", "length <= 4 * LANES"),
    ("src/sums.inc.h", "a += strips[i / LANES].first", "a = strips[i / LANES].first"),
    ("src/sums.inc.h", "params.high[i % channels]", "params.high[0]"),
    ("src/moments.h", "mean_a[c] += delta * share;", "mean_a[c] += delta / 2;"),
    ("src/moments.h", "m2_b[c] + delta * delta * weight", "m2_b[c]"),
    ("src/moments.h", "weight = n_a * share;", "weight = n_b * share;"),
    ("src/moments.h", "b + step < blocks.count ? b + step : blocks.count", "blocks.count"),
    ("src/moments.h", "m2 / (count - ddof)", "m2 / count"),
    ("src/moments.h", "return 1 / sqrt(var + eps);", "return 1 / sqrt(var);"),
    ("src/moments.h", "scale[c] = weight[c] * inv_std[c];", "scale[c] = inv_std[c];"),
    ("src/moments.h", "sum[a * shape.channels + c] +=", "sum[a * shape.channels + c] ="),
    # the affine map
    (
        "src/kernels.inc.h",
        "(P)without(o->shift[c], low, o->scale[c])",
        "(P)o->shift[c]",
    ),
    ("src/lanes.h", "return low != 0 ? a - low * factor : a;", "return a - low * factor;"),
    ("src/kernels.inc.h", "fmadd(d, p.scale, p.shift)", "mul(d, p.scale)"),
    ("src/apply.inc.h", "(w.o, i, n, d, p, w.v.residual)", "(w.o, i, n, d, p, false)"),
    # runs that are written: the parameters of each value, and where a vector may be streamed
    (
        "src/writes.inc.h",
        "select_first(n, a.high, b.high)",
        "select_first(n, b.high, a.high)",
    ),
    ("src/writes.inc.h", "NAME(blend)(end - i, p, next)", "p"),
    ("src/writes.inc.h", "params, ++c, w.v.backward", "params, c, w.v.backward"),
    ("src/writes.inc.h", "planes == 1 || length < LANES ?", "planes == 1 ?"),
    ("src/writes.inc.h", "w.v.backward ? w.o->dx : w.o->y) + i", "w.o->y) + i"),
    ("src/kernels.inc.h", "% (LANES * sizeof(T)) / sizeof(T)", "% sizeof(T) / sizeof(T)"),
    ("src/writes.inc.h", "at_most(end - LANES, i + columns - 1 - column)", "end - LANES"),
    ("src/kernels.inc.h", "row[i] = row[i - channels]", "row[i] = row[0]"),
    ("src/activations.inc.h", "return max(set1(0.0), z);", "return max(z, set1(0.0));"),
    ("src/activations.inc.h", "min(set1(6.0), max(set1(0.0), z))", "max(set1(0.0), z)"),
    ("src/activations.inc.h", "return max(mul(slope, z), z);", "return mul(slope, z);"),
    ("src/driver.c", "*= bnf_inv_std(call->var[c], call->eps);", "*= 1;"),
    # the gradients
    ("src/activations.inc.h", "return select_le(z, set1(0.0), set1(0.0), dy);", "return dy;"),
    (
        "src/activations.inc.h",
        "select_le(z, zero, zero, select_le(set1(6.0), z, zero, dy))",
        "select_le(z, zero, zero, dy)",
    ),
    ("src/activations.inc.h", "min(set1(6.0), add(z, set1(3.0)))", "add(z, set1(3.0))"),
    (
        "src/activations.inc.h",
        "select_le(z, set1(-3.0), set1(0.0), mul(z, share))",
        "mul(z, share)",
    ),
    ("src/activations.inc.h", "fmadd(z, set1(1.0 / 3), set1(0.5))", "set1(0.5)"),
    ("src/activations.inc.h", "select_le(set1(3.0), z, dy, between)", "between"),
    (
        "src/activations.inc.h",
        "select_le(z, set1(0.0), mul(slope, dy), dy)",
        "select_le(z, set1(0.0), set1(0.0), dy)",
    ),
    # smooth activations: the exponential, the smallest numbers, infinities
    ("src/smooth.inc.h", "? 0x1.7f7d1cf79abcap-20 : 0x1.9ef35793c7673p-41", "? 0.0 : 0.0"),
    ("src/smooth.inc.h", "min(set1(most), max(sub(", "max(set1(0.0), max(sub("),
    ("src/smooth.inc.h", "pow2(sub(n, first)))", "set1(1.0))"),
    ("src/smooth.inc.h", "mul(mul(factor_below, near), pow2(sub(e.n, first)))", "mul(near, near)"),
    (
        "src/smooth.inc.h",
        "mul(mul(factor_below, near), pow2(sub(e.n, first)))",
        "mul(factor_below, mul(near, pow2(sub(e.n, first))))",
    ),
    ("src/smooth.h", "2.7557255110978889e-6", "2.7557e-6"),
    ("src/smooth.h", "-9.4446557464447459e-6", "-9.4446e-6"),
    ("src/smooth.h", "1.3282723616689422e-6", "1.3282e-6"),
    # their formulas
    (
        "src/smooth.inc.h",
        "VEC(sigmoid_times)(z, a, z, sub(set1(0.0), a))",
        "mul(z, VEC(sigmoid)(z))",
    ),
    ("src/smooth.inc.h", "div(e, mul(below, below))", "div(e, below)"),
    ("src/smooth.inc.h", "mul(e, sub(below, a))", "mul(e, below)"),
    ("src/smooth.inc.h", "fmadd(e, a, below)", "below"),
    ("src/smooth.inc.h", "fmadd(power, e.rest, sub(power, set1(1.0)))", "sub(power, set1(1.0))"),
    ("src/smooth.inc.h", "SINGLE ? 0x1p-13 : 0x1p-28", "SINGLE ? 0x1p-9 : 0x1p-24"),
    ("src/smooth.inc.h", "SINGLE ? 0x1p-13 : 0x1p-28", "-1.0"),
    ("src/smooth.inc.h", "mul(set1(4.0), VEC(sigmoid_slope)", "mul(set1(2.0), VEC(sigmoid_slope)"),
    (
        "src/smooth.inc.h",
        "exponential_of_sum)(mul(mul(half, a0), a0), low)",
        "exponential_of)(mul(mul(half, a), a))",
    ),
    ("src/smooth.inc.h", "fmadd(share, e.rest, share)", "share"),
    ("src/smooth.inc.h", "SINGLE ? 15.0 : 39.0", "SINGLE ? 14.0 : 38.0"),
    ("src/smooth.inc.h", "#define NEAR 0.7", "#define NEAR 0.5"),
    ("src/smooth.inc.h", "#define NEAR 0.7", "#define NEAR 1.0"),
    ("src/smooth.inc.h", "sub(max(set1(0.0), z), tail)", "sub(set1(0.0), tail)"),
    ("src/smooth.inc.h", "set1(-0x1.9884533d43651p-2)", "set1(-0x1.9884p-2)"),
    ("src/smooth.inc.h", "sub(set1(1.0), left), left)", "left, left)"),
    # all of them share loops
    ("src/activations.inc.h", "mul(dy, VEC(smooth_slope)(z, v.activation))", "mul(dy, z)"),
    (
        "src/grad_sums.inc.h",
        "dot[c + k] -= (w.o->mean[c + k] - (double)params.high[i + k]) * sum[c + k];",
        "",
    ),
    # in float64, where products overflow
    ("src/grad_sums.inc.h", "again[k] = !NAME(is_normal)", "again[k] = false && NAME(is_normal)"),
    ("src/grad_sums.inc.h", "size < INFINITY", "true"),
    ("src/grad_sums.inc.h", "size >= n * LEAST_PRODUCT", "true"),
    ("src/grad_sums.inc.h", "add(s.first, widen(g))", "widen(g)"),
    ("src/grad_sums.inc.h", "fmadd(widen(g), f, s.second)", "fmadd(widen(g), f, f)"),
    # masks
    (
        "src/masked_moments.inc.h",
        "d8_select_le(weight, zero, zero, sub(x, pivot))",
        "sub(x, pivot)",
    ),
    ("src/masked_moments.inc.h", "weighted = mul(weight, d);", "weighted = d;"),
    ("src/masked_moments.inc.h", "range.as_ones &= weights[range.first + i] == 1;", "(void)i;"),
    ("src/masked_moments.inc.h", "weights + o * shape.inner + range.first;", "weights;"),
    ("src/grad_input.inc.h", "select_le(p.weight, zero, zero, rest)", "rest"),
    (
        "src/grad_input.inc.h",
        "mul(p.weight, fmadd(p.x_factor, d, p.constant))",
        "fmadd(p.x_factor, d, p.constant)",
    ),
    ("src/kernels.inc.h", "v.masked ? NAME(where_not_zero)(dy, g, dy) : g", "g"),
    ("src/sums.inc.h", "w.v.masked ? NAME(where_not_zero)(g, d, g) : d", "d"),
    ("src/grad_sums.inc.h", "w.v.masked ? NAME(where_not_zero)(g, x, p.high) : x", "x"),
    ("src/writes.inc.h", "length == shape.inner && !w.v.masked", "length == shape.inner"),
    (
        "src/writes.inc.h",
        "w.weights_behind = plane - o * shape.inner;",
        "w.weights_behind = plane;",
    ),
    ("src/moments.h", "if (n_b == 0)", "if (n_b < 0)"),
    ("src/driver.c", "calls->dbias[c] += calls[i].dbias[c];", ""),
    ("src/moments.h", "dweight[c] = inv_std[c] * dot[c];", "dweight[c] = dot[c];"),
    ("src/moments.h", "-scale[c] * inv_std[c] * (dweight[c] / count)", "0"),
    ("src/moments.h", "constant[c] = -scale[c] * (dbias[c] / count);", "constant[c] = 0;"),
    (
        "src/grad_input.inc.h",
        "fmadd(p.x_factor, d, fmadd(p.dy_factor, g, p.constant))",
        "fmadd(p.dy_factor, g, p.constant)",
    ),
    ("src/grad_input.inc.h", "vec dx = mul(p.dy_factor, g);", "vec dx = g;"),
    (
        "src/grad_input.inc.h",
        "((T *)w.o->dresidual + i, n, g, false)",
        "((T *)w.o->dresidual + i, n, dx, false)",
    ),
    (
        "src/kernels.inc.h",
        "(o, i, n, d, p, v.z_source == BNF_Z_FROM_X_RESIDUAL)",
        "(o, i, n, d, p, false)",
    ),
    (
        "src/kernels.inc.h",
        "(P)without(o->constant[c], low, o->x_factor[c])",
        "(P)o->constant[c]",
    ),
    ("src/kernels.inc.h", "if (sizeof(T) == sizeof(P))", "if (true)"),
    # through constants, as for an eval-mode layer's statistics
    ("src/driver.c", "!alone && call->count != 0", "!alone"),
    ("src/driver.c", "call->ones[c] = 1.0;", "call->ones[c] = call->weight[c];"),
    ("bnfast/functional.py", "_core.inv_std(variances, added)", "variances"),
    ("src/driver.c", "call->inv_std[c] = bnf_inv_std(call->var[c], call->eps);", ";"),
    # a part of a batch
    ("src/driver.c", "return !call->has_moments;", "return true;"),
    ("src/driver.c", "set_forward_numbers(call, 0, call->shape.channels);", ";"),
    # what a mask counts
    (
        "src/masked_moments.inc.h",
        "fmadd(weighted, d, *square)",
        "fmadd(weighted, weighted, *square)",
    ),
    ("src/masked_moments.inc.h", "weights[range.first + i] == 1", "weights[range.first + i] >= 0"),
    (
        "src/masked_moments.inc.h",
        "weights[range.length - 1] == 0",
        "weights[range.length - 1] <= 1",
    ),
    (
        "src/masked_moments.inc.h",
        "weights[o * stride + i] > weights[outer * stride + *inner]",
        "weights[o * stride + i] < 0",
    ),
    ("src/moments.h", "values += counts[a];", "values = counts[a];"),
    ("src/driver.c", "wide[i] : (double)narrow[i];", "1.0 : 1.0;"),
    ("src/writes.inc.h", "((const P *)w.o->weights)[o]", "((const P *)w.o->weights)[0]"),
    ("bnfast/_masks.py", "for i in _arrays.memory_order(x) if", "for i in range(x.ndim) if"),
    ("bnfast/_masks.py", "least >= 0 and", ""),
    # virtual batches
    ("src/driver.c", "calls->dweight[c] += calls", "calls->dweight[c] = calls"),
    ("bnfast/_core.pyx", "min(rows, n - first)", "rows"),
    # batch renormalization
    ("bnfast/renorm.py", "np.clip(ratio, 1 / rmax, rmax)", "np.clip(ratio, 1, rmax)"),
    ("bnfast/renorm.py", "np.clip(shift, -dmax, dmax)", "np.clip(shift, 0, dmax)"),
    ("bnfast/renorm.py", "np.sqrt(batch.var() + eps)", "np.sqrt(batch.var(1) + eps)"),
    ("bnfast/renorm.py", "beta + gamma * self.d", "beta + self.d"),
    ("bnfast/renorm.py", "weight * self.r + bias * self.d", "weight * self.r"),
    # blocks and tiles
    ("src/tiling.c", "inner = block % blocks.segments * blocks.length", "inner = 0"),
    (
        "src/tiling.c",
        "outer = block / blocks.segments * blocks.outers",
        "outer = block * blocks.outers",
    ),
    ("src/tiling.c", "least(rest, shape.inner)", "0"),
    ("src/tiling.c", "if (shape.inner > BLOCK_VALUES)", "if (shape.inner > 2 * BLOCK_VALUES)"),
    ("src/tiling.c", "/ ENOUGH_BLOCKS), MAX_ROWS)", "/ ENOUGH_BLOCKS), shape.outer)"),
    (
        "src/tiling.c",
        "least(BLOCK_VALUES / shape.inner, shape.outer)",
        "shape.outer",
    ),
    # the driver
    ("src/moments.h", "(1 - momentum) * running + momentum * batch", "momentum * batch"),
    ("src/driver.c", "bnf_variance(call->m2[c], call->count, ddof)", "call->var[c]"),
    (
        "bnfast/_core.pyx",
        "as_vector(SUMS_NAMES[0], sums[0], target)",
        "as_vector(SUMS_NAMES[0], sums[1], target)",
    ),
    ("bnfast/_core.pyx", "1.0 / (<double>batches + 1.0)", "0.1"),
    # threads, forks and floating-point environments
    ("src/threads_openmp.c", "bytes[0] != 0 || memcmp(", "memcmp(bytes, bytes, 1) && memcmp("),
    ("src/threads_openmp.c", "state.home != getpid()", "false"),
    ("src/threads_openmp.c", "pthread_atfork(before_fork, NULL, after_fork_in_child);", ""),
    ("src/threads_openmp.c", "if (state.forked && !looked)", "if (false)"),
    ("src/threads_openmp.c", "1 + created_of(wanted - 1)", "wanted"),
    (
        "src/threads.c",
        "const bnf_float_env found = bnf_enter_float_env();",
        "bnf_float_env found = 0;",
    ),
    ("src/threads.c", "first + each + (member < more)", "first + each"),
    ("src/threads.c", "(member < more ? member : more)", "more"),
    ("src/float_env.h", "0x1f80u", "0x9fc0u"),
    # Moments, and functions of layers
    ("bnfast/moments.py", "self.count * share", "share"),
    ("bnfast/moments.py", "share = other.count / count", "share = 0.5"),
    ("bnfast/moments.py", "self.m2 + (other.m2 + ", "self.m2 + ("),
    ("bnfast/moments.py", "row = pairs + row[2 * len(pairs) :]", "row = pairs"),
    (
        "bnfast/moments.py",
        'values = self.count - _options.real("ddof", ddof)',
        "values = self.count - 1",
    ),
    ("bnfast/inference.py", "(old_bias - mean)", "(0 - mean)"),
    ("bnfast/inference.py", "(old_bias - mean)", "(old_bias)"),
    ("bnfast/inference.py", "at_zero = shift - mean * scale", "at_zero = shift"),
    ("bnfast/inference.py", "old_bias + _summed(", "_summed("),
    (
        "bnfast/inference.py",
        "values.reshape(groups, -1).repeat(weight.shape[0] // groups, axis=0)",
        "np.tile(values.reshape(groups, -1), (weight.shape[0] // groups, 1))",
    ),
    (
        "bnfast/inference.py",
        "through.reshape(groups, rows // groups, *others)",
        "through.reshape(rows // groups, groups, *others).swapaxes(0, 1)",
    ),
    ("bnfast/inference.py", "moments.var(ddof=1)", "moments.var(ddof=0)"),
]
if importlib.util.find_spec("sklearn"):
    MUTANTS += [
        ("bnfast/sklearn.py", "share = n_b / count", "share = 0.5"),
        ("bnfast/sklearn.py", "delta * delta * (n_a * share)", "0.0"),
        ("bnfast/sklearn.py", "np.where(n_a > 0, mean_a, mean_b)", "mean_a"),
        ("bnfast/sklearn.py", "np.where(n_b > 0, mean_b, mean_a)", "mean_b"),
        ("bnfast/sklearn.py", "np.where(n_a > 0, m2_a, 0.0)", "m2_a"),
        ("bnfast/sklearn.py", "np.where(count > 0, mean, np.nan)", "mean"),
        ("bnfast/sklearn.py", "else weight[there]", "else weight[: there.sum()]"),
        ("bnfast/sklearn.py", "weight.min() < 0 or ", ""),
        ("bnfast/sklearn.py", "1 / self.scale_", "self.scale_"),
        ("bnfast/sklearn.py", "return x if in_place or converted else None", "return x"),
        ("bnfast/sklearn.py", "constant_mask=constant", "constant_mask=None"),
        ("bnfast/sklearn.py", "(factor > _LARGEST_FACTOR).any()", "False"),
    ]
if ISA in ("avx2", "avx512"):
    HEADER, PREFIX = f"src/simd_{ISA}.h", {"avx2": "_mm256", "avx512": "_mm512"}[ISA]
    MUTANTS += [
        # the roundings of halves, and NaN
        (HEADER, "_MM_FROUND_TO_NEAREST_INT", "_MM_FROUND_TO_ZERO"),
        (HEADER, f"{PREFIX}_set1_epi32(0x7fff)", f"{PREFIX}_set1_epi32(0x8000)"),
        (HEADER, f"{PREFIX}_set1_epi32(0x7fff), odd", f"{PREFIX}_set1_epi32(0), odd"),
        (HEADER, f"{PREFIX}_max_ps(a, b)", f"{PREFIX}_max_ps(b, a)"),
        (HEADER, f"{PREFIX}_min_ps(a, b)", f"{PREFIX}_min_ps(b, a)"),
    ]

if importlib.util.find_spec("torch"):
    MUTANTS += [
        ("bnfast/torch/aten_kernels.c", "wanted_here = on;", "wanted_here = true;"),
        ("bnfast/torch/aten_kernels.c", "return wanted_here || aten_is_on();", "return enabled;"),
        ("bnfast/torch/aten_kernels.c", "rest->slope <= 1", "rest->slope <= 2"),
        ("bnfast/torch/aten_backward.c", "&& !aten_ran_here(to_optional(a->save_mean))", ""),
        ("bnfast/torch/aten_backward.c", "call->shift, b->bias,", "call->shift, NULL,"),
        ("bnfast/torch/aten_backward.c", ".slope = b->arguments->rest.slope,", ""),
        ("bnfast/torch/aten_backward.c", "call.dresidual = outputs[3];", ""),
        ("bnfast/torch/aten_backward.c", ".eps = b->arguments->eps,", ""),
        (
            "bnfast/torch/aten_backward.c",
            "? &call.output : &call.residual",
            "? &call.output : &call.output",
        ),
        ("bnfast/torch/aten_forward.c", "call->shift, f->bias,", "call->shift, NULL,"),
        ("bnfast/torch/aten_forward.c", ".eps = a->eps,", ".eps = 1e-5,"),
        ("bnfast/torch/aten_forward.c", "f->arguments->momentum, 1)", "f->arguments->momentum, 0)"),
        ("bnfast/torch/aten_vectors.c", "!round_to(exact, mean, kind) ||", ""),
        ("bnfast/torch/aten_vectors.c", "kept->mark == KEPT_MARK ? kept : NULL", "kept"),
        (
            "bnfast/torch/aten_tensors.c",
            "looks_channels_last(x) == looks_channels_last(dy)",
            "true",
        ),
        (
            "bnfast/torch/aten_fused.c",
            "bnf_activation_name((bnf_activation)found)",
            "bnf_activation_name((bnf_activation)(found - 1))",
        ),
        ("bnfast/torch/fused.py", "tuple(v.clone() for v", "tuple(v for v"),
        ("bnfast/torch/modules.py", "self.num_batches_tracked.sub_(1)", "pass"),
    ]


def built(folder):
    """Build in a copy; only the chosen instruction set's kernels are compiled again."""
    for other in OTHERS:
        for kernel in folder.glob(f"build/**/*{other}*"):
            kernel.touch()
    command = [sys.executable, "setup.py", "-q", "build_clib", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the build failed:\n{done.stderr}")


def tests_of(file):
    """The tests that should notice a mistake in a file."""
    if file == "bnfast/sklearn.py":
        return ["tests/scikit_learn/test_scaler.py"]
    if not file.startswith("bnfast/torch"):
        return TESTS
    names = ("fused", "convert", "exceptions", "modules", "enable_values", "enable_saved")
    return [f"tests/pytorch/test_{name}.py" for name in (*names, "autograd", "state")]


def first_failure(folder, tests=TESTS):
    """The first test that fails, or None."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    others = " and ".join(f"not {name}" for name in OTHERS) or "True"
    done = subprocess.run(
        [*command, "-k", others, "--timeout", "300"],
        cwd=folder, env={"PATH": "/usr/bin:/bin", "BNFAST_ISA": ISA}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else f"pytest ended with {done.returncode}"


def survives(folder, file, old, new):
    path = folder / file
    source = path.read_text("utf-8")
    path.write_text(source.replace(old, new), "utf-8")
    try:
        built(folder)
        caught = first_failure(folder, tests_of(file))
    finally:
        path.write_text(source, "utf-8")
    print(
        f"{'caught' if caught else 'SURVIVED'}  {file}: {old}  ->  {new}\n    {caught}", flush=True
    )
    return caught is None


def chosen(words):
    return [
        mutant
        for i, mutant in enumerate(MUTANTS)
        if not words
        or str(i) in words
        or any(word in mutant[0] for word in words if not word.isdigit())
    ]


def check_mutants():
    for file, old, _ in MUTANTS:
        times = (ROOT / file).read_text("utf-8").count(old)
        if times != 1:
            sys.exit(f"{file} has {old!r} {times} times; expected once")


def main(words):
    start = time.monotonic()
    check_mutants()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "bnfast"
        skip = shutil.ignore_patterns(".*", "build", "*.so", "__pycache__", "bench", "examples")
        shutil.copytree(ROOT, folder, ignore=skip)
        setup = folder / "setup.py"
        setup.write_text(
            setup.read_text("utf-8").replace('"-O2"', '"-O1"'), "utf-8"
        )  # in half the time
        built(folder)
        unbroken = first_failure(folder)
        if unbroken:
            sys.exit(f"the tests fail without a mistake: {unbroken}")
        mutants = chosen(words)
        survivors = sum(survives(folder, *mutant) for mutant in mutants)
    print(
        f"{len(mutants) - survivors} of {len(mutants)} caught in {time.monotonic() - start:.0f} s"
    )
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
