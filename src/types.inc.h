/* kernels.inc.h for every data type. */
#include <math.h>
#include <string.h>

#include "lanes.h"
#include "smooth.h"

#define T float
#define P float
#define vec f32x16
#define VEC(f) f##_f32x16
#define wide d16
#define NAME(f) f##_f32
#include "activations.inc.h"
#include "kernels.inc.h"
#undef T
#undef P
#undef vec
#undef VEC
#undef wide
#undef NAME

#define T double
#define P double
#define vec d8
#define VEC(f) f##_d8
#define wide d8
#define NAME(f) f##_f64
#include "activations.inc.h"
#include "kernels.inc.h"
#undef T
#undef P
#undef vec
#undef VEC
#undef wide
#undef NAME

#define T bnf_f16
#define P float
#define vec f32x16
#define VEC(f) f##_f32x16
#define wide d16
#define NAME(f) f##_f16
#include "kernels.inc.h"
#undef T
#undef P
#undef vec
#undef VEC
#undef wide
#undef NAME

#define T bnf_bf16
#define P float
#define vec f32x16
#define VEC(f) f##_f32x16
#define wide d16
#define NAME(f) f##_bf16
#include "kernels.inc.h"
#undef T
#undef P
#undef vec
#undef VEC
#undef wide
#undef NAME

static const bnf_kernels *const kernels_of_types[BNF_TYPES] = {
#define TYPE(CODE, name, element, suffix) [BNF_##CODE] = kernels_##suffix,
#include "types.inc"
};
