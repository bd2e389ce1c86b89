/* 2. apply: y = act((x - mean) * scale + shift (+ residual)) */

INLINE void NAME(apply_some)(const bnf_forward *f, ptrdiff_t i, ptrdiff_t n, NAME(affine_vec) a,
                             vec slope, variant v)
{
    const vec d = NAME(center)(NAME(load_some)((const T *)f->x + i, n), a);
    vec z = fmadd(d, a.scale, a.shift);
    if (v.residual)
        z = add(z, NAME(load_some)((const T *)f->residual + i, n));
    NAME(store_some)((T *)f->y + i, n, NAME(activate)(z, slope, v), f->stream);
}

INLINE void NAME(apply_run)(const bnf_forward *f, ptrdiff_t i, ptrdiff_t end, NAME(affine_vec) a,
                            vec slope, variant v)
{
    const ptrdiff_t lead = f->stream ? NAME(lead)((const T *)f->y + i, end - i) : 0;
    if (lead)
        NAME(apply_some)(f, i, lead, a, slope, v);
    for (i += lead; i + LANES <= end; i += LANES)
        NAME(apply_some)(f, i, LANES, a, slope, v);
    if (i < end)
        NAME(apply_some)(f, i, end - i, a, slope, v);
}

INLINE void NAME(apply_planar_as)(const bnf_forward *operands, bnf_tile tile, variant v)
{
    const bnf_forward own = *operands, *f = &own; /* no store can change a copy: it stays in registers */
    NAME(affine) rounded;
    NAME(round_affine)(f->mean, f->scale, f->shift, tile, &rounded);
    const vec slope = set1(f->slope);
    for (ptrdiff_t o = tile.outer0; o < tile.outer1; o++)
        for (ptrdiff_t c = tile.channel0; c < tile.channel1; c++) {
            const ptrdiff_t plane = (o * f->shape.channels + c) * f->shape.inner;
            NAME(apply_run)(f, plane + tile.inner0, plane + tile.inner1,
                            NAME(spread_affine)(&rounded, c - tile.channel0), slope, v);
        }
}

INLINE void NAME(apply_strip)(const bnf_forward *f, ptrdiff_t i, ptrdiff_t rows, ptrdiff_t n,
                              NAME(affine_vec) a, vec slope, variant v)
{
    for (ptrdiff_t r = 0; r < rows; r++, i += f->shape.channels)
        NAME(apply_some)(f, i, n, a, slope, v);
}

INLINE void NAME(apply_interleaved_as)(const bnf_forward *operands, bnf_tile tile, variant v)
{
    const bnf_forward own = *operands, *f = &own; /* no store can change a copy: it stays in registers */
    NAME(affine) rounded;
    NAME(round_affine)(f->mean, f->scale, f->shift, tile, &rounded);
    const vec slope = set1(f->slope);
    const ptrdiff_t step = f->stream ? STREAM_ROWS : SPREAD_ROWS;
    const ptrdiff_t channels = tile.channel1 - tile.channel0;
    for (ptrdiff_t o = tile.outer0; o < tile.outer1; o += step) {
        const ptrdiff_t rows = at_most(step, tile.outer1 - o);
        const ptrdiff_t row = o * f->shape.channels + tile.channel0;
        ptrdiff_t c = f->stream ? NAME(lead)((const T *)f->y + row, channels) : 0;
        if (c)
            NAME(apply_strip)(f, row, rows, c, NAME(load_affine)(&rounded, 0, c), slope, v);
        for (; c + LANES <= channels; c += LANES)
            NAME(apply_strip)(f, row + c, rows, LANES, NAME(load_affine)(&rounded, c, LANES), slope,
                              v);
        if (c < channels)
            NAME(apply_strip)(f, row + c, rows, channels - c,
                              NAME(load_affine)(&rounded, c, channels - c), slope, v);
    }
}

/* From here to the table's entries: each constant a variant is given makes a
 * loop of its own. */
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
    switch (f->activation) {
    case BNF_RELU:
        NAME(apply_added)(f, tile, (variant){.layout = layout, .activation = BNF_RELU});
        break;
    case BNF_RELU6:
        NAME(apply_added)(f, tile, (variant){.layout = layout, .activation = BNF_RELU6});
        break;
    case BNF_LEAKY_RELU:
        NAME(apply_added)(f, tile, (variant){.layout = layout, .activation = BNF_LEAKY_RELU});
        break;
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
