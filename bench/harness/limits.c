// What memory allows: loops that read and write what a batch normalization must, and do no more.
// Compiled and called by limits.py. Each loop exists with plain stores and with streaming stores,
// which bypass the caches, so that a line need not be read before it is written. The faster one is
// the limit.

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
typedef __m512 vector;
#define ADD _mm512_add_ps
#define LOAD _mm512_loadu_ps
#define STORE _mm512_store_ps
#define STREAM _mm512_stream_ps
#elif defined(__AVX__)
typedef __m256 vector;
#define ADD _mm256_add_ps
#define LOAD _mm256_loadu_ps
#define STORE _mm256_store_ps
#define STREAM _mm256_stream_ps
#elif defined(__SSE2__)
typedef __m128 vector;
#define ADD _mm_add_ps
#define LOAD _mm_loadu_ps
#define STORE _mm_store_ps
#define STREAM _mm_stream_ps
#else // no streaming stores that C can name: both forms are plain
typedef float vector;
#define ADD(a, b) ((a) + (b))
#define LOAD(p) (*(p))
#define STORE(p, v) (*(p) = (v))
#define STREAM STORE
#endif

enum { LANES = sizeof(vector) / sizeof(float), AT_ONCE = 8, ALIGNMENT = 64 };

typedef struct {
    const float *in[3];
    float *out[2];
} arrays;

static volatile float sink;

static inline void put(float *p, vector v, bool stream)
{
    if (stream)
        STREAM(p, v);
    else
        STORE(p, v);
}

// Adds `reads` arrays and writes the sum to `writes` others. Called with constants, so that each
// case is compiled to a loop without branches. Eight sums, so that additions are independent.
static inline __attribute__((always_inline)) void
sweep(const arrays *a, ptrdiff_t from, ptrdiff_t to, int reads, int writes, bool stream)
{
    vector sums[AT_ONCE] = {0};
    for (ptrdiff_t i = from; i + AT_ONCE * LANES <= to; i += AT_ONCE * LANES)
        for (int k = 0; k < AT_ONCE; k++) {
            ptrdiff_t at = i + k * LANES;
            vector v = LOAD(a->in[0] + at);
            for (int r = 1; r < reads; r++)
                v = ADD(v, LOAD(a->in[r] + at));
            for (int w = 0; w < writes; w++)
                put(a->out[w] + at, v, stream);
            if (!writes)
                sums[k] = ADD(sums[k], v);
        }
    if (!writes) {
        for (int k = 1; k < AT_ONCE; k++)
            sums[0] = ADD(sums[0], sums[k]);
        sink = ((float *)sums)[0];
    }
#if defined(__SSE2__)
    if (stream)
        _mm_sfence();
#endif
}

static void part(const arrays *a, ptrdiff_t from, ptrdiff_t to, int loop, bool stream)
{
    switch (loop) {
    case 10:
        sweep(a, from, to, 1, 0, false);
        break;
    case 20:
        sweep(a, from, to, 2, 0, false);
        break;
    case 11:
        stream ? sweep(a, from, to, 1, 1, true) : sweep(a, from, to, 1, 1, false);
        break;
    case 21:
        stream ? sweep(a, from, to, 2, 1, true) : sweep(a, from, to, 2, 1, false);
        break;
    case 31:
        stream ? sweep(a, from, to, 3, 1, true) : sweep(a, from, to, 3, 1, false);
        break;
    case 32:
        stream ? sweep(a, from, to, 3, 2, true) : sweep(a, from, to, 3, 2, false);
        break;
    }
}

// `loop` is 10 * (arrays read) + (arrays written). `n` counts floats. The outputs' addresses must
// be equal modulo 64. Incomplete cache lines at both ends are left out: too few to matter.
void run(const arrays *a, ptrdiff_t n, int loop, int stream, int threads)
{
    const ptrdiff_t line = ALIGNMENT / sizeof(float), step = AT_ONCE * LANES;
    ptrdiff_t first =
        a->out[0] ? (ptrdiff_t)((-(uintptr_t)a->out[0] % ALIGNMENT) / sizeof(float)) : 0;
    ptrdiff_t steps = (n - first) / step, lines = (n - first) / line;
    if (steps < threads || lines <= 0)
        threads = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int t = 0; t < threads; t++)
        part(a, first + steps * t / threads * step, first + steps * (t + 1) / threads * step, loop,
             stream);
}
