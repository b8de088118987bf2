/* Rows of KIVI and GEAR, whose tokens share more than a page with one another. */

/* Numbers that share a range, as `codes.GROUP`; and the rank of `gear.Gear`. */
enum { CODE_GROUP = 32, GEAR_RANK = 2 };

/* What rows of one side and head share, as float32: ranges of a group of keys by channel, and GEAR's
 * factors of a page. */
typedef struct {
    const char *page; /* whose they are; NULL for nobody's */
    int64_t group;
    float scales[MOST_HEAD_DIM], zeros[MOST_HEAD_DIM], columns[GEAR_RANK][MOST_HEAD_DIM];
} SharedRanges;

static void find_shared(SharedRanges *shared, const RowAt *at, int64_t group, int64_t rank) {
    const KVLayout *of = at->layout;
    const int64_t dim = of->head_dim, is_new = shared->page != at->page;
    if (!is_new && shared->group == group) return;
    shared->page = at->page;
    shared->group = group;
    if (at->side == of->sides + KEY_SIDE) {
        const char *ranges = at->page + at->side->scales + 4 * (group * of->kv_heads + at->head) * dim;
        for (int64_t i = 0; i < dim; i += 16) {
            const __mmask16 lanes = first_lanes(dim - i);
            /* A scale and a zero each. */
            const __m512i pairs = _mm512_maskz_loadu_epi32(lanes, ranges + 4 * i);
            const __m256i scales = _mm512_cvtepi32_epi16(pairs);
            const __m256i zeros = _mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16));
            _mm512_mask_storeu_ps(shared->scales + i, lanes, _mm512_cvtph_ps(scales));
            _mm512_mask_storeu_ps(shared->zeros + i, lanes, _mm512_cvtph_ps(zeros));
        }
    }
    if (!is_new) return;
    const char *columns = at->page + at->side->columns + 2 * at->head * rank * dim;
    for (int64_t r = 0; r < rank; r++)
        for (int64_t i = 0; i < dim; i += 16) {
            const __mmask16 lanes = first_lanes(dim - i);
            const __m256i column = _mm256_maskz_loadu_epi16(lanes, columns + 2 * (r * dim + i));
            _mm512_mask_storeu_ps(shared->columns[r] + i, lanes, _mm512_cvtph_ps(column));
        }
}

/* 16 codes from the i-th on. The bits above one's own are the next one's, and not looked at. */
static inline __m512 small_codes(const char *codes, int64_t bits, int64_t i, __mmask16 lanes) {
    const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const int64_t count = __builtin_popcount(lanes);
    const __m128i packed = _mm_maskz_loadu_epi8(first_lanes(count * bits / 8), codes + i * bits / 8);
    if (bits == 2) {
        const __m512i words = _mm512_broadcastd_epi32(packed);
        const __m512 four = _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
        return _mm512_permutexvar_ps(_mm512_srlv_epi32(words, _mm512_slli_epi32(numbers, 1)), four);
    }
    const __m512i words =
        _mm512_permutexvar_epi32(_mm512_srli_epi32(numbers, 3), _mm512_castsi128_si512(packed));
    const __m512i shifts = _mm512_and_si512(_mm512_slli_epi32(numbers, 2), _mm512_set1_epi32(31));
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(words, shifts), _mm512_cvtepi32_ps(numbers));
}

/* 16 numbers from the i-th on: keys have ranges by channel, values by token; and what GEAR's columns
 * add, so many times as a row has of each. */
static inline __attribute__((always_inline)) __m512 ranged_numbers(
    const RowAt *at, const SharedRanges *shared, const __m512 *times, int64_t i, const int64_t dim,
    const int64_t bits, const int64_t rank) {
    const KVLayout *of = at->layout;
    const __mmask16 lanes = first_lanes(dim - i);
    __m512 scale, zero;
    if (at->side == of->sides + KEY_SIDE) {
        scale = _mm512_maskz_loadu_ps(lanes, shared->scales + i);
        zero = _mm512_maskz_loadu_ps(lanes, shared->zeros + i);
    } else {
        const int64_t groups = (dim + CODE_GROUP - 1) / CODE_GROUP;
        const char *range = at->page + at->side->scales + 4 * (row_number(at) * groups + i / CODE_GROUP);
        scale = half_at(range);
        zero = half_at(range + 2);
    }
    __m512 sum = _mm512_fmadd_ps(small_codes(codes_at(at), bits, i, lanes), scale, zero);
    for (int64_t r = 0; r < rank; r++)
        sum = _mm512_fmadd_ps(times[r], _mm512_maskz_loadu_ps(lanes, shared->columns[r] + i), sum);
    return sum;
}

/* GEAR's take their places. */
static inline void place_outliers(uint16_t *to, const RowAt *at, int64_t dim) {
    const int64_t count = at->layout->outliers, first = row_number(at) * count;
    const uint16_t *exact = (const uint16_t *)(at->page + at->side->outliers) + first;
    const uint8_t *channels = (const uint8_t *)at->page + at->side->outlier_places + first;
    for (int64_t i = 0; i < count; i++) to[least(channels[i], dim - 1)] = exact[i];
}

static inline __attribute__((always_inline)) void expand_ranged_rows(
    uint16_t *to, int64_t stride, RowAt at, const Tile *tile, const int64_t dim, const int64_t bits,
    const int64_t rank) {
    SharedRanges shared;
    shared.page = NULL;
    for (int64_t n = 0; n < KEYS; n++) {
        if (!tile->pages[n]) continue;
        at.page = tile->pages[n];
        at.place = tile->places[n];
        find_shared(&shared, &at, at.place / CODE_GROUP, rank);
        const char *row = at.page + at.side->rows + 2 * row_number(&at) * rank;
        __m512 times[GEAR_RANK];
        for (int64_t r = 0; r < rank; r++) times[r] = half_at(row + 2 * r);
        for (int64_t i = 0; i < dim; i += 32)
            store_two(to + n * stride + i, dim - i,
                      ranged_numbers(&at, &shared, times, i, dim, bits, rank),
                      ranged_numbers(&at, &shared, times, i + 16, dim, bits, rank));
        place_outliers(to + n * stride, &at, dim);
    }
}

/* As EXPAND_ROWS has them. */
#define EXPAND_RANGED(FORMAT, BITS, RANK)                                                        \
    static void expand_##FORMAT(uint16_t *to, int64_t stride, RowAt at, const Tile *tile) {      \
        switch (at.layout->head_dim) {                                                           \
        case 64: expand_ranged_rows(to, stride, at, tile, 64, BITS, RANK); break;                \
        case 128: expand_ranged_rows(to, stride, at, tile, 128, BITS, RANK); break;              \
        default: expand_ranged_rows(to, stride, at, tile, at.layout->head_dim, BITS, RANK);      \
        }                                                                                        \
    }
EXPAND_RANGED(kivi_4, 4, 0)
EXPAND_RANGED(kivi_2, 2, 0)
EXPAND_RANGED(gear, 2, GEAR_RANK)

static void expand_kivi(uint16_t *to, int64_t stride, RowAt at, const Tile *tile) {
    if (at.layout->code_bits == 4) expand_kivi_4(to, stride, at, tile);
    else expand_kivi_2(to, stride, at, tile);
}
