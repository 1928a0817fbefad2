/* The compiled kernels: the same bytes as the reference (streamconv/ggml/reference.py), several times as fast.
 *
 * Buffers need no alignment and no numpy headers, and the interpreter lock is released. Every float operation is a
 * single IEEE F32 operation, so that the bytes are those of the reference: no -ffast-math, and -ffp-contract=off, since
 * some targets contract to fused multiply-adds by default.
 *
 * A block is copied to the stack, widened to F32 patterns, narrowed, and copied out: plain loops over small local
 * arrays, which compilers turn into vector code for the target machine.
 */
#define Py_LIMITED_API 0x030B0000 /* 3.11, the first with the buffer protocol */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <float.h>
#include <stdint.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0
#error "needs float arithmetic in single precision; the numpy kernels serve here"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "GGUF and safetensors are little-endian; the numpy kernels serve here"
#endif

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#endif

#if defined(__GNUC__) || defined(__clang__)
#define INLINE static inline __attribute__((always_inline))
typedef float vector_t __attribute__((vector_size(32), aligned(4), may_alias));
#else
#define INLINE static inline
typedef float vector_t;
#endif

/* A wheel is built for the oldest x86-64; if the loader can choose at runtime, it also contains AVX2 code. -DCLONED=
   builds only the code for machines without AVX2. */
#if defined(CLONED)
#elif defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define CLONED __attribute__((target_clones("avx2", "default")))
#else
#define CLONED
#endif

enum { F32 = 0, F16 = 1, Q8_0 = 8, BF16 = 30 }; /* ggml_type */

enum {
    CHUNK = 1024, /* elements at a time, a multiple of QK */
    QK = 32,      /* elements of a Q8_0 block */
    QK_NBYTES = 34,
    COPIED = 1 << 16, /* bytes that are copied at a time, a multiple of a chunk's */
};

#define SIGN 0x80000000u
#define INFINITY_F32 0x7f800000u
#define INFINITY_F16 0x7c00u
#define REBIAS ((127u - 15u) << 23) /* from F16's exponent bias to F32's */
#define F16_NORMAL 0x38800000u      /* 2^-14, F16's smallest normal number */
#define TOO_LARGE_F16 0x477ff000u   /* 65520, which rounds to F16's infinity */
#define TOO_LARGE_BF16 0x7f7f8000u  /* halfway from BF16's largest number to infinity */
#define TOO_LARGE_Q8_0 0x4afdf020u  /* 65520 * 127, whose scale does */
#define HALF_DOWN 0x3effffffu       /* the predecessor of 0.5 */

typedef struct {
    Py_ssize_t n_nan, n_inf;
    int fits;
} result_t;

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* A choice without a branch: compilers do not vectorise a branch around a float operation, since that could trap. */
INLINE uint32_t choose(int condition, uint32_t yes, uint32_t no) {
    uint32_t mask = -(uint32_t)condition;
    return (yes & mask) | (no & ~mask);
}

INLINE uint32_t f16_to_f32(uint32_t half) {
    uint32_t magnitude = half & 0x7fff;
    /* A subnormal is a multiple of the last place of 0.5: add it to 0.5, and subtract 0.5, which is exact. */
    uint32_t subnormal = as_bits(as_float(0x3f000000u | magnitude) - 0.5f);
    uint32_t normal = (magnitude << 13) + REBIAS + (magnitude >= INFINITY_F16 ? REBIAS : 0);
    return (half & 0x8000) << 16 | choose(magnitude < 0x400, subnormal, normal);
}

/* To nearest even; a NaN keeps its top bits (the least NaN if they are 0). Numbers that are too large get any bits. */
INLINE uint16_t f32_to_f16(uint32_t bits) {
    uint32_t magnitude = bits & ~SIGN;
    uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) & 0xffff; /* 2^-24 is the last place of 0.5 */
    uint32_t normal = (magnitude - REBIAS + 0xfff + (magnitude >> 13 & 1)) >> 13;
    uint32_t payload = magnitude >> 13 & 0x3ff;
    uint32_t nonfinite = INFINITY_F16 | payload | (payload == 0 && magnitude > INFINITY_F32);
    uint32_t finite = choose(magnitude < F16_NORMAL, subnormal, normal);
    return (uint16_t)(bits >> 16 & 0x8000) | (uint16_t)choose(magnitude >= INFINITY_F32, nonfinite, finite);
}

/* To nearest even; a NaN keeps its top bits and becomes quiet. */
INLINE uint16_t f32_to_bf16(uint32_t bits) {
    uint32_t quiet = bits >> 16 | 0x40;
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & ~SIGN) > INFINITY_F32 ? quiet : rounded);
}

