/* Q2_K to Q6_K: super-blocks of 256 with quantised scales. A piece has N_SUPER of them and is padded with zeros. */

INLINE float f16_at(const uint8_t *from) { return f16_value(load_f16(from)); }

/* A sub-block with the rounded scale and minimum that are stored. If the scale is 0, the quants found are kept. */
INLINE void requantise(const float *x, int n, float d, float minimum, int low, int high, int32_t *levels) {
    for (int i = 0; i < n; i++) {
        int32_t l = (int32_t)(bits_of_float((x[i] + minimum) / d + ROUNDER) & 0x007fffff) - 0x00400000;
        l = l < low ? low : l;
        levels[i] = (l > high ? high : l) - low;
    }
}

/* The sub-blocks of a piece in groups. `w` are the weights with an importance matrix, else NULL. */
#define EACH_GROUP(N, WEIGHTS, SEARCH)                                                                                 \
    for (int group = 0; group < PIECE / (N) / GROUP; group++) {                                                        \
        transpose(x + group * GROUP * (N), N, GROUP, xt);                                                              \
        if (w != NULL)                                                                                                 \
            transpose(w + group * GROUP * (N), N, GROUP, wt);                                                          \
        else                                                                                                           \
            WEIGHTS(xt, N, wt);                                                                                        \
        SEARCH;                                                                                                        \
    }

INLINE void magnitude_lanes(const float *x, int n, float *w) {
    for (int i = 0; i < n * GROUP; i += LANES) store(w + i, magnitude(load(x + i)));
}

/* sqrt(mean square) + |x| */
INLINE void spread_lanes(const float *x, int n, float *w) {
    for (int v = 0; v < N_VECTORS; v++) {
        floats_t sum = splat(0);
        for (int i = 0; i < n; i++) {
            floats_t at = load(x + i * GROUP + v * LANES);
            sum += at * at;
        }
        floats_t root = square_root(sum / (float)n);
        for (int i = 0; i < n; i++) store(w + i * GROUP + v * LANES, root + magnitude(load(x + i * GROUP + v * LANES)));
    }
}

/* Per super-block, `n` numbers of a piece become rows of N_SUPER lanes, and back. */
INLINE void to_rows(const float *from, int n, float *to) {
    for (int block = 0; block < N_SUPER; block++)
        for (int j = 0; j < n; j++) to[j * N_SUPER + block] = from[block * n + j];
}

/* The scales (or the minima) of a piece with an importance matrix: `n` per super-block, of sub-blocks in groups. */
INLINE void positive_scales(const affine_fit_t *fits, size_t offset, int n, int n_max, float *d, int32_t *quants) {
    float values[N_SUPER * 16], weights[N_SUPER * 16], x[N_SUPER * 16], w[N_SUPER * 16];
    for (int i = 0; i < N_SUPER * n; i++) {
        values[i] = ((const float *)((const char *)&fits[i / GROUP] + offset))[i % GROUP];
        weights[i] = fits[i / GROUP].sum_weights[i % GROUP];
    }
    to_rows(values, n, x);
    to_rows(weights, n, w);
    search_positive(x, w, n, n_max, d, quants);
}

INLINE float largest_positive(const float *values, int n) {
    float largest = 0;
    for (int i = 0; i < n; i++) largest = values[i] > largest ? values[i] : largest;
    return largest;
}

/* --- Q4_K and Q5_K: eight sub-blocks of 32 --- */

SEARCH_AFFINE(search_q4_k, 32, 15, -1.0f, 0.1f, 20, 0, 0)
SEARCH_AFFINE(search_q4_k_weighted, 32, 15, -0.9f, 0.05f, 36, 0, 1)
SEARCH_AFFINE(search_q5_k, 32, 31, -0.5f, 0.1f, 15, 0, 0)
SEARCH_AFFINE(search_q5_k_weighted, 32, 31, -0.9f, 0.05f, 36, 0, 1)

enum { N_FITS_32 = PIECE / 32 / GROUP, N_FITS_16 = PIECE / 16 / GROUP };

/* Six bits each of eight scales and eight minima, in 12 bytes. */
INLINE void pack_scales_q4_k(const uint8_t *scales, const uint8_t *minima, uint8_t *out) {
    for (int j = 0; j < 4; j++) {
        out[j] = (uint8_t)(scales[j] | scales[j + 4] >> 4 << 6);
        out[j + 4] = (uint8_t)(minima[j] | minima[j + 4] >> 4 << 6);
        out[j + 8] = (uint8_t)((scales[j + 4] & 15) | (minima[j + 4] & 15) << 4);
    }
}
INLINE void unpack_scale_q4_k(const uint8_t *packed, int j, int *scale, int *minimum) {
    if (j < 4) {
        *scale = packed[j] & 63;
        *minimum = packed[j + 4] & 63;
    } else {
        *scale = (packed[j + 4] & 15) | packed[j - 4] >> 6 << 4;
        *minimum = packed[j + 4] >> 4 | packed[j] >> 6 << 4;
    }
}

