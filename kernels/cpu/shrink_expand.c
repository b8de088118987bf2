/* The two halves of a low-rank delta in bfloat16, in tiles of four rows: shrunk = weight * x A^T, and
 * y += shrunk B^T.
 *
 * As in products.c, each number is summed in the same order whatever else is in the batch, and
 * wherever pages are. Where low_rank.c takes any machine, this takes AVX512-BF16.
 */

/* A delta, and the pages that its matrices are in: addresses are offsets there. */
typedef struct {
    const LowRank *low_rank;
    const Pages *in;
} PagedLowRank;

static inline Place row_place(const Pages *in, const uint16_t *matrix, int64_t stride,
                              int64_t row, int64_t column) {
    return place_of(in, (int64_t)(uintptr_t)matrix + 2 * (row * stride + column));
}

/* Lane i is the sum of the lanes of sums[i]. */
static inline __m128 sum_lanes(const __m512 *sums) {
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(sums[0], sums[1]),
                                   _mm512_unpackhi_ps(sums[0], sums[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(sums[2], sums[3]),
                                   _mm512_unpackhi_ps(sums[2], sums[3]));
    const __m512 c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
    return _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1));
}

/* `ranks` of four ranks of some rows: shrunk = weight * x A^T. from: where their rows of A are. */
static inline __attribute__((always_inline)) void shrink_tile(const int rows, uint16_t *shrunk,
                                                              int64_t width, const uint16_t *x,
                                                              int64_t x_stride, const Pages *pages,
                                                              const Place *from, int64_t ranks,
                                                              int64_t in, float weight) {
    Place at[4];
    const uint16_t *a[4];
    __m512 sums[4][4];
    for (int i = 0; i < 4; i++) at[i] = from[i];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 4; i++) sums[r][i] = _mm512_setzero_ps();
    for (int64_t k = 0, stop; k < in; k = stop) {
        stop = in;
        for (int i = 0; i < 4; i++) {
            a[i] = numbers_at(at + i, pages) - k;
            stop = least(stop, k + numbers_left(at + i, pages));
        }
        for (int i = 0; i < 4; i++) move_on(at + i, pages, 2 * (stop - k));
        for (; k < stop; k += 32) {
            const __mmask32 lanes = in - k >= 32 ? 0xffffffff : (1u << (in - k)) - 1;
            __m512bh columns[4];
            for (int i = 0; i < 4; i++)
                columns[i] = (__m512bh)_mm512_maskz_loadu_epi16(lanes, a[i] + k);
            for (int r = 0; r < rows; r++) {
                const __m512bh row =
                    (__m512bh)_mm512_maskz_loadu_epi16(lanes, x + r * x_stride + k);
                for (int i = 0; i < 4; i++)
                    sums[r][i] = _mm512_dpbf16_ps(sums[r][i], row, columns[i]);
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        const __m128 sum = _mm_mul_ps(sum_lanes(sums[r]), _mm_set1_ps(weight));
        _mm_mask_storeu_epi16(shrunk + r * width, first_lanes(ranks),
                              (__m128i)_mm_cvtneps_pbh(sum));
    }
}

static void shrink(uint16_t *shrunk, int64_t width, const uint16_t *x, int64_t x_stride,
                   int64_t rows, PagedLowRank of, int64_t rank, int64_t last, int64_t in,
                   float weight) {
    const Pages *pages = of.in;
    const LowRank *low_rank = of.low_rank;
    Place next = row_place(pages, low_rank->a, low_rank->a_stride, rank, 0), a[4];
    for (; rank < last; rank += 4) {
        const int64_t ranks = least(4, low_rank->rank - rank);
        for (int i = 0; i < 4; i++) {
            a[i] = next;
            /* Beyond the last rank: the last once more, which nobody reads. */
            if (rank + i < low_rank->rank - 1) move_on(&next, pages, 2 * low_rank->a_stride);
        }
        for (int64_t row = 0; row < rows; row += 4) {
            uint16_t *to = shrunk + row * width + rank;
            const uint16_t *from = x + row * x_stride;
            switch (least(4, rows - row)) {
            case 1: shrink_tile(1, to, width, from, x_stride, pages, a, ranks, in, weight); break;
            case 2: shrink_tile(2, to, width, from, x_stride, pages, a, ranks, in, weight); break;
            case 3: shrink_tile(3, to, width, from, x_stride, pages, a, ranks, in, weight); break;
            default: shrink_tile(4, to, width, from, x_stride, pages, a, ranks, in, weight);
            }
        }
    }
}

/* 64 columns of some rows: y += shrunk B^T. Rows of B^T, `b`, are taken in pairs; unpacking them
 * puts columns 0-3, 8-11, ... of 32 in one vector and the others in a second, and packing undoes
 * it. */
static inline __attribute__((always_inline)) void expand_tile(const int rows, uint16_t *y,
                                                              int64_t y_stride,
                                                              const uint16_t *shrunk, int64_t width,
                                                              const Block *block,
                                                              const uint16_t *const *b,
                                                              int64_t column, int64_t stop) {
    __m512 sums[4][4];
    __mmask32 lanes[2];
    for (int half = 0; half < 2; half++) {
        const int64_t left = stop - column - 32 * half;
        lanes[half] = left >= 32 ? 0xffffffff : left <= 0 ? 0 : (1u << left) - 1;
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 4; i++) sums[r][i] = _mm512_setzero_ps();
    for (int64_t rank = 0; rank < block->rank; rank += 2) {
        const int whole = rank + 1 < block->rank;
        __m512bh columns[4];
        for (int half = 0; half < 2; half++) {
            const int64_t first = column + 32 * half;
            const __m512i one = _mm512_maskz_loadu_epi16(lanes[half], b[rank] + first);
            const __m512i two = whole ? _mm512_maskz_loadu_epi16(lanes[half], b[rank + 1] + first)
                                      : _mm512_setzero_si512();
            columns[2 * half] = (__m512bh)_mm512_unpacklo_epi16(one, two);
            columns[2 * half + 1] = (__m512bh)_mm512_unpackhi_epi16(one, two);
        }
        for (int r = 0; r < rows; r++) {
            uint32_t bits;
            memcpy(&bits, shrunk + r * width + block->rank_start + rank, sizeof bits);
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(whole ? bits : bits & 0xffff);
            for (int i = 0; i < 4; i++) sums[r][i] = _mm512_dpbf16_ps(sums[r][i], pair, columns[i]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++) {
            uint16_t *at = y + r * y_stride + block->out_start + column + 32 * half;
            const __m512i old = _mm512_maskz_loadu_epi16(lanes[half], at);
            const __m512i none = _mm512_setzero_si512();
            const __m512 low = _mm512_castsi512_ps(_mm512_unpacklo_epi16(none, old));
            const __m512 high = _mm512_castsi512_ps(_mm512_unpackhi_epi16(none, old));
            const __m256i a =
                (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(low, sums[r][2 * half]));
            const __m256i b =
                (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(high, sums[r][2 * half + 1]));
            const __m512i packed =
                _mm512_packus_epi32(_mm512_cvtepu16_epi32(a), _mm512_cvtepu16_epi32(b));
            _mm512_mask_storeu_epi16(at, lanes[half], packed);
        }
}

static void expand(uint16_t *y, int64_t y_stride, const uint16_t *shrunk, int64_t width,
                   int64_t rows, const Block *block, const Pages *pages, int64_t column,
                   int64_t last) {
    const uint16_t *b[block->rank];
    /* Columns until a page of some row ends; most often all. */
    for (int64_t stop; column < last; column = stop) {
        Place at = row_place(pages, block->b_t, block->b_stride, 0, column);
        stop = last;
        for (int64_t rank = 0; rank < block->rank; rank++) {
            b[rank] = numbers_at(&at, pages) - column;
            stop = least(stop, column + numbers_left(&at, pages));
            move_on(&at, pages, 2 * block->b_stride);
        }
        for (; column < stop; column += 64)
            for (int64_t row = 0; row < rows; row += 4) {
                uint16_t *to = y + row * y_stride;
                const uint16_t *from = shrunk + row * width;
                switch (least(4, rows - row)) {
                case 1: expand_tile(1, to, y_stride, from, width, block, b, column, stop); break;
                case 2: expand_tile(2, to, y_stride, from, width, block, b, column, stop); break;
                case 3: expand_tile(3, to, y_stride, from, width, block, b, column, stop); break;
                default: expand_tile(4, to, y_stride, from, width, block, b, column, stop);
                }
            }
    }
}

/* Brings a block's part of B to a cache. */
static void touch_block(const Block *block, const Pages *pages) {
    Place at = row_place(pages, block->b_t, block->b_stride, 0, 0);
    int64_t left = (block->rank - 1) * block->b_stride + block->out_features;
    for (int64_t count; left > 0; left -= count) {
        count = least(left, numbers_left(&at, pages));
        touch(numbers_at(&at, pages), count);
        move_on(&at, pages, 2 * count);
    }
}
