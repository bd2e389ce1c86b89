#include "bnfast.h"
#include "simd_avx2.h"

#define ISA(type) bnf_avx2_##type
#include "types.inc.h"
