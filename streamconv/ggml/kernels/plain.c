/* The extension module streamconv.ggml._plain: block types in plain C, the counterpart of block_reference.py in numpy.
 *
 * Verification compares files with its results, since numpy would take ten times as long as the conversion. It shares
 * the call from Python, the table of types and the conversion of F16 and BF16 with the fast kernels (_blocks), but no
 * code that makes blocks. Tests compare it with numpy.
 */
#include "request.h"

#include "plain_searches.h"

/* Makes one super-block, or LANES blocks of 32, of x; w are weights with an importance matrix, else NULL. */
typedef void (*quantiser_t)(const float *x, const float *w, uint8_t *out);

enum { GROUP_32 = 32 * LANES };

/* LANES runs of n elements become n rows of LANES. */
INLINE void to_lanes(const float *from, int n, floats_t *to) {
    for (int i = 0; i < n; i++) EACH_LANE to[i][k] = from[k * n + i];
}

INLINE float f16_rounded(float value) { return f16_value(f16_of(value)); }

/* Truncated towards zero, like the C casts in ggml; numbers beyond int32 become 0. */
INLINE int32_t truncated(float value) { return fabsf(value) < 2147483648.0f ? (int32_t)value : 0; }

/* Quants of a sub-block, from 0 to high - low, for the rounded scale that is stored; if it is 0, they are unchanged. */
INLINE void requantise(const float *x, int n, float scale, float minimum, int low, int high, int32_t *levels) {
    for (int i = 0; i < n && scale != 0; i++) levels[i] = clip(nearest((x[i] + minimum) / scale), low, high) - low;
}

INLINE float largest_positive(const float *numbers, int n) {
    float largest = 0;
    for (int i = 0; i < n; i++) largest = numbers[i] > largest ? numbers[i] : largest;
    return largest;
}

INLINE float first_largest_of(const float *numbers, int n) {
    float top = 0;
    for (int i = 0; i < n; i++) top = fabsf(numbers[i]) > fabsf(top) ? numbers[i] : top;
    return top;
}

/* --- 32 elements, one scale --- */

/* The fifth bits if the type has them, then the low nibbles. */
INLINE void pack_32(const int32_t *levels, int n_max, uint8_t *out) {
    uint32_t high = 0;
    for (int i = 0; i < 32; i++) high |= (uint32_t)(levels[i] >> 4 & 1) << i;
    if (n_max == 31) memcpy(out, &high, 4), out += 4;
    for (int i = 0; i < 16; i++) out[i] = (uint8_t)((levels[i] & 15) | (levels[i + 16] & 15) << 4);
}

/* Q4_0 and Q5_0 of a block without an importance matrix. */
INLINE float symmetric_32(const float *x, int n_max, int32_t *levels) {
    float half = (float)((n_max + 1) / 2), d = first_largest_of(x, 32) / -half, inverse = d != 0 ? 1 / d : 0;
    for (int i = 0; i < 32; i++) {
        int32_t l = truncated(x[i] * inverse + (half + 0.5f));
        levels[i] = isinf(inverse) ? 0 : l < n_max ? l : n_max;
    }
    return d;
}

