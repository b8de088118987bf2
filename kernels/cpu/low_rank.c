/* A low-rank delta for few rows, in bfloat16: y += (x A^T) B^T, summed in float32.
 *
 * Such a delta is bound by reading A and B once. A library's matrix product spends about 20 us on
 * each of them before it begins, which is more than the reading takes.
 *
 * The loops are plain so that the compiler makes vectors of them for whatever machine it runs on.
 */
#include <stdint.h>
#include <string.h>

/* The expansion of one part of a fused linear layer. */
typedef struct {
    int64_t out_start, out_features; /* columns of y */
    int64_t rank_start, rank;        /* rows of a */
    const uint16_t *b_t;             /* [rank, out_features] */
    int64_t b_stride;                /* elements between rows of b_t */
} Block;

typedef struct {
    int64_t in_features, rank; /* of a: [rank, in_features] */
    const uint16_t *a;
    int64_t a_stride; /* elements between rows of a */
    int64_t num_blocks;
    const Block *blocks;
} LowRank;

static inline float widen(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* To the nearest, ties to even; a NaN keeps its high bits, and stays one. */
static inline uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
    uint32_t is_nan = (bits & 0x7fffffff) > 0x7f800000;
    return (uint16_t)((is_nan ? (bits | 0x400000) : rounded) >> 16);
}

static float dot(const float *restrict x, const uint16_t *restrict a, int64_t n) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * widen(a[i]);
    return sum;
}

static void add_scaled(float *restrict sum, const uint16_t *restrict b, float scale, int64_t n) {
    for (int64_t i = 0; i < n; i++) sum[i] += scale * widen(b[i]);
}

/* y: [rows, *], x: [rows, in_features]; strides in elements.
 * scratch: floats, rows * (in_features + rank) + the largest out_features. */
void polydelta_add_low_rank(uint16_t *y, int64_t y_stride, const uint16_t *x, int64_t x_stride,
                            int64_t rows, const LowRank *delta, float *scratch) {
    const int64_t in = delta->in_features, rank = delta->rank;
    float *wide = scratch, *shrunk = wide + rows * in, *sum = shrunk + rows * rank;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < in; i++) wide[row * in + i] = widen(x[row * x_stride + i]);
    for (int64_t r = 0; r < rank; r++) /* each row of A is read once, for all rows of x */
        for (int64_t row = 0; row < rows; row++)
            shrunk[row * rank + r] = dot(wide + row * in, delta->a + r * delta->a_stride, in);
    for (int64_t b = 0; b < delta->num_blocks; b++) {
        const Block block = delta->blocks[b];
        for (int64_t row = 0; row < rows; row++) {
            memset(sum, 0, block.out_features * sizeof *sum);
            for (int64_t r = 0; r < block.rank; r++)
                add_scaled(sum, block.b_t + r * block.b_stride,
                           shrunk[row * rank + block.rank_start + r], block.out_features);
            uint16_t *out = y + row * y_stride + block.out_start;
            for (int64_t i = 0; i < block.out_features; i++)
                out[i] = narrow(widen(out[i]) + sum[i]);
        }
    }
}
