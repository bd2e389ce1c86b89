"""Breaks each operation of the sets in turn: `python tests/kernels/mutants.py [word ...]`.

tests/mutants.py does this with the formulas of the kernels. They do not show the operand order of a
max, or a mask that is a lane too long. Every mistake is made in a copy of src/, and must be noticed
by the requests of operations.py. Words select: a set's name, a part of a file's. All take a minute
or two; the exit status says whether all were caught.
"""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import operations
import targets
from cases import bfloat16
from program import ROOT


def can_run(target):
    tools = [target.compiler, *target.launcher[:1]]
    return all(map(shutil.which, tools)) and not (target.emulated and targets.SIMDE is None)


TARGETS = {
    parameter.id: parameter.values[0]
    for parameter in targets.every_target()
    if can_run(parameter.values[0])
}
SCALAR, SSE2, AVX2, AVX512 = "scalar", "sse2", "avx2", "avx512"
EMULATED, NEON = "avx512 (emulated)", "neon (qemu-aarch64)"

# set, type that is tested, file, text in it, replacement of its first occurrence
MUTANTS = [
    # the operand that is returned if both are equal, or one is NaN
    (SCALAR, "float32", "simd_scalar.h", "a.lane[i] > b.lane[i]", "a.lane[i] >= b.lane[i]"),
    (SCALAR, "float32", "simd_scalar.h", "a.lane[i] < b.lane[i]", "!(a.lane[i] >= b.lane[i])"),
    (SSE2, "float32", "simd_sse2.h", "_mm_max_ps(a.lo, b.lo)", "_mm_max_ps(b.lo, a.lo)"),
    (SSE2, "float32", "simd_sse2.h", "_mm_min_ps(a.hi, b.hi)", "_mm_min_ps(b.hi, a.hi)"),
    (SSE2, "float64", "simd_sse2.h", "_mm_max_pd(x.d, y.d)", "_mm_max_pd(y.d, x.d)"),
    (SSE2, "float64", "simd_sse2.h", "_mm_min_pd(x.c, y.c)", "_mm_min_pd(y.c, x.c)"),
    (AVX2, "float32", "simd_avx2.h", "_mm256_max_ps(a, b)", "_mm256_max_ps(b, a)"),
    (AVX2, "float32", "simd_avx2.h", "_mm256_min_ps(a, b)", "_mm256_min_ps(b, a)"),
    (AVX2, "float64", "simd_avx2.h", "_mm256_max_pd(a.lo, b.lo)", "_mm256_max_pd(b.lo, a.lo)"),
    (AVX2, "float64", "simd_avx2.h", "_mm256_min_pd(a.hi, b.hi)", "_mm256_min_pd(b.hi, a.hi)"),
    (AVX512, "float64", "simd_avx512.h", "_mm512_max_pd(a, b)", "_mm512_max_pd(b, a)"),
    (AVX512, "float64", "simd_avx512.h", "_mm512_min_pd(a, b)", "_mm512_min_pd(b, a)"),
    (AVX512, "float32", "simd_avx512.h", "_mm512_max_ps(a, b)", "_mm512_max_ps(b, a)"),
    (EMULATED, "float32", "simd_avx512.h", "_mm512_min_ps(a, b)", "_mm512_min_ps(b, a)"),
    (EMULATED, "float64", "simd_avx512.h", "_mm512_max_pd(a, b)", "_mm512_max_pd(b, a)"),
    (EMULATED, "float64", "simd_avx512.h", "_mm512_min_pd(a, b)", "_mm512_min_pd(b, a)"),
    (
        NEON, "float32", "simd_neon.h",
        "vbslq_f32(vcgtq_f32(a.lo, b.lo), a.lo, b.lo)", "vmaxq_f32(a.lo, b.lo)",
    ),
    (
        NEON, "float32", "simd_neon.h",
        "vbslq_f32(vcgtq_f32(a.hi, b.hi), a.hi, b.hi)", "vmaxnmq_f32(a.hi, b.hi)",
    ),
    (
        NEON, "float32", "simd_neon.h",
        "vbslq_f32(vcltq_f32(a.lo, b.lo), a.lo, b.lo)", "vminq_f32(a.lo, b.lo)",
    ),
    (NEON, "float32", "simd_neon.h", "vcgtq_f32(a.lo, b.lo)", "vcgeq_f32(a.lo, b.lo)"),
    (NEON, "float64", "simd_neon.h", "vbslq_f64(vcgtq_f64(a, b), a, b)", "vmaxq_f64(a, b)"),
    (NEON, "float64", "simd_neon.h", "vbslq_f64(vcltq_f64(a, b), a, b)", "vminq_f64(a, b)"),
    # the side that includes the kink
    (SCALAR, "float32", "simd_scalar.h", "a.lane[i] <= b.lane[i]", "a.lane[i] < b.lane[i]"),
    (SSE2, "float64", "simd_sse2.h", "_mm_cmple_pd", "_mm_cmplt_pd"),
    (AVX2, "float32", "simd_avx2.h", "_CMP_LE_OQ", "_CMP_LT_OQ"),
    (AVX2, "float32", "simd_avx2.h", "_CMP_LE_OQ", "_CMP_NGT_UQ"),
    (EMULATED, "float32", "simd_avx512.h", "_CMP_LE_OQ", "_CMP_LT_OQ"),
    (NEON, "float32", "simd_neon.h", "vcleq_f32(a.lo, b.lo)", "vcltq_f32(a.lo, b.lo)"),
    # one rounding, and one order of additions
    (
        AVX2, "float64", "simd_avx2.h", "_mm256_fmadd_pd(a.hi, b.hi, c.hi)",
        "_mm256_add_pd(_mm256_mul_pd(a.hi, b.hi), c.hi)",
    ),
    (
        EMULATED, "float64", "simd_avx512.h", "_mm512_fmadd_pd(a, b, c)",
        "_mm512_add_pd(_mm512_mul_pd(a, b), c)",
    ),
    (
        EMULATED, "float32", "simd_avx512.h", "_mm512_fmadd_ps(a, b, c)",
        "_mm512_add_ps(_mm512_mul_ps(a, b), c)",
    ),
    (
        NEON, "float32", "simd_neon.h", "vfmaq_f32(c.lo, a.lo, b.lo)",
        "vaddq_f32(c.lo, vmulq_f32(a.lo, b.lo))",
    ),
    (
        NEON, "float64", "simd_neon.h", "vaddq_f64(vaddq_f64(x.a, x.c), vaddq_f64(x.b, x.d))",
        "vaddq_f64(vaddq_f64(x.a, x.b), vaddq_f64(x.c, x.d))",
    ),
    (AVX2, "float32", "lanes.h", "d8_sum(d8_add(a.lo, a.hi))", "d8_sum(a.lo) + d8_sum(a.hi)"),
    (AVX2, "float32", "lanes.h", "d8_fma(a.hi, b.hi, c.hi)", "d8_fma(a.hi, b.hi, c.lo)"),
    (AVX2, "float32", "lanes.h", "d8_sub(a.hi, b.hi)", "d8_sub(b.hi, a.hi)"),
    (AVX2, "float32", "lanes.h", "d8_store(p + 8, a.hi)", "d8_store(p + 8, a.lo)"),
    (AVX2, "float32", "lanes.h", "f32x16_high(a)}", "f32x16_low(a)}"),
    (EMULATED, "float32", "simd_avx512.h", "extractf32x8_ps(a, 1)", "extractf32x8_ps(a, 0)"),
    # quotients that are rounded once, and the whole range of exponents
    (
        AVX2, "float32", "simd_avx2.h", "_mm256_div_ps(a, b)",
        "_mm256_mul_ps(a, _mm256_div_ps(_mm256_set1_ps(1), b))",
    ),
    (EMULATED, "float64", "simd_avx512.h", "_mm512_div_pd(a, b)", "_mm512_div_pd(b, a)"),
    (NEON, "float64", "simd_neon.h", "vdivq_f64(x.c, y.c)", "vdivq_f64(x.c, y.d)"),
    (SCALAR, "float64", "simd_scalar.h", "bits <<= 52", "bits <<= 51"),
    (SSE2, "float32", "simd_sse2.h", "0x1.8p23f + 127", "0x1.8p23f + 126"),
    (AVX2, "float64", "simd_avx2.h", "0x1.8p52 + 1023", "1023"),
    (NEON, "float32", "simd_neon.h", "f4_pow2(n.hi)", "f4_pow2(n.lo)"),
    # parts of a vector, and nothing past them
    (SSE2, "float32", "simd_sse2.h", "for (ptrdiff_t i = 0; i < n; i++)\n        lanes[i] = p[i];",
     "for (ptrdiff_t i = 0; i <= n; i++)\n        lanes[i] = p[i];"),
    (AVX2, "float32", "simd_avx2.h", "_mm256_maskload_ps(p, first)", "_mm256_loadu_ps(p)"),
    (AVX2, "float32", "simd_avx2.h", "if (n & 4)", "if (n & 8)"),
    (AVX2, "float64", "simd_avx2.h", "d8_half_part(p + 4, n - 4", "d8_half_part(p + 4, n - 5"),
    (AVX2, "bfloat16", "simd_m128i.h", "memcpy(&two, p + (n & 4)", "memcpy(&two, p"),
    (AVX2, "float32", "simd_pairs.h", "f8_load_part(p + 8, n - 8", "f8_load_part(p, n - 8"),
    (AVX2, "float32", "simd_pairs.h", "if (n > 8)", "if (n > 9)"),
    (SCALAR, "float16", "simd_pairs.h", "f16_load_part(p + 8, n - 8", "f16_load_part(p + 8, 8"),
    (AVX2, "float32", "simd_pairs.h", "f8_stream(p + 8, a.hi)", "f8_stream(p + 8, a.lo)"),
    (AVX2, "bfloat16", "simd_pairs.h", "bf16_stream(p + 8, a.hi)", "bf16_stream(p, a.hi)"),
    (EMULATED, "float64", "simd_avx512.h", "(__mmask8)((1u << n)", "(__mmask8)((2u << n)"),
    (EMULATED, "float32", "simd_avx512.h", "(__mmask8)((1u << n)", "(__mmask8)((2u << n)"),
    (EMULATED, "float32", "simd_avx512.h", "(__mmask16)((1u << n)", "(__mmask16)((2u << n)"),
    (EMULATED, "float16", "simd_avx512.h", "(__mmask16)((1u << n)", "(__mmask16)((2u << n)"),
    (
        EMULATED, "float64", "simd_avx512.h",
        "_mm512_mask_loadu_pd(fill, first_of_8(n), p)", "_mm512_loadu_pd(p)",
    ),
    (
        EMULATED, "float32", "simd_avx512.h",
        "_mm512_mask_loadu_ps(fill, first_of_16(n), p)", "_mm512_loadu_ps(p)",
    ),
    (
        EMULATED, "float64", "simd_avx512.h",
        "_mm512_mask_storeu_pd(p, first_of_8(n), a)", "_mm512_storeu_pd(p, a)",
    ),
    (
        EMULATED, "float32", "simd_avx512.h",
        "_mm512_mask_storeu_ps(p, first_of_16(n), a)", "_mm512_storeu_ps(p, a)",
    ),
    (
        EMULATED, "float16", "simd_avx512.h",
        "_mm256_mask_storeu_epi16(p, first_of_16(n), f16x16_narrow(a))", "f16x16_store(p, a)",
    ),
    # eight elements in float64
    (
        AVX2, "float32", "simd_pairs.h",
        "d8_select_first(n, f8_widen(f8_load_part(p, n, f8_set1(0))), fill)",
        "f8_widen(f8_load_part(p, n, f8_set1(0)))",
    ),
    (SSE2, "bfloat16", "simd_sse2.h", "return f8_widen(bf16_load(p));", "return d8_set1(0);"),
    (EMULATED, "float32", "simd_avx512.h", "_mm256_maskz_loadu_ps(first, p)", "_mm256_loadu_ps(p)"),
    (EMULATED, "float32", "simd_avx512.h", "_mm512_mask_cvtps_pd(fill, first, ",
     "_mm512_cvtps_pd("),
    (EMULATED, "bfloat16", "simd_avx512.h", "_mm512_mask_blend_pd(first, fill, bf16",
     "_mm512_mask_blend_pd(255, fill, bf16"),
    # the first lanes of one vector, the others of another
    (SCALAR, "float32", "simd_scalar.h", "i < n ? a.lane[i]", "i <= n ? a.lane[i]"),
    (SSE2, "float32", "simd_sse2.h", "_mm_setr_epi32(4, 5, 6, 7)", "_mm_setr_epi32(4, 5, 6, 8)"),
    (SSE2, "float64", "simd_sse2.h", "_mm_move_sd(b, a)", "_mm_move_sd(a, b)"),
    (AVX2, "float32", "simd_pairs.h", "f8_select_first(n - 8,", "f8_select_first(n,"),
    (AVX2, "float64", "simd_avx2.h", "d4_first(n - 4)", "d4_first(n - 3)"),
    (EMULATED, "float32", "simd_avx512.h", "blend_ps(first_of_16(n), b, a)",
     "blend_ps(first_of_16(n), a, b)"),
    (EMULATED, "float64", "simd_avx512.h", "blend_pd(first_of_8(n), b, a)",
     "blend_pd(first_of_8(n), a, b)"),
    (NEON, "float32", "simd_neon.h", "vld1q_s32(lanes + 4)", "vld1q_s32(lanes + 3)"),
    (NEON, "float64", "simd_neon.h", "vcopyq_laneq_f64(b, 0, a, 0)",
     "vcopyq_laneq_f64(b, 1, a, 0)"),
    # the places of a pivot
    (SCALAR, "float32", "lanes.h", "(k * 40503 & 65535)", "0"),
    (SCALAR, "float32", "lanes.h", "(places << 16)", "(places << 15)"),
    (NEON, "float32", "simd_neon.h", "vld1q_lane_f32(p + 2, fill, 2)",
     "vld1q_lane_f32(p + 1, fill, 2)"),
    (NEON, "float16", "simd_neon.h", "memcpy(lanes, p, (size_t)n * sizeof *p)",
     "memcpy(lanes, p, 16)"),
    (NEON, "float16", "simd_neon.h", "memcpy(p, lanes, (size_t)n * sizeof *p)",
     "memcpy(p, lanes, 16)"),
    # halves: to nearest, ties to even; denormals; NaN made quiet, its bits kept
    (SCALAR, "float16", "simd_scalar.h", "0xfff + (size >> 13 & 1)", "0xfff"),
    (SCALAR, "float16", "simd_scalar.h", "size < 113u << 23", "size < 112u << 23"),
    (SCALAR, "bfloat16", "simd_scalar.h", "0x7fff + (bits >> 16 & 1)", "0x7fff"),
    (SCALAR, "bfloat16", "simd_scalar.h", "bits | 0x400000", "bits"),
    (SSE2, "float16", "simd_sse2.h", "_mm_add_epi32(odd, _mm_set1_epi32(0xfff - (112 << 23)))",
     "_mm_set1_epi32(0xfff - (112 << 23))"),
    (SSE2, "float16", "simd_sse2.h", "_mm_set1_epi32(0x7e00)", "_mm_set1_epi32(0x7c00)"),
    (SSE2, "float16", "simd_sse2.h", "_mm_set1_epi32(0x3ff)", "_mm_set1_epi32(0x0ff)"),
    (SSE2, "float16", "simd_sse2.h", "_mm_set1_ps(0x1p-14f)", "_mm_set1_ps(0x1p-15f)"),
    (SSE2, "float16", "simd_sse2.h", "_mm_set1_epi32(113 << 23)", "_mm_set1_epi32(112 << 23)"),
    (AVX2, "float16", "simd_avx2.h", "_MM_FROUND_TO_NEAREST_INT", "_MM_FROUND_TO_ZERO"),
    (AVX2, "bfloat16", "simd_avx2.h", "_mm256_set1_epi32(0x40)", "_mm256_set1_epi32(0)"),
    (AVX2, "bfloat16", "simd_avx2.h", "_mm256_add_epi32(bits, half)",
     "_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff))"),
    (EMULATED, "float16", "simd_avx512.h", "_MM_FROUND_TO_NEAREST_INT", "_MM_FROUND_TO_ZERO"),
    (EMULATED, "bfloat16", "simd_avx512.h", "_mm512_set1_epi32(0x7fff), odd",
     "_mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0)"),
    (EMULATED, "bfloat16", "simd_avx512.h", "_mm512_set1_epi32(0x400000)", "_mm512_set1_epi32(0)"),
    (EMULATED, "bfloat16", "simd_avx512.h", "_mm512_cvtepi32_epi16(_mm512_srli_epi32(wide, 16))",
     "_mm512_cvtepi32_epi16(wide)"),
    (NEON, "bfloat16", "simd_neon.h", "vdupq_n_u32(0x400000)", "vdupq_n_u32(0)"),
    (NEON, "bfloat16", "simd_neon.h", "vaddq_u32(vdupq_n_u32(0x7fff), odd)",
     "vdupq_n_u32(0x7fff)"),
]  # fmt: skip


