/* Writing a step's keys and values into a KV cache, each as a pure function of its own row, and what
 * pages note of their keys as they are stored. */

/* 16 numbers; what is not finite as 0, so that one channel's overflow stays its own where heads are not
 * rotated. */
static inline __m512 load_finite(const uint16_t *from, __mmask16 lanes) {
    const __m512 numbers = load_wide(lanes, from);
    const __mmask16 finite = _mm512_cmp_ps_mask(
        _mm512_abs_ps(numbers), _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
    return _mm512_maskz_mov_ps(finite, numbers);
}

static inline float store_half(char *to, float value) {
    const float most = 65504.0f; /* of float16 */
    const uint16_t bits = _cvtss_sh(value > most ? most : value < -most ? -most : value, 0);
    memcpy(to, &bits, sizeof bits);
    return _cvtsh_ss(bits);
}

/* To divide by a scale: where it is 0, all codes are 0. */
static inline __m512 steps_of(float scale) {
    return _mm512_set1_ps(scale > 0 ? scale : __builtin_inff());
}

static inline __m512 between(__m512 x, float low, float high) {
    return _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(low)), _mm512_set1_ps(high));
}

/* Numbers to the nearest e4m3 code, ties to even; no larger than 448. */
static inline __m512i fp8_codes(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i size = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(size, 20), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff));
    const __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(_mm512_add_epi32(size, half), 20),
                                            _mm512_set1_epi32((127 - 7) << 3));
    const __m512 small = _mm512_mul_ps(_mm512_castsi512_ps(size), _mm512_set1_ps(512.0f));
    const __mmask16 tiny = _mm512_cmplt_epi32_mask(size, _mm512_set1_epi32((127 - 6) << 23));
    const __m512i code = _mm512_mask_mov_epi32(normal, tiny, _mm512_cvtps_epi32(small));
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
    return _mm512_or_si512(code, sign);
}

static void encode_scaled(const RowAt *at, const uint16_t *row, float largest) {
    const int64_t dim = at->layout->head_dim;
    char *codes = (char *)codes_at(at);
    __m512 most = _mm512_setzero_ps();
    for (int64_t i = 0; i < dim; i += 16)
        most = _mm512_max_ps(most, _mm512_abs_ps(load_finite(row + i, first_lanes(dim - i))));
    const float scale = store_half((char *)at->page + at->side->scales + 2 * row_number(at),
                                   _mm512_reduce_max_ps(most) / largest);
    for (int64_t i = 0; i < dim; i += 16) {
        const __mmask16 lanes = first_lanes(dim - i);
        const __m512 shares = _mm512_div_ps(load_finite(row + i, lanes), steps_of(scale));
        const __m512 x = between(shares, -largest, largest);
        const __m512i code = at->layout->format == FP8 ? fp8_codes(x) : _mm512_cvtps_epi32(x);
        _mm_mask_storeu_epi8(codes + i, lanes, _mm512_cvtepi32_epi8(code));
    }
}

static void encode_int4(const RowAt *at, const uint16_t *row) {
    const int64_t dim = at->layout->head_dim;
    char *codes = (char *)codes_at(at);
    char *scales = (char *)at->page + at->side->scales + 4 * row_number(at);
    const __m512 inf = _mm512_set1_ps(__builtin_inff());
    __m512 lowest = inf, highest = _mm512_sub_ps(_mm512_setzero_ps(), inf);
    for (int64_t i = 0; i < dim; i += 16) {
        const __mmask16 lanes = first_lanes(dim - i);
        const __m512 x = load_finite(row + i, lanes);
        lowest = _mm512_mask_min_ps(lowest, lanes, lowest, x);
        highest = _mm512_mask_max_ps(highest, lanes, highest, x);
    }
    const float low = _mm512_reduce_min_ps(lowest), high = _mm512_reduce_max_ps(highest);
    const __m512 steps = steps_of(store_half(scales, high / 15.0f - low / 15.0f));
    const __m512 zero = _mm512_set1_ps(store_half(scales + 2, low));
    for (int64_t i = 0; i < dim; i += 16) {
        const __m512 x = _mm512_sub_ps(load_finite(row + i, first_lanes(dim - i)), zero);
        const __m512i code = _mm512_cvtps_epi32(between(_mm512_div_ps(x, steps), 0.0f, 15.0f));
        /* The odd channel's 4 bits above the even one's: two lanes become a byte. */
        const __m512i both = _mm512_or_si512(code, _mm512_srli_epi64(code, 28));
        _mm_mask_storeu_epi8(codes + i / 2, first_lanes((dim - i) / 2) & 0xff,
                             _mm512_cvtepi64_epi8(both));
    }
}