INLINE void q45_k(const float *x, const float *w, int n_blocks, uint8_t *out, int is_q5) {
    const int n_max = is_q5 ? 31 : 15, weighted = w != NULL;
    affine_fit_t fits[N_FITS_32];
    float d[N_SUPER], d_minimum[N_SUPER];
    int32_t scale_quants[N_SUPER * 8], minimum_quants[N_SUPER * 8];
    {
        float xt[32 * GROUP], wt[32 * GROUP];
        EACH_GROUP(32, spread_lanes, {
            if (weighted)
                (is_q5 ? search_q5_k_weighted : search_q4_k_weighted)(xt, wt, &fits[group]);
            else
                (is_q5 ? search_q5_k : search_q4_k)(xt, wt, &fits[group]);
        })
    }
    if (weighted) {
        positive_scales(fits, offsetof(affine_fit_t, scale), 8, 63, d, scale_quants);
        positive_scales(fits, offsetof(affine_fit_t, minimum), 8, 63, d_minimum, minimum_quants);
    }
    for (int block = 0; block < n_blocks; block++, x += SUPER) {
        const affine_fit_t *fit = &fits[block * 8 / GROUP];
        const int lane = block * 8 % GROUP;
        uint8_t scales[8], minima[8];
        int32_t levels[SUPER];
        if (weighted) {
            for (int j = 0; j < 8; j++) {
                scales[j] = (uint8_t)scale_quants[j * N_SUPER + block];
                minima[j] = (uint8_t)minimum_quants[j * N_SUPER + block];
                if (is_q5) {
                    scales[j] = scales[j] < 63 ? scales[j] : 63;
                    minima[j] = minima[j] < 63 ? minima[j] : 63;
                }
            }
        } else {
            float top = largest_positive(fit->scale + lane, 8), top_minimum = largest_positive(fit->minimum + lane, 8);
            float inverse = top > 0 ? 63 / top : 0, inverse_minimum = top_minimum > 0 ? 63 / top_minimum : 0;
            for (int j = 0; j < 8; j++) {
                uint8_t scale = (uint8_t)nearest(inverse * fit->scale[lane + j]);
                uint8_t minimum = (uint8_t)nearest(inverse_minimum * fit->minimum[lane + j]);
                scales[j] = scale < 63 ? scale : 63;
                minima[j] = minimum < 63 ? minimum : 63;
            }
            d[block] = top / 63;
            d_minimum[block] = top_minimum / 63;
        }
        store_f16(out, d[block]);
        store_f16(out + 2, d_minimum[block]);
        pack_scales_q4_k(scales, minima, out + 4);
        for (int j = 0; j < 8; j++) {
            int scale, minimum;
            unpack_scale_q4_k(out + 4, j, &scale, &minimum);
            float step = f16_at(out) * (float)scale;
            if (step != 0)
                requantise(x + 32 * j, 32, step, f16_at(out + 2) * (float)minimum, 0, n_max, levels + 32 * j);
            else
                for (int i = 32 * j; i < 32 * j + 32; i += LANES)
                    store_ints(levels + i, affine_levels(fit, lane + j, x + i, n_max, weighted));
        }
        out += 16;
        if (is_q5) {
            int32_t high[32] = {0};
            for (int j = 0; j < 8; j++)
                for (int i = 0; i < 32; i++) high[i] |= levels[32 * j + i] >> 4 << j;
            for (int i = 0; i < 32; i++) out[i] = (uint8_t)high[i];
            out += 32;
        }
        for (int j = 0; j < 4; j++, out += 32)
            for (int i = 0; i < 32; i++)
                out[i] = (uint8_t)((levels[64 * j + i] & 15) | (levels[64 * j + 32 + i] & 15) << 4);
    }
}

static void q4_k(const float *x, const float *w, int n_blocks, uint8_t *out) { q45_k(x, w, n_blocks, out, 0); }
static void q5_k(const float *x, const float *w, int n_blocks, uint8_t *out) { q45_k(x, w, n_blocks, out, 1); }

/* --- Q2_K: sixteen sub-blocks of 16 --- */