/* Q4_1 and Q5_1; of zeros with different signs, the first is the minimum. */
INLINE float affine_32(const float *x, int n_max, float *minimum, int32_t *levels) {
    float low = x[0], high = x[0];
    for (int i = 1; i < 32; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    float d = (high - low) / (float)n_max, inverse = d != 0 ? 1 / d : 0;
    for (int i = 0; i < 32; i++) {
        int32_t l = truncated((x[i] - low) * inverse + 0.5f);
        levels[i] = isinf(inverse) ? 0 : l < n_max ? l : n_max;
    }
    *minimum = low;
    return d;
}

INLINE void legacy(const float *x, const float *w, int n_max, int has_minimum, uint8_t *out) {
    floats_t xt[32], wt[32], scale, minimum;
    ints_t quants[32];
    fill(minimum, 0);
    if (w != NULL) {
        to_lanes(x, 32, xt);
        to_lanes(w, 32, wt);
        if (has_minimum)
            qkx(32, (const floats_t *)xt, (const floats_t *)wt, (affine_t){n_max, -0.9f, 0.05f, 36, 0, 1}, scale, minimum, quants);
        else
            qx(32, (const floats_t *)xt, (const floats_t *)wt, (n_max + 1) / 2, scale, quants);
    }
    EACH_LANE {
        int32_t levels[32];
        float low = -minimum[k], d;
        if (w != NULL) {
            for (int i = 0; i < 32; i++) levels[i] = quants[i][k];
            d = scale[k];
        } else {
            d = has_minimum ? affine_32(x + 32 * k, n_max, &low, levels) : symmetric_32(x + 32 * k, n_max, levels);
        }
        store_f16(out, d);
        if (has_minimum) store_f16(out + 2, low);
        out += has_minimum ? 4 : 2;
        pack_32(levels, n_max, out);
        out += n_max == 31 ? 20 : 16;
    }
}

static void q4_0(const float *x, const float *w, uint8_t *out) { legacy(x, w, 15, 0, out); }
static void q4_1(const float *x, const float *w, uint8_t *out) { legacy(x, w, 15, 1, out); }
static void q5_0(const float *x, const float *w, uint8_t *out) { legacy(x, w, 31, 0, out); }
static void q5_1(const float *x, const float *w, uint8_t *out) { legacy(x, w, 31, 1, out); }

/* --- IQ4 --- */

/* Scales of LANES blocks; weights are x * x without an importance matrix. */
INLINE void iq4_scales(const float *x, const float *w, floats_t scale) {
    floats_t xt[32], wt[32];
    to_lanes(x, 32, xt);
    if (w != NULL) to_lanes(w, 32, wt);
    for (int i = 0; i < 32 && w == NULL; i++) EACH_LANE wt[i][k] = xt[i][k] * xt[i][k];
    iq4((const floats_t *)xt, (const floats_t *)wt, scale);
}

INLINE void pack_iq4(const float *x, float scale, uint8_t *out) {
    float inverse = scale != 0 ? 1 / scale : 0;
    for (int i = 0; i < 16; i++)
        out[i] = (uint8_t)(iq4_place(x[i] * inverse) | iq4_place(x[i + 16] * inverse) << 4);
}

static void iq4_nl(const float *x, const float *w, uint8_t *out) {
    floats_t scale;
    iq4_scales(x, w, scale);
    EACH_LANE {
        store_f16(out + 18 * k, scale[k]);
        pack_iq4(x + 32 * k, scale[k], out + 18 * k + 2);
    }
}

static void iq4_xs(const float *x, const float *w, uint8_t *out) {
    floats_t scale;
    iq4_scales(x, w, scale);
    float d = -first_largest_of(scale, 8) / 32, inverse = d != 0 ? 1 / d : 0;
    memset(out, 0, 8);
    store_f16(out, d);
    for (int j = 0; j < 8; j++) {
        int32_t l = clip(nearest(inverse * scale[j]), -32, 31), code = l + 32;
        out[2 + j / 4] |= (uint8_t)(code >> 4 << 2 * (j % 4));
        out[4 + j / 2] |= (uint8_t)((code & 15) << 4 * (j % 2));
        pack_iq4(x + 32 * j, d * (float)l, out + 8 + 16 * j);
    }
}

/* --- super-blocks with scales and minima: Q2_K, Q4_K, Q5_K --- */

/* The result of the search in n_subs sub-blocks of n elements: codes of scales and minima, and their factors. */
typedef struct {
    float scale[16], minimum[16], sum_w[16];
    int32_t levels[SUPER], scale_code[16], minimum_code[16];
    float d, d_minimum;
} found_t;

INLINE float codes_of(const float *numbers, const float *w, int n, int top, int weighted, int32_t *codes) {
    if (weighted) return qp(n, numbers, w, top, codes);
    float largest = largest_positive(numbers, n), inverse = largest > 0 ? (float)top / largest : 0;
    for (int j = 0; j < n; j++) codes[j] = nearest(inverse * numbers[j]) & 255;
    return largest / (float)top;
}

INLINE void search_minima(const float *x, const float *w, int n, int top, affine_t how, found_t *found) {
    if (w != NULL) how = (affine_t){how.n_max, -0.9f, 0.05f, 36, 0, 1};
    const int n_subs = SUPER / n;
    for (int first = 0; first < n_subs; first += LANES) {
        floats_t xt[32], wt[32], sum_w, squares;
        ints_t quants[32];
        to_lanes(x + first * n, n, xt);
        if (w != NULL) to_lanes(w + first * n, n, wt);
        fill(squares, 0);
        for (int i = 0; i < n; i++) EACH_LANE squares[k] += xt[i][k] * xt[i][k];
        for (int i = 0; i < n && w == NULL; i++)
            EACH_LANE wt[i][k] = how.absolute ? fabsf(xt[i][k]) : sqrtf(squares[k] / (float)n) + fabsf(xt[i][k]);
        fill(sum_w, 0);
        for (int i = 0; i < n; i++) EACH_LANE sum_w[k] += wt[i][k];
        qkx(n, (const floats_t *)xt, (const floats_t *)wt, how, found->scale + first, found->minimum + first, quants);
        memcpy(found->sum_w + first, sum_w, sizeof sum_w);
        for (int i = 0; i < n; i++) EACH_LANE found->levels[(first + k) * n + i] = quants[i][k];
    }
    found->d = codes_of(found->scale, found->sum_w, n_subs, top, w != NULL, found->scale_code);
    found->d_minimum = codes_of(found->minimum, found->sum_w, n_subs, top, w != NULL, found->minimum_code);
}

INLINE void six_bit_scales(const float *x, const float *w, affine_t how, uint8_t *out) {
    found_t found;
    search_minima(x, w, 32, 63, how, &found);
    for (int j = 0; j < 8 && (w == NULL || how.n_max == 31); j++) {
        found.scale_code[j] = found.scale_code[j] < 63 ? found.scale_code[j] : 63;
        found.minimum_code[j] = found.minimum_code[j] < 63 ? found.minimum_code[j] : 63;
    }
    store_f16(out, found.d);
    store_f16(out + 2, found.d_minimum);
    uint8_t *packed = out + 4;
    const int32_t *s = found.scale_code, *m = found.minimum_code;
    for (int j = 0; j < 4; j++) {
        packed[j] = (uint8_t)(s[j] | s[j + 4] >> 4 << 6);
        packed[4 + j] = (uint8_t)(m[j] | m[j + 4] >> 4 << 6);
        packed[8 + j] = (uint8_t)((s[j + 4] & 15) | (m[j + 4] & 15) << 4);
    }
    for (int j = 0; j < 8; j++) { /* unpacked again, since a code above 63 spills into another one */
        int scale = j < 4 ? packed[j] & 63 : (packed[j + 4] & 15) | packed[j - 4] >> 6 << 4;
        int minimum = j < 4 ? packed[j + 4] & 63 : packed[j + 4] >> 4 | packed[j] >> 6 << 4;
        requantise(x + 32 * j, 32, f16_rounded(found.d) * (float)scale, f16_rounded(found.d_minimum) * (float)minimum,
                   0, how.n_max, found.levels + 32 * j);
    }
    out += 16;
    const int32_t *l = found.levels;
    for (int i = 0; i < 32 && how.n_max == 31; i++) {
        int bits = 0;
        for (int j = 0; j < 8; j++) bits |= l[32 * j + i] >> 4 << j;
        out[i] = (uint8_t)bits;
    }
    if (how.n_max == 31) out += 32;
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 32; i++) out[32 * j + i] = (uint8_t)((l[64 * j + i] & 15) | (l[64 * j + 32 + i] & 15) << 4);
}

