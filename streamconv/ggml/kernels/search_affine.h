/* The search for a scale and a minimum (ggml's make_qkx2_quants, or make_qkx3_quants with an importance matrix). */

typedef struct {
    int n, n_max;          /* elements of a sub-block; the largest quant */
    float first, step;     /* the range tried is n_max + first + step * i wide */
    int n_steps;           /* the last i */
    int absolute;          /* the error is |d|, else d * d */
    int weighted;          /* make_qkx3_quants */
} affine_t;

/* For each lane: the result, and the inverse scale, minimum and kind of the accepted step, from which `affine_level`
   computes the quants. */
typedef struct {
    float scale[GROUP], minimum[GROUP], sum_weights[GROUP];
    float inverse[GROUP], low[GROUP];
    int32_t is_first[GROUP];
} affine_fit_t;

/* Quants of one step. The fast form is valid for |f| up to 2^22, and needs the upper bound only if f can exceed it. */
INLINE floats_t affine_quant(floats_t f, floats_t rounder, int n_max, int bounded, int exact, int is_first, int weighted) {
    if (!exact) {
        floats_t sum = greater(f + rounder, rounder);
        if (bounded) sum = lesser(sum, rounder + (float)n_max);
        return sum - rounder;
    }
    if (weighted && !is_first) {
        f = choose(f > 0, lesser(f, splat((float)n_max)), splat(0));
        return to_floats(nearest_ints(f));
    }
    return to_floats(clamped_ints(nearest_ints(f), 0, n_max));
}

/* Quants of elements of one lane's sub-block after a search. */
INLINE ints_t affine_levels(const affine_fit_t *fit, int lane, const float *x, int n_max, int weighted) {
    floats_t f = fit->inverse[lane] * (load(x) - fit->low[lane]);
    if (!weighted || fit->is_first[lane]) return clamped_ints(nearest_ints(f), 0, n_max);
    return nearest_ints(choose(f > 0, lesser(f, splat((float)n_max)), splat(0)));
}

/* Sums over one pair of vectors: of w * l, (w * l) * l and (w * l) * x. The quants are kept for the error. */
INLINE void affine_sums(const float *x, const float *w, affine_t how, int bounded, int exact, const floats_t *inverse,
                        const floats_t *low, floats_t quants[][PAIR], floats_t *sum_l, floats_t *sum_l2, floats_t *sum_xl) {
    const floats_t rounder = splat(ROUNDER_UNKNOWN);
    floats_t is[PAIR], from[PAIR], l1[PAIR], l2[PAIR], xl[PAIR];
    UNROLL for (int v = 0; v < PAIR; v++) {
        is[v] = inverse[v];
        from[v] = low[v];
        l1[v] = l2[v] = xl[v] = splat(0);
    }
    for (int i = 0; i < how.n; i++)
        UNROLL for (int v = 0; v < PAIR; v++) {
            floats_t at = load(x + i * GROUP + v * LANES);
            floats_t l = affine_quant(is[v] * (at - from[v]), rounder, how.n_max, bounded, exact, 0, how.weighted);
            floats_t wl = load(w + i * GROUP + v * LANES) * l;
            quants[i][v] = l;
            l1[v] += wl;
            l2[v] += wl * l;
            xl[v] += wl * at;
        }
    UNROLL for (int v = 0; v < PAIR; v++) {
        sum_l[v] = l1[v];
        sum_l2[v] = l2[v];
        sum_xl[v] = xl[v];
    }
}

INLINE void affine_error(const float *x, const float *w, affine_t how, floats_t quants[][PAIR], const floats_t *scale,
                         const floats_t *low, floats_t *error) {
    floats_t a[PAIR], b[PAIR], e[PAIR];
    UNROLL for (int v = 0; v < PAIR; v++) {
        a[v] = scale[v];
        b[v] = low[v];
        e[v] = splat(0);
    }
    for (int i = 0; i < how.n; i++)
        UNROLL for (int v = 0; v < PAIR; v++) {
            floats_t d = (a[v] * quants[i][v] + b[v]) - load(x + i * GROUP + v * LANES);
            e[v] += load(w + i * GROUP + v * LANES) * (how.absolute ? magnitude(d) : d * d);
        }
    UNROLL for (int v = 0; v < PAIR; v++) error[v] = e[v];
}

/* `x` and `w` are n rows of GROUP lanes. If `exact` is 0, returns whether the fast rounding was exact in all lanes: it
   is not if the range between the least and the largest element overflows, vanishes or, after a step has moved the
   minimum, is negative. */
