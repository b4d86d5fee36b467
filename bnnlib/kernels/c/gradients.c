/* The gradients: products of signs with real numbers. Four signs can be chosen in 16 ways, so four
   numbers have 16 signed sums. Compute those once; every product then looks its sum up, and one
   addition does the work of four multiplications and additions. (Arlazarov, Dinic, Kronrod and
   Faradzhev, 1970: "the method of four Russians".) */
#include "binary.h"

#define GROUP 4       /* images whose gradients share a table */
#define ENTRIES 16    /* signed sums of a group */
#define OUTPUTS 32    /* outputs of a table, side by side */
#define GROUPS 7      /* tables at a time: 14 KB, which stay in the first cache */
#define VECTORS (OUTPUTS / LANES)

/* ----------------------------------------------------------------------- gradient of the weights

   grad_w[tap][c][o] = sum over places (y, x) and images n of
                       x[n][y + ky][x + kx][c] * g[n][y][x][o]

   Four images give, at one place, four rows of gradients, and their inputs at one tap the number of
   the signed sum. It is the same for every tap that reaches this input, so it is made once. */

/* index[place][c][group] = 16 times the number that the bits of four images make. */
static void make_index(const Shape *s, const uint64_t *x, long groups, uint8_t *index) {
    uint64_t spread[256]; /* the bits of a byte, 16 in a byte each */
    for (int byte = 0; byte < 256; byte++) {
        spread[byte] = 0;
        for (int bit = 0; bit < 8; bit++)
            spread[byte] |= (uint64_t)(byte >> bit & 1) << (8 * bit + 4);
    }
    const long places = s->h * s->w;
#pragma omp parallel for schedule(static) num_threads(s->threads)
    for (long place = 0; place < places; place++)
        for (long group = 0; group < groups; group++)
            for (long c = 0; c < s->c; c += 8) {
                uint64_t eight = 0; /* channels */
                for (long k = 0; k < lesser(GROUP, s->n - GROUP * group); k++) {
                    const uint64_t *words = x + ((GROUP * group + k) * places + place) * s->words;
                    eight |= spread[words[c / 64] >> c % 64 & 255] << k;
                }
                uint8_t *to = index + (place * s->c + c) * groups + group;
                for (long i = 0; i < lesser(8, s->c - c); i++) to[i * groups] = eight >> 8 * i;
            }
}

/* The gradients of 32 outputs in a row of all images, as rows[place][image][output], so that images
   are neighbours; zeros where there is no image or no output. */
static void gather(const Shape *s, const float *grad, long images, long oy, long first,
                   float *rows) {
    const long outputs = lesser(OUTPUTS, s->o - first);
    for (long image = 0; image < s->n; image++)
        for (long ox = 0; ox < s->ow; ox++) {
            float *to = rows + (ox * images + image) * OUTPUTS;
            const float *from = grad + ((image * s->oh + oy) * s->ow + ox) * s->o + first;
            if (outputs == OUTPUTS) memcpy(to, from, 4 * OUTPUTS);
            else memcpy(to, from, 4 * outputs);
        }
}

/* table[i] = the sum over k of row k, negative where bit k of i is 0 (absent, where `steps`). */
ALWAYS void fill(int steps, const float *rows, float table[ENTRIES][OUTPUTS]) {
    for (int v = 0; v < OUTPUTS; v += LANES) {
        vf half[2][4];
        for (int h = 0; h < 2; h++) {
            const vf a = *(const vf *)(rows + 2 * h * OUTPUTS + v);
            const vf b = *(const vf *)(rows + (2 * h + 1) * OUTPUTS + v);
            half[h][0] = steps ? a - a : -a - b;
            half[h][1] = steps ? a : a - b;
            half[h][2] = steps ? b : b - a;
            half[h][3] = a + b;
        }
        for (int i = 0; i < ENTRIES; i++)
            *(vf *)(table[i] + v) = half[0][i & 3] + half[1][i >> 2];
    }
}

/* sums[c] += for each of `groups` tables the entry that the index of c names. */
ALWAYS void look_up(int groups, const float (*tables)[ENTRIES][OUTPUTS], const uint8_t *index,
                    long stride, long channels, float (*sums)[OUTPUTS]) {
    for (long c = 0; c < channels; c++, index += stride) {
        vf sum[VECTORS];
        for (int group = 0; group < groups; group++) {
            const size_t bytes = OUTPUTS / 4 * (size_t)index[group];
            const vf *entry = (const vf *)((const char *)tables[group] + bytes);
            for (int v = 0; v < VECTORS; v++) sum[v] = group ? sum[v] + entry[v] : entry[v];
        }
        vf *to = (vf *)sums[c];
        for (int v = 0; v < VECTORS; v++) to[v] += sum[v];
    }
}

