/* PyTorch's tensors for the kernels: where their values are, and in what order. */
#ifndef BNFAST_ATEN_TENSORS_H
#define BNFAST_ATEN_TENSORS_H

#include "aten_api.h"
#include "bnfast.h"

/* Tensors with more axes than this are left to PyTorch. */
enum { MOST_AXES = 8 };

typedef struct {
    torch_tensor tensor;
    int64_t dim;
    const int64_t *sizes, *strides; /* owned by the tensor */
    int32_t dtype;
    bnf_type type; /* BNF_TYPES: a type that the kernels do not take */
} aten_view;

/* The layout of PyTorch's results: contiguous or channels_last, whichever is closer to the
 * input. */
typedef struct {
    bnf_shape shape;
    int64_t strides[MOST_AXES];
} aten_layout;

/* Look up PyTorch's codes of the types. */
void aten_tensors_setup(void);

bool aten_look(torch_tensor tensor, aten_view *view);
aten_layout aten_result_layout(const aten_view *x);
aten_layout aten_gradient_layout(const aten_view *x, const aten_view *dy);
bool aten_same_shape(const aten_view *a, const aten_view *b);

/* Whether all elements of a view are inside its storage. */
bool aten_has_memory(const aten_view *view);

/* Find a view's values in a layout: in place if they have it, else copied to *room. If *room is
 * NULL, it becomes a new tensor, which the caller owns. */
bool aten_in_order(const aten_view *view, const aten_layout *layout, torch_tensor *room,
                   const void **values);

bool aten_new(const aten_view *like, const aten_layout *layout, torch_tensor *made);

int32_t aten_dtype(bnf_type type);
size_t aten_itemsize(bnf_type type);

#endif
