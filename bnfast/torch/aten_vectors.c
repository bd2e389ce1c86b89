#include <math.h>
#include <string.h>

#include "aten_stack.h"
#include "aten_vectors.h"
#include "simd_scalar.h" /* conversions of half types */

bool aten_new_vector(int64_t length, int32_t dtype, torch_tensor *made)
{
    const int64_t stride = 1;
    return !torch.empty_strided(1, &length, &stride, dtype, torch.device_type_cpu(), 0, made);
}

static double widened(const void *from, bnf_type type, int64_t i)
{
    switch (type) {
    case BNF_F32:
        return ((const float *)from)[i];
    case BNF_F16:
        return f16_widen(((const bnf_f16 *)from)[i]);
    case BNF_BF16:
        return bf16_widen(((const bnf_bf16 *)from)[i]);
    default:
        return ((const double *)from)[i];
    }
}

static void narrowed(double value, bnf_type type, int64_t i, void *to)
{
    switch (type) {
    case BNF_F32:
        ((float *)to)[i] = (float)value;
        return;
    case BNF_F16:
        ((bnf_f16 *)to)[i] = f16_narrow((float)value);
        return;
    case BNF_BF16:
        ((bnf_bf16 *)to)[i] = bf16_narrow((float)value);
        return;
    default:
        ((double *)to)[i] = value;
    }
}

void aten_widen(const void *from, bnf_type type, int64_t length, double *to)
{
    for (int64_t i = 0; i < length; i++)
        to[i] = widened(from, type, i);
}

void aten_narrow(const double *from, bnf_type type, int64_t length, void *to)
{
    for (int64_t i = 0; i < length; i++)
        narrowed(from[i], type, i, to);
}

/* One value, rounded to a type. */
static double rounded_to(double value, bnf_type type)
{
    union {
        float f32;
        double f64;
        bnf_f16 f16;
        bnf_bf16 bf16;
    } room;
    narrowed(value, type, 0, &room);
    return widened(&room, type, 0);
}

bnf_type aten_vector_type(bnf_type data, const torch_tensor *vectors, int number)
{
    for (int i = 0; i < number; i++) {
        int32_t dtype;
        if (vectors[i] && !torch.get_dtype(vectors[i], &dtype))
            return data < BNF_TYPES && dtype == aten_dtype(data) ? data : BNF_F32;
    }
    return data;
}

bool aten_fits(torch_tensor tensor, vector_kind kind, const void **values)
{
    aten_view view;
    if (!tensor)
        return true;
    return aten_look(tensor, &view) && view.type == kind.type && view.dim == 1 &&
           view.sizes[0] == kind.length && (view.strides[0] == 1 || kind.length == 1) &&
           aten_has_memory(&view) && !torch.get_const_data(tensor, values);
}

void aten_fill(double *to, const void *values, vector_kind kind, double otherwise)
{
    if (values)
        aten_widen(values, kind.type, kind.length, to);
    else
        for (int64_t c = 0; c < kind.length; c++)
            to[c] = otherwise;
}

bool aten_type_for_pytorch(torch_value x, const torch_tensor *vectors, int number, int32_t *dtype,
                           bnf_type *type, int64_t *length)
{
    aten_view view;
    if (!aten_look(to_tensor(x), &view))
        return false;
    *type = aten_vector_type(view.type, vectors, number);
    *dtype = *type == BNF_TYPES ? view.dtype : aten_dtype(*type);
    *length = view.dim > 1 ? view.sizes[1] : 0;
    return true;
}

/* ---- What the forward keeps for the backward
 *
 * save_mean and save_invstd hold PyTorch's values, rounded. The float64 values follow save_mean in
 * its storage, after a mark which says that the forward ran here. They are used only if they round
 * to the visible values, which fails if save_mean or save_invstd was overwritten. A copy or a part
 * of save_mean does not have them. In evaluation save_mean has no values, and only the mark follows
 * it. */

typedef struct {
    uint64_t mark;
    double values[]; /* means, then inverse standard deviations */
} kept_numbers;

