/* An instruction set's table of kernels, `ISA(types)`: of `ISA(suffix)`, which its file was
 * compiled to for each type. */
#define TYPE(CODE, name, element, suffix) extern const bnf_kernels ISA(suffix)[BNF_LAYOUTS];
#include "types.inc"

static const bnf_kernels *const ISA(types)[BNF_TYPES] = {
#define TYPE(CODE, name, element, suffix) [BNF_##CODE] = ISA(suffix),
#include "types.inc"
};
#undef ISA
