#include "bnfast.h"
#include "simd_scalar.h"

#define ISA(type) bnf_scalar_##type
#include "types.inc.h"
