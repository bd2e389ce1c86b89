/* Runs the operations of one simd_<isa>.h on one data type:
 *
 *     run_operations REQUESTS RESULTS
 *
 * Compiled once for each set and type, with the set's flags and, for example,
 *     -DSIMD='"simd_avx2.h"' -DT=bnf_f16 -DP=float -Dvec=f32x16 -Dwide=d16
 * as types.inc.h has them. A request is a header and the operands of so many groups of lanes;
 * operations.py writes them and checks the answers. Values in memory are placed directly after or
 * before a page without access. */
#include <stdbool.h>
#include <stdint.h>

#include "pages.h"

#include SIMD
#include "lanes.h"

enum { LANES = sizeof(vec) / sizeof(P) };

/* The order of operations.py's OPERATIONS. */
typedef enum {
    LOAD,
    LOAD_WIDE,
    STORE,
    STREAM,
    SET1,
    WIDEN,
    POW2,
    ADD,
    SUB,
    MUL,
    DIV,
    MAX,
    MIN,
    FMADD,
    SELECT_LE,
    SELECT_FIRST,
    WIDE_SET1,
    WIDE_ADD,
    WIDE_SUB,
    WIDE_FMADD,
    WIDE_SUM,
    PLACE,
} operation;

typedef struct {
    int64_t operation;
    int64_t n;        /* lanes in memory, from 1; those of the first operand, from 0 */
    int64_t at_start; /* memory begins at the page without access, instead of ending there */
    int64_t groups;
} request;

static void read_exactly(FILE *file, void *to, size_t bytes)
{
    if (fread(to, 1, bytes, file) != bytes)
        fail("requests: cut short");
}

static void write_lanes(FILE *file, vec a)
{
    P lanes[LANES];
    store(lanes, a);
    fwrite(lanes, sizeof lanes, 1, file);
}

static void write_wide(FILE *file, wide a)
{
    double lanes[LANES];
    wide_store(lanes, a);
    fwrite(lanes, sizeof lanes, 1, file);
}

static void write_eight(FILE *file, d8 a)
{
    double lanes[WIDE_LANES];
    d8_store(lanes, a);
    fwrite(lanes, sizeof lanes, 1, file);
}

static vec read_lanes(FILE *file)
{
    P lanes[LANES];
    read_exactly(file, lanes, sizeof lanes);
    return load(lanes);
}

static wide read_wide(FILE *file)
{
    double lanes[LANES];
    read_exactly(file, lanes, sizeof lanes);
    return wide_load(lanes);
}

/* n elements; the lanes past them are 1, 2, ... by their number. */
static void run_load(const request *r, T *slot, FILE *requests, FILE *results)
{
    P fill[LANES];
    for (int i = 0; i < LANES; i++)
        fill[i] = (P)(i + 1);
    read_exactly(requests, slot, (size_t)r->n * sizeof(T));
    write_lanes(results, r->n < LANES ? load_part(slot, r->n, load(fill)) : load(slot));
}

static void run_load_wide(const request *r, T *slot, FILE *requests, FILE *results)
{
    static const double fill[WIDE_LANES] = {1, 2, 3, 4, 5, 6, 7, 8};
    read_exactly(requests, slot, (size_t)r->n * sizeof(T));
    const bool part = r->n < WIDE_LANES;
    write_eight(results, part ? load_wide_part(slot, r->n, d8_load(fill)) : load_wide(slot));
}

/* All elements are written out, POISON where none was stored. */
static void run_store(const request *r, T *slot, FILE *requests, FILE *results)
{
    T *room = r->at_start ? slot : slot + r->n - LANES;
    const vec a = read_lanes(requests);
    memset(room, POISON, LANES * sizeof(T));
    if (r->operation == STREAM)
        stream(slot, a);
    else if (r->n < LANES)
        store_part(slot, r->n, a);
    else
        store(slot, a);
    stream_end();
    fwrite(room, sizeof(T), LANES, results);
}

/* Operands are read in the order of the arguments. */
static vec run_arithmetic(const request *r, FILE *requests)
{
    const vec a = read_lanes(requests), b = read_lanes(requests);
    switch (r->operation) {
    case ADD:
        return add(a, b);
    case SUB:
        return sub(a, b);
    case MUL:
        return mul(a, b);
    case DIV:
        return div(a, b);
    case MAX:
        return max(a, b);
    case MIN:
        return min(a, b);
    case SELECT_FIRST:
        return select_first(r->n, a, b);
    }
    const vec c = read_lanes(requests);
    return r->operation == FMADD ? fmadd(a, b, c) : select_le(a, b, c, read_lanes(requests));
}

static wide run_wide(const request *r, FILE *requests)
{
    const wide a = read_wide(requests), b = read_wide(requests);
    if (r->operation == WIDE_FMADD)
        return fmadd(a, b, read_wide(requests));
    return r->operation == WIDE_ADD ? add(a, b) : sub(a, b);
}

static double read_double(FILE *file)
{
    double a;
    read_exactly(file, &a, sizeof a);
    return a;
}

/* Of k, places and n. */
static void run_place(FILE *requests, FILE *results)
{
    int64_t a[3];
    read_exactly(requests, a, sizeof a);
    const int64_t found = place((ptrdiff_t)a[0], (ptrdiff_t)a[1], (ptrdiff_t)a[2]);
    fwrite(&found, sizeof found, 1, results);
}

static void run_group(const request *r, T *slot, FILE *requests, FILE *results)
{
    switch (r->operation) {
    case LOAD:
        run_load(r, slot, requests, results);
        break;
    case LOAD_WIDE:
        run_load_wide(r, slot, requests, results);
        break;
    case STORE:
    case STREAM:
        run_store(r, slot, requests, results);
        break;
    case SET1:
        write_lanes(results, set1(read_double(requests)));
        break;
    case WIDE_SET1:
        write_wide(results, wide_set1(read_double(requests)));
        break;
    case WIDEN:
        write_wide(results, widen(read_lanes(requests)));
        break;
    case POW2:
        write_lanes(results, pow2(read_lanes(requests)));
        break;
    case WIDE_ADD:
    case WIDE_SUB:
    case WIDE_FMADD:
        write_wide(results, run_wide(r, requests));
        break;
    case WIDE_SUM: {
        const double sum = wide_sum(read_wide(requests));
        fwrite(&sum, sizeof sum, 1, results);
        break;
    }
    case PLACE:
        run_place(requests, results);
        break;
    default:
        write_lanes(results, run_arithmetic(r, requests));
    }
}

int main(int argc, char **argv)
{
    FILE *requests = argc == 3 ? fopen(argv[1], "rb") : NULL;
    FILE *results = requests ? fopen(argv[2], "wb") : NULL;
    if (!results)
        fail("run_operations REQUESTS RESULTS");
    char *page = map_between_guards(0);
    for (request r; fread(&r, sizeof r, 1, requests) == 1;) {
        T *slot = (T *)(r.at_start ? page : page + page_size() - (size_t)r.n * sizeof(T));
        for (int64_t i = 0; i < r.groups; i++)
            run_group(&r, slot, requests, results);
    }
    unmap_between_guards(page, 0);
    fclose(requests);
    return fclose(results) ? 2 : 0;
}
