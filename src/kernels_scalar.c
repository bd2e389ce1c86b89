#include "bnfast.h"
#include "simd_scalar.h"
#include "types.inc.h"

const bnf_table bnf_table_scalar = {"scalar", kernels_of_types};
