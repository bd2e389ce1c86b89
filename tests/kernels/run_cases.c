/* Runs the kernels of one instruction set on cases from a file:
 *
 *     run_cases ISA CASES RESULTS
 *     run_cases                        lists the sets that can run here
 *
 * Python writes the cases and checks the results (program.py gives the format). This program needs
 * only src/, so it also runs under an emulated processor and under valgrind. Every array ends where
 * a page without access begins: a kernel that reads or writes past one is killed. */
#include <stdint.h>

#include "bnfast.h"
#include "pages.h"

typedef struct {
    int64_t type, itemsize, layout, activation, z_source, through, residual, stream, ahead, masked;
    int64_t outer, channels, inner;
    int64_t tile[6];
    double slope;
} header;

/* So many bytes of POISON, the last just before a page without access. */
static char *place(size_t bytes)
{
    return map_between_guards(bytes) + room_between_guards(bytes) - bytes;
}

static void release(const void *placed, size_t bytes)
{
    unmap_between_guards((char *)placed + bytes - room_between_guards(bytes), bytes);
}

static void *read_placed(FILE *file, size_t bytes)
{
    char *placed = place(bytes);
    if (fread(placed, 1, bytes, file) != bytes)
        fail("cases: cut short");
    return placed;
}

static void write_and_release(FILE *file, const void *placed, size_t bytes)
{
    if (fwrite(placed, 1, bytes, file) != bytes)
        fail("results");
    release(placed, bytes);
}

/* Results of a kernel that sums. */
typedef struct {
    double *a, *b;
} row_pair;

static row_pair place_rows(size_t bytes)
{
    return (row_pair){(double *)place(bytes), (double *)place(bytes)};
}

static void write_and_release_rows(FILE *file, row_pair rows, size_t bytes)
{
    write_and_release(file, rows.a, bytes);
    write_and_release(file, rows.b, bytes);
}

static size_t weight_size(const header *h) { return h->itemsize == 8 ? 8 : 4; }

/* The sum of the tile's weights. */
static double count_of(const header *h, bnf_tile tile, const void *weights)
{
    double count = 0;
    for (ptrdiff_t o = tile.outer0; o < tile.outer1; o++)
        for (ptrdiff_t i = tile.inner0; i < tile.inner1; i++) {
            const ptrdiff_t at = o * h->inner + i;
            count += h->itemsize == 8 ? ((const double *)weights)[at]
                                      : (double)((const float *)weights)[at];
        }
    return count;
}

/* moments_and_apply over two parts of a tile's channels: the bits of batch_moments and apply, and
 * no other byte. */
static void check_in_turn(const bnf_kernels *kernels, const bnf_operands *f, bnf_tile tile,
                          size_t bytes, size_t row, row_pair batch)
{
    bnf_operands g = *f, alone = *f;
    bnf_tile summed = tile, written = tile;
    summed.channel0 = written.channel1 = (tile.channel0 + tile.channel1) / 2;
    const row_pair sums = place_rows(row), sums_alone = place_rows(row);
    g.y = place(bytes);
    alone.y = place(bytes);
    kernels->moments_and_apply(&g, summed, written, sums.a, sums.b);
    kernels->apply(&alone, written);
    for (ptrdiff_t c = summed.channel0; c < summed.channel1; c++)
        sums_alone.a[c] = batch.a[c], sums_alone.b[c] = batch.b[c];
    if (memcmp(g.y, alone.y, bytes) || memcmp(sums.a, sums_alone.a, row) ||
        memcmp(sums.b, sums_alone.b, row))
        fail("moments_and_apply: other bits than batch_moments and apply");
    release(g.y, bytes);
    release(alone.y, bytes);
    release(sums.a, row), release(sums.b, row);
    release(sums_alone.a, row), release(sums_alone.b, row);
}

