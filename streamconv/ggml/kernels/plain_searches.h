/* ggml's searches for the scales of block types in plain C, for verification: the counterpart of block_searches.py.
 *
 * Nothing is shared with the fast kernels, not even their methods: there are no vector types, no rounding that is valid
 * only for ordinary numbers, and no skipped steps. An array [n][LANES] holds one sub-block per column, as in numpy, so
 * that sums over a sub-block go from its first element to its last, and columns do not wait for each other.
 * Functions have the names of ggml's (ggml/src/ggml-quants.c) without `make_` and `_quants`.
 */
#include <math.h>

#include "halves.h"

enum { LANES = 8 };
typedef float floats_t[LANES];
typedef int32_t ints_t[LANES];

#define EACH_LANE for (int k = 0; k < LANES; k++)
#define LEAST_MAGNITUDE 1e-15f /* ggml's GROUP_MAX_EPS: smaller magnitudes count as zero */

/* ggml's nearest_int, with the same results for infinities, NaNs and numbers beyond 2^22. */
INLINE int32_t nearest(float value) { return (int32_t)(bits_of_float(value + 12582912.0f) & 0x7fffff) - 0x400000; }

INLINE int32_t clip(int32_t value, int32_t low, int32_t high) {
    value = value > low ? value : low;
    return value < high ? value : high;
}

INLINE void fill(floats_t to, float value) { EACH_LANE to[k] = value; }

INLINE void choose(const ints_t condition, const floats_t yes, floats_t kept) {
    EACH_LANE kept[k] = condition[k] ? yes[k] : kept[k];
}

/* The element with the largest magnitude of each column (the first of several); +0 if all are zeros or NaNs. */
INLINE void first_largest(int n, const floats_t *x, floats_t top) {
    fill(top, 0);
    for (int i = 0; i < n; i++) EACH_LANE top[k] = fabsf(x[i][k]) > fabsf(top[k]) ? x[i][k] : top[k];
}

/* The parameters of `qkx`: step i tries a range of n_max + first + step * i. */
typedef struct {
    int n_max;
    float first, step;
    int n_steps, absolute, weighted;
} affine_t;

INLINE void qkx_error(int n, const floats_t *x, const floats_t *w, const ints_t *quants, const floats_t scale,
                      const floats_t low, affine_t how, floats_t error) {
    fill(error, 0);
    for (int i = 0; i < n; i++)
        EACH_LANE {
            float d = (scale[k] * (float)quants[i][k] + low[k]) - x[i][k];
            error[k] += w[i][k] * (how.absolute ? fabsf(d) : d * d);
        }
}

/* Scales, minima (negated, as in ggml) and quants: make_qkx2_quants, or make_qkx3_quants with an importance matrix
   (how.weighted). */
INLINE void qkx(int n, const floats_t *x, const floats_t *w, affine_t how, floats_t scale, floats_t minimum,
                ints_t *quants) {
    const float n_max = (float)how.n_max;
    floats_t high, low, sum_w, sum_x, best;
    ints_t flat, found[32];
    fill(sum_w, 0);
    fill(sum_x, 0);
    EACH_LANE high[k] = low[k] = x[0][k];
    for (int i = 0; i < n; i++)
        EACH_LANE {
            high[k] = x[i][k] > high[k] ? x[i][k] : high[k];
            low[k] = x[i][k] < low[k] ? x[i][k] : low[k];
            sum_w[k] += w[i][k];
            sum_x[k] += w[i][k] * x[i][k];
        }
    EACH_LANE {
        low[k] = low[k] > 0 ? 0 : low[k];
        flat[k] = high[k] <= low[k];
    }
    floats_t inverse;
    EACH_LANE {
        inverse[k] = n_max / (high[k] - low[k]);
        scale[k] = 1 / inverse[k];
    }
    for (int i = 0; i < n; i++) EACH_LANE quants[i][k] = clip(nearest(inverse[k] * (x[i][k] - low[k])), 0, how.n_max);
    qkx_error(n, x, w, (const ints_t *)quants, scale, low, how, best);
    for (int step = 0; step <= how.n_steps; step++) {
        floats_t sum_l, sum_l2, sum_xl, new_scale, new_low, error;
        ints_t accepted;
        fill(sum_l, 0);
        fill(sum_l2, 0);
        fill(sum_xl, 0);
        EACH_LANE inverse[k] = ((how.first + how.step * (float)step) + n_max) / (high[k] - low[k]);
        for (int i = 0; i < n; i++)
            EACH_LANE {
                float f = inverse[k] * (x[i][k] - low[k]);
                int32_t l = how.weighted ? nearest(f < n_max ? f : n_max) : clip(nearest(f), 0, how.n_max);
                if (how.weighted) l = f > 0 ? l : 0;
                float wl = w[i][k] * (float)l;
                found[i][k] = l;
                sum_l[k] += wl;
                sum_l2[k] += wl * (float)l;
                sum_xl[k] += wl * x[i][k];
            }
        EACH_LANE {
            float determinant = sum_w[k] * sum_l2[k] - sum_l[k] * sum_l[k];
            float a = (sum_w[k] * sum_xl[k] - sum_x[k] * sum_l[k]) / determinant;
            float b = (sum_l2[k] * sum_x[k] - sum_l[k] * sum_xl[k]) / determinant;
            new_scale[k] = b > 0 ? sum_xl[k] / sum_l2[k] : a;
            new_low[k] = b > 0 ? 0 : b;
            accepted[k] = determinant > 0 && !flat[k];
        }
        qkx_error(n, x, w, (const ints_t *)found, new_scale, new_low, how, error);
        EACH_LANE accepted[k] = accepted[k] && error[k] < best[k];
        choose(accepted, error, best);
        choose(accepted, new_scale, scale);
        choose(accepted, new_low, low);
        for (int i = 0; i < n; i++) EACH_LANE quants[i][k] = accepted[k] ? found[i][k] : quants[i][k];
    }
    EACH_LANE {
        scale[k] = flat[k] ? 0 : scale[k];
        minimum[k] = -low[k];
    }
    for (int i = 0; i < n; i++) EACH_LANE quants[i][k] = flat[k] ? 0 : quants[i][k];
}