static void look_up_any(long groups, const float (*tables)[ENTRIES][OUTPUTS], const uint8_t *index,
                        long stride, long channels, float (*sums)[OUTPUTS]) {
    switch (groups) { /* unrolled for each number of tables */
#define CASE(n) case n: look_up(n, tables, index, stride, channels, sums); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
    }
}

/* The gradient of outputs first ... first + 31 from some rows of places, sums[tap][c][output]. */
static void weight_sums(const Shape *s, const uint8_t *index, const float *grad, long groups,
                        long first, Range rows, float (*sums)[OUTPUTS]) {
    float (*tables)[ENTRIES][OUTPUTS] = allocate(GROUPS * sizeof *tables);
    float *places = allocate(4 * s->ow * GROUP * groups * OUTPUTS); /* what `gather` found */
    memset(places, 0, 4 * s->ow * GROUP * groups * OUTPUTS);
    memset(sums, 0, s->kh * s->kw * s->c * sizeof *sums);
    for (long oy = rows.first; oy < rows.last; oy++) {
        const Range ky = inside(oy, s->sh, s->ph, s->kh, s->h);
        gather(s, grad, GROUP * groups, oy, first, places);
        for (long ox = 0; ox < s->ow; ox++) {
            const Range kx = inside(ox, s->sw, s->pw, s->kw, s->w);
            for (long start = 0, count; start < groups; start += count) {
                const long turns = (groups - start + GROUPS - 1) / GROUPS;
                count = (groups - start + turns - 1) / turns;
                for (long group = 0; group < count; group++) {
                    const float *four = places + (ox * groups + start + group) * GROUP * OUTPUTS;
                    if (s->low) fill(0, four, tables[group]);
                    else fill(1, four, tables[group]);
                }
                for (long y = ky.first; y < ky.last && kx.first < kx.last; y++) {
                    /* the taps of a row lie side by side */
                    long from = (oy * s->sh - s->ph + y) * s->w + ox * s->sw - s->pw + kx.first;
                    look_up_any(count, tables, index + from * s->c * groups + start, groups,
                                (kx.last - kx.first) * s->c, sums + (y * s->kw + kx.first) * s->c);
                }
            }
        }
    }
    free(places);
    free(tables);
}

/* The sums of all slices, as (o, taps * c). */
static void add_slices(const Shape *s, const float (*sums)[OUTPUTS], long slices, long first,
                       float *result) {
    const long size = s->kh * s->kw * s->c, outputs = lesser(OUTPUTS, s->o - first);
    for (long i = 0; i < size; i += 16) { /* so many lie in the first cache */
        const long count = lesser(16, size - i);
        for (long k = 0; k < outputs; k++) {
            float *to = result + (first + k) * size + i;
            for (long j = 0; j < count; j++) to[j] = sums[i + j][k];
            for (long slice = 1; slice < slices; slice++)
                for (long j = 0; j < count; j++) to[j] += sums[slice * size + i + j][k];
        }
    }
}

EXPORT void weight_gradient(const Shape *s, const uint64_t *x, const float *grad, float *result) {
    const long groups = (s->n + GROUP - 1) / GROUP, blocks = (s->o + OUTPUTS - 1) / OUTPUTS;
    const long size = s->kh * s->kw * s->c;
    uint8_t *index = allocate(s->h * s->w * s->c * groups);
    make_index(s, x, groups, index);
    if (blocks >= s->threads || s->oh == 1) { /* a thread for each block of outputs */
#pragma omp parallel for schedule(dynamic) num_threads(s->threads)
        for (long block = 0; block < blocks; block++) {
            float (*sums)[OUTPUTS] = allocate(size * sizeof *sums);
            weight_sums(s, index, grad, groups, block * OUTPUTS, (Range){0, s->oh}, sums);
            add_slices(s, sums, 1, block * OUTPUTS, result);
            free(sums);
        }
    } else { /* or for each slice of the rows, one block after the other */
        const long slices = lesser(s->threads, s->oh);
        float (*sums)[OUTPUTS] = allocate(slices * size * sizeof *sums);
        for (long block = 0; block < blocks; block++) {
#pragma omp parallel for schedule(static) num_threads(s->threads)
            for (long slice = 0; slice < slices; slice++)
                weight_sums(s, index, grad, groups, block * OUTPUTS,
                            (Range){s->oh * slice / slices, s->oh * (slice + 1) / slices},
                            sums + slice * size);
            add_slices(s, sums, slices, block * OUTPUTS, result);
        }
        free(sums);
    }
    free(index);
}