static void run_case(const bnf_table *table, const header *h, FILE *cases, FILE *results)
{
    const bnf_kernels *kernels = &table->kernels[h->type][h->layout];
    const size_t row = (size_t)h->channels * sizeof(double);
    const size_t bytes = (size_t)(h->outer * h->channels * h->inner * h->itemsize);
    const bnf_tile tile = {h->tile[0], h->tile[1], h->tile[2], h->tile[3], h->tile[4], h->tile[5]};

    bnf_operands b = {
        .shape = {h->outer, h->channels, h->inner},
        .activation = (bnf_activation)h->activation,
        .slope = h->slope,
        .z_source = (bnf_z_source)h->z_source,
        .through_moments = h->through,
        .stream = h->stream,
        .ahead = (ptrdiff_t)h->ahead,
    };
    b.x = read_placed(cases, bytes);
    b.dy = read_placed(cases, bytes);
    b.residual = h->residual ? read_placed(cases, bytes) : NULL;
    b.y = h->z_source == BNF_Z_FROM_Y ? read_placed(cases, bytes) : NULL;
    b.mean = read_placed(cases, row);
    b.scale = read_placed(cases, row);
    b.shift = read_placed(cases, row);
    b.dy_factor = read_placed(cases, row);
    b.x_factor = read_placed(cases, row);
    b.constant = read_placed(cases, row);
    const size_t mask = (size_t)(h->outer * h->inner) * weight_size(h);
    b.weights = h->masked ? read_placed(cases, mask) : NULL;
    b.dx = place(bytes);
    b.dresidual = h->residual ? place(bytes) : NULL;
    bnf_operands f = b;
    f.y = place(bytes);
    const row_pair moments = place_rows(row), batch = place_rows(row), sums = place_rows(row);

    kernels->moments(&f, tile, moments.a, moments.b);
    kernels->batch_moments(&f, tile, batch.a, batch.b);
    kernels->apply(&f, tile);
    if (kernels->moments_and_apply && tile.channel1 - tile.channel0 > 1)
        check_in_turn(kernels, &f, tile, bytes, row, batch);
    kernels->grad_sums(&b, tile, sums.a, sums.b);
    kernels->grad_input(&b, tile);

    if (b.weights) {
        const row_pair masked = place_rows(row);
        kernels->masked_moments(&f, tile, count_of(h, tile, b.weights), masked.a, masked.b);
        write_and_release_rows(results, masked, row);
        release(b.weights, mask);
    }
    write_and_release_rows(results, moments, row);
    write_and_release_rows(results, batch, row);
    write_and_release(results, f.y, bytes);
    write_and_release_rows(results, sums, row);
    write_and_release(results, b.dx, bytes);
    if (h->residual) {
        write_and_release(results, b.dresidual, bytes);
        release(b.residual, bytes);
    }
    if (b.y)
        release(b.y, bytes);
    release(b.x, bytes);
    release(b.dy, bytes);
    const double *parameters[] = {b.mean, b.scale, b.shift, b.dy_factor, b.x_factor, b.constant};
    for (size_t i = 0; i < sizeof parameters / sizeof *parameters; i++)
        release(parameters[i], row);
}

static const bnf_table *find_table(const char *name)
{
    for (int i = 0; i < bnf_isa_count(); i++)
        if (!strcmp(bnf_isa_name(i), name))
            return bnf_isa_table(i);
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 4) {
        for (int i = 0; i < bnf_isa_count(); i++)
            if (bnf_isa_table(i))
                puts(bnf_isa_name(i));
        return 0;
    }
    const bnf_table *table = find_table(argv[1]);
    if (!table) {
        fprintf(stderr, "%s cannot run here\n", argv[1]);
        return 2;
    }
    FILE *cases = fopen(argv[2], "rb"), *results = fopen(argv[3], "wb");
    if (!cases || !results)
        fail("cases or results");
    for (header h; fread(&h, sizeof h, 1, cases) == 1;)
        run_case(table, &h, cases, results);
    fclose(cases);
    return fclose(results) ? 2 : 0;
}