INLINE void widen(int source, const uint8_t *slab, uint32_t *wide, int n) {
    uint16_t narrow[CHUNK];
    if (source == F32) {
        memcpy(wide, slab, 4 * (size_t)n);
        return;
    }
    memcpy(narrow, slab, 2 * (size_t)n);
    if (source == BF16)
        for (int i = 0; i < n; i++) wide[i] = (uint32_t)narrow[i] << 16;
    else
        for (int i = 0; i < n; i++) wide[i] = f16_to_f32(narrow[i]);
}

INLINE void narrow(int target, const uint32_t *wide, uint8_t *out, int n) {
    uint16_t halves[CHUNK];
    if (target == F32) {
        memcpy(out, wide, 4 * (size_t)n);
        return;
    }
    if (target == BF16)
        for (int i = 0; i < n; i++) halves[i] = f32_to_bf16(wide[i]);
    else
        for (int i = 0; i < n; i++) halves[i] = f32_to_f16(wide[i]);
    memcpy(out, halves, 2 * (size_t)n);
}

/* Blocks of a scale, amax / 127 as F16, and 32 numbers round(x / scale) as int8, computed as in ggml-quants.c. */
INLINE void quantize_q8_0(const uint32_t *wide, uint8_t *out, int n) {
    for (; n > 0; n -= QK, wide += QK, out += QK_NBYTES) {
        int32_t amax = 0;
        for (int i = 0; i < QK; i++) {
            int32_t magnitude = (int32_t)(wide[i] & ~SIGN);
            amax = magnitude > amax ? magnitude : amax;
        }
        float scale = as_float((uint32_t)amax) / 127.0f;
        float inverse = scale > 0x1p-128f ? 1.0f / scale : 0.0f; /* would overflow for 2^-128 and less */
        uint16_t scale_f16 = f32_to_f16(as_bits(scale));
        int8_t quants[QK];
        for (int i = 0; i < QK; i++) {
            float product = as_float(wide[i]) * inverse;
            /* Round half away from zero: see reference.py. */
            float half = as_float((as_bits(product) & SIGN) | HALF_DOWN);
            quants[i] = (int8_t)(int32_t)(product + half);
        }
        memcpy(out, &scale_f16, 2);
        memcpy(out + 2, quants, QK);
    }
}

/* The largest finite magnitude; others are counted. */
INLINE uint32_t survey(const uint32_t *wide, int n, result_t *result) {
    int32_t largest = 0;
    for (int i = 0; i < n; i++) {
        int32_t magnitude = (int32_t)(wide[i] & ~SIGN);
        largest = magnitude > largest ? magnitude : largest;
    }
    if ((uint32_t)largest < INFINITY_F32) return (uint32_t)largest;
    largest = 0;
    for (int i = 0; i < n; i++) {
        uint32_t magnitude = wide[i] & ~SIGN;
        result->n_nan += magnitude > INFINITY_F32;
        result->n_inf += magnitude == INFINITY_F32;
        if (magnitude < INFINITY_F32 && (int32_t)magnitude > largest) largest = (int32_t)magnitude;
    }
    return (uint32_t)largest;
}

INLINE result_t convert(int source, int target, const uint8_t *slab, uint8_t *out, Py_ssize_t n_elements) {
    uint32_t wide[CHUNK];
    result_t result = {0, 0, 1};
    int width = source == F32 ? 4 : 2;
    for (Py_ssize_t start = 0; start < n_elements; start += CHUNK) {
        int n = (int)(n_elements - start < CHUNK ? n_elements - start : CHUNK);
        widen(source, slab + start * width, wide, n);
        uint32_t largest = survey(wide, n, &result);
        if (target == Q8_0) {
            result.fits = largest < TOO_LARGE_Q8_0 && result.n_nan + result.n_inf == 0;
            if (!result.fits) return result;
            quantize_q8_0(wide, out + start / QK * QK_NBYTES, n);
        } else {
            result.fits = largest < (target == F16 ? TOO_LARGE_F16 : target == BF16 ? TOO_LARGE_BF16 : INFINITY_F32);
            if (!result.fits) return result;
            narrow(target, wide, out + start * (target == F32 ? 4 : 2), n);
        }
    }
    return result;
}

/* How many numbers of `n` halves, or F32 patterns, are not finite, added to `result`. */
INLINE void count(int type, const uint8_t *data, int n, result_t *result) {
    if (type == F32) {
        uint32_t wide[CHUNK];
        memcpy(wide, data, 4 * (size_t)n);
        survey(wide, n, result);
        return;
    }
    int16_t magnitudes[CHUNK], largest = 0, infinity = type == F16 ? INFINITY_F16 : INFINITY_F32 >> 16;
    memcpy(magnitudes, data, 2 * (size_t)n);
    for (int i = 0; i < n; i++) {
        magnitudes[i] &= 0x7fff;
        largest = magnitudes[i] > largest ? magnitudes[i] : largest;
    }
    for (int i = 0; largest >= infinity && i < n; i++) {
        result->n_nan += magnitudes[i] > infinity;
        result->n_inf += magnitudes[i] == infinity;
    }
}

