/* All searches at one vector width: included once per build, with VECTOR_NBYTES and QUANTISE (the name) defined. */
#include "blocks.h"
#include "vectors.h"

#include "search_affine.h"
#include "search_symmetric.h"

#include "iq4.h"
#include "k_quants.h"
#include "legacy.h"

/* Makes blocks of a piece: `w` are its weights, NULL without an importance matrix. Both are PIECE numbers, zeros after
   the last block. */
typedef void (*quantiser_t)(const float *x, const float *w, int n_blocks, uint8_t *out);

static quantiser_t quantiser_of(int type) {
    switch (type) {
    case 2: return q4_0;
    case 3: return q4_1;
    case 6: return q5_0;
    case 7: return q5_1;
    case 10: return q2_k;
    case 11: return q3_k;
    case 12: return q4_k;
    case 13: return q5_k;
    case 14: return q6_k;
    case 20: return iq4_nl;
    default: return iq4_xs;
    }
}

/* n elements from `start` on as F32. */
INLINE void widen(const request_t *request, int64_t start, int n, float *x) {
    uint16_t narrow[SUPER];
    uint32_t *bits = (uint32_t *)(void *)x;
    if (request->source == F32) {
        memcpy(x, request->rows + 4 * start, 4 * (size_t)n);
        return;
    }
    for (int first = 0; first < n; first += SUPER) {
        int count = n - first < SUPER ? n - first : SUPER;
        memcpy(narrow, request->rows + 2 * (start + first), 2 * (size_t)count);
        if (request->source == BF16)
            for (int i = 0; i < count; i++) {
                uint32_t wide = (uint32_t)narrow[i] << 16;
                memcpy(bits + first + i, &wide, 4);
            }
        else
            for (int i = 0; i < count; i++) x[first + i] = f16_value(narrow[i]);
    }
}

/* The place of the first element that is not finite, or -1. */
INLINE int first_not_finite(const float *x, int n) {
    int32_t largest = 0;
    for (int i = 0; i < n; i++) {
        int32_t bits = (int32_t)(bits_of_float(x[i]) & 0x7fffffff);
        largest = bits > largest ? bits : largest;
    }
    if (largest < 0x7f800000) return -1;
    int i = 0;
    while ((bits_of_float(x[i]) & 0x7fffffff) < 0x7f800000) i++;
    return i;
}

enum { N_ROWS = 8 }; /* whose squares are summed at a time: a sum in order waits for each addition */

/* The mean of squares of up to N_ROWS rows from `first_row` on, each summed from its first element to its last. */
INLINE void row_means(const request_t *request, int64_t first_row, int n_rows, float *means) {
    float x[N_ROWS][SUPER], sums[N_ROWS] = {0};
    memset(x, 0, sizeof x);
    for (int64_t start = 0; start < request->n_per_row; start += SUPER) {
        int n = request->n_per_row - start < SUPER ? (int)(request->n_per_row - start) : SUPER;
        for (int row = 0; row < n_rows; row++) widen(request, (first_row + row) * request->n_per_row + start, n, x[row]);
        for (int i = 0; i < n; i++)
            for (int row = 0; row < N_ROWS; row++) sums[row] += x[row][i] * x[row][i];
    }
    for (int row = 0; row < n_rows; row++) means[row] = sums[row] / (float)request->n_per_row;
}

/* Weights of a piece: the importance times sqrt(mean square + x * x), or the importance itself. */
INLINE void weigh(const request_t *request, const float *x, int64_t start, int n, float *w, float *means, int64_t *n_means) {
    const int root = request->type->root, block = root == ROOT_BLOCK ? request->type->n_elements : LEGACY;
    float sums[PIECE / LEGACY];
    if (root == ROOT_BLOCK) {
        memset(sums, 0, sizeof sums);
        for (int first = 0; first < PIECE / block; first += N_SUPER)
            for (int i = 0; i < block; i++)
                for (int j = 0; j < N_SUPER; j++) {
                    float at = x[(first + j) * block + i];
                    sums[first + j] += at * at;
                }
    }
    for (int first = 0; first < n; first += block) {
        const int64_t row = (start + first) / request->n_per_row, column = (start + first) % request->n_per_row;
        const float *importance = request->importance + column;
        int count = n - first < block ? n - first : block;
        float mean = 0;
        if (root == ROOT_NONE) {
            memcpy(w + first, importance, (size_t)count * sizeof *w);
            continue;
        }
        if (root == ROOT_ROW) {
            if (row >= *n_means) { /* rows come in order */
                int64_t n_rows = request->n_elements / request->n_per_row - row;
                row_means(request, row, n_rows < N_ROWS ? (int)n_rows : N_ROWS, means);
                *n_means = row + N_ROWS;
            }
            mean = means[row % N_ROWS];
        } else {
            mean = request->type->root_factor * sums[first / block] / (float)block;
        }
        for (int i = 0; i < count; i++)
            w[first + i] = importance[i] * __builtin_sqrtf(mean + x[first + i] * x[first + i]);
    }
}

outcome_t QUANTISE(const request_t *request) {
    const block_type_t *type = request->type;
    const quantiser_t quantiser = quantiser_of(type->type);
    outcome_t outcome = {ALL_FITS, 0};
    float x[PIECE], w[PIECE], means[N_ROWS];
    int64_t n_means = 0;
    uint8_t *out = request->out;
    for (int64_t start = 0; start < request->n_elements; start += PIECE) {
        int n = request->n_elements - start < PIECE ? (int)(request->n_elements - start) : PIECE;
        int n_blocks = n / type->n_elements;
        widen(request, start, n, x);
        int place = first_not_finite(x, n);
        if (place >= 0) return (outcome_t){NOT_FINITE, start + place};
        memset(x + n, 0, (size_t)(PIECE - n) * sizeof *x);
        if (request->importance != NULL) {
            weigh(request, x, start, n, w, means, &n_means);
            memset(w + n, 0, (size_t)(PIECE - n) * sizeof *w);
        }
        quantiser(x, request->importance != NULL ? w : NULL, n_blocks, out);
        for (int block = 0; block < n_blocks; block++, out += type->nbytes)
            for (int i = 0; i < type->n_scales; i++)
                if ((load_f16(out + type->scale_at + 2 * i) & 0x7c00) == 0x7c00 && outcome.status == ALL_FITS)
                    outcome = (outcome_t){BEYOND_F16, start + (int64_t)block * type->n_elements};
    }
    return outcome;
}
