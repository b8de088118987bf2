/* A low-rank delta for few rows, in bfloat16: y += (x A^T) B^T, summed in float32.
 *
 * Such a delta is bound by reading A and B once. A library's matrix product spends about 20 us on
 * each of them before it begins, which is more than the reading takes.
 */
/* The expansion of one part of a fused linear layer. */
typedef struct {
    int64_t out_start, out_features; /* columns of y */
    int64_t rank_start, rank;        /* rows of a */
    const uint16_t *b_t;             /* [rank, out_features] */
    int64_t b_stride;                /* elements between rows of b_t */
} Block;

typedef struct {
    int64_t rank;
    const uint16_t *a; /* [rank, in] */
    int64_t a_stride; /* elements between rows of a */
    int64_t num_blocks;
    const Block *blocks;
} LowRank;

/* y: [rows, *], x: [rows, in]; strides in elements.
 * scratch: floats, rows * (in + rank) + the largest out_features. */
void polydelta_add_low_rank(uint16_t *y, int64_t y_stride, const uint16_t *x, int64_t x_stride,
                            int64_t rows, int64_t in, const LowRank *delta, float *scratch) {
    const int64_t rank = delta->rank;
    float *wide = scratch, *shrunk = wide + rows * in, *sum = shrunk + rows * rank;
    widen_rows(wide, x, x_stride, rows, in);
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
            add_rounded(y + row * y_stride + block.out_start, sum, block.out_features);
        }
    }
}