static const uint64_t KEPT_MARK = 0x626e666173743031; /* "bnfast01" */

static int64_t kept_offset(vector_kind kind)
{
    const int64_t bytes = kind.length * (int64_t)aten_itemsize(kind.type);
    return (bytes + 7) / 8 * 8;
}

static int64_t kept_end(vector_kind kind)
{
    return kept_offset(kind) + (int64_t)sizeof(kept_numbers) +
           2 * kind.length * (int64_t)sizeof(double);
}

static kept_numbers *kept_behind(const void *save_mean, vector_kind kind)
{
    return (kept_numbers *)((char *)save_mean + kept_offset(kind));
}

bool aten_new_save_mean(vector_kind kind, torch_tensor *made)
{
    const int64_t stride = 1;
    torch_tensor longer = NULL;
    void *values;
    const bool done = aten_new_vector(kept_end(kind) / (int64_t)aten_itemsize(kind.type),
                                      aten_dtype(kind.type), &longer) &&
                      !torch.get_data(longer, &values) &&
                      !torch.reinterpret(longer, 1, &kind.length, &stride, 0, made);
    if (done)
        kept_behind(values, kind)->mark = KEPT_MARK;
    delete_tensor(&longer);
    return done;
}

void aten_keep(void *save_mean, vector_kind kind, const double *mean, const double *inv_std)
{
    kept_numbers *kept = kept_behind(save_mean, kind);
    const size_t bytes = (size_t)kind.length * sizeof(double);
    memcpy(kept->values, mean, bytes);
    memcpy(kept->values + kind.length, inv_std, bytes);
}

/* Where a storage begins. PyTorch does not give the address of an empty tensor. */
static const void *storage_of(const aten_view *view)
{
    const int64_t one = 1;
    const void *values = NULL;
    torch_tensor first = NULL;
    if (view->sizes[0] > 0)
        return torch.get_const_data(view->tensor, &values) ? NULL : values;
    if (torch.reinterpret(view->tensor, 1, &one, &one, 0, &first) ||
        torch.get_const_data(first, &values))
        values = NULL;
    delete_tensor(&first);
    return values;
}

/* NULL if nothing is kept after this vector. */
static const kept_numbers *find_kept(const aten_view *save_mean)
{
    int64_t offset, bytes;
    const vector_kind kind = {save_mean->type, save_mean->sizes[0]};
    if (torch.get_storage_offset(save_mean->tensor, &offset) || offset != 0 ||
        torch.get_storage_size(save_mean->tensor, &bytes) || bytes < kept_end(kind))
        return NULL;
    const void *values = storage_of(save_mean);
    if (!values || (uintptr_t)values % sizeof(double) != 0)
        return NULL;
    const kept_numbers *kept = kept_behind(values, kind);
    return kept->mark == KEPT_MARK ? kept : NULL;
}

bool aten_ran_here(torch_tensor save_mean)
{
    aten_view view;
    if (!save_mean || !aten_look(save_mean, &view) || view.type == BNF_TYPES || view.dim != 1)
        return false;
    return find_kept(&view) != NULL;
}

static bool round_to(const double *exact, const double *visible, vector_kind kind)
{
    for (int64_t c = 0; c < kind.length; c++) {
        const double rounded = rounded_to(exact[c], kind.type);
        if (rounded != visible[c] && !(isnan(rounded) && isnan(visible[c])))
            return false;
    }
    return true;
}

void aten_recall(torch_tensor save_mean, double *mean, double *inv_std)
{
    aten_view view;
    const kept_numbers *kept = aten_look(save_mean, &view) ? find_kept(&view) : NULL;
    if (!kept)
        return;
    const vector_kind kind = {view.type, view.sizes[0]};
    const double *exact = kept->values;
    if (!round_to(exact, mean, kind) || !round_to(exact + kind.length, inv_std, kind))
        return;
    const size_t size = (size_t)kind.length * sizeof(double);
    memcpy(mean, exact, size);
    memcpy(inv_std, exact + kind.length, size);
}
