/* 2. apply: y = act((x - mean) * scale + shift (+ residual)) */

INLINE void NAME(apply_some)(const bnf_forward *f, ptrdiff_t i, ptrdiff_t n, NAME(affine_vec) a,
                             vec slope, variant v)
{
    if (v.smooth) { /* takes so long that the hardware does not look far enough ahead */
        fetch_ahead((const T *)f->x + i);
        if (v.residual)
            fetch_ahead((const T *)f->residual + i);
    }
    const vec d = NAME(center)(NAME(load_some)((const T *)f->x + i, n), a);
    vec z = fmadd(d, a.scale, a.shift);
    if (v.residual)
        z = add(z, NAME(load_some)((const T *)f->residual + i, n));
    NAME(store_some)((T *)f->y + i, n, VEC(activate)(z, slope, v), f->stream);
}

INLINE void NAME(apply_run)(const bnf_forward *f, ptrdiff_t i, ptrdiff_t end, NAME(affine_vec) a,
                            vec slope, variant v)
{
    ptrdiff_t odd = f->stream ? NAME(lead)((const T *)f->y + i, end - i) : 0;
    do { /* unaligned head, full vectors, then the tail with the head's partial-vector code */
        if (odd)
            NAME(apply_some)(f, i, odd, a, slope, v);
        for (i += odd; i + LANES <= end; i += LANES)
            NAME(apply_some)(f, i, LANES, a, slope, v);
        odd = end - i;
    } while (odd);
}

INLINE void NAME(apply_planar_as)(const bnf_forward *operands, bnf_tile tile, variant v)
{
    /* A local copy: no store can change it, so the compiler keeps it in registers. */
    const bnf_forward own = *operands, *f = &own;
    NAME(affine) rounded;
    NAME(round_affine)(f->mean, f->scale, f->shift, tile, 1, &rounded);
    const vec slope = set1(f->slope);
    for (ptrdiff_t o = tile.outer0; o < tile.outer1; o++)
        for (ptrdiff_t c = tile.channel0; c < tile.channel1; c++) {
            const ptrdiff_t plane = (o * f->shape.channels + c) * f->shape.inner;
            NAME(apply_run)(f, plane + tile.inner0, plane + tile.inner1,
                            NAME(broadcast_affine)(&rounded, c - tile.channel0), slope, v);
        }
}

/* n channels of one row, from channel i of the tile on. */
INLINE void NAME(apply_strip)(const bnf_forward *f, ptrdiff_t row, ptrdiff_t i, ptrdiff_t n,
                              const NAME(affine) * rounded, vec slope, variant v)
{
    NAME(apply_some)(f, row + i, n, NAME(load_affine)(rounded, i, n), slope, v);
}

/* Row by row, with the parameters read from L1.  Rows may lie a multiple of 4 KiB
 * apart.  A strip of several rows would then load right after stores whose
 * addresses have the same low 12 bits, which processors mistake for the same
 * address. */
INLINE void NAME(apply_interleaved_as)(const bnf_forward *operands, bnf_tile tile, variant v)
{
    const bnf_forward own = *operands, *f = &own;
    ptrdiff_t at_once = rows_at_once(f->shape, tile);
    NAME(affine) rounded;
    NAME(round_affine)(f->mean, f->scale, f->shift, tile, at_once, &rounded);
    const vec slope = set1(f->slope);
    for (ptrdiff_t o = tile.outer0; o < tile.outer1; o += at_once) {
        if (o + at_once > tile.outer1)
            at_once = 1;
        const ptrdiff_t columns = at_once * (tile.channel1 - tile.channel0);
        const ptrdiff_t row = o * f->shape.channels + tile.channel0;
        ptrdiff_t odd = f->stream ? NAME(lead)((const T *)f->y + row, columns) : 0, i = 0;
        do { /* as in apply_run */
            if (odd)
                NAME(apply_strip)(f, row, i, odd, &rounded, slope, v);
            for (i += odd; i + LANES <= columns; i += LANES)
                NAME(apply_strip)(f, row, i, LANES, &rounded, slope, v);
            odd = columns - i;
        } while (odd);
    }
}

/* From here to the table's entries: each constant that is put into a variant
 * makes a loop of its own. */
INLINE void NAME(apply_as)(const bnf_forward *f, bnf_tile tile, variant v)
{
    if (v.layout == BNF_PLANAR)
        NAME(apply_planar_as)(f, tile, v);
    else
        NAME(apply_interleaved_as)(f, tile, v);
    if (f->stream)
        stream_end();
}

INLINE void NAME(apply_added)(const bnf_forward *f, bnf_tile tile, variant v)
{
    if (f->residual)
        NAME(apply_as)(f, tile, (v.residual = true, v));
    else
        NAME(apply_as)(f, tile, v);
}

INLINE void NAME(apply)(const bnf_forward *f, bnf_tile tile, bnf_layout layout)
{
    if (bnf_is_smooth(f->activation)) {
        NAME(apply_added)(f, tile,
                          (variant){.layout = layout, .activation = f->activation, .smooth = true});
        return;
    }
    switch (f->activation) {
#define SMOOTH(...)
#define ACTIVATION(CODE, ...)                                                              \
    case BNF_##CODE:                                                                       \
        NAME(apply_added)(f, tile, (variant){.layout = layout, .activation = BNF_##CODE}); \
        break;
#include "activations.inc"
    default:
        NAME(apply_added)(f, tile, (variant){.layout = layout});
    }
}

static void NAME(apply_planar)(const bnf_forward *f, bnf_tile tile)
{
    NAME(apply)(f, tile, BNF_PLANAR);
}

static void NAME(apply_interleaved)(const bnf_forward *f, bnf_tile tile)
{
    NAME(apply)(f, tile, BNF_INTERLEAVED);
}
