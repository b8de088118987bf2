/* Deltas of other kinds for few rows, in bfloat16, summed in float32; see kernels/delta_weights.py.
 *
 * Every function has the same arguments: y [rows, *] is changed in place, x is [rows, in]; strides
 * are in elements, of matrices too; scratch is room for as many floats as the caller knows.
 */

typedef struct {
    int64_t out;
    const int32_t *row_pointers, *columns; /* [out + 1], [nnz] */
    const uint16_t *values;                /* [nnz] */
} Sparse;

enum { SPARSE_ROWS = 16, SPARSE_OUTPUTS = 32 };

/* Some outputs of SPARSE_ROWS rows: each number of dW is read once, for all of them. across: x
 * transposed, [in, SPARSE_ROWS]. */
static void sum_sparse(float sums[SPARSE_OUTPUTS][SPARSE_ROWS], const Sparse *d, int64_t first,
                       int64_t count, const float *restrict across) {
    for (int64_t i = 0; i < count; i++) {
        float sum[SPARSE_ROWS] = {0};
        for (int64_t k = d->row_pointers[first + i]; k < d->row_pointers[first + i + 1]; k++) {
            const float value = widen(d->values[k]), *column = across + d->columns[k] * SPARSE_ROWS;
            for (int64_t row = 0; row < SPARSE_ROWS; row++) sum[row] += value * column[row];
        }
        memcpy(sums[i], sum, sizeof sum);
    }
}

/* scratch: (in + SPARSE_OUTPUTS) * SPARSE_ROWS */
void polydelta_add_sparse(uint16_t *y, int64_t y_stride, const uint16_t *x, int64_t x_stride,
                          int64_t rows, int64_t in, const Sparse *d, float *scratch) {
    float *across = scratch, (*sums)[SPARSE_ROWS] = (void *)(scratch + in * SPARSE_ROWS);
    for (int64_t top = 0; top < rows; top += SPARSE_ROWS) {
        const int64_t count = least(SPARSE_ROWS, rows - top);
        for (int64_t k = 0; k < in; k++)
            for (int64_t row = 0; row < SPARSE_ROWS; row++)
                across[k * SPARSE_ROWS + row] =
                    row < count ? widen(x[(top + row) * x_stride + k]) : 0;
        for (int64_t first = 0; first < d->out; first += SPARSE_OUTPUTS) {
            const int64_t outputs = least(SPARSE_OUTPUTS, d->out - first);
            sum_sparse(sums, d, first, outputs, across);
            for (int64_t row = 0; row < count; row++) {
                uint16_t *out = y + (top + row) * y_stride + first;
                for (int64_t i = 0; i < outputs; i++)
                    out[i] = narrow(widen(out[i]) + sums[i][row]);
            }
        }
    }
}

typedef struct {
    int64_t out_start, out, count;
    const int32_t *indices;  /* [count] */
    const uint16_t *block_t; /* [count, out] */
    int64_t stride;
} Columns;

/* scratch: out */
void polydelta_add_columns(uint16_t *y, int64_t y_stride, const uint16_t *x, int64_t x_stride,
                           int64_t rows, int64_t in, const Columns *d, float *scratch) {
    (void)in;
    for (int64_t row = 0; row < rows; row++) {
        memset(scratch, 0, d->out * sizeof *scratch);
        for (int64_t k = 0; k < d->count; k++)
            add_scaled(scratch, d->block_t + k * d->stride,
                       widen(x[row * x_stride + d->indices[k]]), d->out);
        add_rounded(y + row * y_stride + d->out_start, scratch, d->out);
    }
}

typedef struct {
    int64_t count;
    const int32_t *indices; /* [count] */
    const uint16_t *block;  /* [count, in] */
    int64_t stride;
} Rows;

/* scratch: rows * in */
void polydelta_add_rows(uint16_t *y, int64_t y_stride, const uint16_t *x, int64_t x_stride,
                        int64_t rows, int64_t in, const Rows *d, float *scratch) {
    widen_rows(scratch, x, x_stride, rows, in);
    for (int64_t k = 0; k < d->count; k++)
        for (int64_t row = 0; row < rows; row++) {
            uint16_t *out = y + row * y_stride + d->indices[k];
            *out = narrow(widen(*out) + dot(scratch + row * in, d->block + k * d->stride, in));
        }
}

typedef struct {
    int64_t out_start, a, b, c, d;
    const uint16_t *left; /* [a, b] */
    int64_t left_stride;
    const uint16_t *right; /* [c, d] */
    int64_t right_stride;
} Kronecker;

/* scratch: in + b * c + c */
void polydelta_add_kronecker(uint16_t *y, int64_t y_stride, const uint16_t *x, int64_t x_stride,
                             int64_t rows, int64_t in, const Kronecker *d, float *scratch) {
    float *wide = scratch, *mixed = wide + in, *sum = mixed + d->b * d->c;
    for (int64_t row = 0; row < rows; row++) {
        widen_rows(wide, x + row * x_stride, x_stride, 1, in);
        for (int64_t b = 0; b < d->b; b++)
            for (int64_t c = 0; c < d->c; c++)
                mixed[b * d->c + c] = dot(wide + b * d->d, d->right + c * d->right_stride, d->d);
        for (int64_t a = 0; a < d->a; a++) {
            memset(sum, 0, d->c * sizeof *sum);
            for (int64_t b = 0; b < d->b; b++) {
                const float left = widen(d->left[a * d->left_stride + b]);
                for (int64_t c = 0; c < d->c; c++) sum[c] += left * mixed[b * d->c + c];
            }
            add_rounded(y + row * y_stride + d->out_start + a * d->c, sum, d->c);
        }
    }
}

