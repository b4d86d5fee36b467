/* The binary layer itself. Of two signs the product is -1 where their bits differ, so that 64
   products and their sum are one xor and one popcount. */
#include "binary.h"

/* ---------------------------------------------------------------------------- floats to bits

   bit = x > 0. Sorts the values on its way, so that no caller has to promise what they are: the
   result has bit 0 set where one is not -1 or 1, bit 1 where one is not 0 or 1. With `latent` the
   bit is x >= 0, and the result is 3 where a value is no number. */

ALWAYS uint64_t pack_word(const float *x, long count, int latent, unsigned *other) {
    uint64_t word = 0;
    unsigned not_signs = 0, not_steps = 0;
    long i = 0;
#if AVX512
    const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1);
    for (; i < count; i += 16) {
        __mmask16 there = count - i >= 16 ? 0xffff : (1u << (count - i)) - 1;
        __m512 v = _mm512_maskz_loadu_ps(there, x + i);
        __mmask16 set = latent ? _mm512_mask_cmp_ps_mask(there, v, zero, _CMP_GE_OQ)
                               : _mm512_mask_cmp_ps_mask(there, v, zero, _CMP_GT_OQ);
        word |= (uint64_t)set << i;
        if (latent) {
            not_signs |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        } else {
            __mmask16 no_one = _mm512_mask_cmp_ps_mask(there, _mm512_abs_ps(v), one, _CMP_NEQ_UQ);
            not_signs |= no_one;
            not_steps |= no_one & _mm512_cmp_ps_mask(v, zero, _CMP_NEQ_UQ);
            not_steps |= _mm512_mask_cmp_ps_mask(there, v, zero, _CMP_LT_OQ);
        }
    }
#else
#if AVX2
    const __m256 zero = _mm256_setzero_ps(), one = _mm256_set1_ps(1), minus = _mm256_set1_ps(-0.0f);
    for (; i + 8 <= count; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i), set;
        set = latent ? _mm256_cmp_ps(v, zero, _CMP_GE_OQ) : _mm256_cmp_ps(v, zero, _CMP_GT_OQ);
        word |= (uint64_t)_mm256_movemask_ps(set) << i;
        if (latent) {
            not_signs |= _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        } else {
            unsigned no_one = _mm256_movemask_ps(
                _mm256_cmp_ps(_mm256_andnot_ps(minus, v), one, _CMP_NEQ_UQ));
            not_signs |= no_one;
            not_steps |= no_one & _mm256_movemask_ps(_mm256_cmp_ps(v, zero, _CMP_NEQ_UQ));
            not_steps |= _mm256_movemask_ps(_mm256_cmp_ps(v, zero, _CMP_LT_OQ));
        }
    }
#endif
    for (; i < count; i++) {
        float v = x[i];
        word |= (uint64_t)(latent ? v >= 0 : v > 0) << i;
        not_signs |= latent ? v != v : !(v == 1 || v == -1);
        not_steps |= !latent && !(v == 1 || v == 0);
    }
#endif
    *other |= latent ? (not_signs ? 3 : 0) : (not_signs ? 1 : 0) | (not_steps ? 2 : 0);
    return word;
}

/* (rows, c) numbers as (rows, words); stops at the first row that is of neither kind. */
EXPORT long pack(const float *x, long rows, long c, long latent, long threads, uint64_t *words) {
    const long per_row = (c + 63) / 64;
    unsigned other = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : other) \
    if (rows * per_row > SMALL)
    for (long row = 0; row < rows; row++)
        if (other != 3)
            for (long j = 0; j < per_row; j++)
                words[row * per_row + j] =
                    pack_word(x + row * c + 64 * j, lesser(64, c - 64 * j), latent, &other);
    return other;
}

/* ------------------------------------------------------------------------- the order of weights

   The outputs of a block lie side by side, for each word of each tap: a vector has one word of
   several outputs. With AVX2, which counts by a table of 16 answers, it is one nibble a byte. */

#if AVX2
typedef uint8_t Weight;
#define PER_WORD 16
#else
typedef uint64_t Weight;
#define PER_WORD 1
#endif

