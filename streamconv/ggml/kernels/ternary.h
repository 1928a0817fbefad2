/* TQ1_0 and TQ2_0: super-blocks of a scale and quants of -1, 0 and 1. An importance matrix makes no difference. */

/* Quants from 0 to 2 of a super-block; returns the scale. */
INLINE float ternary_levels(const float *x, int32_t *levels) {
    floats_t largest = splat(0);
    for (int i = 0; i < SUPER; i += LANES) largest = greater(magnitude(load(x + i)), largest);
    float d = largest_of_all(largest)[0], inverse = d != 0 ? 1 / d : 0;
    if (inverse > 0x1.fffffep127f) inverse = 0; /* in ggml, numbers beyond the range of integers become zeros */
    for (int i = 0; i < SUPER; i += LANES) {
        floats_t product = load(x + i) * inverse;
        /* Rounds half away from zero: with the predecessor of 0.5, numbers just below a half are still rounded down. */
        ints_t half = ((ints_t)product & INT32_MIN) | 0x3effffff;
        store_ints(levels + i, __builtin_convertvector(product + (floats_t)half, ints_t) + 1);
    }
    return d;
}

static void tq2_0(const float *x, const float *w, int n_blocks, uint8_t *out) {
    (void)w;
    for (int block = 0; block < n_blocks; block++, x += SUPER, out += 66) {
        int32_t levels[SUPER];
        store_f16(out + 64, ternary_levels(x, levels));
        pack_two_bits(levels, out);
    }
}

/* `n_trits` quants, `apart` from each other, as a byte: a fraction of 256 whose digits in base 3 are the quants. */
INLINE uint8_t pack_trits(const int32_t *levels, int n_trits, int apart) {
    int32_t q = 0;
    for (int i = 0; i < 5; i++) q = 3 * q + (i < n_trits ? levels[i * apart] : 0);
    return (uint8_t)((q * 256 + 242) / 243);
}

static void tq1_0(const float *x, const float *w, int n_blocks, uint8_t *out) {
    (void)w;
    for (int block = 0; block < n_blocks; block++, x += SUPER, out += 54) {
        int32_t levels[SUPER];
        store_f16(out + 52, ternary_levels(x, levels));
        for (int i = 0; i < 32; i++) out[i] = pack_trits(levels + i, 5, 32);
        for (int i = 0; i < 16; i++) out[32 + i] = pack_trits(levels + 160 + i, 5, 16);
        for (int i = 0; i < 4; i++) out[48 + i] = pack_trits(levels + 240 + i, 4, 4);
    }
}