SEARCH_AFFINE(search_q2_k, 16, 3, -0.5f, 0.1f, 15, 1, 0)
SEARCH_AFFINE(search_q2_k_weighted, 16, 3, -0.9f, 0.05f, 36, 0, 1)

/* Two bits of 256 quants in 64 bytes. */
INLINE void pack_two_bits(const int32_t *levels, uint8_t *out) {
    for (int half = 0; half < 2; half++, levels += 128, out += 32)
        for (int i = 0; i < 32; i++)
            out[i] = (uint8_t)((levels[i] & 3) | (levels[i + 32] & 3) << 2 | (levels[i + 64] & 3) << 4 |
                               (levels[i + 96] & 3) << 6);
}

static void q2_k(const float *x, const float *w, int n_blocks, uint8_t *out) {
    const int weighted = w != NULL;
    affine_fit_t fits[N_FITS_16];
    float d[N_SUPER], d_minimum[N_SUPER];
    int32_t scale_quants[N_SUPER * 16], minimum_quants[N_SUPER * 16];
    {
        float xt[16 * GROUP], wt[16 * GROUP];
        EACH_GROUP(16, magnitude_lanes, (weighted ? search_q2_k_weighted : search_q2_k)(xt, wt, &fits[group]))
    }
    if (weighted) {
        positive_scales(fits, offsetof(affine_fit_t, scale), 16, 15, d, scale_quants);
        positive_scales(fits, offsetof(affine_fit_t, minimum), 16, 15, d_minimum, minimum_quants);
    }
    for (int block = 0; block < n_blocks; block++, x += SUPER, out += 84) {
        const affine_fit_t *fit = &fits[block * 16 / GROUP];
        const int lane = block * 16 % GROUP;
        int32_t levels[SUPER];
        if (weighted) {
            for (int j = 0; j < 16; j++)
                out[j] = (uint8_t)(scale_quants[j * N_SUPER + block] | minimum_quants[j * N_SUPER + block] << 4);
        } else {
            float top = largest_positive(fit->scale + lane, 16), top_minimum = largest_positive(fit->minimum + lane, 16);
            for (int j = 0; j < 16; j++) {
                out[j] = top > 0 ? (uint8_t)nearest((15 / top) * fit->scale[lane + j]) : 0;
                if (top_minimum > 0)
                    out[j] |= (uint8_t)((uint8_t)nearest((15 / top_minimum) * fit->minimum[lane + j]) << 4);
            }
            d[block] = top / 15;
            d_minimum[block] = top_minimum / 15;
        }
        store_f16(out + 80, d[block]);
        store_f16(out + 82, d_minimum[block]);
        for (int j = 0; j < 16; j++) {
            float step = f16_at(out + 80) * (float)(out[j] & 15);
            if (step != 0)
                requantise(x + 16 * j, 16, step, f16_at(out + 82) * (float)(out[j] >> 4), 0, 3, levels + 16 * j);
            else
                for (int i = 16 * j; i < 16 * j + 16; i += LANES)
                    store_ints(levels + i, affine_levels(fit, lane + j, x + i, 3, weighted));
        }
        pack_two_bits(levels, out + 16);
    }
}

/* --- Q3_K: sixteen sub-blocks of 16, no minima --- */

INLINE float first_largest_scale(const float *scales, float *largest) {
    float top = 0, amax = 0;
    for (int j = 0; j < 16; j++) {
        float size = __builtin_fabsf(scales[j]);
        if (size > amax) {
            amax = size;
            top = scales[j];
        }
    }
    *largest = amax;
    return top;
}

