/* The loops of the kernels that write: over one run of memory, whose parameters change with the
 * channel.  A run has a head up to the first whole line and a tail: a store that touches two lines
 * is slow, and streaming stores need whole ones. */

/* All parameters in vectors; those of the gradients only where a loop writes dx. */
typedef struct {
    vec high, scale, shift, x_factor, dy_factor, constant;
    vec weight; /* of a mask */
} NAME(write_lanes);

INLINE NAME(lanes) NAME(of_y)(NAME(write_lanes) p)
{
    return (NAME(lanes)){p.high, p.scale, p.shift};
}

INLINE NAME(write_lanes) NAME(broadcast_all)(NAME(params) p, ptrdiff_t i, bool backward)
{
    NAME(write_lanes)
    to = {.high = set1(p.high[i]), .scale = set1(p.scale[i]), .shift = set1(p.shift[i])};
    if (backward) {
        to.x_factor = set1(p.x_factor[i]);
        to.dy_factor = set1(p.dy_factor[i]);
        to.constant = set1(p.constant[i]);
    }
    return to;
}

INLINE NAME(write_lanes) NAME(side_by_side_all)(NAME(params) p, ptrdiff_t i, bool backward)
{
    NAME(write_lanes)
    to = {.high = load(p.high + i), .scale = load(p.scale + i), .shift = load(p.shift + i)};
    if (backward) {
        to.x_factor = load(p.x_factor + i);
        to.dy_factor = load(p.dy_factor + i);
        to.constant = load(p.constant + i);
    }
    return to;
}

/* Where two channels meet: n lanes of one, the rest of the other. */
INLINE NAME(write_lanes) NAME(blend)(ptrdiff_t n, NAME(write_lanes) a, NAME(write_lanes) b)
{
    return (NAME(write_lanes)){.high = select_first(n, a.high, b.high),
                               .scale = select_first(n, a.scale, b.scale),
                               .shift = select_first(n, a.shift, b.shift),
                               .x_factor = select_first(n, a.x_factor, b.x_factor),
                               .dy_factor = select_first(n, a.dy_factor, b.dy_factor),
                               .constant = select_first(n, a.constant, b.constant)};
}

INLINE void NAME(apply_some)(NAME(work) w, ptrdiff_t i, ptrdiff_t n, NAME(lanes) p);
INLINE void NAME(grad_input_some)(NAME(work) w, ptrdiff_t i, ptrdiff_t n, NAME(write_lanes) p);

/* A mask's weights lie in memory as one channel of planes does; a row has one. */
INLINE vec NAME(weights_at)(NAME(work) w, ptrdiff_t i, ptrdiff_t n)
{
    const P *weights = (const P *)w.o->weights + (i - w.weights_behind);
    if (w.v.layout == BNF_INTERLEAVED)
        return w.row_weight;
    return n < LANES ? load_part(weights, n, set1(0.0)) : load(weights);
}

INLINE void NAME(write_some)(NAME(work) w, ptrdiff_t i, ptrdiff_t n, NAME(write_lanes) p)
{
    if (w.v.masked)
        p.weight = NAME(weights_at)(w, i, n);
    if (w.v.backward)
        NAME(grad_input_some)(w, i, n, p);
    else
        NAME(apply_some)(w, i, n, NAME(of_y)(p));
}

/* How many of n values come before the first whole line. */
INLINE ptrdiff_t NAME(head)(NAME(work) w, ptrdiff_t i, ptrdiff_t n)
{
    return NAME(lead)((const T *)(w.v.backward ? w.o->dx : w.o->y) + i, n);
}

/* `planes` planes of `length` values, one after the other, those of the tile's channels c, ...  A
 * vector in which two planes meet is computed with the parameters of both. */
INLINE void NAME(write_planes)(NAME(work) w, ptrdiff_t i, ptrdiff_t length, ptrdiff_t planes,
                               NAME(params) params, ptrdiff_t c)
{
    ptrdiff_t end = i + length, odd = NAME(head)(w, i, length);
    NAME(write_lanes) p = NAME(broadcast_all)(params, c, w.v.backward);
    for (; planes > 0; planes--, end += length) {
        do { /* head, full vectors, then a tail with the head's partial-vector code */
            if (odd)
                NAME(write_some)(w, i, odd, p);
            for (i += odd; i + LANES <= end; i += LANES)
                NAME(write_some)(w, i, LANES, p);
            odd = planes == 1 || length < LANES ? end - i : 0;
        } while (odd);
        if (planes == 1)
            return;
        const NAME(write_lanes) next = NAME(broadcast_all)(params, ++c, w.v.backward);
        if (i < end) {
            NAME(write_some)(w, i, LANES, NAME(blend)(end - i, p, next));
            i += LANES;
        }
        p = next;
    }
}

