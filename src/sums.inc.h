/* Two sums per channel, of l and of l * f, where
 *
 *     for a training call's moments   l = f = x - pivot,
 *     for the backward                l = g, f = x - high.
 *
 * They are summed in the type of a lane over trees of eight vectors (of a run, or of eight rows),
 * and widened once for each tree.  A value of l is rounded three times before it is widened, a
 * product four times.  Value i of a run stays in lane i % LANES, so that every set adds in the same
 * order. */

typedef struct {
    vec l, f;
} NAME(term);

typedef struct {
    vec first, second;
} NAME(tree);

typedef struct {
    wide first, second;
} NAME(sums);

/* How a loop computes: on what, with which slope, as which variant; for a masked loop that writes,
 * with which weights (writes.inc.h). */
typedef struct {
    const bnf_operands *o;
    vec slope;
    variant v;
    vec row_weight;
    ptrdiff_t weights_behind;
} NAME(work);

INLINE NAME(term) NAME(term_at)(NAME(work) w, ptrdiff_t i, ptrdiff_t n, NAME(lanes) p)
{
    const vec d = NAME(centered)(w.o, i, n, p);
    if (!w.v.backward)
        return (NAME(term)){d, d};
    const vec g = NAME(before_activation)(w.o, i, n, d, p, w.slope, w.v);
    return (NAME(term)){g, w.v.masked ? NAME(where_not_zero)(g, d, g) : d};
}

INLINE NAME(tree) NAME(plus)(NAME(tree) a, NAME(tree) b)
{
    return (NAME(tree)){add(a.first, b.first), add(a.second, b.second)};
}

INLINE NAME(tree) NAME(two)(NAME(term) a, NAME(term) b)
{
    return (NAME(tree)){add(a.l, b.l), fmadd(b.l, b.f, mul(a.l, a.f))};
}

/* Fetches a vector of all that is summed, for later. */
INLINE void NAME(fetch)(NAME(work) w, ptrdiff_t i)
{
    fetch((const T *)w.o->x + i);
    if (w.v.backward)
        fetch((const T *)w.o->dy + i);
    if (w.v.z_source == BNF_Z_FROM_Y)
        fetch((const T *)w.o->y + i);
    if (w.v.z_source == BNF_Z_FROM_X_RESIDUAL)
        fetch((const T *)w.o->residual + i);
}

/* Eight vectors, `step` apart. */
INLINE void NAME(fetch_eight)(NAME(work) w, ptrdiff_t i, ptrdiff_t step)
{
    ISA_UNROLL
    for (int k = 0; k < 8; k++)
        NAME(fetch)(w, i + k * step);
}

/* Two whole vectors, `step` apart. */
INLINE NAME(tree) NAME(pair)(NAME(work) w, ptrdiff_t i, ptrdiff_t step, NAME(lanes) p)
{
    return NAME(two)(NAME(term_at)(w, i, LANES, p), NAME(term_at)(w, i + step, LANES, p));
}

/* Eight whole vectors.  Pairs are added as soon as two are there, to keep few in registers. */
INLINE NAME(tree) NAME(eight)(NAME(work) w, ptrdiff_t i, ptrdiff_t step, NAME(lanes) p)
{
    NAME(tree) half[2];
    ISA_UNROLL
    for (int k = 0; k < 2; k++, i += 4 * step) {
        half[k] = NAME(pair)(w, i, step, p);
        half[k] = NAME(plus)(half[k], NAME(pair)(w, i + 2 * step, step, p));
    }
    return NAME(plus)(half[0], half[1]);
}

/* What is left of a run or of some rows: up to four vectors, `step` apart, of n values each, of
 * which the last one has `last`; then, a second time, those that are `then` further, `fewer` of
 * them. */
typedef struct {
    ptrdiff_t step, count, n, last, times, then, fewer;
} NAME(left);

INLINE NAME(tree)
    NAME(up_to_two)(NAME(work) w, ptrdiff_t i, ptrdiff_t count, const NAME(left) * a, NAME(lanes) p)
{
    const NAME(term) t = NAME(term_at)(w, i, count > 1 ? a->n : a->last, p);
    if (count == 1)
        return (NAME(tree)){t.l, mul(t.l, t.f)};
    return NAME(two)(t, NAME(term_at)(w, i + a->step, count > 2 ? a->n : a->last, p));
}

INLINE NAME(tree) NAME(up_to_four)(NAME(work) w, ptrdiff_t i, ptrdiff_t count, const NAME(left) * a,
                                   NAME(lanes) p)
{
    const NAME(tree) t = NAME(up_to_two)(w, i, count, a, p);
    if (count <= 2)
        return t;
    return NAME(plus)(t, NAME(up_to_two)(w, i + 2 * a->step, count - 2, a, p));
}