/* 16 magnitudes as whole numbers in the same order. */
static inline __m512i magnitudes(const uint16_t *row, __mmask16 lanes) {
    const __m512i bits = _mm512_castps_si512(load_finite(row, lanes));
    return _mm512_srli_epi32(_mm512_slli_epi32(bits, 1), 17);
}

static int64_t count_magnitudes(const uint16_t *row, int64_t dim, int32_t lowest) {
    int64_t count = 0;
    for (int64_t i = 0; i < dim; i += 16)
        count += __builtin_popcount(_mm512_mask_cmpge_epi32_mask(
            first_lanes(dim - i), magnitudes(row + i, first_lanes(dim - i)),
            _mm512_set1_epi32(lowest)));
    return count;
}

static void encode_mustafar(const RowAt *at, const uint16_t *row) {
    const int64_t dim = at->layout->head_dim, kept = at->layout->code_bytes / 2;
    char *bits = (char *)at->page + at->side->bits + row_number(at) * (dim / 8);
    uint16_t *values = (uint16_t *)codes_at(at);
    int32_t lowest = 0; /* the highest magnitude that `kept` of them are not below */
    for (int32_t bit = 1 << 14; bit; bit >>= 1)
        if (count_magnitudes(row, dim, lowest | bit) >= kept) lowest |= bit;
    int64_t ties = kept - count_magnitudes(row, dim, lowest + 1);
    for (int64_t i = 0; i < dim; i += 16) {
        const __mmask16 lanes = first_lanes(dim - i);
        const __m512i sizes = magnitudes(row + i, lanes), least_size = _mm512_set1_epi32(lowest);
        uint32_t map = _mm512_mask_cmpgt_epi32_mask(lanes, sizes, least_size);
        uint32_t equal = _mm512_mask_cmpeq_epi32_mask(lanes, sizes, least_size);
        for (; equal && ties > 0; equal &= equal - 1, ties--) map |= equal & -equal;
        const __m512i numbers = _mm512_castps_si512(load_finite(row + i, lanes));
        const __m512i some = _mm512_maskz_compress_epi32(map, _mm512_srli_epi32(numbers, 16));
        const int64_t count = __builtin_popcount(map);
        _mm256_mask_storeu_epi16(values, first_lanes(count), _mm512_cvtepi32_epi16(some));
        values += count;
        memcpy(bits + i / 8, &map, least(2, (dim - i) / 8));
    }
}

/* Of one head's rows of a page, each at a multiple of `stride` after the first; in float64, as
 * mustafar.py has it. */
