/* The searches for a scale without a minimum (ggml's make_qx_quants, make_q3_quants, make_qp_quants). */

#define LEAST_MAGNITUDE 1e-15f /* smaller magnitudes count as zero */

/* For each lane: the scale, the inverse from which quants are computed, and whether all elements count as zero. */
typedef struct {
    float scale[GROUP], inverse[GROUP];
    int32_t is_zero[GROUP];
} symmetric_fit_t;

/* Quants of elements of one lane's sub-block after a search, from 0 to 2 * n_max - 1. */
INLINE ints_t symmetric_levels(const symmetric_fit_t *fit, int lane, const float *x, int n_max) {
    ints_t l = n_max + clamped_ints(nearest_ints(fit->inverse[lane] * load(x)), -n_max, n_max - 1);
    return l & ~fit->is_zero[lane];
}

/* For each lane, the element with the largest magnitude (the first of several) among n rows of n_lanes. */
INLINE floats_t first_largest(const float *x, int n, int n_lanes, floats_t *largest) {
    floats_t top = splat(0), amax = splat(0);
    for (int i = 0; i < n; i++) {
        floats_t at = load(x + i * n_lanes), size = magnitude(at);
        ints_t more = size > amax;
        amax = greater(size, amax);
        top = choose(more, at, top);
    }
    *largest = amax;
    return top;
}

/* n rows of GROUP lanes; the fast rounding is exact for all finite elements. */
INLINE void search_symmetric(const float *x, const float *w, int n, int n_max, symmetric_fit_t *fit) {
    const floats_t rounder = splat(ROUNDER_UNKNOWN);
    const floats_t bottom = rounder - (float)n_max, ceiling = rounder + (float)(n_max - 1);
    floats_t wx[32][PAIR];
    for (int p = 0; p < N_VECTORS; p += PAIR) {
        floats_t top[PAIR], inverse[PAIR], scale[PAIR], best[PAIR];
        ints_t zero[PAIR];
        UNROLL for (int v = 0; v < PAIR; v++) {
            floats_t amax;
            top[v] = first_largest(x + (p + v) * LANES, n, GROUP, &amax);
            zero[v] = amax < LEAST_MAGNITUDE;
            top[v] = choose(zero[v], splat(1), top[v]);
            scale[v] = best[v] = inverse[v] = splat(0);
        }
        for (int i = 0; i < n; i++)
            UNROLL for (int v = 0; v < PAIR; v++)
                wx[i][v] = load(w + i * GROUP + (p + v) * LANES) * load(x + i * GROUP + (p + v) * LANES);
        for (int step = 0; step <= 18; step++) {
            /* The first is without an offset; then -9 to 9 without 0. */
            int offset = step == 0 ? 0 : step <= 9 ? step - 10 : step - 9;
            float wide = -((float)n_max + 0.1f * (float)offset);
            floats_t is[PAIR], a[PAIR], b[PAIR];
            UNROLL for (int v = 0; v < PAIR; v++) {
                is[v] = wide / top[v];
                a[v] = b[v] = splat(0);
            }
            for (int i = 0; i < n; i++)
                UNROLL for (int v = 0; v < PAIR; v++) {
                    floats_t f = is[v] * load(x + i * GROUP + (p + v) * LANES);
                    floats_t l = lesser(greater(f + rounder, bottom), ceiling) - rounder;
                    a[v] += wx[i][v] * l;
                    b[v] += (load(w + i * GROUP + (p + v) * LANES) * l) * l;
                }
            UNROLL for (int v = 0; v < PAIR; v++) {
                ints_t accepted = step == 0 ? splat_int(-1) : (b[v] > 0) & (a[v] * a[v] > best[v] * b[v]);
                floats_t ratio = a[v] / b[v];
                if (step == 0) ratio = choose(b[v] != 0, ratio, splat(0));
                scale[v] = choose(accepted, ratio, scale[v]);
                best[v] = choose(accepted, ratio * a[v], best[v]);
                inverse[v] = choose(accepted, is[v], inverse[v]);
            }
        }
        UNROLL for (int v = 0; v < PAIR; v++) {
            store(fit->scale + (p + v) * LANES, choose(zero[v], splat(0), scale[v]));
            store(fit->inverse + (p + v) * LANES, inverse[v]);
            store_ints(fit->is_zero + (p + v) * LANES, zero[v]);
        }
    }
}

