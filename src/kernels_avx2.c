#include "bnfast.h"
#include "simd_avx2.h"
#include "types.inc.h"

const bnf_table bnf_table_avx2 = {"avx2", kernels_of_types};
