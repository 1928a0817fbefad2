/* Vectors of VECTOR_NBYTES and the operations that the searches need, with the vector types of GCC and clang.
 *
 * A lane is one sub-block (or one block). Each lane sums its elements from the first to the last, as scalar code would,
 * so that the bytes do not depend on the width of vectors.
 */
#include "halves.h"

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

typedef float floats_t __attribute__((vector_size(VECTOR_NBYTES)));
typedef int32_t ints_t __attribute__((vector_size(VECTOR_NBYTES)));

enum {
    LANES = VECTOR_NBYTES / 4,
    N_VECTORS = 4,             /* searched at a time: enough independent divisions to hide their latency */
    PAIR = 2,                  /* of them in an inner loop: as many as fit in 16 registers */
    GROUP = N_VECTORS * LANES, /* sub-blocks that are searched at a time */
};

#define ROUNDER 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer, half to even */
#define ROUNDER_BITS 0x4b400000

/* Hides a constant from the compiler, which would turn max(a, b) with a known operand into a comparison and a blend. */
static volatile const float ROUNDER_UNKNOWN = ROUNDER;

INLINE floats_t splat(float value) { return value - (floats_t){0}; }
INLINE ints_t splat_int(int32_t value) { return value - (ints_t){0}; }

INLINE floats_t load(const float *from) {
    floats_t vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}
INLINE void store(float *to, floats_t vector) { memcpy(to, &vector, sizeof vector); }
INLINE void store_ints(int32_t *to, ints_t vector) { memcpy(to, &vector, sizeof vector); }

INLINE floats_t to_floats(ints_t vector) { return __builtin_convertvector(vector, floats_t); }

INLINE floats_t choose(ints_t mask, floats_t yes, floats_t no) {
    return (floats_t)((mask & (ints_t)yes) | (~mask & (ints_t)no));
}
INLINE ints_t choose_ints(ints_t mask, ints_t yes, ints_t no) { return (mask & yes) | (~mask & no); }

/* a < b ? a : b and a > b ? a : b: the second operand if they are equal or one is a NaN. */
INLINE floats_t lesser(floats_t a, floats_t b) {
    floats_t result;
    for (int i = 0; i < LANES; i++) result[i] = a[i] < b[i] ? a[i] : b[i];
    return result;
}
INLINE floats_t greater(floats_t a, floats_t b) {
    floats_t result;
    for (int i = 0; i < LANES; i++) result[i] = a[i] > b[i] ? a[i] : b[i];
    return result;
}
INLINE ints_t lesser_ints(ints_t a, ints_t b) {
    ints_t result;
    for (int i = 0; i < LANES; i++) result[i] = a[i] < b[i] ? a[i] : b[i];
    return result;
}
INLINE ints_t greater_ints(ints_t a, ints_t b) {
    ints_t result;
    for (int i = 0; i < LANES; i++) result[i] = a[i] > b[i] ? a[i] : b[i];
    return result;
}

INLINE floats_t magnitude(floats_t vector) { return (floats_t)((ints_t)vector & 0x7fffffff); }
INLINE floats_t square_root(floats_t vector) {
    floats_t result;
    for (int i = 0; i < LANES; i++) result[i] = __builtin_sqrtf(vector[i]);
    return result;
}

/* Swaps the numbers of lanes whose indices differ by `apart`, a power of two. */
#if VECTOR_NBYTES == 32
#define LANE_NUMBERS ((ints_t){0, 1, 2, 3, 4, 5, 6, 7})
#else
#define LANE_NUMBERS ((ints_t){0, 1, 2, 3})
#endif
INLINE floats_t exchange(floats_t vector, int apart) {
#if !defined(__clang__)
    return __builtin_shuffle(vector, LANE_NUMBERS ^ apart);
#elif VECTOR_NBYTES == 32
    return apart == 4   ? __builtin_shufflevector(vector, vector, 4, 5, 6, 7, 0, 1, 2, 3)
           : apart == 2 ? __builtin_shufflevector(vector, vector, 2, 3, 0, 1, 6, 7, 4, 5)
                        : __builtin_shufflevector(vector, vector, 1, 0, 3, 2, 5, 4, 7, 6);
#else
    return apart == 2 ? __builtin_shufflevector(vector, vector, 2, 3, 0, 1)
                      : __builtin_shufflevector(vector, vector, 1, 0, 3, 2);
#endif
}

/* The least and the largest lane, in every lane. */
INLINE floats_t least_of_all(floats_t vector) {
    if (LANES == 8) vector = lesser(vector, exchange(vector, LANES / 2));
    vector = lesser(vector, exchange(vector, 2));
    return lesser(vector, exchange(vector, 1));
}
INLINE floats_t largest_of_all(floats_t vector) {
    if (LANES == 8) vector = greater(vector, exchange(vector, LANES / 2));
    vector = greater(vector, exchange(vector, 2));
    return greater(vector, exchange(vector, 1));
}

INLINE int any(ints_t mask) {
    int32_t found = 0;
    for (int i = 0; i < LANES; i++) found |= mask[i];
    return found != 0;
}

/* ggml's nearest_int, with the same results for infinities, NaNs and numbers beyond 2^22. */
INLINE int32_t nearest(float value) {
    return (int32_t)(bits_of_float(value + ROUNDER) & 0x007fffff) - 0x00400000;
}
INLINE ints_t nearest_ints(floats_t vector) {
    return ((ints_t)(vector + ROUNDER) & 0x007fffff) - 0x00400000;
}
INLINE int32_t clamped(int32_t value, int32_t low, int32_t high) {
    return value < low ? low : value > high ? high : value;
}
INLINE ints_t clamped_ints(ints_t vector, int32_t low, int32_t high) {
    return lesser_ints(greater_ints(vector, splat_int(low)), splat_int(high));
}

typedef float quad_t __attribute__((vector_size(16)));
typedef int32_t quad_ints_t __attribute__((vector_size(16)));
#ifdef __clang__
#define SHUFFLE_TWO(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE_TWO(a, b, ...) __builtin_shuffle(a, b, (quad_ints_t){__VA_ARGS__})
#endif

/* `n_lanes` runs of n elements become n rows of n_lanes; both are multiples of 4. */
INLINE void transpose(const float *from, int n, int n_lanes, float *to) {
    for (int lane = 0; lane < n_lanes; lane += 4)
        for (int i = 0; i < n; i += 4) {
            quad_t runs[4];
            UNROLL for (int j = 0; j < 4; j++) memcpy(&runs[j], from + (lane + j) * n + i, sizeof runs[j]);
            quad_t a = SHUFFLE_TWO(runs[0], runs[1], 0, 4, 1, 5), b = SHUFFLE_TWO(runs[0], runs[1], 2, 6, 3, 7);
            quad_t c = SHUFFLE_TWO(runs[2], runs[3], 0, 4, 1, 5), d = SHUFFLE_TWO(runs[2], runs[3], 2, 6, 3, 7);
            runs[0] = SHUFFLE_TWO(a, c, 0, 1, 4, 5);
            runs[1] = SHUFFLE_TWO(a, c, 2, 3, 6, 7);
            runs[2] = SHUFFLE_TWO(b, d, 0, 1, 4, 5);
            runs[3] = SHUFFLE_TWO(b, d, 2, 3, 6, 7);
            UNROLL for (int j = 0; j < 4; j++) memcpy(to + (i + j) * n_lanes + lane, &runs[j], sizeof runs[j]);
        }
}
