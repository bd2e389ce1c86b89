/* PyTorch's batch norm operators for CPU tensors, on bnfast's driver. */
#ifndef BNFAST_ATEN_KERNELS_H
#define BNFAST_ATEN_KERNELS_H

#include <stdbool.h>

#include "aten_tensors.h"
#include "driver.h"

/* The outcome of a call: it ran here, or was left to PyTorch's own kernel for a reason. */
#define ATEN_OUTCOMES(O)                                                                     \
    O(RAN_TRAINING, "training")                                                              \
    O(RAN_EVALUATION, "evaluation")                                                          \
    O(RAN_BACKWARD, "backward")                                                              \
    O(LEFT_OFF, "bnfast was not enabled")                                                    \
    O(LEFT_TYPE, "a type of tensor that bnfast does not take")                               \
    O(LEFT_SHAPE, "no values, or not the shape of a batch")                                  \
    O(LEFT_PARAMETERS, "parameters or statistics of another type, shape or order in memory") \
    O(LEFT_MEMORY, "a tensor whose memory was freed")                                        \
    O(LEFT_ACTIVATION, "an activation that bnfast does not have")

#define ATEN_OUTCOME(name, text) name,
typedef enum { ATEN_OUTCOMES(ATEN_OUTCOME) OUTCOMES } aten_outcome;

/* Call once, before anything else here and before the kernels are registered. */
void aten_setup(const bnf_driver *driver);

bool aten_switch(bool on);      /* for the process; returns the former value */
bool aten_switch_here(bool on); /* for this thread */
bool aten_is_on(void);
long long aten_count(aten_outcome outcome);
void aten_forget_counts(void);

/* ---- For the kernels themselves */

extern const bnf_driver *aten_driver;
#define ATEN_NO_MEMORY "bnfast: not enough memory for the numbers per channel"

/* As in driver.c: keeps arithmetic inside its floating-point environment. */
#define APART __attribute__((noinline))

bool aten_runs_here(aten_outcome outcome);
/* Whether calls should run here, by the setting of the process or of this thread. */
bool aten_is_wanted(void);
/* Whether the kernels here take a data tensor; if so, any outcome that runs here. */
aten_outcome aten_look_at_data(torch_tensor tensor, aten_view *view);
/* The number of threads that PyTorch would use in this thread. */
int aten_threads(void);
/* Throw PyTorch's exception through the frames up to PyTorch. Free everything before. */
void aten_throw(const char *message);
/* End a kernel: with its results, or with an error. */
void aten_finish(const char *error, aten_outcome outcome, torch_tensor *results, int number,
                 torch_value *stack);

/* ---- The kernels */

/* The operations after the normalization in the same pass; zero: none. */
typedef struct {
    bool fused; /* an operator of our own: no other kernel can do the call */
    bnf_activation activation;
    double slope;
} aten_rest;

typedef struct {
    torch_value x, weight, bias, running_mean, running_var; /* all are optional except x */
    bool training;
    double momentum, eps;
    torch_value residual; /* optional, if fused */
    aten_rest rest;
} aten_forward_arguments;

typedef struct {
    torch_value dy, x, weight, running_mean, running_var, save_mean, save_invstd;
    bool training;
    double eps;
    torch_value wanted; /* a list: are gradients of x, weight, bias (fused: residual) wanted */
    torch_value bias;   /* if fused */
    torch_value beside; /* if fused and the forward had a residual: its output, if that tells the
                           activation's derivative, else the residual */
    aten_rest rest;
} aten_backward_arguments;

/* Why a call cannot run here, as an error message of our own operator. */
const char *aten_refusal(aten_outcome outcome);
/* Whether the kernels have the activation of a fused call. */
bool aten_has_activation(const aten_rest *rest);

/* The first arguments, which PyTorch's operator and ours have in common. */
aten_forward_arguments aten_read_forward(const torch_value *stack);

/* They take ownership of the arguments, and leave three results on the stack; a fused backward
 * leaves four. */
void aten_forward(aten_forward_arguments arguments, torch_value *stack);
void aten_backward(aten_backward_arguments arguments, torch_value *stack);

/* PyTorch's operators. */
torch_kernel aten_batch_norm, aten_batch_norm_legit, aten_batch_norm_no_stats,
    aten_batch_norm_backward;
/* bnfast's own. */
torch_kernel aten_batch_norm_act, aten_batch_norm_act_backward;

#endif
