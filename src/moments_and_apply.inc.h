/* 7. moments_and_apply: batch_moments of a tile, and apply of another one of the same images, in
 * turn: eight vectors are summed, which memory sends, then eight are written, which memory takes.
 * One after the other, each would wait for memory alone. */

/* Writes the planes of a tile, image by image, a few vectors at a time. */
struct NAME(writer) {
    NAME(work) w;
    bnf_tile tile;
    NAME(params) params;
    NAME(lanes) p;            /* of the plane that is written */
    ptrdiff_t c;              /* its entry in params */
    ptrdiff_t i, plane, stop; /* the next value, where its plane ends, and where the last one */
};

INLINE void NAME(begin_image)(NAME(writer) * writer, ptrdiff_t image)
{
    const bnf_shape shape = writer->w.o->shape;
    const bnf_tile tile = writer->tile;
    const ptrdiff_t i = (image * shape.channels + tile.channel0) * shape.inner;
    const ptrdiff_t odd = NAME(head)(writer->w, i, shape.inner);
    writer->c = 0;
    writer->p = NAME(broadcast)(writer->params, 0);
    if (odd)
        NAME(apply_some)(writer->w, i, odd, writer->p);
    writer->i = i + odd;
    writer->plane = i + shape.inner;
    writer->stop = i + (tile.channel1 - tile.channel0) * shape.inner;
}

/* Goes on to the next channel in a vector where two planes meet. */
INLINE void NAME(write_vector)(NAME(writer) * writer)
{
    NAME(lanes) p = writer->p;
    const ptrdiff_t left = writer->plane - writer->i;
    if (left < LANES) {
        writer->p = NAME(broadcast)(writer->params, ++writer->c);
        writer->plane += writer->w.o->shape.inner;
        p = (NAME(lanes)){select_first(left, p.high, writer->p.high),
                          select_first(left, p.scale, writer->p.scale),
                          select_first(left, p.shift, writer->p.shift)};
    }
    NAME(apply_some)(writer->w, writer->i, LANES, p);
    writer->i += LANES;
}

/* Eight whole vectors, or all that are left. */
INLINE void NAME(write_more)(NAME(writer) * writer)
{
    const ptrdiff_t i = writer->i;
    if (i + 8 * LANES <= writer->plane) {
        const NAME(lanes) p = writer->p;
        ISA_UNROLL
        for (int k = 0; k < 8; k++)
            NAME(apply_some)(writer->w, i + k * LANES, LANES, p);
        writer->i = i + 8 * LANES;
        return;
    }
    for (int k = 0; k < 8 && writer->i + LANES <= writer->stop; k++)
        NAME(write_vector)(writer);
}

INLINE void NAME(end_image)(NAME(writer) * writer)
{
    while (writer->i + LANES <= writer->stop)
        NAME(write_vector)(writer);
    if (writer->i < writer->stop)
        NAME(apply_some)(writer->w, writer->i, writer->stop - writer->i, writer->p);
}

INLINE void NAME(in_turn)(const bnf_operands *o, bnf_tile tile, bnf_tile written, double *mean,
                          double *m2, variant v)
{
    const bnf_operands own = *o; /* as in write_tile */
    P rows[3][BNF_MAX_PLANAR];
    NAME(writer)
    writer = {.w = {.o = &own, .slope = set1(own.slope), .v = v},
              .tile = written,
              .params = {.high = rows[0], .scale = rows[1], .shift = rows[2]}};
    NAME(round_params)(&own, written, 0, writer.params);
    NAME(moments_about_pivots)(&own, tile, mean, m2, &writer);
    if (own.stream)
        stream_end();
}

/* Common calls have such a loop in sets that have many; others are done one after the other. */
static void NAME(moments_and_apply)(const bnf_operands *o, bnf_tile tile, bnf_tile written,
                                    double *mean, double *m2)
{
    const bool whole = tile.inner1 - tile.inner0 == o->shape.inner;
    const bool plain = o->activation == BNF_LINEAR || o->activation == BNF_RELU;
    if (FEW_LOOPS || sizeof(T) == sizeof(double) || !whole || !plain || o->residual ||
        o->shape.inner < 8 * LANES || NAME(values_of_channel)(tile) < SHORT_CHANNEL) {
        NAME(apply_planar)(o, written);
        NAME(batch_moments_planar)(o, tile, mean, m2);
    } else if (o->activation == BNF_RELU)
        NAME(in_turn)(o, tile, written, mean, m2,
                      (variant){.layout = BNF_PLANAR, .activation = BNF_RELU});
    else
        NAME(in_turn)(o, tile, written, mean, m2, (variant){.layout = BNF_PLANAR});
}
