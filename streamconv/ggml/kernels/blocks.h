/* Shared by the parts of the extension: the types, and the function that each build of body.h defines. */
#ifndef STREAMCONV_BLOCKS_H
#define STREAMCONV_BLOCKS_H

#include <stddef.h>
#include <stdint.h>

enum { F32 = 0, F16 = 1, BF16 = 30 }; /* ggml_type of the rows */

enum {
    SUPER = 256,             /* elements of a super-block */
    N_SUPER = 8,             /* super-blocks at a time */
    PIECE = SUPER * N_SUPER, /* elements at a time */
};

/* The elements whose squares are summed under the root of an importance weight. */
enum { ROOT_NONE, ROOT_ROW, ROOT_BLOCK };

typedef struct {
    int type; /* ggml_type */
    int n_elements, nbytes; /* of a block */
    int n_scales, scale_at; /* F16 numbers of a block, and the offset of the first; they are adjacent */
    int root;               /* ROOT_NONE: the importance itself is the weight */
    float root_factor;      /* times the mean of squares */
    float levels;           /* the largest number of a block whose scale is 1 */
} block_type_t;

enum status { ALL_FITS, NOT_FINITE, BEYOND_F16, OVERWEIGHT };

/* The least magnitude that F16 rounds to infinity. An element of this times `levels` does not fit any scale; searches
   whose sums overflow often turn its block into zeros. */
#define LEAST_BEYOND_F16 65520.0f
/* The largest product of a weight and an element of its block (or 1) with which no sum of a search exceeds F32: there
   are at most 16 sums of 32 products, times the squares of quants up to 63. */
#define MOST_WEIGHT 1e32f

typedef struct {
    enum status status;
    int64_t element; /* the first that is not finite, or the first in the block that does not fit */
} outcome_t;

typedef struct {
    const block_type_t *type;
    int source;
    const uint8_t *rows;
    int64_t n_elements, n_per_row;
    const float *importance; /* n_per_row numbers, or NULL */
    uint8_t *out;
} request_t;

outcome_t quantise_baseline(const request_t *request);
outcome_t quantise_avx2(const request_t *request);

#endif