static void q4_k(const float *x, const float *w, uint8_t *out) {
    six_bit_scales(x, w, (affine_t){15, -1.0f, 0.1f, 20, 0, 0}, out);
}
static void q5_k(const float *x, const float *w, uint8_t *out) {
    six_bit_scales(x, w, (affine_t){31, -0.5f, 0.1f, 15, 0, 0}, out);
}

/* The low two bits of 256. */
INLINE void pack_two_bits(const int32_t *l, uint8_t *out) {
    for (int i = 0; i < 64; i++) {
        const int32_t *at = l + i / 32 * 128 + i % 32;
        out[i] = (uint8_t)((at[0] & 3) | (at[32] & 3) << 2 | (at[64] & 3) << 4 | (at[96] & 3) << 6);
    }
}

static void q2_k(const float *x, const float *w, uint8_t *out) {
    found_t found;
    search_minima(x, w, 16, 15, (affine_t){3, -0.5f, 0.1f, 15, 1, 0}, &found);
    store_f16(out + 80, found.d);
    store_f16(out + 82, found.d_minimum);
    for (int j = 0; j < 16; j++) {
        out[j] = (uint8_t)(found.scale_code[j] | found.minimum_code[j] << 4);
        requantise(x + 16 * j, 16, f16_rounded(found.d) * (float)(out[j] & 15),
                   f16_rounded(found.d_minimum) * (float)(out[j] >> 4), 0, 3, found.levels + 16 * j);
    }
    pack_two_bits(found.levels, out + 16);
}

