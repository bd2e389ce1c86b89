#include "bnfast.h"
#include "simd_avx512.h"
#include "types.inc.h"

const bnf_table bnf_table_avx512 = {"avx512", kernels_of_types};
