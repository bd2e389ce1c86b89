/* The part of PyTorch's C interface for extensions that is used here. Its functions are found by
 * name in the loaded library, so nothing is built against PyTorch or linked to it.
 *
 * The functions and their arguments are those of torch/csrc/inductor/aoti_torch/c/shim.h and
 * torch/csrc/stable/c/shim.h. */
#ifndef BNFAST_ATEN_API_H
#define BNFAST_ATEN_API_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef int32_t torch_status; /* 0: success; otherwise torch.what() gives the error */
/* Owned handles. */
typedef struct torch_object *torch_tensor, *torch_list, *torch_string, *torch_library;
/* An argument or a result: a number or a handle. An optional one is a pointer to it, or 0. */
typedef uint64_t torch_value;
/* Takes its arguments off the stack and owns them; leaves its results there. */
typedef void torch_kernel(torch_value *stack, uint64_t arguments, uint64_t results);

#define TORCH_FUNCTIONS(F)                                                                        \
    F(torch_status, library_init_impl, "aoti_torch_library_init_impl",                            \
      (const char *space, const char *key, const char *file, uint32_t line, torch_library *made)) \
    F(torch_status, library_impl, "torch_library_impl",                                           \
      (torch_library library, const char *name, torch_kernel *kernel, uint64_t abi))              \
    F(torch_status, call, "torch_call_dispatcher",                                                \
      (const char *name, const char *overload, torch_value *stack, uint64_t abi))                 \
    F(void, check, "aoti_torch_check",                                                            \
      (bool holds, const char *function, const char *file, uint32_t line, const char *message))   \
    F(const char *, what, "torch_exception_get_what_without_backtrace", (void))                   \
    F(torch_status, is_defined, "aoti_torch_is_defined", (torch_tensor tensor, bool *defined))    \
    F(torch_status, get_dtype, "aoti_torch_get_dtype", (torch_tensor tensor, int32_t *dtype))     \
    F(torch_status, get_dim, "aoti_torch_get_dim", (torch_tensor tensor, int64_t *dim))           \
    F(torch_status, get_sizes, "aoti_torch_get_sizes", (torch_tensor tensor, int64_t **sizes))    \
    F(torch_status, get_strides, "aoti_torch_get_strides",                                        \
      (torch_tensor tensor, int64_t **strides))                                                   \
    F(torch_status, get_storage_offset, "aoti_torch_get_storage_offset",                          \
      (torch_tensor tensor, int64_t *offset))                                                     \
    F(torch_status, get_storage_size, "aoti_torch_get_storage_size",                              \
      (torch_tensor tensor, int64_t *bytes))                                                      \
    F(torch_status, get_const_data, "torch_get_const_data_ptr",                                   \
      (torch_tensor tensor, const void **data))                                                   \
    F(torch_status, get_data, "torch_get_mutable_data_ptr", (torch_tensor tensor, void **data))   \
    F(torch_status, empty_strided, "aoti_torch_empty_strided",                                    \
      (int64_t dim, const int64_t *sizes, const int64_t *strides, int32_t dtype,                  \
       int32_t device_type, int32_t device_index, torch_tensor *made))                            \
    F(torch_status, reinterpret, "aoti_torch__reinterpret_tensor",                                \
      (torch_tensor tensor, int64_t dim, const int64_t *sizes, const int64_t *strides,            \
       int64_t offset, torch_tensor *made))                                                       \
    F(bool, grad_mode, "aoti_torch_grad_mode_is_enabled", (void))                                 \
    F(torch_status, undefined, "aoti_torch_new_uninitialized_tensor", (torch_tensor * made))      \
    F(torch_status, copy, "aoti_torch_copy_",                                                     \
      (torch_tensor to, torch_tensor from, int32_t non_blocking))                                 \
    F(torch_status, delete_tensor, "aoti_torch_delete_tensor_object", (torch_tensor tensor))      \
    F(torch_status, list_get, "torch_list_get_item",                                              \
      (torch_list list, size_t index, torch_value *item))                                         \
    F(torch_status, delete_list, "torch_delete_list", (torch_list list))                          \
    F(torch_status, string_text, "torch_string_c_str", (torch_string string, const char **text))  \
    F(torch_status, delete_string, "torch_delete_string", (torch_string string))                  \
    F(torch_status, new_value, "torch_new_stable_ivalue", (torch_value * *made))                  \
    F(torch_status, delete_value, "torch_delete_stable_ivalue", (torch_value * value))            \
    F(torch_status, get_num_threads, "torch_get_num_threads", (uint32_t *threads))                \
    F(int32_t, dtype_float32, "aoti_torch_dtype_float32", (void))                                 \
    F(int32_t, dtype_float64, "aoti_torch_dtype_float64", (void))                                 \
    F(int32_t, dtype_float16, "aoti_torch_dtype_float16", (void))                                 \
    F(int32_t, dtype_bfloat16, "aoti_torch_dtype_bfloat16", (void))                               \
    F(int32_t, device_type_cpu, "aoti_torch_device_type_cpu", (void))

#define TORCH_MEMBER(type, name, symbol, arguments) type(*name) arguments;
typedef struct {
    TORCH_FUNCTIONS(TORCH_MEMBER)
} torch_functions;

extern torch_functions torch;

/* The PyTorch version that this file was written for, 2.13, in the form that its functions take. */
#define TORCH_ABI ((uint64_t)2 << 56 | (uint64_t)13 << 48)

/* Find all functions in a loaded library. Return NULL, or the name of what is missing: a function,
 * or the library itself. */
const char *torch_find(const char *library);

#endif