/* A tree of the same shape as eight, without the vectors that are missing. */
INLINE NAME(tree) NAME(tree_of)(NAME(work) w, ptrdiff_t i, const NAME(left) * a, NAME(lanes) p)
{
    const NAME(tree) t = NAME(up_to_four)(w, i, a->count, a, p);
    if (a->times == 1)
        return t;
    return NAME(plus)(t, NAME(up_to_four)(w, i + a->then, a->count - a->fewer, a, p));
}

/* The same, compiled once: for loops with another activation than ReLU, to keep the library small.
 */
APART NAME(tree) NAME(tree_of_any)(const bnf_operands *o, variant v, ptrdiff_t i,
                                   const NAME(left) * a, const NAME(lanes) * p)
{
    const NAME(work) w = {.o = o, .slope = set1(o->slope), .v = v};
    const NAME(lanes) own = *p;
    return NAME(tree_of)(w, i, a, own);
}

/* p is a pointer, since a copy for each call takes longer than a short run. */
INLINE NAME(tree)
    NAME(left_over)(NAME(work) w, ptrdiff_t i, const NAME(left) * a, const NAME(lanes) * p)
{
    const bool common = w.v.activation == BNF_LINEAR || w.v.activation == BNF_RELU;
    if (!w.v.backward || (common && !w.v.smooth && !w.v.masked && !FEW_LOOPS))
        return NAME(tree_of)(w, i, a, *p);
    return NAME(tree_of_any)(w.o, w.v, i, a, p);
}

INLINE NAME(sums) NAME(widened)(NAME(sums) s, NAME(tree) t)
{
    return (NAME(sums)){add(s.first, widen(t.first)), add(s.second, widen(t.second))};
}

/* --- Planar --- */

/* moments_and_apply.inc.h */
typedef struct NAME(writer) NAME(writer);
INLINE void NAME(begin_image)(NAME(writer) * writer, ptrdiff_t image);
INLINE void NAME(write_more)(NAME(writer) * writer);
INLINE void NAME(end_image)(NAME(writer) * writer);

/* n values, and as many in the next image's plane if there are few: they are in one tree.  Writes
 * some of another tile after each tree, if there is a writer. */
INLINE NAME(sums)
    NAME(sum_run)(NAME(work) w, ptrdiff_t i, ptrdiff_t n, ptrdiff_t next, const NAME(lanes) * p,
                  ptrdiff_t ahead, NAME(sums) s, NAME(writer) * writer)
{
    for (; n >= 8 * LANES; n -= 8 * LANES, i += 8 * LANES) {
        if (ahead)
            NAME(fetch_eight)(w, i + ahead, LANES);
        s = NAME(widened)(s, NAME(eight)(w, i, LANES, *p));
        if (writer)
            NAME(write_more)(writer);
    }
    if (writer)
        NAME(write_more)(writer);
    if (n == 0)
        return s;
    const ptrdiff_t count = (n + LANES - 1) / LANES;
    for (ptrdiff_t k = 0; ahead && k < count; k++) {
        NAME(fetch)(w, i + k * LANES + ahead);
        if (next)
            NAME(fetch)(w, i + k * LANES + next + ahead);
    }
    const NAME(left) a = {.step = LANES,
                          .count = count,
                          .n = LANES,
                          .last = n - (count - 1) * LANES,
                          .times = 1 + (next || count > 4),
                          .then = next ? next : 4 * LANES,
                          .fewer = next ? 0 : 4};
    return NAME(widened)(s, NAME(left_over)(w, i, &a, p));
}

/* Moments have a pivot alone. */
INLINE NAME(lanes) NAME(summed_about)(NAME(work) w, NAME(params) params, ptrdiff_t c)
{
    if (w.v.backward)
        return NAME(broadcast)(params, c);
    return (NAME(lanes)){.high = set1(params.high[c])};
}

/* A tile's channels are one run in each image.  Where it ends, the next image's is fetched. */
INLINE void NAME(sum_planar)(NAME(work) w, bnf_tile tile, NAME(params) params, double *first,
                             double *second, NAME(writer) * writer)
{
    const bnf_shape shape = w.o->shape;
    const ptrdiff_t channels = tile.channel1 - tile.channel0, run = channels * shape.inner;
    const ptrdiff_t image = shape.channels * shape.inner, length = tile.inner1 - tile.inner0;
    const ptrdiff_t near = w.o->ahead;
    NAME(sums) sums[BNF_MAX_PLANAR];
    for (ptrdiff_t c = 0; c < channels; c++)
        sums[c] = (NAME(sums)){wide_set1(0.0), wide_set1(0.0)};
    for (ptrdiff_t o = tile.outer0, images; o < tile.outer1; o += images) {
        images = length <= 4 * LANES && o + 1 < tile.outer1 ? 2 : 1;
        const ptrdiff_t far = near ? near + images * image - run : 0;
        ptrdiff_t i = o * image + tile.channel0 * shape.inner + tile.inner0;
        if (writer)
            NAME(begin_image)(writer, o);
        for (ptrdiff_t c = 0; c < channels; c++, i += shape.inner) {
            const NAME(lanes) p = NAME(summed_about)(w, params, c);
            const ptrdiff_t ahead = c * shape.inner + near < run ? near : far;
            sums[c] =
                NAME(sum_run)(w, i, length, images == 2 ? image : 0, &p, ahead, sums[c], writer);
        }
        if (writer)
            NAME(end_image)(writer);
    }
    for (ptrdiff_t c = 0; c < channels; c++) {
        first[tile.channel0 + c] = wide_sum(sums[c].first);
        second[tile.channel0 + c] = wide_sum(sums[c].second);
    }
}

