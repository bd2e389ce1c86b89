/* bnfast's own operators: batch norm, addition and activation in one call. */
#include "aten_kernels.h"
#include "aten_stack.h"

/* BNF_ACTIVATIONS: none that the kernels have.  The name is used up. */
static bnf_activation read_activation(torch_value optional)
{
    if (!optional)
        return BNF_LINEAR;
    torch_value *box = (torch_value *)(uintptr_t)optional;
    const torch_string string = (torch_string)(uintptr_t)*box;
    const char *text;
    int found = BNF_ACTIVATIONS;
    if (!torch.string_text(string, &text))
        for (found = BNF_LINEAR + 1; found < BNF_ACTIVATIONS; found++)
            if (strcmp(text, bnf_activation_name((bnf_activation)found)) == 0)
                break;
    torch.delete_string(string);
    torch.delete_value(box);
    return (bnf_activation)found;
}

static aten_rest read_rest(torch_value activation, torch_value slope)
{
    return (aten_rest){true, read_activation(activation), to_double(slope)};
}

void aten_batch_norm_act(torch_value *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    aten_forward_arguments a = aten_read_forward(stack);
    a.residual = stack[8];
    a.rest = read_rest(stack[9], stack[10]);
    aten_forward(a, stack);
}

void aten_batch_norm_act_backward(torch_value *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    const aten_backward_arguments a = {.dy = stack[0],
                                       .x = stack[1],
                                       .weight = stack[2],
                                       .bias = stack[3],
                                       .running_mean = stack[4],
                                       .running_var = stack[5],
                                       .save_mean = stack[6],
                                       .save_invstd = stack[7],
                                       .training = to_bool(stack[8]),
                                       .eps = to_double(stack[9]),
                                       .beside = stack[10],
                                       .rest = read_rest(stack[11], stack[12]),
                                       .wanted = stack[13]};
    aten_backward(a, stack);
}
