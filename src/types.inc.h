/* kernels.inc.h for every data type. */
#include "lanes.h"

#define T float
#define vec f8
#define NAME(f) f##_f32
#include "kernels.inc.h"
#undef T
#undef vec
#undef NAME

#define T double
#define vec d8
#define NAME(f) f##_f64
#include "kernels.inc.h"
#undef T
#undef vec
#undef NAME
