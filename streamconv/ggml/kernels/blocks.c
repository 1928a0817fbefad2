/* The extension module streamconv.ggml._blocks: encodes rows of F32, F16 or BF16 as blocks, as llama-quantize does.
 *
 * A call uses up to 64 KiB of the thread's stack.
 */
#include "request.h"

#if defined(__x86_64__)
static int has_avx2(void) {
    __builtin_cpu_init(); /* some runtimes need this call */
    return __builtin_cpu_supports("avx2") != 0;
}
#endif

static outcome_t quantise(const request_t *request, int baseline) {
#if defined(__x86_64__)
    if (!baseline && has_avx2()) return quantise_avx2(request);
#endif
    (void)baseline;
    return quantise_baseline(request);
}

static PyObject *quantize(PyObject *module, PyObject *args) {
    (void)module;
    return answer_request(args, quantise);
}

static PyMethodDef METHODS[] = {
    {"quantize", quantize, METH_VARARGS,
     "quantize(type, source, rows, n_per_row, importance, out, baseline=False, /)\n--\n\n(status, element), as "
     "streamconv.ggml.blocks says."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot SLOTS[] = {{0, NULL}};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    .m_name = "streamconv.ggml._blocks",
    .m_doc = "The compiled kernels of streamconv.ggml.blocks.",
    .m_methods = METHODS,
    .m_slots = SLOTS,
};

PyMODINIT_FUNC PyInit__blocks(void) { return PyModuleDef_Init(&MODULE); }