/* ------------------------------------------------------------------------ gradient of the inputs

   grad_x[n][y][x][c] = sum over taps and outputs o of w[o][tap][c] * g[n][y - ky][x - kx][o]

   Here the signs are those of the weights. The signed sums of a few outputs at one pixel fill a
   vector register; for as many channels as it has lanes one instruction looks them up. Half of the
   sums are the others with the opposite sign, so one sum is of one more output than the entries
   need bits. */

#if AVX512 || AVX2
#if AVX512
#define BITS 5    /* outputs of a table: 16 entries and a sign */
#define WIDE 8    /* pixels that share the indices which they load */
#else
#define BITS 4    /* 8 entries and a sign */
#define WIDE 4
#endif
#define FIELDS (32 / BITS)          /* numbers of BITS bits in a word of indices */
#define CHANNELS (2 * LANES)

typedef int32_t vi __attribute__((vector_size(4 * LANES)));

ALWAYS vf permute(vi index, vf table) {
#if AVX512
    return (vf)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#else
    return (vf)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index);
#endif
}

/* index[block of channels][tap][word][channel]: FIELDS numbers, the signs of BITS outputs each; the
   last bit says that the sum is negative, the others which sum its opposite is. */
static void make_signs(const Shape *s, const uint64_t *weight, long words, uint32_t *index) {
    const long taps = s->kh * s->kw;
#pragma omp parallel for schedule(static) num_threads(s->threads) if (s->o * taps * s->c > 32 * SMALL)
    for (long block = 0; block < (s->c + CHANNELS - 1) / CHANNELS; block++)
        for (long tap = 0; tap < taps; tap++)
            for (long word = 0; word < words; word++) {
                uint32_t *to = index + ((block * taps + tap) * words + word) * CHANNELS;
                memset(to, 0, 4 * CHANNELS);
                for (long k = 0; k < FIELDS * BITS; k++) {
                    long o = word * FIELDS * BITS + k;
                    if (o >= s->o) break;
                    long c = block * CHANNELS;
                    uint32_t bits = weight[(o * taps + tap) * s->words + c / 64] >> c % 64;
                    for (long i = 0; i < CHANNELS; i++) to[i] |= (bits >> i & 1) << k;
                }
                for (long i = 0; i < CHANNELS; i++) {
                    uint32_t flip = 0; /* where the last output is negative, all flip */
                    for (long first = 0; first < FIELDS * BITS; first += BITS) {
                        const uint32_t sign = 1u << (BITS - 1), bits = to[i] >> first;
                        flip |= (bits & sign ? sign : 2 * sign - 1) << first;
                    }
                    to[i] ^= flip;
                }
            }
}

/* The signs that the outputs of a table have in each of its entries. */
#define TWICE(...) __VA_ARGS__, __VA_ARGS__
static const float SIGN[4][16] __attribute__((aligned(64))) = {
    {TWICE(TWICE(TWICE(-1, 1)))},
    {TWICE(TWICE(-1, -1, 1, 1))},
    {TWICE(-1, -1, -1, -1, 1, 1, 1, 1)},
    {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1}};

/* The entries of one pixel: for each BITS outputs all signed sums in which the last is positive. */
ALWAYS void make_table(const float *few, float *to) {
    vf sum = (vf){0} + few[BITS - 1];
    for (int k = 0; k < BITS - 1; k++) sum += *(const vf *)SIGN[k] * few[k];
    *(vf *)to = sum;
}

static void make_tables(const float *grad, long outputs, float *to) {
    long o = 0;
    for (; o + BITS <= outputs; o += BITS, to += LANES) make_table(grad + o, to);
    if (o < outputs) {
        float few[BITS] = {0};
        memcpy(few, grad + o, 4 * (outputs - o));
        make_table(few, to);
    }
}

/* One tap of an input pixel: its signs, and the tables of the output that it reaches. */
typedef struct {
    const uint32_t *index;
    const float *tables;
} Tap;

/* The sums of WIDE pixels for two vectors of channels, over all taps; `offset`: of the first pixel.
   A function of its own, because its loop needs every register. */