static void q3_k(const float *x, const float *w, int n_blocks, uint8_t *out) {
    symmetric_fit_t fits[N_FITS_16];
    float sums[PIECE / 16], scales_of_all[PIECE / 16];
    int32_t searched[PIECE]; /* groups of 16 rows of GROUP lanes; only without an importance matrix */
    {
        float xt[16 * GROUP], wt[16 * GROUP];
        for (int group = 0; group < N_FITS_16; group++) {
            transpose(x + group * GROUP * 16, 16, GROUP, xt);
            if (w == NULL) {
                search_stepwise(xt, 16, scales_of_all + group * GROUP, searched + group * GROUP * 16);
                continue;
            }
            transpose(w + group * GROUP * 16, 16, GROUP, wt);
            search_symmetric(xt, wt, 16, 4, &fits[group]);
            memcpy(scales_of_all + group * GROUP, fits[group].scale, sizeof fits[group].scale);
            for (int v = 0; v < GROUP; v += LANES) {
                floats_t sum = splat(0);
                for (int i = 0; i < 16; i++) sum += load(wt + i * GROUP + v);
                store(sums + group * GROUP + v, sum);
            }
        }
    }
    for (int block = 0; block < n_blocks; block++, x += SUPER, out += 110) {
        const float *scales = scales_of_all + 16 * block;
        int32_t codes[16], levels[SUPER], high[32] = {0};
        float d = 0, largest;
        if (w != NULL) {
            d = search_symmetric_scales(scales, sums + 16 * block, 16, 32, codes);
        } else {
            float top = first_largest_scale(scales, &largest), inverse = -32 / top;
            for (int j = 0; j < 16; j++)
                codes[j] = top != 0 ? clamped((int8_t)nearest(inverse * scales[j]), -32, 31) + 32 : 0;
            d = top != 0 ? 1 / inverse : 0;
        }
        memset(out + 96, 0, 12);
        for (int j = 0; j < 16; j++) {
            out[96 + j % 8] |= (uint8_t)((codes[j] & 15) << (j < 8 ? 0 : 4));
            out[104 + j % 4] |= (uint8_t)((codes[j] >> 4 & 3) << 2 * (j / 4));
        }
        store_f16(out + 108, d);
        for (int j = 0; j < 16; j++) {
            float step = f16_at(out + 108) * (float)(codes[j] - 32);
            const int sub_block = 16 * block + j, group = sub_block / GROUP, lane = sub_block % GROUP;
            if (step != 0)
                requantise(x + 16 * j, 16, step, 0, -4, 3, levels + 16 * j);
            else if (w != NULL)
                for (int i = 16 * j; i < 16 * j + 16; i += LANES)
                    store_ints(levels + i, symmetric_levels(&fits[group], lane, x + i, 4));
            else
                for (int i = 0; i < 16; i++) levels[16 * j + i] = searched[(group * 16 + i) * GROUP + lane];
        }
        for (int j = 0; j < 8; j++)
            for (int i = 0; i < 32; i++) high[i] |= levels[32 * j + i] >> 2 << j;
        for (int i = 0; i < 32; i++) out[i] = (uint8_t)high[i];
        pack_two_bits(levels, out + 32);
    }
}

/* --- Q6_K: sixteen sub-blocks of 16, no minima, scales of eight bits --- */

static void q6_k(const float *x, const float *w, int n_blocks, uint8_t *out) {
    symmetric_fit_t fits[N_FITS_16];
    {
        float xt[16 * GROUP], wt[16 * GROUP];
        EACH_GROUP(16, square_lanes, search_symmetric(xt, wt, 16, 32, &fits[group]))
    }
    for (int block = 0; block < n_blocks; block++, x += SUPER, out += 210) {
        const symmetric_fit_t *fit = &fits[block * 16 / GROUP];
        float scales[16], largest;
        int32_t levels[SUPER];
        for (int j = 0; j < 16; j++) scales[j] = fits[(block * 16 + j) / GROUP].scale[(block * 16 + j) % GROUP];
        float top = first_largest_scale(scales, &largest);
        if (largest < LEAST_MAGNITUDE) {
            memset(out, 0, 210);
            continue;
        }
        float inverse = -128 / top;
        store_f16(out + 208, 1 / inverse);
        for (int j = 0; j < 16; j++) {
            int32_t code = nearest(inverse * scales[j]);
            int8_t scale = (int8_t)(code < 127 ? code : 127);
            float step = f16_at(out + 208) * (float)scale;
            out[192 + j] = (uint8_t)scale;
            if (step != 0)
                requantise(x + 16 * j, 16, step, 0, -32, 31, levels + 16 * j);
            else
                for (int i = 16 * j; i < 16 * j + 16; i += LANES)
                    store_ints(levels + i, symmetric_levels(fit, block * 16 % GROUP + j, x + i, 32));
        }
        for (int half = 0; half < 2; half++) {
            const int32_t *l = levels + 128 * half;
            for (int i = 0; i < 32; i++) {
                out[64 * half + i] = (uint8_t)((l[i] & 15) | (l[i + 64] & 15) << 4);
                out[64 * half + 32 + i] = (uint8_t)((l[i + 32] & 15) | (l[i + 96] & 15) << 4);
                out[128 + 32 * half + i] =
                    (uint8_t)(l[i] >> 4 | l[i + 32] >> 4 << 2 | l[i + 64] >> 4 << 4 | l[i + 96] >> 4 << 6);
            }
        }
    }
}