/* The same for the 16 scales of one super-block, which can have any value; scalar, since there are few. Fills quants
   from 0 to 2 * n_max - 1, and returns the scale. */
INLINE float search_symmetric_scales(const float *x, const float *w, int n, int n_max, int32_t *quants) {
    float top = 0, amax = 0, scale = 0, best = 0, inverse = 0;
    for (int i = 0; i < n; i++) {
        float size = float_of_bits(bits_of_float(x[i]) & 0x7fffffff);
        if (size > amax) {
            amax = size;
            top = x[i];
        }
    }
    if (amax < LEAST_MAGNITUDE) {
        memset(quants, 0, (size_t)n * sizeof *quants);
        return 0;
    }
    for (int step = 0; step <= 18; step++) {
        int offset = step == 0 ? 0 : step <= 9 ? step - 10 : step - 9;
        float is = -((float)n_max + 0.1f * (float)offset) / top, a = 0, b = 0;
        for (int i = 0; i < n; i++) {
            float l = (float)clamped(nearest(is * x[i]), -n_max, n_max - 1);
            a += w[i] * x[i] * l;
            b += w[i] * l * l;
        }
        if (step == 0 || (b > 0 && a * a > best * b)) {
            scale = step == 0 && b == 0 ? 0 : a / b;
            best = scale * a;
            inverse = is;
        }
    }
    for (int i = 0; i < n; i++) quants[i] = n_max + clamped(nearest(inverse * x[i]), -n_max, n_max - 1);
    return scale;
}

/* Q3_K without an importance matrix: n = 16, quants from -4 to 3, each improved in turn, in up to five passes.
   `quants` gets n rows of GROUP lanes, from 0 to 7. */
INLINE void search_stepwise(const float *x, int n, float *scales, int32_t *quants) {
    const int n_max = 4;
    floats_t level[16][N_VECTORS], wx[16][N_VECTORS], w[16][N_VECTORS], a[N_VECTORS], b[N_VECTORS];
    ints_t zero[N_VECTORS];
    UNROLL for (int v = 0; v < N_VECTORS; v++) {
        floats_t amax, top = first_largest(x + v * LANES, n, GROUP, &amax);
        zero[v] = amax < LEAST_MAGNITUDE;
        floats_t is = -(float)n_max / choose(zero[v], splat(1), top);
        a[v] = b[v] = splat(0);
        for (int i = 0; i < n; i++) {
            floats_t at = load(x + i * GROUP + v * LANES);
            floats_t l = to_floats(clamped_ints(nearest_ints(is * at), -n_max, n_max - 1));
            w[i][v] = at * at;
            wx[i][v] = w[i][v] * at;
            a[v] += wx[i][v] * l;
            b[v] += (w[i][v] * l) * l;
            level[i][v] = l;
        }
    }
    for (int pass = 0; pass < 5; pass++) {
        ints_t changed = splat_int(0);
        for (int i = 0; i < n; i++)
            UNROLL for (int v = 0; v < N_VECTORS; v++) {
                floats_t at = load(x + i * GROUP + v * LANES), l = level[i][v];
                floats_t less_a = a[v] - wx[i][v] * l, less_b = b[v] - (w[i][v] * l) * l;
                floats_t f = (at * less_b) / less_a;
                floats_t new_l = to_floats(clamped_ints(nearest_ints(f), -n_max, n_max - 1));
                floats_t new_a = less_a + wx[i][v] * new_l, new_b = less_b + (w[i][v] * new_l) * new_l;
                ints_t accepted = (less_a > 0) & (new_l != l) & (new_b > 0);
                accepted &= (new_a * new_a) * b[v] > (a[v] * a[v]) * new_b;
                level[i][v] = choose(accepted, new_l, l);
                a[v] = choose(accepted, new_a, a[v]);
                b[v] = choose(accepted, new_b, b[v]);
                changed |= accepted;
            }
        if (!any(changed)) break;
    }
    UNROLL for (int v = 0; v < N_VECTORS; v++) {
        store(scales + v * LANES, choose(zero[v] | ~(b[v] > 0), splat(0), a[v] / b[v]));
        for (int i = 0; i < n; i++) {
            ints_t l = __builtin_convertvector(level[i][v], ints_t) + n_max;
            store_ints(quants + i * GROUP + v * LANES, l & ~zero[v]);
        }
    }
}

