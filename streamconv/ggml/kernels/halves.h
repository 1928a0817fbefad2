/* F16 and BF16 to and from F32 in integer arithmetic: the same with and without machine instructions for them. */
#ifndef STREAMCONV_HALVES_H
#define STREAMCONV_HALVES_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float f16_value(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    /* A subnormal is a multiple of the last place of 0.5: add it to 0.5, and subtract 0.5, which is exact. */
    uint32_t subnormal = bits_of_float(float_of_bits(0x3f000000u | magnitude) - 0.5f);
    uint32_t normal = (magnitude << 13) + (112u << 23) + (magnitude >= 0x7c00 ? 112u << 23 : 0);
    uint32_t is_subnormal = -(uint32_t)(magnitude < 0x400);
    return float_of_bits(sign | (subnormal & is_subnormal) | (normal & ~is_subnormal));
}

/* To nearest even; numbers that are too large become infinities, and a NaN becomes the one that ggml writes. */
INLINE uint16_t f16_of(float value) {
    uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffff;
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00; /* 65520 and more */
    if (magnitude < 0x38800000) return sign | (uint16_t)bits_of_float(float_of_bits(magnitude) + 0.5f);
    return sign | (uint16_t)((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

INLINE uint16_t load_f16(const uint8_t *from) {
    uint16_t half;
    memcpy(&half, from, 2);
    return half;
}

INLINE void store_f16(uint8_t *to, float value) {
    uint16_t half = f16_of(value);
    memcpy(to, &half, 2);
}

#endif
