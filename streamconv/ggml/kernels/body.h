/* All searches at one vector width: included once per build, with VECTOR_NBYTES and QUANTISE (the name) defined. */
#include "blocks.h"
#include "vectors.h"

#include "search_affine.h"
#include "search_symmetric.h"

#include "iq4.h"
#include "k_quants.h"
#include "legacy.h"
#include "ternary.h"

/* Makes the blocks of a piece. `w` are its weights, NULL without an importance matrix. Both have PIECE numbers, which
   are zeros after the last block. */
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
    case 34: return tq1_0;
    case 35: return tq2_0;
    default: return iq4_xs;
    }
}

/* n elements from `start` on as F32; n is at most PIECE. */
INLINE void widen(const request_t *request, int64_t start, int n, float *x) {
    uint16_t narrow[PIECE];
    uint32_t wide[PIECE];
    if (request->source == F32) {
        memcpy(x, request->rows + 4 * start, 4 * (size_t)n);
        return;
    }
    memcpy(narrow, request->rows + 2 * start, 2 * (size_t)n);
    if (request->source == F16) {
        for (int i = 0; i < n; i++) x[i] = f16_value(narrow[i]);
        return;
    }
    for (int i = 0; i < n; i++) wide[i] = (uint32_t)narrow[i] << 16;
    memcpy(x, wide, 4 * (size_t)n);
}

enum { INFINITE = 0x7f800000 };

/* The index of the first element with a magnitude of at least `least` (as bits), or -1; n is a multiple of 32. */
INLINE int first_beyond(const float *x, int n, int32_t least) {
    ints_t beyond = splat_int(0);
    for (int i = 0; i < n; i += LANES) beyond |= ((ints_t)load(x + i) & 0x7fffffff) >= least;
    if (!any(beyond)) return -1;
    int i = 0;
    while ((int32_t)(bits_of_float(x[i]) & 0x7fffffff) < least) i++;
    return i;
}

/* Whether a sum of a block's weighted elements can overflow. Weights are not negative, and n is a multiple of 32. */
INLINE int is_overweight(const float *x, const float *w, int n) {
    floats_t largest = splat(1), most = splat(0);
    for (int i = 0; i < n; i += LANES) {
        largest = greater(magnitude(load(x + i)), largest);
        most = greater(load(w + i), most);
    }
    return !(largest_of_all(largest)[0] * largest_of_all(most)[0] <= MOST_WEIGHT);
}

enum { N_ROWS = 8 }; /* summed at the same time, since each addition of a sum in order waits for the one before it */

/* The mean of squares of up to N_ROWS rows from `first_row` on, each added from its first element to its last. */
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

/* The sums of squares of N_SUPER runs of n elements, each added from its first element to its last. */
INLINE void sum_squares(const float *x, int n, float *sums) {
    float total[N_SUPER] = {0};
    for (int i = 0; i < n; i++)
        UNROLL for (int j = 0; j < N_SUPER; j++) total[j] += x[j * n + i] * x[j * n + i];
    memcpy(sums, total, sizeof total);
}

/* importance * sqrt(mean + x * x) of n elements. */
INLINE void weigh_run(const float *x, const float *importance, float mean, int n, float *w) {
    for (int i = 0; i < n; i += LANES) {
        floats_t at = load(x + i);
        store(w + i, load(importance + i) * square_root(mean + at * at));
    }
}

/* Weights of the n elements of a piece that starts at `start`. */
INLINE void weigh(const request_t *request, const float *x, int64_t start, int n, float *w, float *means, int64_t *n_means) {
    const block_type_t *type = request->type;
    const int block = type->root == ROOT_ROW ? LEGACY : type->n_elements;
    float sums[PIECE / LEGACY];
    if (type->root == ROOT_BLOCK)
        for (int first = 0; first < PIECE / block; first += N_SUPER) sum_squares(x + first * block, block, sums + first);
    for (int first = 0; first < n; first += block) {
        const int64_t row = (start + first) / request->n_per_row, column = (start + first) % request->n_per_row;
        const float *importance = request->importance + column;
        if (type->root == ROOT_NONE) {
            memcpy(w + first, importance, (size_t)block * sizeof *w);
        } else if (type->root == ROOT_BLOCK) {
            weigh_run(x + first, importance, type->root_factor * sums[first / block] / (float)block, block, w + first);
        } else {
            if (row >= *n_means) { /* rows come in order */
                int64_t n_rows = request->n_elements / request->n_per_row - row;
                row_means(request, row, n_rows < N_ROWS ? (int)n_rows : N_ROWS, means);
                *n_means = row + N_ROWS;
            }
            weigh_run(x + first, importance, means[row % N_ROWS], LEGACY, w + first);
        }
    }
}

outcome_t QUANTISE(const request_t *request) {
    const block_type_t *type = request->type;
    const quantiser_t quantiser = quantiser_of(type->type);
    outcome_t outcome = {ALL_FITS, 0};
    const int32_t least = (int32_t)bits_of_float(LEAST_BEYOND_F16 * type->levels);
    float x[PIECE], w[PIECE], means[N_ROWS];
    int64_t n_means = 0;
    uint8_t *out = request->out;
    for (int64_t start = 0; start < request->n_elements; start += PIECE) {
        int n = request->n_elements - start < PIECE ? (int)(request->n_elements - start) : PIECE;
        int n_blocks = n / type->n_elements;
        widen(request, start, n, x);
        int beyond = first_beyond(x, n, least), place = beyond < 0 ? -1 : first_beyond(x, n, INFINITE);
        if (place >= 0) return (outcome_t){NOT_FINITE, start + place};
        memset(x + n, 0, (size_t)(PIECE - n) * sizeof *x);
        if (request->importance != NULL) {
            weigh(request, x, start, n, w, means, &n_means);
            memset(w + n, 0, (size_t)(PIECE - n) * sizeof *w);
        }
        quantiser(x, request->importance != NULL ? w : NULL, n_blocks, out);
        for (int block = 0; block < n_blocks && outcome.status == ALL_FITS; block++) {
            const int first = block * type->n_elements;
            int fits = beyond < 0 || beyond >= first + type->n_elements;
            for (int i = 0; i < type->n_scales; i++)
                fits &= (load_f16(out + block * type->nbytes + type->scale_at + 2 * i) & 0x7c00) != 0x7c00;
            if (!fits)
                outcome = (outcome_t){BEYOND_F16, start + first};
            else if (request->importance != NULL && is_overweight(x + first, w + first, type->n_elements))
                outcome = (outcome_t){OVERWEIGHT, start + first};
        }
        out += (size_t)n_blocks * (size_t)type->nbytes;
    }
    return outcome;
}
