/* A low-rank delta whose matrices have 8 or 4 bits, for few rows: y += (x A^T) B^T in float32.
 *
 * Each row of a matrix is written out as float32 once for all rows of x; it stays in the first-level
 * cache, so the memory gives no more than the codes.
 */
enum { CODES_GROUP = 32 };

/* A matrix of `scale * code`; see QuantizedMatrix in delta_weights.py. */
typedef struct {
    const uint8_t *codes;
    int64_t code_stride; /* bytes between rows */
    const uint16_t *scales;
    int64_t scale_stride; /* elements between rows */
} Codes;

/* As Block and LowRank. */
typedef struct {
    int64_t out_start, out_features, rank_start, rank;
    Codes b_t;
} QuantizedBlock;

typedef struct {
    int64_t bits, rank;
    Codes a;
    int64_t num_blocks;
    const QuantizedBlock *blocks;
} QuantizedLowRank;

/* A finite float16 number: its exponent counts from 15, that of float32 from 127. */
static inline float widen_half(uint16_t value) {
    const uint32_t bits = (uint32_t)(value & 0x8000) << 16 | (uint32_t)(value & 0x7fff) << 13;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result * 0x1p112f;
}

static void write_row(float *restrict to, const Codes *of, int64_t row, int64_t columns,
                      int64_t bits) {
    const uint8_t *codes = of->codes + row * of->code_stride;
    const uint16_t *scales = of->scales + row * of->scale_stride;
    for (int64_t start = 0; start < columns; start += CODES_GROUP, to += CODES_GROUP) {
        const float scale = widen_half(*scales++);
        const int64_t n = least(CODES_GROUP, columns - start);
        if (bits == 8) {
            const int8_t *group = (const int8_t *)codes + start;
            for (int64_t i = 0; i < n; i++) to[i] = scale * group[i];
        } else {
            const uint8_t *group = codes + start / 2;
            for (int64_t i = 0; i < n / 2; i++) {
                to[2 * i] = scale * ((group[i] & 15) - 8);
                to[2 * i + 1] = scale * ((group[i] >> 4) - 8);
            }
            if (n % 2) to[n - 1] = scale * ((group[n / 2] & 15) - 8);
        }
    }
}

static float dot_wide(const float *restrict x, const float *restrict a, int64_t n) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * a[i];
    return sum;
}

/* scratch: floats, rows * (in + rank + the largest out_features) + in + the largest out_features. */
void polydelta_add_quantized_low_rank(uint16_t *y, int64_t y_stride, const uint16_t *x,
                                      int64_t x_stride, int64_t rows, int64_t in,
                                      const QuantizedLowRank *delta, float *scratch) {
    const int64_t rank = delta->rank;
    float *wide = scratch, *shrunk = wide + rows * in, *line = shrunk + rows * rank;
    widen_rows(wide, x, x_stride, rows, in);
    for (int64_t r = 0; r < rank; r++) {
        write_row(line, &delta->a, r, in, delta->bits);
        for (int64_t row = 0; row < rows; row++)
            shrunk[row * rank + r] = dot_wide(wide + row * in, line, in);
    }
    for (int64_t b = 0; b < delta->num_blocks; b++) {
        const QuantizedBlock *block = delta->blocks + b;
        const int64_t out = block->out_features;
        float *sums = line + out;
        memset(sums, 0, rows * out * sizeof *sums);
        for (int64_t r = 0; r < block->rank; r++) {
            write_row(line, &block->b_t, r, out, delta->bits);
            for (int64_t row = 0; row < rows; row++) {
                const float times = shrunk[row * rank + block->rank_start + r];
                for (int64_t i = 0; i < out; i++) sums[row * out + i] += times * line[i];
            }
        }
        for (int64_t row = 0; row < rows; row++)
            add_rounded(y + row * y_stride + block->out_start, sums + row * out, out);
    }
}