/* --- super-blocks with signed scales: Q3_K, Q6_K --- */

INLINE void search_signed(const float *x, const float *w, int n_max, int stepwise, found_t *found) {
    for (int first = 0; first < 16; first += LANES) {
        floats_t xt[16], wt[16], sum_w;
        ints_t quants[16];
        to_lanes(x + first * 16, 16, xt);
        if (w != NULL) to_lanes(w + first * 16, 16, wt);
        for (int i = 0; i < 16 && w == NULL; i++) EACH_LANE wt[i][k] = xt[i][k] * xt[i][k];
        fill(sum_w, 0);
        for (int i = 0; i < 16; i++) EACH_LANE sum_w[k] += wt[i][k];
        if (stepwise)
            q3(16, (const floats_t *)xt, found->scale + first, quants);
        else
            qx(16, (const floats_t *)xt, (const floats_t *)wt, n_max, found->scale + first, quants);
        memcpy(found->sum_w + first, sum_w, sizeof sum_w);
        for (int i = 0; i < 16; i++) EACH_LANE found->levels[(first + k) * 16 + i] = quants[i][k];
    }
}

/* qx of the 16 scales of a super-block, in one lane. */
INLINE float codes_with_weights(const float *scales, const float *sum_w, int32_t *codes) {
    floats_t xt[16] = {{0}}, wt[16] = {{0}}, scale;
    ints_t quants[16];
    for (int j = 0; j < 16; j++) xt[j][0] = scales[j], wt[j][0] = sum_w[j];
    qx(16, (const floats_t *)xt, (const floats_t *)wt, 32, scale, quants);
    for (int j = 0; j < 16; j++) codes[j] = quants[j][0];
    return scale[0];
}

static void q3_k(const float *x, const float *w, uint8_t *out) {
    found_t found;
    search_signed(x, w, 4, w == NULL, &found);
    int32_t *codes = found.scale_code;
    if (w != NULL) {
        found.d = codes_with_weights(found.scale, found.sum_w, codes);
    } else {
        float top = first_largest_of(found.scale, 16), inverse = -32 / top;
        for (int j = 0; j < 16; j++)
            codes[j] = top != 0 ? clip((int8_t)nearest(inverse * found.scale[j]), -32, 31) + 32 : 0;
        found.d = top != 0 ? 1 / inverse : 0;
    }
    memset(out, 0, 110);
    store_f16(out + 108, found.d);
    for (int j = 0; j < 16; j++) {
        out[96 + j % 8] |= (uint8_t)((codes[j] & 15) << 4 * (j / 8));
        out[104 + j % 4] |= (uint8_t)((codes[j] >> 4 & 3) << 2 * (j / 4));
        requantise(x + 16 * j, 16, f16_rounded(found.d) * (float)(codes[j] - 32), 0, -4, 3, found.levels + 16 * j);
    }
    for (int i = 0; i < SUPER; i++) out[i % 32] |= (uint8_t)(found.levels[i] >> 2 << i / 32);
    pack_two_bits(found.levels, out + 32);
}