/* Scales and quants from 0 to 2 * n_max - 1: make_qx_quants with rmse_type 1. */
INLINE void qx(int n, const floats_t *x, const floats_t *w, int n_max, floats_t scale, ints_t *quants) {
    floats_t top, best, inverse;
    first_largest(n, x, top);
    fill(scale, 0);
    fill(best, 0);
    fill(inverse, 0);
    for (int step = 0; step <= 18; step++) { /* without an offset; then -9 to 9 without 0 */
        const int offset = step == 0 ? 0 : step <= 9 ? step - 10 : step - 9;
        floats_t is, a, b;
        fill(a, 0);
        fill(b, 0);
        EACH_LANE is[k] = -((float)n_max + 0.1f * (float)offset) / top[k];
        for (int i = 0; i < n; i++)
            EACH_LANE {
                float l = (float)clip(nearest(is[k] * x[i][k]), -n_max, n_max - 1);
                a[k] += (w[i][k] * x[i][k]) * l;
                b[k] += (w[i][k] * l) * l;
            }
        EACH_LANE {
            float ratio = step == 0 && b[k] == 0 ? 0 : a[k] / b[k];
            int accepted = step == 0 || (b[k] > 0 && a[k] * a[k] > best[k] * b[k]);
            scale[k] = accepted ? ratio : scale[k];
            best[k] = accepted ? ratio * a[k] : best[k];
            inverse[k] = accepted ? is[k] : inverse[k];
        }
    }
    for (int i = 0; i < n; i++)
        EACH_LANE {
            int zero = fabsf(top[k]) < LEAST_MAGNITUDE;
            quants[i][k] = zero ? 0 : n_max + clip(nearest(inverse[k] * x[i][k]), -n_max, n_max - 1);
        }
    EACH_LANE scale[k] = fabsf(top[k]) < LEAST_MAGNITUDE ? 0 : scale[k];
}

/* Scales and quants from 0 to 7: make_q3_quants, each quant improved in turn. */
INLINE void q3(int n, const floats_t *x, floats_t scale, ints_t *quants) {
    floats_t top, w[16], wx[16], level[16], sum_xl, sum_l2;
    first_largest(n, x, top);
    fill(sum_xl, 0);
    fill(sum_l2, 0);
    for (int i = 0; i < n; i++)
        EACH_LANE {
            float l = (float)clip(nearest(-4.0f / top[k] * x[i][k]), -4, 3);
            level[i][k] = l;
            w[i][k] = x[i][k] * x[i][k];
            wx[i][k] = w[i][k] * x[i][k];
            sum_xl[k] += wx[i][k] * l;
            sum_l2[k] += (w[i][k] * l) * l;
        }
    for (int pass = 0; pass < 5; pass++) {
        int changed = 0;
        for (int i = 0; i < n; i++)
            EACH_LANE {
                float l = level[i][k];
                float without_xl = sum_xl[k] - wx[i][k] * l, without_l2 = sum_l2[k] - (w[i][k] * l) * l;
                float found = (float)clip(nearest((x[i][k] * without_l2) / without_xl), -4, 3);
                float new_xl = without_xl + wx[i][k] * found, new_l2 = without_l2 + (w[i][k] * found) * found;
                int accepted = without_xl > 0 && found != l && new_l2 > 0 &&
                               (new_xl * new_xl) * sum_l2[k] > (sum_xl[k] * sum_xl[k]) * new_l2;
                level[i][k] = accepted ? found : l;
                sum_xl[k] = accepted ? new_xl : sum_xl[k];
                sum_l2[k] = accepted ? new_l2 : sum_l2[k];
                changed |= accepted;
            }
        if (!changed) break;
    }
    EACH_LANE {
        int zero = fabsf(top[k]) < LEAST_MAGNITUDE;
        scale[k] = zero || !(sum_l2[k] > 0) ? 0 : sum_xl[k] / sum_l2[k];
        for (int i = 0; i < n; i++) quants[i][k] = zero ? 0 : (int32_t)level[i][k] + 4;
    }
}

