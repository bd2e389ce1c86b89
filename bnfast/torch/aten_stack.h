/* PyTorch's stack of arguments and results of a kernel: numbers and handles in a row. */
#ifndef BNFAST_ATEN_STACK_H
#define BNFAST_ATEN_STACK_H

#include <string.h>

#include "aten_api.h"

static inline torch_value from_double(double value)
{
    torch_value bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline double to_double(torch_value bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline bool to_bool(torch_value value) { return (value & 0xff) != 0; }

static inline torch_value from_tensor(torch_tensor tensor)
{
    return (torch_value)(uintptr_t)tensor;
}

static inline torch_tensor to_tensor(torch_value value) { return (torch_tensor)(uintptr_t)value; }

/* NULL if there is no tensor, or an undefined one, as autograd passes it. */
static inline torch_tensor to_optional(torch_value value)
{
    bool defined = false;
    if (!value)
        return NULL;
    const torch_tensor tensor = to_tensor(*(torch_value *)(uintptr_t)value);
    return !torch.is_defined(tensor, &defined) && defined ? tensor : NULL;
}

static inline bool make_optional(torch_value tensor, torch_value *optional)
{
    torch_value *box;
    if (torch.new_value(&box))
        return false;
    *box = tensor;
    *optional = (torch_value)(uintptr_t)box;
    return true;
}

static inline void delete_tensor(torch_tensor *tensor)
{
    if (*tensor)
        torch.delete_tensor(*tensor);
    *tensor = NULL;
}

static inline void delete_optional(torch_value value)
{
    if (!value)
        return;
    torch_value *box = (torch_value *)(uintptr_t)value;
    torch.delete_tensor(to_tensor(*box));
    torch.delete_value(box);
}

/* The new tensor if one was made, else the tensor in the optional argument, which is freed. */
static inline torch_value either(torch_tensor made, torch_value optional)
{
    if (made) {
        delete_optional(optional);
        return from_tensor(made);
    }
    torch_value *box = (torch_value *)(uintptr_t)optional;
    const torch_value tensor = *box;
    torch.delete_value(box);
    return tensor;
}

#endif