EXPORT long prepared_bytes(long o, long words) { /* words: of all taps of an output */
    return (o + BLOCK - 1) / BLOCK * BLOCK * words * PER_WORD * sizeof(Weight);
}

EXPORT void prepare(const uint64_t *words, long o, long count, long threads, Weight *out) {
#pragma omp parallel for schedule(static) num_threads(threads) if (o * count > SMALL)
    for (long block = 0; block < (o + BLOCK - 1) / BLOCK; block++)
        for (long j = 0; j < count; j++)
            for (long k = 0; k < BLOCK; k++) {
                long i = block * BLOCK + k;
                uint64_t word = i < o ? words[i * count + j] : 0;
                for (long part = 0; part < PER_WORD; part++)
                    out[((block * count + j) * PER_WORD + part) * BLOCK + k] =
                        PER_WORD == 1 ? word : word >> 4 * part & 15;
            }
}

/* ---------------------------------------------------------------------------------- counting

   counts[p][k] = the ones of x[p] ^ weight[k] (or of x[p] & weight[k]) over `rows` rows of taps,
   `count` words each; from row to row x moves on by x_row words, the weights by w_row. `halves`:
   of the outputs of a block, of which the last may have few. */

#if AVX512

ALWAYS void count_ones(int positions, int steps, int halves, const uint64_t *const *x, long x_row,
                       const Weight *weight, long w_row, long rows, long count,
                       int32_t counts[TILE][BLOCK]) {
    __m512i sum[TILE][4];
    for (int p = 0; p < positions; p++)
        for (int v = 0; v < 2 * halves; v++) sum[p][v] = _mm512_setzero_si512();
    for (long row = 0; row < rows; row++)
        for (long j = 0; j < count; j++) {
            const __m512i *w = (const __m512i *)(weight + row * w_row * BLOCK + j * BLOCK);
            for (int p = 0; p < positions; p++) {
                __m512i one = _mm512_set1_epi64(x[p][row * x_row + j]);
                for (int v = 0; v < 2 * halves; v++) {
                    __m512i both =
                        steps ? _mm512_and_si512(one, w[v]) : _mm512_xor_si512(one, w[v]);
                    sum[p][v] = _mm512_add_epi64(sum[p][v], _mm512_popcnt_epi64(both));
                }
            }
        }
    for (int p = 0; p < positions; p++)
        for (int v = 0; v < 2 * halves; v++)
            _mm256_storeu_si256((__m256i *)(counts[p] + 8 * v), _mm512_cvtepi64_epi32(sum[p][v]));
}

#elif AVX2

/* The ones of (nibble ^ weight) or (nibble & weight): for each nibble 16 answers, one a weight. One
   vpshufb looks up those of 32 outputs; no sum of a run of 3 words exceeds a byte. */
static const uint8_t ANSWERS[2][16][16] __attribute__((aligned(64))) = {
#define ONES(n) ((n)&1) + ((n) >> 1 & 1) + ((n) >> 2 & 1) + ((n) >> 3 & 1)
#define ROW(op, a)                                                                                \
    {ONES((a)op 0), ONES((a)op 1), ONES((a)op 2), ONES((a)op 3), ONES((a)op 4), ONES((a)op 5),    \
     ONES((a)op 6), ONES((a)op 7), ONES((a)op 8), ONES((a)op 9), ONES((a)op 10), ONES((a)op 11),  \
     ONES((a)op 12), ONES((a)op 13), ONES((a)op 14), ONES((a)op 15)}
#define TABLE(op)                                                                                 \
    {ROW(op, 0), ROW(op, 1), ROW(op, 2), ROW(op, 3), ROW(op, 4), ROW(op, 5), ROW(op, 6),          \
     ROW(op, 7), ROW(op, 8), ROW(op, 9), ROW(op, 10), ROW(op, 11), ROW(op, 12), ROW(op, 13),      \
     ROW(op, 14), ROW(op, 15)}
    TABLE(^), TABLE(&)};

