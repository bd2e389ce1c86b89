/* The floating-point environment that results are computed in: rounding to nearest, denormals
 * kept, no traps.
 *
 * A thread inherits its environment when it is created and keeps it, so the threads of a pool may
 * have another one than the calling thread (torch.set_flush_denormal, fesetround).  Bits would then
 * depend on which thread took which tile.  So every thread enters this one environment, and gets
 * its own back when it leaves. */
#ifndef BNFAST_FLOAT_ENV_H
#define BNFAST_FLOAT_ENV_H

#if defined(__x86_64__)

#include <xmmintrin.h>

#define STANDARD_CSR 0x1f80u /* all traps off, to nearest, no flush to zero on input or output */
#define CSR_FLAGS 0x3fu      /* the exceptions raised so far: no control bits */

typedef unsigned bnf_float_env;

static inline bnf_float_env bnf_enter_float_env(void)
{
    const unsigned found = _mm_getcsr();
    if ((found & ~CSR_FLAGS) != STANDARD_CSR)
        _mm_setcsr(STANDARD_CSR);
    return found;
}

static inline void bnf_leave_float_env(bnf_float_env found)
{
    if ((found & ~CSR_FLAGS) != STANDARD_CSR)
        _mm_setcsr(found);
}

#elif defined(__aarch64__)

#include <stdint.h>

typedef uint64_t bnf_float_env; /* FPCR, whose bits are all 0 in the standard environment */

static inline void bnf_set_fpcr(uint64_t value)
{
    __asm__ volatile("msr fpcr, %0" : : "r"(value) : "memory");
}

static inline bnf_float_env bnf_enter_float_env(void)
{
    uint64_t found;
    __asm__ volatile("mrs %0, fpcr" : "=r"(found) : : "memory");
    if (found != 0)
        bnf_set_fpcr(0);
    return found;
}

static inline void bnf_leave_float_env(bnf_float_env found)
{
    if (found != 0)
        bnf_set_fpcr(found);
}

#else

#include <fenv.h>

typedef fenv_t bnf_float_env;

static inline bnf_float_env bnf_enter_float_env(void)
{
    fenv_t found;
    fegetenv(&found);
    fesetenv(FE_DFL_ENV);
    return found;
}

static inline void bnf_leave_float_env(bnf_float_env found) { fesetenv(&found); }

#endif
#endif