static __attribute__((noinline)) void look_up_tile(const Tap *taps, long count, long offset,
                                                   long tables, vf result[WIDE][2]) {
    const vi one = (vi)((vf){0} + 1);
    vf sum[WIDE][2] = {{{0}}};
    for (const Tap *tap = taps; tap < taps + count; tap++) {
        const uint32_t *index = tap->index;
        const float *at = tap->tables + offset;
        for (long t = 0; t < tables; index += CHANNELS) {
            vi low = *(const vi *)index, high = *(const vi *)(index + LANES);
            for (long last = lesser(tables, t + FIELDS); t < last; t++, at += LANES) {
                /* 1 or -1 by the sign bit: to multiply and add is one instruction, as to add is */
                const vf sign0 = (vf)(one | (low << (32 - BITS) & INT32_MIN));
                const vf sign1 = (vf)(one | (high << (32 - BITS) & INT32_MIN));
                for (int p = 0; p < WIDE; p++) {
                    const vf table = *(const vf *)(at + p * tables * LANES);
                    sum[p][0] += sign0 * permute(low, table);
                    sum[p][1] += sign1 * permute(high, table);
                }
                low >>= BITS;
                high >>= BITS;
            }
        }
    }
    memcpy(result, sum, sizeof sum);
}

/* The gradients of a row of inputs from the tables of the rows above and below. */
static void input_row(const Shape *s, const uint32_t *index, const float *ring, long row_size,
                      long tables, long iy, long block, float *result) {
    const long words = (tables + FIELDS - 1) / FIELDS, channels = s->c - block * CHANNELS;
    for (long phase = 0; phase < s->sw; phase++) { /* inputs that reach outputs side by side */
        Tap taps[s->kh * s->kw];
        long count = 0;
        for (long ky = 0; ky < s->kh; ky++) {
            const long y = iy + s->ph - ky, oy = y / s->sh;
            if (y < 0 || y % s->sh || oy >= s->oh) continue;
            for (long kx = 0; kx < s->kw; kx++) {
                const long x = phase + s->pw - kx + s->sw * s->kw; /* kw zeros lie before a row */
                if (x % s->sw) continue;
                const long tap = (block * s->kh + ky) * s->kw + kx;
                taps[count++] = (Tap){index + tap * words * CHANNELS,
                                      ring + oy % s->kh * row_size + x / s->sw * tables * LANES};
            }
        }
        for (long j = 0; phase + j * s->sw < s->w; j += WIDE) {
            vf sum[WIDE][2];
            look_up_tile(taps, count, j * tables * LANES, tables, sum);
            for (long p = 0; p < WIDE && phase + (j + p) * s->sw < s->w; p++) {
                const long place = iy * s->w + phase + (j + p) * s->sw;
                float *to = result + place * s->c + block * CHANNELS;
                if (channels >= CHANNELS) memcpy(to, sum[p], 4 * CHANNELS);
                else memcpy(to, sum[p], 4 * channels);
            }
        }
    }
}

/* One image; `ring` holds the tables of as many rows of outputs as the kernel has. */
static void input_image(const Shape *s, const uint32_t *index, const float *grad, float *ring,
                        long row_size, long tables, Range blocks, float *result) {
    long ready = 0; /* rows with tables */
    for (long iy = 0; iy < s->h; iy++) {
        for (; ready < s->oh && ready * s->sh <= iy + s->ph; ready++)
            for (long ox = 0; ox < s->ow; ox++)
                make_tables(grad + (ready * s->ow + ox) * s->o, s->o,
                            ring + ready % s->kh * row_size + (s->kw + ox) * tables * LANES);
        for (long block = blocks.first; block < blocks.last; block++)
            input_row(s, index, ring, row_size, tables, iy, block, result);
    }
}

EXPORT void input_gradient(const Shape *s, const uint64_t *weight, const float *grad,
                           float *result) {
    const long tables = (s->o + BITS - 1) / BITS, words = (tables + FIELDS - 1) / FIELDS;
    const long blocks = (s->c + CHANNELS - 1) / CHANNELS;
    /* zeros before a row, and after it as many as the last tile may read */
    const long row_size = (s->kw + s->ow + s->kw + 2 + WIDE) * tables * LANES;
    const long parts = s->n >= s->threads ? 1 : lesser(blocks, s->threads);
    const long size = (blocks + parts - 1) / parts;
    uint32_t *index = allocate(4 * blocks * CHANNELS * s->kh * s->kw * words);
    make_signs(s, weight, words, index);
#pragma omp parallel num_threads(s->threads)
    {
        float *ring = allocate(4 * row_size * s->kh);
        memset(ring, 0, 4 * row_size * s->kh);
#pragma omp for collapse(2) schedule(dynamic)
        for (long image = 0; image < s->n; image++)
            for (long part = 0; part < parts; part++)
                input_image(s, index, grad + image * s->oh * s->ow * s->o, ring, row_size, tables,
                            (Range){part * size, lesser(blocks, (part + 1) * size)},
                            result + image * s->h * s->w * s->c);
        free(ring);
    }
    free(index);
}
#endif