/* The scale and the quants of n numbers; quants are bytes, so negative ones wrap around: make_qp_quants. */
INLINE float qp(int n, const float *x, const float *w, int n_max, int32_t *quants) {
    float top = 0, best = 0, inverse = 0, sum_xl = 0, sum_l2 = 0;
    for (int i = 0; i < n; i++) top = top > x[i] ? top : x[i];
    for (int step = -5; step <= 4; step++) { /* without an offset; then -4 to 4 without 0 */
        if (step == 0) continue;
        float is = step == -5 ? (float)n_max / top : (0.1f * (float)step + (float)n_max) / top, error = 0;
        for (int i = 0; i < n; i++) {
            int32_t l = nearest(is * x[i]);
            l = step == -5 ? l & 255 : l < n_max ? l : n_max;
            float d = x[i] - (1 / is) * (float)l;
            error += (w[i] * d) * d;
        }
        if (step == -5 || error < best) {
            best = error;
            inverse = is;
        }
    }
    for (int i = 0; i < n; i++) {
        int32_t l = nearest(inverse * x[i]);
        l = l < n_max ? l : n_max;
        sum_xl += (w[i] * x[i]) * (float)l;
        sum_l2 += (w[i] * (float)l) * (float)l;
        quants[i] = l & 255;
    }
    for (int pass = 0, changed = 1; pass < 5 && changed; pass++) {
        changed = 0;
        for (int i = 0; i < n; i++) {
            float l = (float)quants[i], wx = w[i] * x[i];
            float without_xl = sum_xl - wx * l, without_l2 = sum_l2 - (w[i] * l) * l;
            int32_t found = nearest((x[i] * without_l2) / without_xl);
            found = found < n_max ? found : n_max;
            float level = (float)found;
            float new_xl = without_xl + wx * level, new_l2 = without_l2 + (w[i] * level) * level;
            if (without_xl > 0 && without_l2 > 0 && found != quants[i] &&
                (new_xl * new_xl) * sum_l2 > (sum_xl * sum_xl) * new_l2) {
                quants[i] = found & 255;
                sum_xl = new_xl;
                sum_l2 = new_l2;
                changed = 1;
            }
        }
    }
    if (top < LEAST_MAGNITUDE) memset(quants, 0, (size_t)n * sizeof *quants);
    return top < LEAST_MAGNITUDE || !(sum_l2 > 0) ? 0 : sum_xl / sum_l2;
}

enum { N_VALUES = 16 };
static const float IQ4[N_VALUES] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* The index of the nearest value; midpoints round up, and a NaN gives the last index. */
INLINE int32_t iq4_place(float f) {
    int32_t place = N_VALUES - 1;
    for (int v = 0; v < N_VALUES - 1; v++) place -= f < (IQ4[v] + IQ4[v + 1]) / 2;
    return place;
}

/* Scales: the first half of quantize_row_iq4_nl_impl. */
INLINE void iq4(const floats_t *x, const floats_t *w, floats_t scale) {
    floats_t top, best;
    first_largest(32, x, top);
    fill(scale, 0);
    fill(best, 0);
    for (int step = -8; step <= 7; step++) { /* the plain scale, then -7 to 7 */
        floats_t is, a, b;
        fill(a, 0);
        fill(b, 0);
        EACH_LANE is[k] = step == -8 ? 1 / (top[k] / -IQ4[0]) : ((float)step + IQ4[0]) / top[k];
        for (int i = 0; i < 32; i++) {
            floats_t q;
            fill(q, IQ4[N_VALUES - 1]);
            for (int v = 0; v < N_VALUES - 1; v++)
                EACH_LANE q[k] -= is[k] * x[i][k] < (IQ4[v] + IQ4[v + 1]) / 2 ? IQ4[v + 1] - IQ4[v] : 0;
            EACH_LANE {
                a[k] += (w[i][k] * q[k]) * x[i][k];
                b[k] += (w[i][k] * q[k]) * q[k];
            }
        }
        EACH_LANE {
            int accepted = b[k] > 0 && (step == -8 || a[k] * a[k] > best[k] * b[k]);
            scale[k] = accepted ? a[k] / b[k] : scale[k];
            best[k] = accepted ? scale[k] * a[k] : best[k];
        }
    }
    EACH_LANE scale[k] = fabsf(top[k]) < LEAST_MAGNITUDE ? 0 : scale[k];
}
