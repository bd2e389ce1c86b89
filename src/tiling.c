/* Shape -> blocks -> tiles, as pure functions.
 *
 * Blocks decide the order of summation.  They depend on the shape alone, and so
 * do the bits of a result.  Tiles are unions of whole blocks.  They depend on the
 * caches and the threads too, which may change only the speed. */
#include "bnfast.h"

/* The most values of a planar block, and rows of an interleaved one: moments.inc.h
 * proves the accuracy of a sum around a pivot for so many. */
#define BLOCK_VALUES 16384
#define MIN_ROWS 512
#define MAX_ROWS 16384
/* How many values an interleaved block should have: half a megabyte, which L2 holds. */
#define BLOCK_WEIGHT 131072
/* More blocks than this serve more threads than a machine has, and each costs a merge. */
#define ENOUGH_BLOCKS 512
/* With fewer bytes for each, another thread costs more time than it saves. */
#define BYTES_PER_THREAD 100000
#define PAGE 4096
/* Values of a plane: shorter ones are not written in turn with others' sums. */
#define SHORTEST_IN_TURN 128
/* float32 values in a cache line. */
#define LINE 16
_Static_assert(LINE >= BNF_FEW_CHANNELS, "or a tile that is summed might have a part of them");

static ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
static ptrdiff_t most(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
static ptrdiff_t quotient_up(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }

bnf_layout bnf_shape_layout(bnf_shape shape)
{
    return shape.inner > 1 ? BNF_PLANAR : BNF_INTERLEAVED;
}

static bnf_blocks cut_rows(bnf_shape shape)
{
    const ptrdiff_t width = least(shape.channels, BNF_MAX_INTERLEAVED);
    ptrdiff_t rows = most(BLOCK_WEIGHT / width, MIN_ROWS);
    rows = least(most(rows, shape.outer / ENOUGH_BLOCKS), MAX_ROWS);
    return (bnf_blocks){quotient_up(shape.outer, rows), rows, 1, 1};
}

bnf_blocks bnf_cut_blocks(bnf_shape shape)
{
    if (bnf_shape_layout(shape) == BNF_INTERLEAVED)
        return cut_rows(shape);
    if (shape.inner > BLOCK_VALUES) {
        const ptrdiff_t even = quotient_up(shape.inner, quotient_up(shape.inner, BLOCK_VALUES));
        const ptrdiff_t length = quotient_up(even, 16) * 16; /* whole groups of lanes */
        const ptrdiff_t segments = quotient_up(shape.inner, length);
        return (bnf_blocks){shape.outer * segments, 1, segments, length};
    }
    const ptrdiff_t images = least(BLOCK_VALUES / shape.inner, shape.outer);
    return (bnf_blocks){quotient_up(shape.outer, images), images, 1, shape.inner};
}

/* How many values of a channel lie in the blocks before this one. */
ptrdiff_t bnf_values_before(bnf_shape shape, bnf_blocks blocks, ptrdiff_t block)
{
    const ptrdiff_t plane = block / blocks.segments * blocks.outers;
    const ptrdiff_t rest = block % blocks.segments * blocks.length;
    return least(least(plane, shape.outer) * shape.inner + least(rest, shape.inner),
                 shape.outer * shape.inner);
}

/* A larger last cache is one of many cores, or of the machine below a virtual one: slower than a
 * near one, and shared with others. */
#define MOST_LAST_CACHE (32 << 20)

static ptrdiff_t last_cache(bnf_caches caches) { return least(caches.l3, MOST_LAST_CACHE); }

/* How many bytes a thread may keep in the caches between summing and writing.  More than L2 holds,
 * where the last cache is large: long runs through memory gain more than a second read from a near
 * cache.  Two groups of every thread lie there while one is written and the next one summed, beside
 * what is written: so all threads' groups together take a sixth of it. */
static ptrdiff_t held_bytes(bnf_caches caches, int threads)
{
    return most(caches.l2, last_cache(caches) / most(12, 6 * threads));
}

/* The most channels of a tile that is summed: few enough that every thread gets
 * some; in rows, whole cache lines. */
static ptrdiff_t most_channels(bnf_shape shape, bnf_plan plan)
{
    if (plan.layout == BNF_PLANAR)
        return least(BNF_MAX_PLANAR,
                     quotient_up(shape.channels, plan.threads > 1 ? 4 * plan.threads : 1));
    const ptrdiff_t share =
        quotient_up(shape.channels, quotient_up(plan.threads, plan.blocks.count));
    return least(least(BNF_MAX_INTERLEAVED, quotient_up(share, LINE) * LINE), shape.channels);
}

/* Whether the groups can be shared out evenly: four fifths of the threads' time is used. */
static bool is_even(ptrdiff_t groups, int threads)
{
    return groups * 5 >= quotient_up(groups, threads) * threads * 4;
}

/* Whether all tensors of a call stay in the caches.  They share the last one with what comes before
 * and after the call. */
static bool stays_in_caches(ptrdiff_t bytes, bnf_caches caches, int threads)
{
    return bytes <= most(caches.l2 * threads, last_cache(caches) / 2);
}

int bnf_useful_threads(ptrdiff_t bytes)
{
    return (int)most(least(bytes / BYTES_PER_THREAD, 1 << 16), 1);
}

/* Tiles that are only written may be cut anywhere: a few for each thread, of whole
 * rows or images if there are enough of them, since long runs are faster. */
static void cut_write_blocks(bnf_shape shape, bnf_plan *plan)
{
    const ptrdiff_t wanted = plan->threads > 1 ? 4 * plan->threads : 1;
    const ptrdiff_t at_once = bnf_rows_at_once(shape);
    const ptrdiff_t outers = quotient_up(quotient_up(shape.outer, wanted), at_once) * at_once;
    const ptrdiff_t stripes = quotient_up(shape.outer, outers);
    const ptrdiff_t width = quotient_up(shape.channels, quotient_up(wanted, stripes));
    plan->width = least(width, BNF_MAX_CHANNELS);
    plan->widths = quotient_up(shape.channels, plan->width);
    const ptrdiff_t pieces = quotient_up(wanted, stripes * plan->widths);
    const ptrdiff_t length = quotient_up(quotient_up(shape.inner, pieces), 16) * 16;
    const ptrdiff_t segments = quotient_up(shape.inner, length);
    plan->write_blocks = (bnf_blocks){stripes * segments, outers, segments, length};
}

/* gathers: whether the call sums anything; reads and writes: how many tensors of
 * this shape it reads and writes. */
bnf_plan bnf_make_plan(bnf_shape shape, ptrdiff_t itemsize, bool gathers, int reads, int writes,
                       bnf_caches caches, int max_threads)
{
    bnf_plan plan = {.layout = bnf_shape_layout(shape), .blocks = bnf_cut_blocks(shape)};
    const ptrdiff_t channel_bytes = shape.outer * shape.inner * itemsize * most(reads, 1);
    const ptrdiff_t bytes = channel_bytes * shape.channels / most(reads, 1) * (reads + writes);
    const bool planar = plan.layout == BNF_PLANAR;

    plan.threads = (int)least(bnf_useful_threads(bytes), most(max_threads, 1));
    const ptrdiff_t channels = most_channels(shape, plan);
    const ptrdiff_t held = held_bytes(caches, plan.threads) / channel_bytes;
    const ptrdiff_t group = most(least(held, channels), 1);
    /* What stays in the last cache may be read twice from end to end: that does not read memory
     * either, and runs longer than those of a group are read faster. */
    const bool cached = stays_in_caches(bytes, caches, plan.threads);
    plan.fused = planar && gathers && writes > 0 && held > 0 &&
                 (!cached || bytes <= caches.l2 * plan.threads) &&
                 is_even(quotient_up(shape.channels, group), plan.threads);
    plan.group = plan.fused ? group : channels;
    plan.groups = plan.chains = quotient_up(shape.channels, plan.group);
    if (plan.fused) {
        plan.width = plan.group;
        plan.widths = plan.groups;
        plan.write_blocks = (bnf_blocks){1, shape.outer, 1, shape.inner};
    } else
        cut_write_blocks(shape, &plan);
    plan.stream = !cached;
    /* A page ahead of one tensor, half of one of two: the hardware's prefetcher stops at the end of
     * each page.  Near caches need none. */
    const bool near = channel_bytes * shape.channels <= caches.l2 * plan.threads;
    plan.ahead = near ? 0 : PAGE / itemsize / most(reads, 1);
    return plan;
}

/* A thread that writes a group while it sums the next one needs groups that follow one another; a
 * few chains of them for each thread are still shared out evenly. */
ptrdiff_t bnf_chains_in_turn(bnf_shape shape, bnf_plan plan)
{
    const bool worth_it =
        plan.fused && plan.stream && plan.blocks.segments == 1 && shape.inner >= SHORTEST_IN_TURN;
    return worth_it ? least(plan.groups, plan.threads > 1 ? 4 * plan.threads : 1) : plan.groups;
}

bnf_tile bnf_block_tile(bnf_shape shape, bnf_blocks blocks, ptrdiff_t block, ptrdiff_t channel0,
                        ptrdiff_t channels)
{
    const ptrdiff_t outer = block / blocks.segments * blocks.outers;
    const ptrdiff_t inner = block % blocks.segments * blocks.length;
    return (bnf_tile){outer,    least(outer + blocks.outers, shape.outer),
                      channel0, least(channel0 + channels, shape.channels),
                      inner,    least(inner + blocks.length, shape.inner)};
}
