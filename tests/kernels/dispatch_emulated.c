/* In the place of src/dispatch.c: AVX-512's table alone, compiled for an emulation of it,
 * which runs where src/dispatch.c would rightly say that the processor has none. */
#include "bnfast.h"

extern const bnf_table bnf_table_avx512;

int bnf_isa_count(void) { return 1; }

const bnf_table *bnf_isa_table(int index) { return index == 0 ? &bnf_table_avx512 : NULL; }

const char *bnf_isa_name(int index) { return (void)index, "avx512 (emulated)"; }
