#include "aten_tensors.h"

static int32_t dtypes[BNF_TYPES];
static int32_t cpu;

void aten_tensors_setup(void)
{
    dtypes[BNF_F32] = torch.dtype_float32();
    dtypes[BNF_F64] = torch.dtype_float64();
    dtypes[BNF_F16] = torch.dtype_float16();
    dtypes[BNF_BF16] = torch.dtype_bfloat16();
    cpu = torch.device_type_cpu();
}

int32_t aten_dtype(bnf_type type) { return dtypes[type]; }

size_t aten_itemsize(bnf_type type) { return (size_t)bnf_type_size(type); }

static bnf_type type_of(int32_t dtype)
{
    int type = 0;
    while (type < BNF_TYPES && dtypes[type] != dtype)
        type++;
    return (bnf_type)type;
}

bool aten_look(torch_tensor tensor, aten_view *view)
{
    int64_t *sizes, *strides;
    if (torch.get_dim(tensor, &view->dim) || torch.get_sizes(tensor, &sizes) ||
        torch.get_strides(tensor, &strides) || torch.get_dtype(tensor, &view->dtype))
        return false;
    view->tensor = tensor;
    view->sizes = sizes;
    view->strides = strides;
    view->type = type_of(view->dtype);
    return true;
}

/* ---- Memory order */

/* The axes of channels_last, innermost first. */
static int64_t channels_last_axis(int64_t dim, int64_t i)
{
    return i == 0 ? 1 : i == dim - 1 ? 0 : dim - i;
}

/* PyTorch's own rule, also where axes of length 1 leave the order ambiguous. */
static bool looks_channels_last(const aten_view *x)
{
    if ((x->dim != 4 && x->dim != 5) || x->strides[1] == 0)
        return false;
    int64_t least = 0;
    for (int64_t i = 0; i < x->dim; i++) {
        const int64_t axis = channels_last_axis(x->dim, i);
        const int64_t size = x->sizes[axis], stride = x->strides[axis];
        if (size == 0 || stride < least || (axis == 0 && least == x->strides[1]))
            return false;
        least = size > 1 ? stride * size : stride;
    }
    return true;
}

static aten_layout layout_of(const aten_view *x, bool last)
{
    aten_layout layout;
    int64_t step = 1, inner = 1;
    for (int64_t i = 0; i < x->dim; i++) {
        const int64_t axis = last ? channels_last_axis(x->dim, i) : x->dim - 1 - i;
        layout.strides[axis] = step;
        step *= x->sizes[axis] > 1 ? x->sizes[axis] : 1;
    }
    for (int64_t axis = 2; axis < x->dim; axis++)
        inner *= x->sizes[axis];
    layout.shape = last ? (bnf_shape){x->sizes[0] * inner, x->sizes[1], 1}
                        : (bnf_shape){x->sizes[0], x->sizes[1], inner};
    return layout;
}

static bool lies_in(const aten_view *view, const aten_layout *layout)
{
    for (int64_t axis = 0; axis < view->dim; axis++)
        if (view->sizes[axis] > 1 && view->strides[axis] != layout->strides[axis])
            return false;
    return true;
}

static bool is_contiguous(const aten_view *x)
{
    const aten_layout layout = layout_of(x, false);
    return lies_in(x, &layout);
}

static bool is_channels_last(const aten_view *x)
{
    const aten_layout layout = layout_of(x, true);
    return (x->dim == 4 || x->dim == 5) && lies_in(x, &layout);
}

aten_layout aten_result_layout(const aten_view *x)
{
    return layout_of(x, !is_contiguous(x) && (is_channels_last(x) || looks_channels_last(x)));
}

aten_layout aten_gradient_layout(const aten_view *x, const aten_view *dy)
{
    const bool alike = looks_channels_last(x) == looks_channels_last(dy);
    const bool dense = is_contiguous(dy) || is_channels_last(dy);
    if (alike && dense && (is_contiguous(x) || is_channels_last(x)))
        return aten_result_layout(x);
    return layout_of(x, looks_channels_last(x));
}

bool aten_same_shape(const aten_view *a, const aten_view *b)
{
    if (a->dim != b->dim)
        return false;
    for (int64_t axis = 0; axis < a->dim; axis++)
        if (a->sizes[axis] != b->sizes[axis])
            return false;
    return true;
}

bool aten_has_memory(const aten_view *view)
{
    int64_t end, bytes;
    if (torch.get_storage_offset(view->tensor, &end) ||
        torch.get_storage_size(view->tensor, &bytes))
        return false;
    for (int64_t axis = 0; axis < view->dim; axis++)
        end += (view->sizes[axis] - 1) * view->strides[axis];
    return end < bytes / (int64_t)aten_itemsize(view->type);
}

bool aten_in_order(const aten_view *view, const aten_layout *layout, torch_tensor *room,
                   const void **values)
{
    if (lies_in(view, layout))
        return !torch.get_const_data(view->tensor, values);
    return (*room || aten_new(view, layout, room)) && !torch.copy(*room, view->tensor, 0) &&
           !torch.get_const_data(*room, values);
}

bool aten_new(const aten_view *like, const aten_layout *layout, torch_tensor *made)
{
    return !torch.empty_strided(like->dim, like->sizes, layout->strides, like->dtype, cpu, 0, made);
}