ALWAYS void count_ones(int positions, int steps, int halves, const uint64_t *const *x, long x_row,
                       const Weight *weight, long w_row, long rows, long count,
                       int32_t counts[TILE][BLOCK]) {
    __m256i wide[TILE][4];
    for (int p = 0; p < positions; p++)
        for (int v = 0; v < 2 * halves; v++) wide[p][v] = _mm256_setzero_si256();
    for (long row = 0; row < rows; row++)
        for (long start = 0; start < count; start += 3) {
            __m256i sum[TILE][2];
            for (int p = 0; p < positions; p++) sum[p][0] = sum[p][1] = _mm256_setzero_si256();
            for (long j = start; j < lesser(count, start + 3); j++) {
                const uint8_t *w = weight + (row * w_row + j) * 16 * BLOCK;
                const uint8_t *bytes[TILE];
                for (int p = 0; p < positions; p++)
                    bytes[p] = (const uint8_t *)(x[p] + row * x_row + j);
                for (int b = 0; b < 8; b++)
                    for (int high = 0; high < 2; high++, w += BLOCK) {
                        const __m256i w0 = _mm256_load_si256((const __m256i *)w);
                        const __m256i w1 = _mm256_load_si256((const __m256i *)(w + 32));
                        for (int p = 0; p < positions; p++) {
                            long entry = high ? bytes[p][b] & 0xf0 : bytes[p][b] << 4 & 0xf0;
                            __m256i answers = _mm256_broadcastsi128_si256(
                                *(const __m128i *)(ANSWERS[steps][0] + entry));
                            __m256i *to = sum[p];
                            to[0] = _mm256_add_epi8(to[0], _mm256_shuffle_epi8(answers, w0));
                            if (halves == 2)
                                to[1] = _mm256_add_epi8(to[1], _mm256_shuffle_epi8(answers, w1));
                            /* in this order: to keep all answers there is no room */
                            __asm__("" : "+x"(sum[p][0]), "+x"(sum[p][1]));
                        }
                    }
            }
            for (int p = 0; p < positions; p++)
                for (int v = 0; v < 2 * halves; v++) {
                    __m256i half = sum[p][v / 2];
                    __m128i part = v % 2 ? _mm256_extracti128_si256(half, 1)
                                         : _mm256_castsi256_si128(half);
                    wide[p][v] = _mm256_add_epi16(wide[p][v], _mm256_cvtepu8_epi16(part));
                }
        }
    for (int p = 0; p < positions; p++)
        for (int v = 0; v < 4 * halves; v++) {
            __m256i half = wide[p][v / 2];
            __m128i part = v % 2 ? _mm256_extracti128_si256(half, 1) : _mm256_castsi256_si128(half);
            _mm256_storeu_si256((__m256i *)(counts[p] + 8 * v), _mm256_cvtepu16_epi32(part));
        }
}

#else

typedef uint64_t vu __attribute__((vector_size(16), aligned(8), may_alias));

/* popcount by halves: pairs of bits, nibbles, bytes; a product adds the bytes. */
ALWAYS vu popcount(vu v) {
    v -= v >> 1 & 0x5555555555555555;
    v = (v & 0x3333333333333333) + (v >> 2 & 0x3333333333333333);
    v = (v + (v >> 4)) & 0x0f0f0f0f0f0f0f0f;
    v += v >> 8;
    v += v >> 16;
    return (v + (v >> 32)) & 127;
}

ALWAYS void count_ones(int positions, int steps, int halves, const uint64_t *const *x, long x_row,
                       const Weight *weight, long w_row, long rows, long count,
                       int32_t counts[TILE][BLOCK]) {
    for (int p = 0; p < positions; p++) {
        vu sum[BLOCK / 2] = {{0}};
        for (long row = 0; row < rows; row++)
            for (long j = 0; j < count; j++) {
                const vu *w = (const vu *)(weight + (row * w_row + j) * BLOCK);
                vu one = (vu){0} + x[p][row * x_row + j];
                for (int v = 0; v < halves * BLOCK / 4; v++)
                    sum[v] += popcount(steps ? one & w[v] : one ^ w[v]);
            }
        for (int k = 0; k < halves * BLOCK / 2; k++) counts[p][k] = sum[k / 2][k % 2];
    }
}

#endif

