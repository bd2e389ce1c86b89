/* kernels.inc.h for one data type.  setup.py compiles each instruction set's file once per type of
 * types.inc, side by side, and names the type in KERNELS_<suffix>. */
#include <math.h>
#include <string.h>

#include "lanes.h"
#include "smooth.h"

#ifdef KERNELS_f64

#define T double
#define P double
#define vec d8
#define VEC(f) f##_d8
#define wide d8
#define NAME(f) f##_f64
#define KERNELS ISA(f64)

#else /* lanes of float32 */

#define P float
#define vec f32x16
#define VEC(f) f##_f32x16
#define wide d16
#if defined(KERNELS_f32)
#define T float
#define NAME(f) f##_f32
#define KERNELS ISA(f32)
#elif defined(KERNELS_f16)
#define T bnf_f16
#define NAME(f) f##_f16
#define KERNELS ISA(f16)
#elif defined(KERNELS_bf16)
#define T bnf_bf16
#define NAME(f) f##_bf16
#define KERNELS ISA(bf16)
#else
#error "which type's kernels? -DKERNELS_f32, or another suffix of types.inc"
#endif

#endif

#include "activations.inc.h"
#include "kernels.inc.h"