static void note_means(const RowAt *at, const uint16_t *rows, int64_t stride) {
    const KVLayout *of = at->layout;
    uint16_t *means = means_at(at);
    for (int64_t i = 0; i < of->head_dim; i += 16) {
        const __mmask16 lanes = first_lanes(of->head_dim - i);
        __m512d sums[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
        for (int64_t place = 0; place < of->block_size; place++) {
            const __m512 x = load_finite(rows + place * stride + i, lanes);
            sums[0] = _mm512_add_pd(sums[0], _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
            sums[1] = _mm512_add_pd(sums[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
        }
        const __m512d count = _mm512_set1_pd(of->block_size);
        const __m512 low = _mm512_castps256_ps512(_mm512_cvtpd_ps(_mm512_div_pd(sums[0], count)));
        const __m256 high = _mm512_cvtpd_ps(_mm512_div_pd(sums[1], count));
        store_narrow(means + i, lanes, _mm512_insertf32x8(low, high, 1));
    }
}

/* What a row is beside a mean. */
static void subtract(uint16_t *to, const uint16_t *row, const uint16_t *means, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 16) {
        const __mmask16 lanes = first_lanes(dim - i);
        const __m512 x = load_finite(row + i, lanes);
        store_narrow(to + i, lanes, _mm512_sub_ps(x, load_wide(lanes, means + i)));
    }
}

static void encode_row(const RowAt *at, const uint16_t *row) {
    switch (at->layout->format) {
    case NATIVE: memcpy((char *)codes_at(at), row, at->layout->code_bytes); break;
    case INT8: encode_scaled(at, row, 127.0f); break;
    case FP8: encode_scaled(at, row, 448.0f); break;
    case INT4: encode_int4(at, row); break;
    default: encode_mustafar(at, row);
    }
}

/* As `kv_attention.KVRound`: of the flat batch, and page * block_size + place, or the slot instead of
 * the page where the format is by page; and the pages that are full then. */
typedef struct {
    int64_t count;
    const int64_t *rows, *places;
    int64_t num_closing;
    const int64_t *closing, *closing_slots;
} KVStored;

typedef struct {
    KVCache cache;
    const KVStored *stored;
    const uint16_t *keys, *values; /* [tokens, kv_heads, head_dim] */
    int64_t key_stride, value_stride;
} KVStoring;

static void store_kv_item(const void *task, int64_t item) {
    const KVStoring *of = task;
    const KVLayout *layout = of->cache.layout;
    const int64_t dim = layout->head_dim;
    const int64_t stop = least(of->stored->count, (item + 1) * ROWS_PER_ITEM);
    for (int64_t i = item * ROWS_PER_ITEM; i < stop; i++) {
        const int64_t at = of->stored->places[i], row = of->stored->rows[i];
        const int64_t page = at / layout->block_size, place = at % layout->block_size;
        for (int64_t side = 0; side < SIDES; side++) {
            const uint16_t *from = side ? of->values + row * of->value_stride
                                        : of->keys + row * of->key_stride;
            for (int64_t head = 0; head < layout->kv_heads; head++) {
                const RowAt to = {layout, layout->sides + side, page_at(&of->cache, page), place, head};
                if (layout->by_page)
                    memcpy(open_row(&of->cache, page, place, side, head), from + head * dim, 2 * dim);
                else
                    encode_row(&to, from + head * dim);
            }
        }
    }
}

void polydelta_store_tokens(Pool *pool, const KVStoring *of) {
    share(pool, store_kv_item, of, row_items(of->stored->count));
}

typedef struct {
    KVCache cache;
    const KVStored *stored;
} KVEncoding;

/* One head of a page that is full, from where its tokens are native. */
static void encode_page_item(const void *task, int64_t item) {
    const KVEncoding *of = task;
    const KVLayout *layout = of->cache.layout;
    const int64_t number = item / layout->kv_heads, head = item % layout->kv_heads;
    const int64_t slot = of->stored->closing_slots[number], dim = layout->head_dim;
    const char *page = page_at(&of->cache, of->stored->closing[number]);
    for (int64_t side = 0; side < SIDES; side++) {
        RowAt to = {layout, layout->sides + side, page, 0, head};
        const uint16_t *means = means_at(&to);
        const uint16_t *first = open_row(&of->cache, slot, 0, side, head);
        if (means) note_means(&to, first, SIDES * layout->kv_heads * dim);
        for (; to.place < layout->block_size; to.place++) {
            const uint16_t *row = open_row(&of->cache, slot, to.place, side, head);
            uint16_t rest[MOST_HEAD_DIM];
            if (means) {
                subtract(rest, row, means, dim);
                row = rest;
            }
            encode_row(&to, row);
        }
    }
}

void polydelta_encode_pages(Pool *pool, const KVEncoding *of) {
    share(pool, encode_page_item, of, of->stored->num_closing * of->cache.layout->kv_heads);
}
