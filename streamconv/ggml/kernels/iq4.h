/* IQ4_NL and IQ4_XS: quants are indices in a fixed list of values. */

enum { N_VALUES = 16, IQ4_BLOCK = 32 };

static const float IQ4_VALUES[N_VALUES] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
#define IQ4_MIDPOINT(k) ((IQ4_VALUES[k] + IQ4_VALUES[(k) + 1]) / 2) /* exact */

/* The indices of the nearest values; midpoints round up. */
INLINE ints_t iq4_places(floats_t f) {
    ints_t places = splat_int(N_VALUES - 1);
    UNROLL for (int k = 0; k < N_VALUES - 1; k++) places += f < IQ4_MIDPOINT(k);
    return places;
}
INLINE floats_t iq4_nearest(floats_t f) {
    floats_t value = splat(IQ4_VALUES[N_VALUES - 1]);
    UNROLL for (int k = 0; k < N_VALUES - 1; k++)
        value -= (floats_t)((f < IQ4_MIDPOINT(k)) & (ints_t)splat(IQ4_VALUES[k + 1] - IQ4_VALUES[k]));
    return value;
}

/* Scales of GROUP lanes of 32 elements. */
INLINE void search_iq4(const float *x, const float *w, float *scales) {
    for (int p = 0; p < N_VECTORS; p += PAIR) {
        floats_t middle[IQ4_BLOCK][PAIR], upper[IQ4_BLOCK][PAIR], apart[IQ4_BLOCK][PAIR];
        floats_t top[PAIR], scale[PAIR], best[PAIR];
        ints_t zero[PAIR];
        UNROLL for (int v = 0; v < PAIR; v++) {
            floats_t amax, a = splat(0), b = splat(0);
            const float *at_v = x + (p + v) * LANES, *w_v = w + (p + v) * LANES;
            top[v] = first_largest(at_v, IQ4_BLOCK, GROUP, &amax);
            zero[v] = amax < LEAST_MAGNITUDE;
            top[v] = choose(zero[v], splat(1), top[v]);
            floats_t inverse = 1.0f / (top[v] / IQ4_VALUES[0] * -1.0f);
            floats_t widest = (-7 + IQ4_VALUES[0]) / top[v], narrowest = (7 + IQ4_VALUES[0]) / top[v];
            for (int i = 0; i < IQ4_BLOCK; i++) {
                floats_t at = load(at_v + i * GROUP), q = iq4_nearest(inverse * at);
                floats_t wq = load(w_v + i * GROUP) * q;
                a += wq * at;
                b += wq * q;
                /* From the narrowest to the widest the factor grows by less than the ratio of neighbouring midpoints,
                   so an element crosses at most one, halfway between its values at the ends. */
                floats_t one = iq4_nearest(widest * at), other = iq4_nearest(narrowest * at);
                upper[i][v] = greater(one, other);
                floats_t under = lesser(one, other);
                apart[i][v] = upper[i][v] - under;
                middle[i][v] = (upper[i][v] + under) * 0.5f;
            }
            scale[v] = choose(b > 0, a / b, splat(0));
            best[v] = scale[v] * a;
        }
        for (int step = -7; step <= 7; step++) {
            floats_t inverse[PAIR], a[PAIR], b[PAIR];
            UNROLL for (int v = 0; v < PAIR; v++) {
                inverse[v] = ((float)step + IQ4_VALUES[0]) / top[v];
                a[v] = b[v] = splat(0);
            }
            for (int i = 0; i < IQ4_BLOCK; i++)
                UNROLL for (int v = 0; v < PAIR; v++) {
                    floats_t at = load(x + i * GROUP + (p + v) * LANES);
                    ints_t under = inverse[v] * at < middle[i][v];
                    floats_t q = upper[i][v] - (floats_t)(under & (ints_t)apart[i][v]);
                    floats_t wq = load(w + i * GROUP + (p + v) * LANES) * q;
                    a[v] += wq * at;
                    b[v] += wq * q;
                }
            UNROLL for (int v = 0; v < PAIR; v++) {
                ints_t accepted = (b[v] > 0) & (a[v] * a[v] > best[v] * b[v]);
                floats_t ratio = a[v] / b[v];
                scale[v] = choose(accepted, ratio, scale[v]);
                best[v] = choose(accepted, ratio * a[v], best[v]);
            }
        }
        UNROLL for (int v = 0; v < PAIR; v++) store(scales + (p + v) * LANES, choose(zero[v], splat(0), scale[v]));
    }
}

INLINE void iq4_pack(const float *x, float inverse, uint8_t *out) {
    int32_t places[IQ4_BLOCK];
    for (int i = 0; i < IQ4_BLOCK; i += LANES) store_ints(places + i, iq4_places(load(x + i) * inverse));
    for (int i = 0; i < 16; i++) out[i] = (uint8_t)(places[i] | places[i + 16] << 4);
}

/* Weights of GROUP blocks in lanes: x * x without an importance matrix. */
INLINE void square_lanes(const float *x, int n, float *w) {
    for (int i = 0; i < n * GROUP; i++) w[i] = x[i] * x[i];
}

/* The scales of a piece, in the order of the blocks. */
INLINE void iq4_scales(const float *x, const float *w, float *scales) {
    float xt[IQ4_BLOCK * GROUP], wt[IQ4_BLOCK * GROUP];
    for (int group = 0; group < PIECE / IQ4_BLOCK / GROUP; group++) {
        transpose(x + group * GROUP * IQ4_BLOCK, IQ4_BLOCK, GROUP, xt);
        if (w != NULL)
            transpose(w + group * GROUP * IQ4_BLOCK, IQ4_BLOCK, GROUP, wt);
        else
            square_lanes(xt, IQ4_BLOCK, wt);
        search_iq4(xt, wt, scales + group * GROUP);
    }
}

static void iq4_nl(const float *x, const float *w, int n_blocks, uint8_t *out) {
    float scales[PIECE / IQ4_BLOCK];
    iq4_scales(x, w, scales);
    for (int block = 0; block < n_blocks; block++, x += IQ4_BLOCK, out += 18) {
        store_f16(out, scales[block]);
        iq4_pack(x, scales[block] != 0 ? 1 / scales[block] : 0, out + 2);
    }
}

static void iq4_xs(const float *x, const float *w, int n_blocks, uint8_t *out) {
    float all[PIECE / IQ4_BLOCK];
    iq4_scales(x, w, all);
    for (int block = 0; block < n_blocks; block++, x += SUPER, out += 136) {
        const float *scales = all + 8 * block;
        float top = 0, amax = 0;
        for (int j = 0; j < 8; j++) {
            float size = __builtin_fabsf(scales[j]);
            if (size > amax) {
                amax = size;
                top = scales[j];
            }
        }
        float d = -top / 32, inverse = d != 0 ? 1 / d : 0;
        unsigned high = 0;
        uint8_t low[4] = {0};
        for (int j = 0; j < 8; j++) {
            int l = clamped(nearest(inverse * scales[j]), -32, 31);
            float scale = d * (float)l;
            iq4_pack(x + j * IQ4_BLOCK, scale != 0 ? 1 / scale : 0, out + 8 + 16 * j);
            low[j / 2] |= (uint8_t)(((l + 32) & 15) << 4 * (j % 2));
            high |= (unsigned)(l + 32) >> 4 << 2 * j;
        }
        store_f16(out, d);
        uint16_t high_bits = (uint16_t)high;
        memcpy(out + 2, &high_bits, 2);
        memcpy(out + 4, low, 4);
    }
}
