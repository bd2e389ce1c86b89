/* Values per channel: parameters and statistics, and what a forward keeps for its backward. */
#ifndef BNFAST_ATEN_VECTORS_H
#define BNFAST_ATEN_VECTORS_H

#include "aten_tensors.h"

typedef struct {
    bnf_type type;
    int64_t length;
} vector_kind;

static inline bool is_half(bnf_type type) { return type == BNF_F16 || type == BNF_BF16; }

bool aten_new_vector(int64_t length, int32_t dtype, torch_tensor *made);

/* The type of parameters and statistics: the data's, or float32 with half data. PyTorch uses the
 * type of the first vector that is given, and refuses vectors of another type. */
bnf_type aten_vector_type(bnf_type data, const torch_tensor *vectors, int number);
/* The same for any data; also its number of channels. */
bool aten_type_for_pytorch(torch_value x, const torch_tensor *vectors, int number, int32_t *dtype,
                           bnf_type *type, int64_t *length);

/* Whether a vector is missing, or of this kind and without gaps; *values points to it. */
bool aten_fits(torch_tensor tensor, vector_kind kind, const void **values);

/* Convert to float64 and back, rounded to nearest even. */
void aten_widen(const void *from, bnf_type type, int64_t length, double *to);
void aten_narrow(const double *from, bnf_type type, int64_t length, void *to);
void aten_fill(double *to, const void *values, vector_kind kind, double otherwise);

/* Make save_mean, with memory behind it; store the float64 values there; read them again in place
 * of the visible values, if they belong to them. */
bool aten_new_save_mean(vector_kind kind, torch_tensor *made);
void aten_keep(void *save_mean, vector_kind kind, const double *mean, const double *inv_std);
void aten_recall(torch_tensor save_mean, double *mean, double *inv_std);
/* Whether save_mean was made by a forward that ran here. */
bool aten_ran_here(torch_tensor save_mean);

#endif
