/* The searches with vectors of 32 bytes, for machines with AVX2, but without FMA, which would change the bytes. */
typedef int not_empty_t;

#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define VECTOR_NBYTES 32
#define QUANTISE quantise_avx2
#include "body.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
