/* 6. grad_input: dx = dy_factor*g + x_factor*(x - mean) + constant, or
 * dx = dy_factor*g if the statistics are constants; the residual's gradient is g.  With a mask the
 * last two terms, which come through the statistics, are multiplied by the value's weight. */

INLINE void NAME(grad_input_some)(NAME(work) w, ptrdiff_t i, ptrdiff_t n, NAME(write_lanes) p)
{
    if (w.v.smooth) { /* as in apply */
        fetch_ahead((const T *)w.o->x + i);
        fetch_ahead((const T *)w.o->dy + i);
    }
    const bool needs_x =
        w.v.through || w.v.z_source == BNF_Z_FROM_X || w.v.z_source == BNF_Z_FROM_X_RESIDUAL;
    const vec d = needs_x ? NAME(centered)(w.o, i, n, NAME(of_y)(p)) : p.high;
    const vec g = NAME(before_activation)(w.o, i, n, d, NAME(of_y)(p), w.slope, w.v);
    vec dx = mul(p.dy_factor, g);
    if (w.v.through && w.v.masked) {
        const vec zero = set1(0.0), rest = mul(p.weight, fmadd(p.x_factor, d, p.constant));
        dx = add(dx, select_le(p.weight, zero, zero, rest));
    } else if (w.v.through)
        dx = fmadd(p.x_factor, d, fmadd(p.dy_factor, g, p.constant));
    if (w.v.residual)
        NAME(store_some)((T *)w.o->dresidual + i, n, g, false);
    NAME(store_some)((T *)w.o->dx + i, n, dx, w.o->stream);
}

INLINE void NAME(grad_input_added)(const bnf_operands *o, bnf_tile tile, variant v)
{
    if (v.z_source != BNF_Z_FROM_X && o->dresidual) /* BNF_Z_FROM_X: there is no residual */
        NAME(write_tile)(o, tile, (v.residual = true, v));
    else
        NAME(write_tile)(o, tile, v);
}

INLINE void NAME(grad_input_through)(const bnf_operands *o, bnf_tile tile, variant v)
{
    if (o->through_moments)
        NAME(grad_input_added)(o, tile, (v.through = true, v));
    else
        NAME(grad_input_added)(o, tile, v);
}

INLINE void NAME(grad_input_activated)(const bnf_operands *o, bnf_tile tile, variant v)
{
    if (o->z_source == BNF_Z_FROM_X_RESIDUAL)
        NAME(grad_input_through)(o, tile, (v.z_source = BNF_Z_FROM_X_RESIDUAL, v));
    else if (o->z_source == BNF_Z_FROM_Y && !v.smooth && bnf_is_from_output(v.activation))
        NAME(grad_input_through)(o, tile, (v.z_source = BNF_Z_FROM_Y, v));
    else
        NAME(grad_input_through)(o, tile, (v.z_source = BNF_Z_FROM_X, v));
}

/* One loop for all. */
INLINE void NAME(grad_input_of_any)(const bnf_operands *o, bnf_tile tile, variant v)
{
    v.through = o->through_moments, v.residual = o->dresidual != NULL;
    v.activation = o->activation, v.smooth = bnf_is_smooth(o->activation);
    v.z_source = o->z_source;
    NAME(write_tile)(o, tile, v);
}

INLINE void NAME(grad_input)(const bnf_operands *o, bnf_tile tile, bnf_layout layout)
{
    variant v = {.layout = layout, .backward = true};
    if (FEW_LOOPS) {
        NAME(grad_input_of_any)(o, tile, (v.masked = o->weights != NULL, v));
        return;
    }
    if (o->weights) {
        NAME(grad_input_of_any)(o, tile, (v.masked = true, v));
        return;
    }
    if (bnf_is_smooth(o->activation)) {
        v.activation = o->activation, v.smooth = true;
        NAME(grad_input_activated)(o, tile, v);
        return;
    }
    switch (o->activation) {
#define SMOOTH(...)
#define ACTIVATION(CODE, ...)                                                \
    case BNF_##CODE:                                                         \
        NAME(grad_input_activated)(o, tile, (v.activation = BNF_##CODE, v)); \
        break;
#include "activations.inc"
    default:
        NAME(grad_input_through)(o, tile, v);
    }
}

static void NAME(grad_input_planar)(const bnf_operands *o, bnf_tile tile)
{
    NAME(grad_input)(o, tile, BNF_PLANAR);
}

static void NAME(grad_input_interleaved)(const bnf_operands *o, bnf_tile tile)
{
    NAME(grad_input)(o, tile, BNF_INTERLEAVED);
}