INLINE void NAME(write_planar)(NAME(work) w, bnf_tile tile, NAME(params) params)
{
    const bnf_shape shape = w.o->shape;
    const ptrdiff_t channels = tile.channel1 - tile.channel0, length = tile.inner1 - tile.inner0;
    const ptrdiff_t planes = length == shape.inner && !w.v.masked ? channels : 1;
    for (ptrdiff_t o = tile.outer0; o < tile.outer1; o++)
        for (ptrdiff_t c = 0; c < channels; c += planes) {
            const ptrdiff_t plane = (o * shape.channels + tile.channel0 + c) * shape.inner;
            w.weights_behind = plane - o * shape.inner;
            NAME(write_planes)(w, plane + tile.inner0, length, planes, params, c);
        }
}

/* n values in rows of `columns`.  The parameters are repeated behind the last column, so a vector
 * may begin in any of them; those of the first column are at `first`. */
INLINE void NAME(write_rows)(NAME(work) w, ptrdiff_t i, ptrdiff_t n, ptrdiff_t columns,
                             NAME(params) params, ptrdiff_t first)
{
    const ptrdiff_t end = i + n;
    ptrdiff_t column = 0, odd = NAME(head)(w, i, n);
    do { /* as in write_planes */
        if (odd)
            NAME(write_some)(w, i, odd,
                             NAME(side_by_side_all)(params, first + column, w.v.backward));
        i += odd;
        column += odd;
        while (i + LANES <= end) {
            if (column >= columns)
                column -= columns;
            const ptrdiff_t stop = at_most(end - LANES, i + columns - 1 - column);
            for (; i <= stop; i += LANES, column += LANES)
                NAME(write_some)(w, i, LANES,
                                 NAME(side_by_side_all)(params, first + column, w.v.backward));
        }
        if (column >= columns)
            column -= columns;
        odd = end - i;
    } while (odd);
}

/* All rows are one run if the tile has all channels, and no mask gives each its weight. */
INLINE void NAME(write_interleaved)(NAME(work) w, bnf_tile tile, NAME(params) params,
                                    ptrdiff_t first)
{
    const ptrdiff_t stride = w.o->shape.channels, channels = tile.channel1 - tile.channel0;
    const ptrdiff_t rows = channels == stride && !w.v.masked ? tile.outer1 - tile.outer0 : 1;
    const ptrdiff_t columns = channels * rows_at_once(w.o->shape, tile);
    for (ptrdiff_t o = tile.outer0; o < tile.outer1; o += rows) {
        if (w.v.masked)
            w.row_weight = set1(((const P *)w.o->weights)[o]);
        NAME(write_rows)(w, o * stride + tile.channel0, rows * channels, columns, params, first);
    }
}

/* Where the first column's parameters are: such that they can be loaded in whole lines where y or
 * dx is written so. */
INLINE ptrdiff_t NAME(first_column)(const bnf_operands *o, bnf_tile tile, const void *written)
{
    const T *row = (const T *)written + tile.outer0 * o->shape.channels + tile.channel0;
    return (LANES - NAME(lead)(row, LANES)) % LANES;
}

INLINE void NAME(write_tile)(const bnf_operands *operands, bnf_tile tile, variant v)
{
    /* A local copy: no store can change it, so the compiler keeps it in registers. */
    const bnf_operands own = *operands;
    const NAME(work) w = {.o = &own, .slope = set1(own.slope), .v = v};
    const bool planar = v.layout == BNF_PLANAR;
    const ptrdiff_t channels = tile.channel1 - tile.channel0;
    const ptrdiff_t columns = planar ? 0 : channels * rows_at_once(own.shape, tile);
    const ptrdiff_t first =
        planar ? 0 : NAME(first_column)(&own, tile, v.backward ? own.dx : own.y);
    /* Room to place the first column, and to repeat some behind the last. */
    _Alignas(LINE_BYTES) P rows[6][BNF_MAX_CHANNELS + 2 * LANES];
    const NAME(params) params = {.high = rows[0],
                                 .scale = rows[1],
                                 .shift = rows[2],
                                 .x_factor = rows[3],
                                 .dy_factor = rows[4],
                                 .constant = rows[5]};
    NAME(round_params)(&own, tile, first, params);
    NAME(repeat)(params.high + first, channels, columns);
    NAME(repeat)(params.scale + first, channels, columns);
    NAME(repeat)(params.shift + first, channels, columns);
    if (v.backward) {
        NAME(round_slopes)(&own, tile, first, params);
        NAME(repeat)(params.x_factor + first, channels, columns);
        NAME(repeat)(params.dy_factor + first, channels, columns);
        NAME(repeat)(params.constant + first, channels, columns);
    }
    if (planar)
        NAME(write_planar)(w, tile, params);
    else
        NAME(write_interleaved)(w, tile, params, first);
    if (own.stream)
        stream_end();
}
