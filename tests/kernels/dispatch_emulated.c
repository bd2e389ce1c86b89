/* Replaces src/dispatch.c: only AVX-512's table, compiled for an emulation of it. It runs where
 * src/dispatch.c would correctly say that the processor does not have AVX-512. */
#include "bnfast.h"

#define ISA(type) bnf_avx512_##type
#include "table.inc.h"

static const bnf_table table = {"avx512 (emulated)", bnf_avx512_types};

int bnf_isa_count(void) { return 1; }

const bnf_table *bnf_isa_table(int index) { return index == 0 ? &table : NULL; }

const char *bnf_isa_name(int index) { return (void)index, table.name; }
