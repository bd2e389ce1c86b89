/* Which kernel tables were built, and which of them this processor can run. */
#include "bnfast.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>

extern const bnf_table bnf_table_sse2, bnf_table_avx2;

static bool runs_sse2(void) { return true; /* the x86-64 baseline */ }

/* The operating system's word that it saves the ymm registers. */
static bool saves_ymm(void)
{
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & 6) == 6;
}

static bool runs_avx2(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d))
        return false;
    if (!(c & bit_OSXSAVE) || !(c & bit_AVX) || !(c & bit_FMA) || !(c & bit_F16C) || !saves_ymm())
        return false;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2);
}

static const struct {
    const bnf_table *table;
    bool (*runs)(void);
} built[] = {{&bnf_table_sse2, runs_sse2}, {&bnf_table_avx2, runs_avx2}};

#else
#error "bnfast has no kernel table for this processor yet"
#endif

int bnf_isa_count(void) { return (int)(sizeof built / sizeof *built); }

const bnf_table *bnf_isa_table(int index)
{
    return built[index].runs() ? built[index].table : NULL;
}

const char *bnf_isa_name(int index) { return built[index].table->name; }