/* Scales or minima of N_SUPER super-blocks with an importance matrix: n rows of N_SUPER lanes become quants, which are
   bytes (a negative scale wraps around, as in ggml). `out` gets the scale of each lane. */
INLINE void search_positive(const float *x, const float *w, int n, int n_max, float *scales, int32_t *quants) {
    for (int first = 0; first < N_SUPER; first += LANES) {
        floats_t at[16], weight[16], wx[16], level[16], top = splat(0), a = splat(0), b = splat(0), best = splat(0);
        for (int i = 0; i < n; i++) {
            at[i] = load(x + i * N_SUPER + first);
            weight[i] = load(w + i * N_SUPER + first);
            wx[i] = weight[i] * at[i];
            top = choose(top > at[i], top, at[i]);
        }
        ints_t zero = top < LEAST_MAGNITUDE;
        floats_t inverse = (float)n_max / top;
        for (int step = -5; step <= 4; step++) {
            if (step == 0) continue;
            floats_t is = step == -5 ? inverse : (0.1f * (float)step + (float)n_max) / top;
            floats_t scale = 1.0f / is, error = splat(0);
            for (int i = 0; i < n; i++) {
                ints_t l = nearest_ints(is * at[i]);
                l = step == -5 ? l & 255 : lesser_ints(l, splat_int(n_max));
                floats_t d = at[i] - scale * to_floats(l);
                error += (weight[i] * d) * d;
            }
            ints_t accepted = step == -5 ? splat_int(-1) : error < best;
            best = choose(accepted, error, best);
            inverse = choose(accepted, is, inverse);
        }
        for (int i = 0; i < n; i++) {
            ints_t l = lesser_ints(nearest_ints(inverse * at[i]), splat_int(n_max));
            a += wx[i] * to_floats(l);
            b += (weight[i] * to_floats(l)) * to_floats(l);
            level[i] = to_floats(l & 255);
        }
        for (int pass = 0; pass < 5; pass++) {
            ints_t changed = splat_int(0);
            for (int i = 0; i < n; i++) {
                floats_t l = level[i];
                floats_t less_a = a - wx[i] * l, less_b = b - (weight[i] * l) * l;
                ints_t new_quant = lesser_ints(nearest_ints((at[i] * less_b) / less_a), splat_int(n_max));
                floats_t new_l = to_floats(new_quant);
                floats_t new_a = less_a + wx[i] * new_l, new_b = less_b + (weight[i] * new_l) * new_l;
                ints_t accepted = (less_a > 0) & (less_b > 0) & (new_l != l);
                accepted &= (new_a * new_a) * b > (a * a) * new_b;
                level[i] = choose(accepted, to_floats(new_quant & 255), l);
                a = choose(accepted, new_a, a);
                b = choose(accepted, new_b, b);
                changed |= accepted;
            }
            if (!any(changed)) break;
        }
        store(scales + first, choose(zero | ~(b > 0), splat(0), a / b));
        for (int i = 0; i < n; i++)
            store_ints(quants + i * N_SUPER + first, __builtin_convertvector(level[i], ints_t) & ~zero);
    }
}
