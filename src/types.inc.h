/* kernels.inc.h for every data type. */
#include "lanes.h"

#define T float
#define P float
#define vec f8
#define NAME(f) f##_f32
#include "kernels.inc.h"
#undef T
#undef P
#undef vec
#undef NAME

#define T double
#define P double
#define vec d8
#define NAME(f) f##_f64
#include "kernels.inc.h"
#undef T
#undef P
#undef vec
#undef NAME

#define T bnf_f16
#define P float
#define vec f8
#define NAME(f) f##_f16
#include "kernels.inc.h"
#undef T
#undef P
#undef vec
#undef NAME

#define T bnf_bf16
#define P float
#define vec f8
#define NAME(f) f##_bf16
#include "kernels.inc.h"
#undef T
#undef P
#undef vec
#undef NAME

#define KERNELS {kernels_f32, kernels_f64, kernels_f16, kernels_bf16} /* by bnf_type */
