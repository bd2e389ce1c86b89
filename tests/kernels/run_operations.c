/* Runs the operations of one simd_<isa>.h on one data type, eight lanes at a time:
 *
 *     run_operations REQUESTS RESULTS
 *
 * Compiled once for each set and type, with the set's flags and, for example,
 *     -DSIMD='"simd_avx2.h"' -DT=bnf_f16 -DP=float -Dvec=f8
 * as types.inc.h has them. A request is a header and the operands of so many groups of lanes;
 * operations.py writes them and checks the answers. Values in memory are placed directly after or
 * before a page without access. */
#include <stdbool.h>
#include <stdint.h>

#include "pages.h"

#include SIMD
#include "lanes.h"

/* The order of operations.py's OPERATIONS. */
typedef enum {
    LOAD,
    LOAD_WIDE,
    STORE,
    STREAM,
    WIDEN,
    SUM,
    POW2,
    ADD,
    SUB,
    MUL,
    DIV,
    MAX,
    MIN,
    FMADD,
    SELECT_LE,
} operation;

typedef struct {
    int64_t operation;
    int64_t n;        /* lanes in memory, 1 to 8 */
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

static void write_wide(FILE *file, d8 a)
{
    double lanes[LANES];
    d8_store(lanes, a);
    fwrite(lanes, sizeof lanes, 1, file);
}

static vec read_lanes(FILE *file)
{
    P lanes[LANES];
    read_exactly(file, lanes, sizeof lanes);
    return load(lanes);
}

/* n elements; the lanes past them are 1, 2, ... 8 by their number. */
static void run_load(const request *r, T *slot, FILE *requests, FILE *results)
{
    static const P fill[LANES] = {1, 2, 3, 4, 5, 6, 7, 8};
    read_exactly(requests, slot, (size_t)r->n * sizeof(T));
    if (r->operation == LOAD_WIDE)
        write_wide(results, load_wide(slot));
    else
        write_lanes(results, r->n < LANES ? load_part(slot, r->n, load(fill)) : load(slot));
}

/* All eight elements are written out, POISON where none was stored. */
static void run_store(const request *r, T *slot, FILE *requests, FILE *results)
{
    T *room = r->at_start ? slot : slot + r->n - LANES;
    const vec a = read_lanes(requests);
    memset(room, POISON, LANES * sizeof(T));
    if (r->operation == STORE && r->n < LANES)
        store_part(slot, r->n, a);
    else if (r->operation == STORE)
        store(slot, a);
    else if (r->n < LANES)
        stream_part(slot, r->n, a);
    else
        stream(slot, a);
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
    }
    const vec c = read_lanes(requests);
    return r->operation == FMADD ? fmadd(a, b, c) : select_le(a, b, c, read_lanes(requests));
}

static void run_group(const request *r, T *slot, FILE *requests, FILE *results)
{
    switch (r->operation) {
    case LOAD:
    case LOAD_WIDE:
        run_load(r, slot, requests, results);
        break;
    case STORE:
    case STREAM:
        run_store(r, slot, requests, results);
        break;
    case WIDEN:
        write_wide(results, widen(read_lanes(requests)));
        break;
    case POW2:
        write_lanes(results, pow2(read_lanes(requests)));
        break;
    case SUM: {
        const double sum = d8_sum(widen(read_lanes(requests)));
        fwrite(&sum, sizeof sum, 1, results);
        break;
    }
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
