/* 4. apply: y = act((x - mean) * scale + shift (+ residual)) */

INLINE void NAME(apply_some)(NAME(work) w, ptrdiff_t i, ptrdiff_t n, NAME(lanes) p)
{
    if (w.v.smooth) { /* takes so long that the hardware does not look far enough ahead */
        fetch_ahead((const T *)w.o->x + i);
        if (w.v.residual)
            fetch_ahead((const T *)w.o->residual + i);
    }
    const vec d = NAME(centered)(w.o, i, n, p);
    const vec z = NAME(affine)(w.o, i, n, d, p, w.v.residual);
    NAME(store_some)((T *)w.o->y + i, n, VEC(activate)(z, w.slope, w.v), w.o->stream);
}

/* From here to the table's entries: each constant that is put into a variant
 * makes a loop of its own. */
INLINE void NAME(apply_added)(const bnf_operands *o, bnf_tile tile, variant v)
{
    if (o->residual)
        NAME(write_tile)(o, tile, (v.residual = true, v));
    else
        NAME(write_tile)(o, tile, v);
}

INLINE void NAME(apply)(const bnf_operands *o, bnf_tile tile, bnf_layout layout)
{
    if (FEW_LOOPS || bnf_is_smooth(o->activation)) {
        const variant v = {
            .layout = layout, .activation = o->activation, .smooth = bnf_is_smooth(o->activation)};
        NAME(apply_added)(o, tile, v);
        return;
    }
    switch (o->activation) {
#define SMOOTH(...)
#define ACTIVATION(CODE, ...)                                                              \
    case BNF_##CODE:                                                                       \
        NAME(apply_added)(o, tile, (variant){.layout = layout, .activation = BNF_##CODE}); \
        break;
#include "activations.inc"
    default:
        NAME(apply_added)(o, tile, (variant){.layout = layout});
    }
}

static void NAME(apply_planar)(const bnf_operands *o, bnf_tile tile)
{
    NAME(apply)(o, tile, BNF_PLANAR);
}

static void NAME(apply_interleaved)(const bnf_operands *o, bnf_tile tile)
{
    NAME(apply)(o, tile, BNF_INTERLEAVED);
}
