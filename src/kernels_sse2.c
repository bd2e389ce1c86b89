#include "bnfast.h"
#include "simd_sse2.h"

#define ISA(type) bnf_sse2_##type
#include "types.inc.h"
