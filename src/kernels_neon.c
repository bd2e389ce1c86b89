#include "bnfast.h"
#include "simd_neon.h"
#include "types.inc.h"

const bnf_table bnf_table_neon = {"neon", kernels_of_types};