/* A type that stays the same: copies unless slab and out are the same memory, and counts in the copy while it is in the
   core's cache. Copying COPIED bytes at a time takes 0.6 of the time for whole chunks (benchmarks/LOG.md). */
INLINE result_t keep(int type, const uint8_t *slab, uint8_t *out, Py_ssize_t n_elements) {
    result_t result = {0, 0, 1};
    int width = type == F32 ? 4 : 2;
    Py_ssize_t nbytes = n_elements * width;
    for (Py_ssize_t first = 0; first < nbytes; first += COPIED) {
        Py_ssize_t end = nbytes - first < COPIED ? nbytes : first + COPIED;
        if (slab != out) memcpy(out + first, slab + first, (size_t)(end - first));
        for (Py_ssize_t at = first; at < end; at += CHUNK * width) {
            int n = (int)(end - at < CHUNK * width ? end - at : CHUNK * width) / width;
            count(type, out + at, n, &result);
        }
    }
    return result;
}

#define CONVERT(SOURCE, TARGET)                                                                                        \
    CLONED static result_t convert_##SOURCE##_##TARGET(const uint8_t *slab, uint8_t *out, Py_ssize_t n) {              \
        return convert(SOURCE, TARGET, slab, out, n);                                                                  \
    }
#define KEEP(TYPE)                                                                                                     \
    CLONED static result_t convert_##TYPE##_##TYPE(const uint8_t *slab, uint8_t *out, Py_ssize_t n) {                  \
        return keep(TYPE, slab, out, n);                                                                               \
    }

KEEP(F32) CONVERT(F32, F16) CONVERT(F32, BF16) CONVERT(F32, Q8_0)
KEEP(F16) CONVERT(F16, F32) CONVERT(F16, BF16) CONVERT(F16, Q8_0)
KEEP(BF16) CONVERT(BF16, F32) CONVERT(BF16, F16) CONVERT(BF16, Q8_0)

typedef struct {
    int source, target;
    result_t (*run)(const uint8_t *slab, uint8_t *out, Py_ssize_t n_elements);
} kernel_t;

#define KERNEL(SOURCE, TARGET) {SOURCE, TARGET, convert_##SOURCE##_##TARGET}

static const kernel_t KERNELS[] = {
    KERNEL(F32, F32),  KERNEL(F32, F16),  KERNEL(F32, BF16),  KERNEL(F32, Q8_0),
    KERNEL(F16, F32),  KERNEL(F16, F16),  KERNEL(F16, BF16),  KERNEL(F16, Q8_0),
    KERNEL(BF16, F32), KERNEL(BF16, F16), KERNEL(BF16, BF16), KERNEL(BF16, Q8_0),
};

static const kernel_t *find_kernel(int source, int target) {
    for (size_t i = 0; i < sizeof KERNELS / sizeof *KERNELS; i++)
        if (KERNELS[i].source == source && KERNELS[i].target == target) return &KERNELS[i];
    PyErr_Format(PyExc_ValueError, "no kernel from type %d to type %d", source, target);
    return NULL;
}

/* How many elements both buffers hold, or -1 with an exception. */
static Py_ssize_t count_elements(const kernel_t *kernel, Py_ssize_t slab_nbytes, Py_ssize_t out_nbytes) {
    Py_ssize_t width = kernel->source == F32 ? 4 : 2, n = slab_nbytes / width;
    Py_ssize_t block = kernel->target == Q8_0 ? QK : 1;
    Py_ssize_t block_nbytes = kernel->target == Q8_0 ? QK_NBYTES : kernel->target == F32 ? 4 : 2;
    if (slab_nbytes % width == 0 && n % block == 0 && n / block * block_nbytes == out_nbytes) return n;
    PyErr_Format(PyExc_ValueError, "%zd bytes do not make %zd bytes", slab_nbytes, out_nbytes);
    return -1;
}

