/* One name for each operation on f32x16 (sixteen float32 lanes) and on d8 (eight float64 lanes), so
 * that kernels.inc.h reads the same for every data type.  Included after simd_<isa>.h, which
 * defines, beside its operations,
 *
 *   ISA_UNROLL       before a loop over up to eight vectors: a pragma that unrolls it, or nothing,
 *   ISA_FEW_LOOPS    whether a kernel has few loops (FEW_LOOPS in kernels.inc.h) for all types:
 *                    true for sets that are used only on processors without a better one, to keep a
 *                    wheel small,
 *   ISA_INLINE       how a kernel's functions are declared. */
#ifndef BNFAST_LANES_H
#define BNFAST_LANES_H

/* Rows that are summed at a time, as many as there are vectors in a tree (sums.inc.h).  Each row is
 * read by an instruction of its own, whose steady stride the hardware prefetcher sees. */
#define ROWS 8
/* Streaming stores write whole cache lines: a line that is written in two ways is slow. */
#define LINE_BYTES 64

/* Selected by the type of the element, not of the pointer, so that const pointers match. */
#define by_element(p, f32, f64, f16, bf16) \
    _Generic(*(p), float: f32, double: f64, bnf_f16: f16, bnf_bf16: bf16)
#define load(p) by_element(p, f32x16_load, d8_load, f16x16_load, bf16x16_load)(p)
#define load_part(p, n, fill) \
    by_element(p, f32x16_load_part, d8_load_part, f16x16_load_part, bf16x16_load_part)(p, n, fill)
#define store(p, a) by_element(p, f32x16_store, d8_store, f16x16_store, bf16x16_store)(p, a)
#define store_part(p, n, a) \
    by_element(p, f32x16_store_part, d8_store_part, f16x16_store_part, bf16x16_store_part)(p, n, a)
#define stream(p, a) by_element(p, f32x16_stream, d8_stream, f16x16_stream, bf16x16_stream)(p, a)
/* Eight elements of any type as a d8. */
#define load_wide(p) by_element(p, f32_load_wide, d8_load, f16_load_wide, bf16_load_wide)(p)
#define load_wide_part(p, n, fill)                                                                 \
    by_element(p, f32_load_wide_part, d8_load_part, f16_load_wide_part, bf16_load_wide_part)(p, n, \
                                                                                             fill)
/* Selected by the vector. */
#define add(a, b) _Generic((a), f32x16: f32x16_add, d8: d8_add, d16: d16_add)(a, b)
#define sub(a, b) _Generic((a), f32x16: f32x16_sub, d8: d8_sub, d16: d16_sub)(a, b)
#define mul(a, b) _Generic((a), f32x16: f32x16_mul, d8: d8_mul)(a, b)
#define div(a, b) _Generic((a), f32x16: f32x16_div, d8: d8_div)(a, b)
#define fmadd(a, b, c) _Generic((a), f32x16: f32x16_fma, d8: d8_fma, d16: d16_fma)(a, b, c)
#define max(a, b) _Generic((a), f32x16: f32x16_max, d8: d8_max)(a, b)
#define min(a, b) _Generic((a), f32x16: f32x16_min, d8: d8_min)(a, b)
#define select_le(a, b, yes, no) \
    _Generic((a), f32x16: f32x16_select_le, d8: d8_select_le)(a, b, yes, no)
#define pow2(n) _Generic((n), f32x16: f32x16_pow2, d8: d8_pow2)(n)
#define select_first(n, a, b) \
    _Generic((a), f32x16: f32x16_select_first, d8: d8_select_first)(n, a, b)
/* The same lanes in float64: d16 of f32x16, and a d8 as it is. */
#define widen(a) _Generic((a), f32x16: f32x16_widen, d8: d8_same)(a)
/* Selected by the kernels' own vector types, vec and wide. */
#define set1(a) _Generic((vec){0}, f32x16: f32x16_set1, d8: d8_set1)(a)
#define wide_set1(a) _Generic((wide){0}, d16: d16_set1, d8: d8_set1)(a)
#define wide_load(p) _Generic((wide){0}, d16: d16_load, d8: d8_load)(p)
#define wide_store(p, a) _Generic((a), d16: d16_store, d8: d8_store)(p, a)
#define wide_sum(a) _Generic((a), d16: d16_sum, d8: d8_sum)(a)

static inline d8 d8_same(d8 a) { return a; }

/* Sixteen float64 lanes, in which the sums of f32x16 are kept. */
typedef struct {
    d8 lo, hi;
} d16;

static inline d16 f32x16_widen(f32x16 a) { return (d16){f32x16_low(a), f32x16_high(a)}; }
static inline d16 d16_set1(double a) { return (d16){d8_set1(a), d8_set1(a)}; }
static inline d16 d16_load(const double *p) { return (d16){d8_load(p), d8_load(p + 8)}; }
static inline void d16_store(double *p, d16 a)
{
    d8_store(p, a.lo);
    d8_store(p + 8, a.hi);
}
static inline d16 d16_add(d16 a, d16 b) { return (d16){d8_add(a.lo, b.lo), d8_add(a.hi, b.hi)}; }
static inline d16 d16_sub(d16 a, d16 b) { return (d16){d8_sub(a.lo, b.lo), d8_sub(a.hi, b.hi)}; }
static inline d16 d16_fma(d16 a, d16 b, d16 c)
{
    return (d16){d8_fma(a.lo, b.lo, c.lo), d8_fma(a.hi, b.hi, c.hi)};
}
static inline double d16_sum(d16 a) { return d8_sum(d8_add(a.lo, a.hi)); }

