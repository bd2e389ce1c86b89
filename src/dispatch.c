/* Which kernel tables were built, and which of them this processor can run.
 *
 * setup.py defines for which kind of processor it builds tables beside the scalar
 * one: BNF_TABLES_X86_64, BNF_TABLES_AARCH64, or neither. */
#include "bnfast.h"

#define ISA(type) bnf_scalar_##type
#include "table.inc.h"

static bool runs_always(void) { return true; }

#ifdef BNF_TABLES_X86_64
#include <cpuid.h>

#define ISA(type) bnf_sse2_##type
#include "table.inc.h"
#define ISA(type) bnf_avx2_##type
#include "table.inc.h"
#define ISA(type) bnf_avx512_##type
#include "table.inc.h"

/* Whether the operating system saves these registers when it switches tasks. */
static bool saves_state(unsigned wanted)
{
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return false;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & wanted) == wanted;
}

static bool runs_avx2(void)
{
    const unsigned first = bit_AVX | bit_FMA | bit_F16C, ymm = 0x6;
    unsigned a, b, c, d;
    if (!saves_state(ymm) || !__get_cpuid(1, &a, &b, &c, &d) || (c & first) != first)
        return false;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2);
}

static bool runs_avx512(void)
{
    const unsigned wanted = bit_AVX512F | bit_AVX512VL | bit_AVX512DQ | bit_AVX512BW, zmm = 0xe6;
    unsigned a, b, c, d;
    return runs_avx2() && saves_state(zmm) && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
           (b & wanted) == wanted;
}

#endif
#ifdef BNF_TABLES_AARCH64
#define ISA(type) bnf_neon_##type
#include "table.inc.h"
#endif

static const struct {
    bnf_table table;
    bool (*runs)(void);
} built[] = {
    {{"scalar", bnf_scalar_types}, runs_always},
#ifdef BNF_TABLES_X86_64
    {{"sse2", bnf_sse2_types}, runs_always}, /* part of x86-64 */
    {{"avx2", bnf_avx2_types}, runs_avx2},       {{"avx512", bnf_avx512_types}, runs_avx512},
#endif
#ifdef BNF_TABLES_AARCH64
    {{"neon", bnf_neon_types}, runs_always}, /* part of AArch64 */
#endif
};

int bnf_isa_count(void) { return (int)(sizeof built / sizeof *built); }

const bnf_table *bnf_isa_table(int index)
{
    return built[index].runs() ? &built[index].table : NULL;
}

const char *bnf_isa_name(int index) { return built[index].table.name; }