static PyObject *encode(PyObject *module, PyObject *args) {
    int source, target;
    Py_buffer slab, out;
    PyObject *answer = NULL;
    (void)module;
    if (!PyArg_ParseTuple(args, "iiy*w*:encode", &source, &target, &slab, &out)) return NULL;
    const kernel_t *kernel = find_kernel(source, target);
    Py_ssize_t n_elements = kernel == NULL ? -1 : count_elements(kernel, slab.len, out.len);
    if (n_elements >= 0) {
        result_t result;
        Py_BEGIN_ALLOW_THREADS
        result = kernel->run(slab.buf, out.buf, n_elements);
        Py_END_ALLOW_THREADS
        answer = Py_BuildValue("nnO", result.n_nan, result.n_inf, result.fits ? Py_True : Py_False);
    }
    PyBuffer_Release(&slab);
    PyBuffer_Release(&out);
    return answer;
}

enum {
    N_SUMS = 8, /* vectors that are summed at a time: as many as fit in registers next to a factor */
    N_COLUMNS = N_SUMS * (int)(sizeof(vector_t) / sizeof(float)),
    MAX_PANEL = 64, /* rows of `right` copied next to each other; a power of two apart, they compete for cache sets */
};

/* One row of N_COLUMNS columns: products are summed from the first to the last, and every operation is rounded. */
INLINE void add_row(const float *left, const float *right, float scale, float *out, Py_ssize_t rank, Py_ssize_t stride) {
    const vector_t *from = (const vector_t *)right;
    vector_t sums[N_SUMS];
    for (int j = 0; j < N_SUMS; j++) sums[j] = left[0] * from[j];
    for (Py_ssize_t k = 1; k < rank; k++) {
        from = (const vector_t *)(right + k * stride);
        for (int j = 0; j < N_SUMS; j++) sums[j] += left[k] * from[j];
    }
    for (int j = 0; j < N_SUMS; j++) ((vector_t *)out)[j] += scale * sums[j];
}

CLONED static void add_product_to(const float *left, const float *right, float scale, float *out, Py_ssize_t n_rows,
                                  Py_ssize_t rank, Py_ssize_t n_columns) {
    float panel[MAX_PANEL * N_COLUMNS];
    Py_ssize_t start = 0;
    for (; start + N_COLUMNS <= n_columns; start += N_COLUMNS) {
        const float *from = right + start;
        Py_ssize_t stride = n_columns;
        if (rank <= MAX_PANEL) {
            for (Py_ssize_t k = 0; k < rank; k++) memcpy(panel + k * N_COLUMNS, from + k * n_columns, N_COLUMNS * 4);
            from = panel, stride = N_COLUMNS;
        }
        for (Py_ssize_t i = 0; i < n_rows; i++)
            add_row(left + i * rank, from, scale, out + i * n_columns + start, rank, stride);
    }
    for (Py_ssize_t i = 0; i < n_rows; i++)
        for (Py_ssize_t j = start; j < n_columns; j++) {
            float sum = left[i * rank] * right[j];
            for (Py_ssize_t k = 1; k < rank; k++) sum += left[i * rank + k] * right[k * n_columns + j];
            out[i * n_columns + j] += scale * sum;
        }
}

static PyObject *add_product(PyObject *module, PyObject *args) {
    Py_buffer left, right, out;
    Py_ssize_t rank;
    float scale;
    PyObject *answer = NULL;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*y*nfw*:add_product", &left, &right, &rank, &scale, &out)) return NULL;
    Py_ssize_t unit = rank > 0 ? rank * (Py_ssize_t)sizeof(float) : 1;
    Py_ssize_t n_rows = left.len / unit, n_columns = right.len / unit;
    if (rank > 0 && left.len % unit == 0 && right.len % unit == 0 &&
        out.len == n_rows * n_columns * (Py_ssize_t)sizeof(float)) {
        Py_BEGIN_ALLOW_THREADS
        add_product_to(left.buf, right.buf, scale, out.buf, n_rows, rank, n_columns);
        Py_END_ALLOW_THREADS
        answer = Py_NewRef(Py_None);
    } else {
        PyErr_Format(PyExc_ValueError, "%zd and %zd bytes of rank %zd do not make %zd", left.len, right.len, rank,
                     out.len);
    }
    PyBuffer_Release(&left);
    PyBuffer_Release(&right);
    PyBuffer_Release(&out);
    return answer;
}

static PyMethodDef METHODS[] = {
    {"encode", encode, METH_VARARGS,
     "encode(source, target, slab, out, /)\n--\n\n(NaNs, infinities, whether all fits), as streamconv.kernels.encode."},
    {"add_product", add_product, METH_VARARGS,
     "add_product(left, right, rank, scale, out, /)\n--\n\nAs streamconv.kernels.add_product."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot SLOTS[] = {{0, NULL}};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    .m_name = "streamconv.ggml._kernels",
    .m_doc = "The compiled kernels of streamconv.codecs.",
    .m_methods = METHODS,
    .m_slots = SLOTS,
};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModuleDef_Init(&MODULE); }
