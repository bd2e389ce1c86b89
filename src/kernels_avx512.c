#include "bnfast.h"
#include "simd_avx512.h"

#define ISA(type) bnf_avx512_##type
#include "types.inc.h"