static void q6_k(const float *x, const float *w, uint8_t *out) {
    found_t found;
    search_signed(x, w, 32, 0, &found);
    float top = first_largest_of(found.scale, 16), inverse = -128 / top;
    memset(out, 0, 210);
    if (fabsf(top) < LEAST_MAGNITUDE) return;
    store_f16(out + 208, 1 / inverse);
    for (int j = 0; j < 16; j++) {
        int32_t code = nearest(inverse * found.scale[j]);
        int8_t scale = (int8_t)(code < 127 ? code : 127);
        out[192 + j] = (uint8_t)scale;
        requantise(x + 16 * j, 16, f16_rounded(1 / inverse) * (float)scale, 0, -32, 31, found.levels + 16 * j);
    }
    for (int i = 0; i < SUPER; i++) { /* for each 128: high bits, two each, and low nibbles of two runs of 32 */
        int half = i / 128, run = i / 32 % 4, at = i % 32, l = found.levels[i];
        out[64 * half + 32 * (run % 2) + at] |= (uint8_t)((l & 15) << 4 * (run / 2));
        out[128 + 32 * half + at] |= (uint8_t)(l >> 4 << 2 * run);
    }
}

/* --- TQ1_0, TQ2_0 --- */

INLINE float ternary(const float *x, int32_t *levels) {
    float d = fabsf(first_largest_of(x, SUPER)), inverse = d != 0 ? 1 / d : 0;
    if (isinf(inverse)) inverse = 0; /* in ggml, numbers beyond the range of integers become zeros */
    for (int i = 0; i < SUPER; i++) levels[i] = (int32_t)roundf(x[i] * inverse) + 1;
    return d;
}

static void tq2_0(const float *x, const float *w, uint8_t *out) {
    int32_t levels[SUPER];
    (void)w;
    store_f16(out + 64, ternary(x, levels));
    pack_two_bits(levels, out);
}

/* Five trits, `apart` from each other, as a byte: a fraction of 256 whose digits in base 3 are the trits. */
INLINE uint8_t trits(const int32_t *levels, int n, int apart) {
    int q = 0;
    for (int i = 0; i < 5; i++) q = 3 * q + (i < n ? levels[i * apart] : 0);
    return (uint8_t)((q * 256 + 242) / 243);
}

static void tq1_0(const float *x, const float *w, uint8_t *out) {
    int32_t levels[SUPER];
    (void)w;
    store_f16(out + 52, ternary(x, levels));
    for (int i = 0; i < 32; i++) out[i] = trits(levels + i, 5, 32);
    for (int i = 0; i < 16; i++) out[32 + i] = trits(levels + 160 + i, 5, 16);
    for (int i = 0; i < 4; i++) out[48 + i] = trits(levels + 240 + i, 4, 4);
}

/* --- rows --- */

static quantiser_t quantiser_of(int type) {
    static const struct {
        int type;
        quantiser_t quantiser;
    } all[] = {{2, q4_0},  {3, q4_1},  {6, q5_0},  {7, q5_1},    {10, q2_k},   {11, q3_k}, {12, q4_k},
               {13, q5_k}, {14, q6_k}, {20, iq4_nl}, {23, iq4_xs}, {34, tq1_0}, {35, tq2_0}};
    for (int i = 0; i < (int)(sizeof all / sizeof *all); i++)
        if (all[i].type == type) return all[i].quantiser;
    return NULL; /* not reached: these are all BLOCK_TYPES */
}

INLINE float element(const request_t *request, int64_t i) {
    if (request->source != F32) {
        uint16_t half = load_f16(request->rows + 2 * i);
        return request->source == F16 ? f16_value(half) : float_of_bits((uint32_t)half << 16);
    }
    float value;
    memcpy(&value, request->rows + 4 * i, 4);
    return value;
}

/* The sum of squares of n elements from `start` on, in order. */
INLINE float squares(const request_t *request, int64_t start, int64_t n) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += element(request, start + i) * element(request, start + i);
    return sum;
}

