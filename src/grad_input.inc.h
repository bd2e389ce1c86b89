/* 4. grad_input: dx = dy_factor*g + x_factor*(x - mean) + constant, or
 * dx = dy_factor*g if the statistics are constants; the residual's gradient is g. */

INLINE void NAME(grad_input_some)(const bnf_backward *b, ptrdiff_t i, ptrdiff_t n,
                                  NAME(affine_vec) a, NAME(slopes_vec) s, vec slope, variant v)
{
    if (v.smooth) { /* as in apply */
        fetch_ahead((const T *)b->x + i);
        fetch_ahead((const T *)b->dy + i);
    }
    const vec g = NAME(before_activation)(b, i, n, a, slope, v);
    vec dx = mul(s.dy_factor, g);
    if (v.through) {
        const vec d = NAME(center)(NAME(load_some)((const T *)b->x + i, n), a);
        dx = fmadd(s.x_factor, d, fmadd(s.dy_factor, g, s.constant));
    }
    if (v.residual)
        NAME(store_some)((T *)b->dresidual + i, n, g, false);
    NAME(store_some)((T *)b->dx + i, n, dx, b->stream);
}

INLINE void NAME(grad_input_run)(const bnf_backward *b, ptrdiff_t i, ptrdiff_t end,
                                 NAME(affine_vec) a, NAME(slopes_vec) s, vec slope, variant v)
{
    ptrdiff_t odd = b->stream ? NAME(lead)((const T *)b->dx + i, end - i) : 0;
    do { /* as in apply */
        if (odd)
            NAME(grad_input_some)(b, i, odd, a, s, slope, v);
        for (i += odd; i + LANES <= end; i += LANES)
            NAME(grad_input_some)(b, i, LANES, a, s, slope, v);
        odd = end - i;
    } while (odd);
}

INLINE void NAME(grad_input_planar_as)(const bnf_backward *operands, bnf_tile tile, variant v)
{
    const bnf_backward own = *operands, *b = &own; /* as in apply */
    NAME(affine) affine;
    NAME(slopes) slopes;
    NAME(round_affine)(b->mean, b->scale, b->shift, tile, 1, &affine);
    NAME(round_slopes)(b, tile, 1, &slopes);
    const vec slope = set1(b->slope);
    for (ptrdiff_t o = tile.outer0; o < tile.outer1; o++)
        for (ptrdiff_t c = tile.channel0; c < tile.channel1; c++) {
            const ptrdiff_t plane = (o * b->shape.channels + c) * b->shape.inner;
            NAME(grad_input_run)(b, plane + tile.inner0, plane + tile.inner1,
                                 NAME(broadcast_affine)(&affine, c - tile.channel0),
                                 NAME(broadcast_slopes)(&slopes, c - tile.channel0), slope, v);
        }
}

INLINE void NAME(grad_input_strip)(const bnf_backward *b, ptrdiff_t row, ptrdiff_t i, ptrdiff_t n,
                                   const NAME(affine) * affine, const NAME(slopes) * slopes,
                                   vec slope, variant v)
{
    NAME(grad_input_some)(b, row + i, n, NAME(load_affine)(affine, i, n),
                          NAME(load_slopes)(slopes, i, n), slope, v);
}

INLINE void NAME(grad_input_interleaved_as)(const bnf_backward *operands, bnf_tile tile, variant v)
{
    const bnf_backward own = *operands, *b = &own; /* as in apply */
    ptrdiff_t at_once = rows_at_once(b->shape, tile);
    NAME(affine) affine;
    NAME(slopes) slopes;
    NAME(round_affine)(b->mean, b->scale, b->shift, tile, at_once, &affine);
    NAME(round_slopes)(b, tile, at_once, &slopes);
    const vec slope = set1(b->slope);
    for (ptrdiff_t o = tile.outer0; o < tile.outer1; o += at_once) { /* as in apply */
        if (o + at_once > tile.outer1)
            at_once = 1;
        const ptrdiff_t columns = at_once * (tile.channel1 - tile.channel0);
        const ptrdiff_t row = o * b->shape.channels + tile.channel0;
        ptrdiff_t odd = b->stream ? NAME(lead)((const T *)b->dx + row, columns) : 0, i = 0;
        do {
            if (odd)
                NAME(grad_input_strip)(b, row, i, odd, &affine, &slopes, slope, v);
            for (i += odd; i + LANES <= columns; i += LANES)
                NAME(grad_input_strip)(b, row, i, LANES, &affine, &slopes, slope, v);
            odd = columns - i;
        } while (odd);
    }
}

INLINE void NAME(grad_input_as)(const bnf_backward *b, bnf_tile tile, variant v)
{
    if (v.layout == BNF_PLANAR)
        NAME(grad_input_planar_as)(b, tile, v);
    else
        NAME(grad_input_interleaved_as)(b, tile, v);
    if (b->stream)
        stream_end();
}

INLINE void NAME(grad_input_added)(const bnf_backward *b, bnf_tile tile, variant v)
{
    if (v.z_source != BNF_Z_FROM_X && b->dresidual) /* BNF_Z_FROM_X: there is no residual */
        NAME(grad_input_as)(b, tile, (v.residual = true, v));
    else
        NAME(grad_input_as)(b, tile, v);
}

INLINE void NAME(grad_input_through)(const bnf_backward *b, bnf_tile tile, variant v)
{
    if (b->through_moments)
        NAME(grad_input_added)(b, tile, (v.through = true, v));
    else
        NAME(grad_input_added)(b, tile, v);
}

INLINE void NAME(grad_input_activated)(const bnf_backward *b, bnf_tile tile, variant v)
{
    if (b->z_source == BNF_Z_FROM_X_RESIDUAL)
        NAME(grad_input_through)(b, tile, (v.z_source = BNF_Z_FROM_X_RESIDUAL, v));
    else if (b->z_source == BNF_Z_FROM_Y && !v.smooth && bnf_is_from_output(v.activation))
        NAME(grad_input_through)(b, tile, (v.z_source = BNF_Z_FROM_Y, v));
    else
        NAME(grad_input_through)(b, tile, (v.z_source = BNF_Z_FROM_X, v));
}

INLINE void NAME(grad_input)(const bnf_backward *b, bnf_tile tile, bnf_layout layout)
{
    variant v = {.layout = layout};
    if (FEW_LOOPS) {
        v.through = b->through_moments, v.residual = b->dresidual != NULL;
        if (b->activation == BNF_LINEAR)
            NAME(grad_input_as)(b, tile, v);
        else
            NAME(grad_input_as)(b, tile,
                                (v.activation = b->activation, v.z_source = b->z_source,
                                 v.smooth = bnf_is_smooth(b->activation), v));
        return;
    }
    if (bnf_is_smooth(b->activation)) {
        v.activation = b->activation, v.smooth = true;
        NAME(grad_input_activated)(b, tile, v);
        return;
    }
    switch (b->activation) {
#define SMOOTH(...)
#define ACTIVATION(CODE, ...)                                                \
    case BNF_##CODE:                                                         \
        NAME(grad_input_activated)(b, tile, (v.activation = BNF_##CODE, v)); \
        break;
#include "activations.inc"
    default:
        NAME(grad_input_through)(b, tile, v);
    }
}

static void NAME(grad_input_planar)(const bnf_backward *b, bnf_tile tile)
{
    NAME(grad_input)(b, tile, BNF_PLANAR);
}

static void NAME(grad_input_interleaved)(const bnf_backward *b, bnf_tile tile)
{
    NAME(grad_input)(b, tile, BNF_INTERLEAVED);
}
