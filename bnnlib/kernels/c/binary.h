/* Shapes, vectors and bits: what the kernels share. Each instruction set has its own object, built
   from the same sources with its own widths. */
#ifndef BINARY_H
#define BINARY_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512VPOPCNTDQ__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define AVX512 1
#define LANES 16 /* floats in a vector */
#define BLOCK 32 /* outputs that are summed side by side */
#include <immintrin.h>
#elif defined(__AVX2__)
#define AVX2 1
#define LANES 8
#define BLOCK 64
#include <immintrin.h>
#else
#define LANES 4
#define BLOCK 16
#endif

#define TILE 4      /* positions that share the weights which they load */
#define SMALL 16384 /* words; fewer are done by one thread before another has woken up */
#define ALWAYS static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

typedef float vf __attribute__((vector_size(4 * LANES)));

/* A convolution: inputs (n, h, w, c), outputs (n, oh, ow, o); words = ceil(c / 64); inputs are
   `low` (-1 or 0) and 1. */
typedef struct {
    long n, h, w, c, o, kh, kw, sh, sw, ph, pw, oh, ow, words, low, threads;
} Shape;

typedef struct { long first, last; } Range; /* first <= i < last */

ALWAYS long lesser(long a, long b) { return a < b ? a : b; }
ALWAYS long greater(long a, long b) { return a > b ? a : b; }

/* The taps of a kernel that lie inside the image for output i. */
ALWAYS Range inside(long i, long step, long pad, long taps, long size) {
    long start = i * step - pad;
    return (Range){greater(0, -start), lesser(taps, size - start)};
}

/* Memory at a cache line's start; everything here is small beside the tensors. */
ALWAYS void *allocate(size_t bytes) {
    return aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
}

#endif