/* --- Interleaved --- */

/* Of LANES channels side by side.  One struct and not five arrays: the arrays would lie 4 KiB apart
 * and so share one set of the cache, whose ways the rows need. */
typedef struct {
    P high[LANES], scale[LANES], shift[LANES];
    double first[LANES], second[LANES];
} NAME(strip);

/* Up to ROWS rows of n channels. */
INLINE void NAME(sum_strip)(NAME(work) w, ptrdiff_t i, ptrdiff_t stride, ptrdiff_t rows,
                            ptrdiff_t n, NAME(strip) * strip)
{
    const NAME(lanes) p = (NAME(lanes)){
        .high = load(strip->high), .scale = load(strip->scale), .shift = load(strip->shift)};
    NAME(sums) s = {wide_load(strip->first), wide_load(strip->second)};
    if (rows == ROWS && n == LANES)
        s = NAME(widened)(s, NAME(eight)(w, i, stride, p));
    else {
        const NAME(left) a = {.step = stride,
                              .count = rows,
                              .n = n,
                              .last = n,
                              .times = 1 + (rows > 4),
                              .then = 4 * stride,
                              .fewer = 4};
        s = NAME(widened)(s, NAME(left_over)(w, i, &a, &p));
    }
    wide_store(strip->first, s.first);
    wide_store(strip->second, s.second);
}

/* Rows of few channels are taken several at once (bnf_rows_at_once), with a copy of the channels
 * for each; the last rows go into the sums of the first copy.  Whole rows follow one another in
 * memory, and are fetched in that order, in which memory is fastest: as far ahead as was measured
 * to be best (bench/NOTES.md), but no row of those that are summed now. */
INLINE void NAME(sum_interleaved)(NAME(work) w, bnf_tile tile, NAME(params) params, double *first,
                                  double *second)
{
    const ptrdiff_t at_once = rows_at_once(w.o->shape, tile), stride = w.o->shape.channels;
    const ptrdiff_t channels = tile.channel1 - tile.channel0, columns = at_once * channels;
    NAME(strip) strips[BNF_MAX_INTERLEAVED / LANES] = {0};
    for (ptrdiff_t i = 0; i < columns; i++) {
        NAME(strip) *s = &strips[i / LANES];
        s->high[i % LANES] = params.high[i % channels];
        if (!w.v.backward)
            continue;
        s->scale[i % LANES] = params.scale[i % channels];
        s->shift[i % LANES] = params.shift[i % channels];
    }
    const bool whole = channels == stride;
    const ptrdiff_t far = at_least(4 * w.o->ahead, ROWS * columns);
    for (ptrdiff_t o = tile.outer0, rows; o < tile.outer1; o += rows) {
        const ptrdiff_t each = o + at_once <= tile.outer1 ? at_once : 1;
        rows = each == at_once ? at_most(ROWS, (tile.outer1 - o) / at_once) * at_once : 1;
        for (ptrdiff_t c = 0; c < each * channels; c += LANES) {
            const ptrdiff_t i = o * stride + tile.channel0 + c;
            if (w.o->ahead)
                NAME(fetch_eight)(w, whole ? o * stride + ROWS * c + far : i + ROWS * stride,
                                  whole ? LANES : stride);
            NAME(sum_strip)(w, i, each * stride, rows / each, at_most(LANES, each * channels - c),
                            &strips[c / LANES]);
        }
    }
    for (ptrdiff_t c = 0; c < channels; c++) {
        double a = 0.0, b = 0.0;
        for (ptrdiff_t i = c; i < columns; i += channels) {
            a += strips[i / LANES].first[i % LANES];
            b += strips[i / LANES].second[i % LANES];
        }
        first[tile.channel0 + c] = a;
        second[tile.channel0 + c] = b;
    }
}

INLINE void NAME(sum_tile)(NAME(work) w, bnf_tile tile, NAME(params) params, double *first,
                           double *second)
{
    if (w.v.layout == BNF_PLANAR)
        NAME(sum_planar)(w, tile, params, first, second, NULL);
    else
        NAME(sum_interleaved)(w, tile, params, first, second);
}