typedef struct {
    int64_t out_start, rows, columns, size;
    const uint16_t *kernel; /* [rows * columns, size] */
    int64_t stride;
} Circulant;

/* scratch: 2 * in + size */
void polydelta_add_circulant(uint16_t *y, int64_t y_stride, const uint16_t *x, int64_t x_stride,
                             int64_t rows, int64_t in, const Circulant *d, float *scratch) {
    const int64_t size = d->size;
    float *sum = scratch + 2 * in;
    for (int64_t row = 0; row < rows; row++) {
        /* Each block twice, so that none of its turns has to wrap around. */
        for (int64_t n = 0; n < d->columns; n++)
            for (int64_t i = 0; i < 2 * size; i++)
                scratch[2 * n * size + i] = widen(x[row * x_stride + n * size + i % size]);
        for (int64_t i = 0; i < d->rows; i++) {
            memset(sum, 0, size * sizeof *sum);
            for (int64_t n = 0; n < d->columns; n++) {
                const uint16_t *kernel = d->kernel + (i * d->columns + n) * d->stride;
                for (int64_t m = 0; m < size; m++) {
                    const float weight = widen(kernel[m]);
                    const float *turned = scratch + 2 * n * size + m;
                    for (int64_t j = 0; j < size; j++) sum[j] += weight * turned[j];
                }
            }
            add_rounded(y + row * y_stride + d->out_start + i * size, sum, size);
        }
    }
}

typedef struct {
    int64_t out_start, out, rank, keep;
    const uint16_t *a; /* [rank, in] */
    int64_t a_stride;
    const float *bias;   /* [rank] */
    const uint16_t *b_t; /* [rank, out] */
    int64_t b_stride;
} TopK;

/* scratch: in + 2 * rank + out */
void polydelta_add_top_k(uint16_t *y, int64_t y_stride, const uint16_t *x, int64_t x_stride,
                         int64_t rows, int64_t in, const TopK *d, float *scratch) {
    float *wide = scratch, *shrunk = wide + in, *score = shrunk + d->rank;
    float *sum = score + d->rank;
    for (int64_t row = 0; row < rows; row++) {
        widen_rows(wide, x + row * x_stride, x_stride, 1, in);
        for (int64_t r = 0; r < d->rank; r++) {
            shrunk[r] = dot(wide, d->a + r * d->a_stride, in);
            const float biased = shrunk[r] + d->bias[r];
            score[r] = biased < 0 ? -biased : biased;
        }
        memset(sum, 0, d->out * sizeof *sum);
        for (int64_t kept = 0; kept < d->keep; kept++) {
            int64_t best = 0;
            for (int64_t r = 1; r < d->rank; r++)
                if (score[r] > score[best]) best = r;
            score[best] = -1;
            add_scaled(sum, d->b_t + best * d->b_stride, shrunk[best], d->out);
        }
        add_rounded(y + row * y_stride + d->out_start, sum, d->out);
    }
}

typedef struct {
    int64_t out_start, out;
    const float *vector; /* [out] */
} Vector;

void polydelta_scale(uint16_t *y, int64_t y_stride, const uint16_t *x, int64_t x_stride,
                     int64_t rows, int64_t in, const Vector *d, float *scratch) {
    (void)x, (void)x_stride, (void)in, (void)scratch;
    for (int64_t row = 0; row < rows; row++) {
        uint16_t *restrict out = y + row * y_stride + d->out_start;
        for (int64_t i = 0; i < d->out; i++) out[i] = narrow(widen(out[i]) * d->vector[i]);
    }
}

typedef struct {
    int64_t out_start, out;
    const float *cos, *sin;  /* [out] */
    const int32_t *partner;  /* [out] */
} Rotate;

/* scratch: out */
void polydelta_rotate(uint16_t *y, int64_t y_stride, const uint16_t *x, int64_t x_stride,
                      int64_t rows, int64_t in, const Rotate *d, float *scratch) {
    (void)x, (void)x_stride, (void)in;
    for (int64_t row = 0; row < rows; row++) {
        uint16_t *restrict out = y + row * y_stride + d->out_start;
        widen_rows(scratch, out, y_stride, 1, d->out);
        for (int64_t i = 0; i < d->out; i++)
            out[i] = narrow(d->cos[i] * scratch[i] + d->sin[i] * scratch[d->partner[i]]);
    }
}

void polydelta_add_bias(uint16_t *y, int64_t y_stride, const uint16_t *x, int64_t x_stride,
                        int64_t rows, int64_t in, const Vector *d, float *scratch) {
    (void)x, (void)x_stride, (void)in, (void)scratch;
    for (int64_t row = 0; row < rows; row++)
        add_rounded(y + row * y_stride + d->out_start, d->vector, d->out);
}