def complaint(target, dtype, folder):
    """What the tests notice in the sources in folder/src, or None. A mistake that does not compile
    is an error in MUTANTS and ends the program.
    """
    dtype = bfloat16 if dtype == "bfloat16" else dtype
    built = operations.build(
        folder, target.isa, dtype, target.flags(), target.compiler, folder / "src", warnings=()
    )
    try:
        requests = operations.make_requests(dtype, target.fused)
        operations.check(requests, built, folder, target.launcher)
    except AssertionError as error:
        return str(error).splitlines()[0]
    return None


def survives(name, dtype, file, old, new, folder):
    path = folder / "src" / file
    source = path.read_text("utf-8")
    if old not in source:
        sys.exit(f"{file} has no {old!r}")
    path.write_text(source.replace(old, new, 1), "utf-8")
    noticed = complaint(TARGETS[name], dtype, folder)
    path.write_text(source, "utf-8")
    verdict = "caught" if noticed else "SURVIVED"
    print(f"{verdict}  {name}, {dtype}: {old}  ->  {new}\n    {noticed}", flush=True)
    return noticed is None


def main(words):
    runnable = [mutant for mutant in MUTANTS if mutant[0] in TARGETS]
    chosen = [m for m in runnable if not words or any(w in m[0] or w in m[2] for w in words)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "src", folder / "src")
        for isa, dtype in sorted({mutant[:2] for mutant in chosen}):
            unbroken = complaint(TARGETS[isa], dtype, folder)
            if unbroken:
                sys.exit(f"the tests fail without a mistake: {unbroken}")
        survivors = sum(survives(*mutant, folder) for mutant in chosen)
    left_out = len(MUTANTS) - len(chosen)
    print(f"{len(chosen) - survivors} of {len(chosen)} caught, {left_out} left out")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
