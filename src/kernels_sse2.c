#include "bnfast.h"
#include "simd_sse2.h"
#include "types.inc.h"

const bnf_table bnf_table_sse2 = {"sse2", kernels_of_types};
