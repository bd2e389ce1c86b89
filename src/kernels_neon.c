#include "bnfast.h"
#include "simd_neon.h"

#define ISA(type) bnf_neon_##type
#include "types.inc.h"
