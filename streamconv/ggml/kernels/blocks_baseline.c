/* The searches with vectors of 16 bytes, which every x86-64 and aarch64 machine has. */
#define VECTOR_NBYTES 16
#define QUANTISE quantise_baseline
#include "body.h"
