/* Heads times a Hadamard matrix (QuaRot, arXiv:2404.00456), in parts of a power of two: as
 * `kv_rotation.rotated`. */
typedef struct {
    uint16_t *y; /* [rows, heads, dim] */
    const uint16_t *x;
    int64_t stride, rows, heads, dim, part;
} Spreading;

/* In float64, where sums are as good as exact: what is stored does not depend on their order. */
static void spread_head(uint16_t *y, const uint16_t *x, int64_t dim, int64_t part, double scale) {
    double head[MOST_HEAD_DIM + 16];
    for (int64_t i = 0; i < dim; i += 16) {
        const __m512 some = load_wide(first_lanes(dim - i), x + i);
        _mm512_storeu_pd(head + i, _mm512_cvtps_pd(_mm512_castps512_ps256(some)));
        _mm512_storeu_pd(head + i + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(some, 1)));
    }
    for (int64_t half = 1; half < part; half *= 2)
        for (int64_t top = 0; top < dim; top += 2 * half)
            for (int64_t i = top; i < top + half; i++) {
                const double a = head[i], b = head[i + half];
                head[i] = a + b;
                head[i + half] = a - b;
            }
    for (int64_t i = 0; i < dim; i += 16) {
        const __m512d by = _mm512_set1_pd(scale);
        const __m256 low = _mm512_cvtpd_ps(_mm512_mul_pd(_mm512_loadu_pd(head + i), by));
        const __m256 high = _mm512_cvtpd_ps(_mm512_mul_pd(_mm512_loadu_pd(head + i + 8), by));
        store_narrow(y + i, first_lanes(dim - i),
                     _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1));
    }
}

static void spread_item(const void *task, int64_t item) {
    const Spreading *of = task;
    const int64_t stop = least(of->rows, (item + 1) * ROWS_PER_ITEM);
    const double scale = 1.0 / __builtin_sqrt((double)of->part);
    for (int64_t row = item * ROWS_PER_ITEM; row < stop; row++)
        for (int64_t head = 0; head < of->heads; head++)
            spread_head(of->y + (row * of->heads + head) * of->dim,
                        of->x + row * of->stride + head * of->dim, of->dim, of->part, scale);
}

void polydelta_spread_heads(Pool *pool, const Spreading *of) {
    share(pool, spread_item, of, row_items(of->rows));
}