/* ------------------------------------------------------------------- what becomes of the sums */

typedef struct {
    float *y;              /* sums with a bias as floats, or: */
    const float *bias;
    uint64_t *bits;        /* whether they reach the threshold of their output */
    const int32_t *thresholds;
} Result;

ALWAYS uint64_t reached(const int32_t *sums, const int32_t *thresholds, long count) {
    uint64_t bits = 0;
    long k = 0;
#if AVX512
    for (; k + 16 <= count; k += 16)
        bits |= (uint64_t)_mm512_cmpge_epi32_mask(
                    _mm512_loadu_si512(sums + k), _mm512_loadu_si512(thresholds + k)) << k;
#elif AVX2
    for (; k + 8 <= count; k += 8) {
        __m256i below = _mm256_cmpgt_epi32(_mm256_loadu_si256((const __m256i *)(thresholds + k)),
                                           _mm256_loadu_si256((const __m256i *)(sums + k)));
        bits |= (uint64_t)(~_mm256_movemask_ps(_mm256_castsi256_ps(below)) & 255) << k;
    }
#endif
    for (; k < count; k++) bits |= (uint64_t)(sums[k] >= thresholds[k]) << k;
    return bits;
}

ALWAYS void keep(const Result *to, long position, long first, long outputs, int32_t *sums) {
    const long count = lesser(BLOCK, outputs - first);
    if (to->y) {
        float *y = to->y + position * outputs + first;
        if (to->bias)
            for (long k = 0; k < count; k++) y[k] = (float)sums[k] + to->bias[first + k];
        else
            for (long k = 0; k < count; k++) y[k] = (float)sums[k];
    } else { /* the bits of a block are a whole part of a word; words are little-endian */
        uint64_t bits = reached(sums, to->thresholds + first, count);
        uint8_t *words = (uint8_t *)(to->bits + position * ((outputs + 63) / 64));
        memcpy(words + first / 8, &bits, BLOCK / 8);
    }
}

/* ------------------------------------------------------------------------------ convolution */

/* One tile: output pixels ox ... ox + positions - 1 of a row, which have the same taps inside. */
ALWAYS void tile(int positions, int steps, int halves, const Shape *s, const uint64_t *x,
                 const Weight *weight, long oy, long ox, long image, long block, const Result *to) {
    Range rows = inside(oy, s->sh, s->ph, s->kh, s->h);
    Range taps = inside(ox, s->sw, s->pw, s->kw, s->w);
    const long width = greater(0, taps.last - taps.first);
    const long height = greater(0, rows.last - rows.first);
    const long count = width * s->words;
    const uint64_t *at[TILE];
    int32_t counts[TILE][BLOCK], base[TILE];
    for (int p = 0; p < positions; p++) {
        long iy = oy * s->sh - s->ph + rows.first, ix = (ox + p) * s->sw - s->pw + taps.first;
        at[p] = x + ((image * s->h + iy) * s->w + ix) * s->words;
        base[p] = height * width * s->c;
    }
    if (steps)
        for (int p = 0; p < positions; p++) {
            base[p] = 0;
            for (long row = 0; row < height; row++)
                for (long j = 0; j < count; j++)
                    base[p] -= __builtin_popcountll(at[p][row * s->w * s->words + j]);
        }
    count_ones(positions, steps, halves, at, s->w * s->words,
               weight + (rows.first * s->kw + taps.first) * s->words * PER_WORD * BLOCK,
               s->kw * s->words, height, count, counts);
    for (int p = 0; p < positions; p++) {
        for (int k = 0; k < halves * BLOCK / 2; k++)
            counts[p][k] = base[p] + (steps ? 2 : -2) * counts[p][k];
        keep(to, (image * s->oh + oy) * s->ow + ox + p, block * BLOCK, s->o, counts[p]);
    }
}