/* The weights of the block that starts at `start`; `mean` is the mean of squares of its row. */
INLINE void weigh(const request_t *request, int64_t start, float mean, float *w) {
    const block_type_t *type = request->type;
    const float *importance = request->importance + start % request->n_per_row;
    if (type->root == ROOT_BLOCK)
        mean = type->root_factor * squares(request, start, type->n_elements) / (float)type->n_elements;
    for (int i = 0; i < type->n_elements; i++) {
        float at = element(request, start + i);
        w[i] = type->root == ROOT_NONE ? importance[i] : importance[i] * sqrtf(mean + at * at);
    }
}

/* Whether a block with its n elements x and weights w fits: ALL_FITS, BEYOND_F16 or OVERWEIGHT. */
INLINE enum status fit(const block_type_t *type, const float *x, const float *w, const uint8_t *made) {
    float largest = fabsf(first_largest_of(x, type->n_elements));
    int beyond = largest >= LEAST_BEYOND_F16 * type->levels;
    for (int i = 0; i < type->n_scales; i++) beyond |= (load_f16(made + type->scale_at + 2 * i) & 0x7c00) == 0x7c00;
    if (beyond) return BEYOND_F16;
    if (w == NULL) return ALL_FITS;
    float most = largest_positive(w, type->n_elements);
    return (largest > 1 ? largest : 1) * most <= MOST_WEIGHT ? ALL_FITS : OVERWEIGHT;
}

static outcome_t quantise_plain(const request_t *request, int baseline) {
    const block_type_t *type = request->type;
    const quantiser_t quantiser = quantiser_of(type->type);
    const int at_a_time = type->n_elements == 32 ? LANES : 1;
    outcome_t outcome = {ALL_FITS, 0};
    float x[GROUP_32], w[GROUP_32], mean = 0;
    int64_t row = -1;
    uint8_t made[24 * LANES > 210 ? 24 * LANES : 210];
    (void)baseline;
    for (int64_t start = 0; start < request->n_elements; start += type->n_elements * at_a_time) {
        int n = GROUP_32 < request->n_elements - start ? GROUP_32 : (int)(request->n_elements - start);
        memset(x, 0, sizeof x);
        memset(w, 0, sizeof w);
        for (int i = 0; i < n; i++) {
            x[i] = element(request, start + i);
            if (!isfinite(x[i])) return (outcome_t){NOT_FINITE, start + i};
        }
        for (int first = 0; first < n && request->importance != NULL; first += type->n_elements) {
            if (type->root == ROOT_ROW && (start + first) / request->n_per_row != row) {
                row = (start + first) / request->n_per_row;
                mean = squares(request, row * request->n_per_row, request->n_per_row) / (float)request->n_per_row;
            }
            weigh(request, start + first, mean, w + first);
        }
        quantiser(x, request->importance != NULL ? w : NULL, made);
        int n_blocks = n / type->n_elements;
        memcpy(request->out + start / type->n_elements * type->nbytes, made, (size_t)(n_blocks * type->nbytes));
        for (int block = 0; block < n_blocks && outcome.status == ALL_FITS; block++) {
            const int first = block * type->n_elements;
            outcome.status = fit(type, x + first, request->importance != NULL ? w + first : NULL, made + block * type->nbytes);
            outcome.element = outcome.status == ALL_FITS ? 0 : start + first;
        }
    }
    return outcome;
}

static PyObject *quantize(PyObject *module, PyObject *args) {
    (void)module;
    return answer_request(args, quantise_plain);
}

static PyMethodDef METHODS[] = {
    {"quantize", quantize, METH_VARARGS,
     "quantize(type, source, rows, n_per_row, importance, out, baseline=False, /)\n--\n\n(status, element), as "
     "streamconv.ggml.blocks says."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot SLOTS[] = {{0, NULL}};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    .m_name = "streamconv.ggml._plain",
    .m_doc = "What the kernels of streamconv.ggml.blocks are compared with in verification.",
    .m_methods = METHODS,
    .m_slots = SLOTS,
};

PyMODINIT_FUNC PyInit__plain(void) { return PyModuleDef_Init(&MODULE); }
