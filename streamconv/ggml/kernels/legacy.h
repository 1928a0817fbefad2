/* Q4_0, Q4_1, Q5_0 and Q5_1: blocks of 32 with a scale, and a minimum in the _1 types. */

enum { LEGACY = 32, LEGACY_VECTORS = LEGACY / LANES };

typedef struct {
    int n_max; /* the largest quant */
    int has_minimum;
} legacy_t;

/* Quants of a block from 0 to n_max, after d and the minimum. */
INLINE void pack_legacy(const uint8_t *quants, int n_max, uint8_t *out) {
    if (n_max == 31) {
        for (int part = 0; part < 4; part++) {
            uint64_t eight;
            memcpy(&eight, quants + 8 * part, 8);
            /* Bit 4 of byte i becomes bit i of the top byte. */
            *out++ = (uint8_t)((eight >> 4 & 0x0101010101010101u) * 0x0102040810204080u >> 56);
        }
    }
    for (int i = 0; i < 16; i++) out[i] = (uint8_t)((quants[i] & 15) | quants[i + 16] << 4);
}

/* The least and the largest element. Of zeros of both signs, either. */
INLINE void extremes(const float *x, float *least, float *largest) {
    float lows[LANES], highs[LANES];
    floats_t low = load(x), high = low;
    UNROLL for (int v = 1; v < LEGACY_VECTORS; v++) {
        floats_t at = load(x + v * LANES);
        low = lesser(at, low);
        high = greater(at, high);
    }
    store(lows, low);
    store(highs, high);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) {
            lows[i] = lows[i] < lows[i + half] ? lows[i] : lows[i + half];
            highs[i] = highs[i] > highs[i + half] ? highs[i] : highs[i + half];
        }
    *least = lows[0];
    *largest = highs[0];
}

INLINE void quantise_legacy(const float *x, legacy_t how, uint8_t *out) {
    float least, largest, d, from = 0, half = 0.5f;
    extremes(x, &least, &largest);
    if (how.has_minimum) {
        if (least == 0) { /* the sign is that of the first zero */
            int i = 0;
            while (x[i] != 0) i++;
            least = x[i];
        }
        d = largest == least ? 0 : (largest - least) / (float)how.n_max;
        from = least;
        store_f16(out + 2, least);
    } else {
        float top = largest > -least ? largest : least;
        if (largest == -least) { /* the first of both */
            int i = 0;
            while (x[i] != largest && x[i] != least) i++;
            top = largest == 0 ? 0 : x[i];
        }
        d = top / (float)-((how.n_max + 1) / 2);
        half = (float)((how.n_max + 1) / 2) + 0.5f;
    }
    store_f16(out, d);
    uint8_t quants[LEGACY] = {0};
    float inverse = d != 0 ? 1 / d : 0;
    if (magnitude(splat(inverse))[0] <= 0x1.fffffep127f) { /* else ggml makes zeros */
        int32_t wide[LEGACY];
        for (int v = 0; v < LEGACY; v += LANES) {
            floats_t at = load(x + v);
            if (how.has_minimum) at -= from;
            ints_t l = __builtin_convertvector(at * inverse + half, ints_t);
            store_ints(wide + v, lesser_ints(l, splat_int(how.n_max)));
        }
        for (int i = 0; i < LEGACY; i++) quants[i] = (uint8_t)wide[i];
    }
    pack_legacy(quants, how.n_max, out + (how.has_minimum ? 4 : 2));
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
            uint8_t quants[LEGACY];
            if (how.has_minimum) {
                store_f16(out, affine.scale[lane]);
                store_f16(out + 2, -affine.minimum[lane]);
                for (int i = 0; i < LEGACY; i++) quants[i] = (uint8_t)affine_level(&affine, lane, at[i], how.n_max, 1);
            } else {
                store_f16(out, symmetric.scale[lane]);
                for (int i = 0; i < LEGACY; i++)
                    quants[i] = (uint8_t)symmetric_level(&symmetric, lane, at[i], (how.n_max + 1) / 2);
            }
            pack_legacy(quants, how.n_max, out + (how.has_minimum ? 4 : 2));
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
        for (int block = 0; block < n_blocks; block++) quantise_legacy(x + block * LEGACY, how, out + block * NBYTES); \
    }

LEGACY_TYPE(q4_0, 15, 0, 18)
LEGACY_TYPE(q4_1, 15, 1, 20)
LEGACY_TYPE(q5_0, 31, 0, 22)
LEGACY_TYPE(q5_1, 31, 1, 24)