/* Fetches a line into the second cache: it can wait for more lines at a time than the first one,
 * and so reads memory faster.  A prefetch never faults, for any address.  Inlined by force, since
 * gcc leaves out calls of a function that does nothing else. */
ISA_INLINE void fetch(const void *p) { __builtin_prefetch(p, 0, 2); }

/* One page ahead, where the hardware prefetcher stops: of a single run, which the first cache can
 * wait for. */
ISA_INLINE void fetch_ahead(const void *p) { __builtin_prefetch((const char *)p + 4096); }

static inline double finite_or_zero(double a) { return a - a == 0 ? a : 0.0; }

/* a - low * factor, also for an infinite factor if low is 0. */
static inline double without(double a, double low, double factor)
{
    return low != 0 ? a - low * factor : a;
}

static inline ptrdiff_t at_most(ptrdiff_t limit, ptrdiff_t n) { return n < limit ? n : limit; }
static inline ptrdiff_t at_least(ptrdiff_t limit, ptrdiff_t n) { return n > limit ? n : limit; }

/* How many rows of a tile are taken as one: one by one if it has only some of the channels. */
static inline ptrdiff_t rows_at_once(bnf_shape shape, bnf_tile tile)
{
    const bool whole = tile.channel1 - tile.channel0 == shape.channels;
    return whole ? bnf_rows_at_once(shape) : 1;
}

/* --- Sums in float64, of the kernel that is exact for any data (moments.inc.h) --- */

#define WIDE_LANES 8

/* Two sums over a run of values: value i goes to lane i % 16.  Sixteen independent chains hide the
 * latency of an addition on every set. */
typedef struct {
    d8 first[2], second[2];
} lane_sums;

static inline lane_sums no_sums(void)
{
    const d8 zero = d8_set1(0.0);
    return (lane_sums){{zero, zero}, {zero, zero}};
}

static inline double total(const d8 halves[2]) { return d8_sum(d8_add(halves[0], halves[1])); }

/* The same for eight channels side by side, with the numbers that are subtracted
 * from their values.  One struct and not three arrays: the arrays would lie 4 KiB
 * apart and so share one set of the cache, whose ways the rows need. */
typedef struct {
    double about[WIDE_LANES], first[WIDE_LANES], second[WIDE_LANES];
} strip_sums;

#define BNF_MAX_STRIPS (BNF_MAX_INTERLEAVED / WIDE_LANES)

/* Columns beyond the channels are copies of them, for rows that are taken at once. */
static inline void copy_about(strip_sums *sums, ptrdiff_t columns, ptrdiff_t channels)
{
    for (ptrdiff_t i = channels, c = 0; i < columns; i++, c++)
        sums[i / WIDE_LANES].about[i % WIDE_LANES] = sums[c / WIDE_LANES].about[c % WIDE_LANES];
}

/* Adds the copies' sums to those of the channels, and sets them to zero. */
static inline void fold_copies(strip_sums *sums, ptrdiff_t columns, ptrdiff_t channels)
{
    for (ptrdiff_t i = columns; i-- > channels;) { /* the last copy into the one before it, ... */
        strip_sums *from = &sums[i / WIDE_LANES], *to = &sums[(i - channels) / WIDE_LANES];
        const ptrdiff_t lane = i % WIDE_LANES, to_lane = (i - channels) % WIDE_LANES;
        to->first[to_lane] += from->first[lane];
        to->second[to_lane] += from->second[lane];
        from->first[lane] = from->second[lane] = 0.0;
    }
}

/* Rows that a mask counts: where they begin, and their weights. */
typedef struct {
    ptrdiff_t at[ROWS], count;
    double weight[ROWS];
} counted_rows;

/* Which of n values or rows is the k-th of so many places of a pivot (batch_moments.inc.h): one in
 * each part of them, shifted by k times the golden ratio.  Places that repeat after a few parts
 * would hit the same corner of every image. */
static inline ptrdiff_t place(ptrdiff_t k, ptrdiff_t places, ptrdiff_t n)
{
    return n * ((k << 16) + (k * 40503 & 65535)) / (places << 16);
}

/* What a loop is compiled for.  It is a constant where a loop is called, so that
 * no branch is left inside (except with FEW_LOOPS, see kernels.inc.h). */
typedef struct {
    bnf_layout layout;
    bool backward; /* gradients, or else moments and y */
    bnf_activation activation;
    bnf_z_source z_source;
    bool smooth; /* the activation is one of several, and no constant */
    bool masked; /* there are weights */
    bool residual, through;
} variant;

#endif
