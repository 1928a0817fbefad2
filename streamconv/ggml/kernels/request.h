/* A call from Python as a request: the checked arguments of `quantize`, for both extensions of block types.
 *
 * Buffers need no alignment and no numpy headers, and the interpreter lock is released. No memory is allocated.
 */
#ifndef STREAMCONV_REQUEST_H
#define STREAMCONV_REQUEST_H

#define Py_LIMITED_API 0x030B0000 /* 3.11, the first with the buffer protocol */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <float.h>

#include "blocks.h"

#if FLT_EVAL_METHOD != 0
#error "needs float arithmetic in single precision"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "GGUF and safetensors are little-endian"
#endif

static const block_type_t BLOCK_TYPES[] = {
    {2, 32, 18, 1, 0, ROOT_ROW, 1, 8},                /* Q4_0 */
    {3, 32, 20, 2, 0, ROOT_ROW, 1, 16},               /* Q4_1 */
    {6, 32, 22, 1, 0, ROOT_ROW, 1, 16},               /* Q5_0 */
    {7, 32, 24, 2, 0, ROOT_ROW, 1, 32},               /* Q5_1 */
    {10, SUPER, 84, 2, 80, ROOT_BLOCK, 1, 15 * 3},    /* Q2_K */
    {11, SUPER, 110, 1, 108, ROOT_BLOCK, 2, 32 * 4},  /* Q3_K */
    {12, SUPER, 144, 2, 0, ROOT_BLOCK, 2, 63 * 15},   /* Q4_K */
    {13, SUPER, 176, 2, 0, ROOT_BLOCK, 2, 63 * 31},   /* Q5_K */
    {14, SUPER, 210, 1, 208, ROOT_NONE, 0, 128 * 32}, /* Q6_K */
    {20, 32, 18, 1, 0, ROOT_BLOCK, 2, 127},           /* IQ4_NL */
    {23, SUPER, 136, 1, 0, ROOT_BLOCK, 2, 32 * 127},  /* IQ4_XS */
    {34, SUPER, 54, 1, 52, ROOT_NONE, 0, 1},          /* TQ1_0 */
    {35, SUPER, 66, 1, 64, ROOT_NONE, 0, 1},          /* TQ2_0 */
};
enum { N_BLOCK_TYPES = sizeof BLOCK_TYPES / sizeof *BLOCK_TYPES };

static const block_type_t *find_type(int type) {
    for (int i = 0; i < N_BLOCK_TYPES; i++)
        if (BLOCK_TYPES[i].type == type) return &BLOCK_TYPES[i];
    PyErr_Format(PyExc_ValueError, "no kernel for type %d", type);
    return NULL;
}

/* Fills the sizes of a request, or sets an exception and returns 0. */
static int measure(request_t *request, Py_ssize_t n_per_row, const Py_buffer *rows, const Py_buffer *importance,
                   const Py_buffer *out) {
    const block_type_t *type = request->type;
    Py_ssize_t width = request->source == F32 ? 4 : 2;
    if (request->source != F32 && request->source != F16 && request->source != BF16) {
        PyErr_Format(PyExc_ValueError, "no kernel from type %d", request->source);
        return 0;
    }
    if (n_per_row <= 0 || n_per_row % type->n_elements != 0 || rows->len % width != 0 ||
        rows->len / width % n_per_row != 0 || out->len % type->nbytes != 0 ||
        rows->len / width / type->n_elements != out->len / type->nbytes ||
        (importance->buf != NULL && importance->len != n_per_row * 4)) {
        PyErr_Format(PyExc_ValueError, "%zd bytes in rows of %zd do not make %zd bytes", rows->len, n_per_row, out->len);
        return 0;
    }
    request->n_elements = rows->len / width;
    request->n_per_row = n_per_row;
    return 1;
}

/* Implements `quantize(type, source, rows, n_per_row, importance, out, baseline=False)` with `work`. */
static PyObject *answer_request(PyObject *args, outcome_t (*work)(const request_t *request, int baseline)) {
    int type, source, baseline = 0;
    Py_ssize_t n_per_row;
    Py_buffer rows, importance, out;
    PyObject *answer = NULL;
    if (!PyArg_ParseTuple(args, "iiy*nz*w*|p:quantize", &type, &source, &rows, &n_per_row, &importance, &out, &baseline))
        return NULL;
    request_t request = {.type = find_type(type), .source = source, .rows = rows.buf, .out = out.buf};
    request.importance = importance.buf;
    if (request.type != NULL && measure(&request, n_per_row, &rows, &importance, &out)) {
        outcome_t outcome;
        Py_BEGIN_ALLOW_THREADS
        outcome = work(&request, baseline);
        Py_END_ALLOW_THREADS
        answer = Py_BuildValue("iL", (int)outcome.status, (long long)outcome.element);
    }
    PyBuffer_Release(&rows);
    PyBuffer_Release(&importance);
    PyBuffer_Release(&out);
    return answer;
}

#endif
