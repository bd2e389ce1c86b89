/* One name for each operation on f8 and on d8, so that kernels.inc.h reads the
 * same for every data type.  Included after simd_<isa>.h, which defines, beside
 * its operations,
 *
 *   ISA_UNROLL_ROWS  before a loop over ROWS rows: a pragma that unrolls it, or nothing,
 *   ISA_FEW_LOOPS    whether the backward has few loops (FEW_LOOPS in kernels.inc.h) for all types:
 *                    true for sets that are used only on processors without a better one, to keep a
 *                    wheel small,
 *   ISA_INLINE       how a kernel's functions are declared. */
#ifndef BNFAST_LANES_H
#define BNFAST_LANES_H

#define LANES 8
/* Rows that a strip of eight channels is summed over at a time.  If an instruction set unrolls
 * them (ISA_UNROLL_ROWS), each row is read by an instruction of its own, whose steady stride the
 * hardware prefetcher sees.  (One instruction for several rows jumps back and forth and reaches a
 * third of the memory's speed.) */
#define ROWS 8
/* That of NumPy's arrays, which therefore have no unaligned head (lead in kernels.inc.h). */
#define STREAM_ALIGNMENT 16

/* Selected by the type of the element, not of the pointer, so that const pointers match. */
#define by_element(p, f32, f64, f16, bf16) \
    _Generic(*(p), float: f32, double: f64, bnf_f16: f16, bnf_bf16: bf16)
#define load(p) by_element(p, f8_load, d8_load, f16_load, bf16_load)(p)
#define load_part(p, n, fill) \
    by_element(p, f8_load_part, d8_load_part, f16_load_part, bf16_load_part)(p, n, fill)
#define load_wide(p) by_element(p, f8_load_wide, d8_load, f16_load_wide, bf16_load_wide)(p)
#define store(p, a) by_element(p, f8_store, d8_store, f16_store, bf16_store)(p, a)
#define store_part(p, n, a) \
    by_element(p, f8_store_part, d8_store_part, f16_store_part, bf16_store_part)(p, n, a)
#define stream(p, a) by_element(p, f8_stream, d8_stream, f16_stream, bf16_stream)(p, a)
#define stream_part(p, n, a) \
    by_element(p, f8_stream_part, d8_stream_part, no_part, no_part)(p, n, a)
/* Selected by the vector. */
#define add(a, b) _Generic((a), f8: f8_add, d8: d8_add)(a, b)
#define sub(a, b) _Generic((a), f8: f8_sub, d8: d8_sub)(a, b)
#define mul(a, b) _Generic((a), f8: f8_mul, d8: d8_mul)(a, b)
#define div(a, b) _Generic((a), f8: f8_div, d8: d8_div)(a, b)
#define fmadd(a, b, c) _Generic((a), f8: f8_fma, d8: d8_fma)(a, b, c)
#define max(a, b) _Generic((a), f8: f8_max, d8: d8_max)(a, b)
#define min(a, b) _Generic((a), f8: f8_min, d8: d8_min)(a, b)
#define select_le(a, b, yes, no) _Generic((a), f8: f8_select_le, d8: d8_select_le)(a, b, yes, no)
#define pow2(n) _Generic((n), f8: f8_pow2, d8: d8_pow2)(n)
#define widen(a) _Generic((a), f8: f8_widen, d8: d8_same)(a)
/* Selected by the kernels' own vector type, vec. */
#define set1(a) _Generic((vec){0}, f8: f8_set1, d8: d8_set1)(a)

static inline d8 d8_same(d8 a) { return a; }

/* Never needed: fewer than eight halves are less than one streaming store writes. */
static inline void no_part(const void *p, ptrdiff_t n, f8 a) { (void)p, (void)n, (void)a; }

/* Prefetches one page ahead while a run is summed: the hardware prefetcher stops
 * at the end of each page.  A prefetch never faults, for any address. */
static inline void fetch_ahead(const void *p) { __builtin_prefetch((const char *)p + 4096); }

static inline double finite_or_zero(double a) { return a - a == 0 ? a : 0.0; }

static inline ptrdiff_t at_most(ptrdiff_t limit, ptrdiff_t n) { return n < limit ? n : limit; }

/* How many rows of a tile are taken as one: one by one if it has only some of the channels. */
static inline ptrdiff_t rows_at_once(bnf_shape shape, bnf_tile tile)
{
    const bool whole = tile.channel1 - tile.channel0 == shape.channels;
    return whole ? bnf_rows_at_once(shape) : 1;
}

/* What a loop is compiled for.  It is a constant where a loop is called, so that
 * no branch is left inside (except with FEW_LOOPS, see kernels.inc.h). */
typedef struct {
    bnf_layout layout;
    bnf_activation activation;
    bnf_z_source z_source;
    bool smooth; /* the activation is one of several, and no constant */
    bool residual, through;
} variant;

/* Two float64 sums over a run of values: value i goes to lane i % 16.  Sixteen
 * independent chains hide the latency of an addition on every set. */
typedef struct {
    d8 first[2], second[2];
} lane_sums;

static inline lane_sums no_sums(void)
{
    const d8 zero = d8_set1(0.0);
    return (lane_sums){{zero, zero}, {zero, zero}};
}

/* The same for eight channels side by side, with the numbers that are subtracted
 * from their values.  One struct and not three arrays: the arrays would lie 4 KiB
 * apart and so share one set of the cache, whose ways the rows need. */
typedef struct {
    double about[LANES], first[LANES], second[LANES];
} strip_sums;

#define BNF_MAX_STRIPS (BNF_MAX_INTERLEAVED / LANES)

/* Columns beyond the channels are copies of them, for rows that are taken at once. */
static inline void copy_about(strip_sums *sums, ptrdiff_t columns, ptrdiff_t channels)
{
    for (ptrdiff_t i = channels, c = 0; i < columns; i++, c++)
        sums[i / LANES].about[i % LANES] = sums[c / LANES].about[c % LANES];
}

/* Adds the copies' sums to those of the channels, and sets them to zero. */
static inline void fold_copies(strip_sums *sums, ptrdiff_t columns, ptrdiff_t channels)
{
    for (ptrdiff_t i = columns; i-- > channels;) { /* the last copy into the one before it, ... */
        strip_sums *from = &sums[i / LANES], *to = &sums[(i - channels) / LANES];
        const ptrdiff_t lane = i % LANES, to_lane = (i - channels) % LANES;
        to->first[to_lane] += from->first[lane];
        to->second[to_lane] += from->second[lane];
        from->first[lane] = from->second[lane] = 0.0;
    }
}

static inline double total(const d8 halves[2]) { return d8_sum(d8_add(halves[0], halves[1])); }

#endif