/* One row of outputs, in tiles; at its ends a tile has fewer taps and is one pixel wide. */
ALWAYS void sum_row(int steps, int halves, const Shape *s, const uint64_t *x, const Weight *weight,
                    long oy, long image, long block, const Result *to) {
    weight += block * BLOCK * s->kh * s->kw * s->words * PER_WORD;
    for (long ox = 0; ox < s->ow;) {
        Range taps = inside(ox, s->sw, s->pw, s->kw, s->w), last;
        int positions = 1;
        for (; positions < TILE && ox + positions < s->ow; positions++) {
            last = inside(ox + positions, s->sw, s->pw, s->kw, s->w);
            if (last.first != taps.first || last.last != taps.last) break;
        }
        switch (positions) {
            case 1: tile(1, steps, halves, s, x, weight, oy, ox, image, block, to); break;
            case 2: tile(2, steps, halves, s, x, weight, oy, ox, image, block, to); break;
            case 3: tile(3, steps, halves, s, x, weight, oy, ox, image, block, to); break;
            default: tile(4, steps, halves, s, x, weight, oy, ox, image, block, to);
        }
        ox += positions;
    }
}

EXPORT void sums(const Shape *s, const uint64_t *x, const Weight *weight, float *y,
                 const float *bias, uint64_t *bits, const int32_t *thresholds) {
    const Result to = {y, bias, bits, thresholds};
    const long blocks = (s->o + BLOCK - 1) / BLOCK, rows = s->n * s->oh;
#pragma omp parallel for collapse(2) schedule(static) num_threads(s->threads)
    for (long row = 0; row < rows; row++)
        for (long block = 0; block < blocks; block++)
            if (s->low && s->o - block * BLOCK > BLOCK / 2)
                sum_row(0, 2, s, x, weight, row % s->oh, row / s->oh, block, &to);
            else if (s->low)
                sum_row(0, 1, s, x, weight, row % s->oh, row / s->oh, block, &to);
            else
                sum_row(1, 2, s, x, weight, row % s->oh, row / s->oh, block, &to);
}

/* ------------------------------------------------------------------------- the layer of pixels

   Pixels stand for whole numbers. A sum of them with signs is twice that of those whose sign is +,
   less that of all; masks[block of 64 outputs][tap][channel][output] are all ones or all zeros. In
   32 bits the result is right even where a sum on the way was too large. */

typedef uint32_t vp __attribute__((vector_size(4 * LANES)));
#define PIXEL_VECTORS (64 / LANES)

EXPORT void pixel_sums(const Shape *s, const uint8_t *x, const vp *masks, const uint32_t *values,
                       uint64_t *bits, const int32_t *thresholds) {
    const long blocks = (s->o + 63) / 64, terms = s->kh * s->kw * s->c;
#pragma omp parallel for collapse(2) schedule(static) num_threads(s->threads)
    for (long image = 0; image < s->n; image++)
        for (long oy = 0; oy < s->oh; oy++)
            for (long ox = 0; ox < s->ow; ox++)
                for (long block = 0; block < blocks; block++) {
                    Range ky = inside(oy, s->sh, s->ph, s->kh, s->h);
                    Range kx = inside(ox, s->sw, s->pw, s->kw, s->w);
                    vp sum[PIXEL_VECTORS] = {{0}};
                    uint32_t all = 0;
                    for (long y = ky.first; y < ky.last; y++) {
                        long iy = oy * s->sh - s->ph + y, ix = ox * s->sw - s->pw + kx.first;
                        const uint8_t *row = x + ((image * s->h + iy) * s->w + ix) * s->c;
                        const vp *mask =
                            masks + (block * terms + (y * s->kw + kx.first) * s->c) * PIXEL_VECTORS;
                        for (long i = 0; i < (kx.last - kx.first) * s->c; i++) {
                            const uint32_t value = values[row[i]];
                            all += value;
                            for (int v = 0; v < PIXEL_VECTORS; v++) sum[v] += *mask++ & value;
                        }
                    }
                    int32_t signed_sums[64];
                    for (int v = 0; v < PIXEL_VECTORS; v++) sum[v] = 2 * sum[v] - all;
                    memcpy(signed_sums, sum, sizeof signed_sums);
                    const long place = (image * s->oh + oy) * s->ow + ox, first = 64 * block;
                    bits[place * blocks + block] =
                        reached(signed_sums, thresholds + first, lesser(64, s->o - first));
                }
}
