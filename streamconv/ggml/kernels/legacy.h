/* Q4_0, Q4_1, Q5_0 and Q5_1: blocks of 32 with a scale, and a minimum in the _1 types. */

enum { LEGACY = 32, LEGACY_VECTORS = LEGACY / LANES };

typedef struct {
    int n_max; /* the largest quant */
    int has_minimum;
} legacy_t;

/* The least and the largest element of a block, in every lane; a zero can have either sign. */
INLINE void extremes(const float *x, floats_t *least, floats_t *largest) {
    floats_t low = load(x), high = low;
    UNROLL for (int v = 1; v < LEGACY_VECTORS; v++) {
        floats_t at = load(x + v * LANES);
        low = lesser(at, low);
        high = greater(at, high);
    }
    *least = least_of_all(low);
    *largest = largest_of_all(high);
}

/* Scale and minimum of each block of a piece, as ggml chooses them. */
INLINE void legacy_scales(const float *x, legacy_t how, int n_blocks, float *d, float *minimum) {
    for (int block = 0; block < n_blocks; block++, x += LEGACY) {
        floats_t low, high;
        extremes(x, &low, &high);
        float least = low[0], largest = high[0];
        if (how.has_minimum) {
            if (least == 0) { /* the sign is that of the first zero */
                int i = 0;
                while (x[i] != 0) i++;
                least = x[i];
            }
            minimum[block] = least;
            d[block] = largest == least ? 0 : largest - least;
        } else {
            d[block] = largest > -least ? largest : least;
            if (largest == -least) { /* the first of the two */
                int i = 0;
                while (x[i] != largest && x[i] != least) i++;
                d[block] = largest == 0 ? 0 : x[i];
            }
        }
    }
    const float divisor = how.has_minimum ? (float)how.n_max : (float)-((how.n_max + 1) / 2);
    for (int block = 0; block < PIECE / LEGACY; block += LANES) store(d + block, load(d + block) / divisor);
}

/* Quants of a block from 0 to n_max. */
INLINE void pack_legacy(const ints_t *l, int n_max, uint8_t *out) {
    int32_t pairs[16];
    if (n_max == 31) {
        ints_t bits = splat_int(0);
        for (int v = 0; v < LEGACY_VECTORS; v++) bits |= (l[v] >> 4) << (LANE_NUMBERS + v * LANES);
        int32_t high = 0;
        for (int i = 0; i < LANES; i++) high |= bits[i];
        memcpy(out, &high, 4);
        out += 4;
    }
    for (int v = 0; v < LEGACY_VECTORS / 2; v++)
        store_ints(pairs + v * LANES, (l[v] & 15) | l[v + LEGACY_VECTORS / 2] << 4);
    for (int i = 0; i < 16; i++) out[i] = (uint8_t)pairs[i];
}

INLINE void quantise_legacy(const float *x, legacy_t how, int n_blocks, int nbytes, uint8_t *out) {
    float d[PIECE / LEGACY] = {0}, minimum[PIECE / LEGACY];
    const float half = how.has_minimum ? 0.5f : (float)((how.n_max + 1) / 2) + 0.5f;
    legacy_scales(x, how, n_blocks, d, minimum);
    for (int block = 0; block < n_blocks; block++, x += LEGACY, out += nbytes) {
        float inverse = d[block] != 0 ? 1 / d[block] : 0;
        store_f16(out, d[block]);
        if (how.has_minimum) store_f16(out + 2, minimum[block]);
        ints_t l[LEGACY_VECTORS];
        for (int v = 0; v < LEGACY_VECTORS; v++) {
            floats_t at = load(x + v * LANES);
            if (how.has_minimum) at -= minimum[block];
            l[v] = __builtin_convertvector(lesser(at * inverse + half, splat((float)how.n_max)), ints_t);
        }
        if (__builtin_fabsf(inverse) > 0x1.fffffep127f || __builtin_fabsf(d[block]) > 0x1.fffffep127f)
            /* in ggml, numbers beyond the range of integers become zeros */
            memset(l, 0, sizeof l);
        pack_legacy(l, how.n_max, out + (how.has_minimum ? 4 : 2));
    }
}

SEARCH_AFFINE(search_q4_1, 32, 15, -0.9f, 0.05f, 36, 0, 1)
SEARCH_AFFINE(search_q5_1, 32, 31, -0.9f, 0.05f, 36, 0, 1)

INLINE void search_legacy(const float *x, const float *w, int n_blocks, legacy_t how, int nbytes, uint8_t *out) {
    float xt[LEGACY * GROUP], wt[LEGACY * GROUP];
    for (int first = 0; first < n_blocks; first += GROUP) {
        affine_fit_t affine;
        symmetric_fit_t symmetric;
        transpose(x + first * LEGACY, LEGACY, GROUP, xt);
        transpose(w + first * LEGACY, LEGACY, GROUP, wt);
        if (!how.has_minimum)
            search_symmetric(xt, wt, LEGACY, (how.n_max + 1) / 2, &symmetric);
        else if (how.n_max == 15)
            search_q4_1(xt, wt, &affine);
        else
            search_q5_1(xt, wt, &affine);
        for (int lane = 0; lane < GROUP && first + lane < n_blocks; lane++, out += nbytes) {
            const float *at = x + (first + lane) * LEGACY;
            ints_t l[LEGACY_VECTORS];
            for (int v = 0; v < LEGACY_VECTORS; v++)
                l[v] = how.has_minimum ? affine_levels(&affine, lane, at + v * LANES, how.n_max, 1)
                                       : symmetric_levels(&symmetric, lane, at + v * LANES, (how.n_max + 1) / 2);
            store_f16(out, how.has_minimum ? affine.scale[lane] : symmetric.scale[lane]);
            if (how.has_minimum) store_f16(out + 2, -affine.minimum[lane]);
            pack_legacy(l, how.n_max, out + (how.has_minimum ? 4 : 2));
        }
    }
}

#define LEGACY_TYPE(NAME, N_MAX, HAS_MINIMUM, NBYTES)                                                                  \
    static void NAME(const float *x, const float *w, int n_blocks, uint8_t *out) {                                     \
        const legacy_t how = {N_MAX, HAS_MINIMUM};                                                                     \
        if (w != NULL) {                                                                                               \
            search_legacy(x, w, n_blocks, how, NBYTES, out);                                                           \
            return;                                                                                                    \
        }                                                                                                              \
        quantise_legacy(x, how, n_blocks, NBYTES, out);                                                                \
    }

LEGACY_TYPE(q4_0, 15, 0, 18)
LEGACY_TYPE(q4_1, 15, 1, 20)
LEGACY_TYPE(q5_0, 31, 0, 22)
LEGACY_TYPE(q5_1, 31, 1, 24)