INLINE int search_affine_with(const float *x, const float *w, affine_t how, int exact, affine_fit_t *fit) {
    const float n_max = (float)how.n_max;
    floats_t high[N_VECTORS], low[N_VECTORS], least[N_VECTORS], sum_w[N_VECTORS], sum_x[N_VECTORS], widen[N_VECTORS];
    floats_t scale[N_VECTORS], best[N_VECTORS], found_inverse[N_VECTORS], found_low[N_VECTORS], inverse[N_VECTORS];
    ints_t is_first[N_VECTORS], flat[N_VECTORS], bad = splat_int(0);
    floats_t quants[N_VECTORS / PAIR][32][PAIR];

    UNROLL for (int v = 0; v < N_VECTORS; v++) {
        floats_t at = load(x + v * LANES), weight = load(w + v * LANES);
        floats_t l = at, h = at, sw = weight, sx = weight * at;
        for (int i = 1; i < how.n; i++) {
            at = load(x + i * GROUP + v * LANES), weight = load(w + i * GROUP + v * LANES);
            l = lesser(at, l);
            h = greater(at, h);
            sw += weight;
            sx += weight * at;
        }
        low[v] = least[v] = found_low[v] = choose(l > 0, splat(0), l);
        high[v] = h;
        sum_w[v] = sw;
        sum_x[v] = sx;
        flat[v] = high[v] <= low[v];
        widen[v] = (floats_t)(flat[v] & (ints_t)splat(1)); /* flat lanes get a range of 1 and are masked at the end */
        inverse[v] = found_inverse[v] = n_max / ((high[v] - low[v]) + widen[v]);
        scale[v] = 1.0f / inverse[v];
        is_first[v] = splat_int(-1);
        if (!exact) bad |= ~((inverse[v] > 0) & (inverse[v] < 0x1p127f));
    }
    for (int p = 0; p < N_VECTORS; p += PAIR) {
        const floats_t rounder = splat(ROUNDER_UNKNOWN);
        for (int i = 0; i < how.n; i++)
            UNROLL for (int v = 0; v < PAIR; v++) {
                floats_t f = inverse[p + v] * (load(x + i * GROUP + (p + v) * LANES) - low[p + v]);
                quants[p / PAIR][i][v] = affine_quant(f, rounder, how.n_max, 0, exact, 1, how.weighted);
            }
        affine_error(x + p * LANES, w + p * LANES, how, quants[p / PAIR], scale + p, low + p, best + p);
    }
    for (int step = 0; step <= how.n_steps; step++) {
        float top = (how.first + how.step * (float)step) + n_max;
        floats_t sum_l[N_VECTORS], sum_l2[N_VECTORS], sum_xl[N_VECTORS], a[N_VECTORS], b[N_VECTORS], error[N_VECTORS];
        ints_t valid[N_VECTORS];
        UNROLL for (int v = 0; v < N_VECTORS; v++) {
            inverse[v] = top / ((high[v] - low[v]) + widen[v]);
            if (!exact)
                bad |= ~((inverse[v] > 0) & (inverse[v] < 0x1p127f) & (inverse[v] * (least[v] - low[v]) > -4e6f));
        }
        for (int p = 0; p < N_VECTORS; p += PAIR) {
            const float *x_p = x + p * LANES, *w_p = w + p * LANES;
            if (!exact && top > n_max + 0.4f)
                affine_sums(x_p, w_p, how, 1, exact, inverse + p, low + p, quants[p / PAIR], sum_l + p, sum_l2 + p, sum_xl + p);
            else
                affine_sums(x_p, w_p, how, 0, exact, inverse + p, low + p, quants[p / PAIR], sum_l + p, sum_l2 + p, sum_xl + p);
        }
        UNROLL for (int v = 0; v < N_VECTORS; v++) {
            floats_t determinant = sum_w[v] * sum_l2[v] - sum_l[v] * sum_l[v];
            valid[v] = determinant > 0;
            a[v] = (sum_w[v] * sum_xl[v] - sum_x[v] * sum_l[v]) / determinant;
            b[v] = (sum_l2[v] * sum_x[v] - sum_l[v] * sum_xl[v]) / determinant;
            ints_t positive = b[v] > 0;
            if (any(positive)) {
                a[v] = choose(positive, sum_xl[v] / sum_l2[v], a[v]);
                b[v] = choose(positive, splat(0), b[v]);
            }
        }
        for (int p = 0; p < N_VECTORS; p += PAIR)
            affine_error(x + p * LANES, w + p * LANES, how, quants[p / PAIR], a + p, b + p, error + p);
        UNROLL for (int v = 0; v < N_VECTORS; v++) {
            ints_t accepted = valid[v] & (error[v] < best[v]);
            best[v] = choose(accepted, error[v], best[v]);
            scale[v] = choose(accepted, a[v], scale[v]);
            found_inverse[v] = choose(accepted, inverse[v], found_inverse[v]);
            found_low[v] = choose(accepted, low[v], found_low[v]);
            low[v] = choose(accepted, b[v], low[v]);
            is_first[v] &= ~accepted;
        }
    }
    UNROLL for (int v = 0; v < N_VECTORS; v++) {
        store(fit->scale + v * LANES, choose(flat[v], splat(0), scale[v]));
        store(fit->minimum + v * LANES, -low[v]);
        store(fit->sum_weights + v * LANES, sum_w[v]);
        store(fit->inverse + v * LANES, choose(flat[v], splat(0), found_inverse[v]));
        store(fit->low + v * LANES, found_low[v]);
        store_ints(fit->is_first + v * LANES, is_first[v]);
    }
    return exact || !any(bad);
}

#define SEARCH_AFFINE(NAME, ...)                                                                                       \
    static __attribute__((noinline)) void NAME##_exactly(const float *x, const float *w, affine_fit_t *fit) {          \
        search_affine_with(x, w, (affine_t){__VA_ARGS__}, 1, fit);                                                     \
    }                                                                                                                  \
    static __attribute__((noinline)) void NAME(const float *x, const float *w, affine_fit_t *fit) {                    \
        if (!search_affine_with(x, w, (affine_t){__VA_ARGS__}, 0, fit)) NAME##_exactly(x, w, fit);                     \
    }
