/* Keys and values of a KV cache of any format as bfloat16: up to KEYS rows of one head at a time, in
 * a buffer that stays in the first-level cache.
 */
enum { NATIVE, INT8, FP8, INT4, MUSTAFAR, KIVI, GEAR };
enum { KEY_SIDE, VALUE_SIDE, SIDES };

/* Bytes from the beginning of a page to sections of keys, or of values; below 0 where the format has
 * none of the kind. means: of the page, a row for each head. */
typedef struct {
    int64_t codes, scales, bits, outliers, outlier_places, rows, columns, means;
} KVSide;

typedef struct {
    int64_t format, by_page, block_size, kv_heads, head_dim;
    int64_t stored_bytes; /* of a page, for keys and values */
    /* Of a token and head: bytes of codes, bits of one of them, and outliers. */
    int64_t code_bytes, code_bits, outliers;
    /* Bytes to what pages note, below 0 where they do not, and how many numbers it is. */
    int64_t labels, num_labels, least, most, representatives, num_representatives;
    KVSide sides[SIDES];
} KVLayout;

/* One layer's part of a cache, as `kv_memory.KVMemory`. */
typedef struct {
    const KVLayout *layout;
    char *pages;
    int64_t page_stride, num_pages;
    char *host;
    int64_t host_stride;
    uint16_t *open; /* [slots, block_size, 2, kv_heads, head_dim] */
} KVCache;

/* Tokens of a sequence that are looked at together. */
typedef struct {
    int32_t tokens[KEYS]; /* positions; NO_TOKEN where there is none */
    const char *pages[KEYS]; /* NULL for none, and where a token is not encoded yet */
    int64_t places[KEYS];    /* in their pages */
    uint32_t opened;         /* a bit for each of those */
    int64_t slot;            /* whose they are */
} Tile;

static const int32_t NO_TOKEN = INT32_MAX;

static inline char *page_at(const KVCache *cache, int64_t page) {
    if (page < 0) return NULL;
    if (page < cache->num_pages) return cache->pages + page * cache->page_stride;
    return cache->host ? cache->host + (page - cache->num_pages) * cache->host_stride : NULL;
}

static inline uint16_t *open_row(const KVCache *cache, int64_t slot, int64_t place, int64_t side,
                                 int64_t head) {
    const KVLayout *of = cache->layout;
    const int64_t row = (slot * of->block_size + place) * SIDES + side;
    return cache->open + (row * of->kv_heads + head) * of->head_dim;
}

/* 16 times the float16 number that lies there. */
static inline __m512 half_at(const char *from) {
    uint16_t bits;
    memcpy(&bits, from, sizeof bits);
    return _mm512_cvtph_ps(_mm256_set1_epi16(bits));
}

/* The first so many of 32 numbers. */
static inline void store_two(uint16_t *to, int64_t count, __m512 low, __m512 high) {
    const __mmask32 lanes = count >= 32 ? 0xffffffff : (1u << count) - 1;
    _mm512_mask_storeu_epi16(to, lanes, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

/* Where a row is of sections that have one for each token and head. */
typedef struct {
    const KVLayout *layout;
    const KVSide *side;
    const char *page;
    int64_t place, head;
} RowAt;

static inline int64_t row_number(const RowAt *at) {
    return at->place * at->layout->kv_heads + at->head;
}
static inline const char *codes_at(const RowAt *at) {
    return at->page + at->side->codes + row_number(at) * at->layout->code_bytes;
}

static inline __m512 int8_numbers(const char *codes, __mmask16 lanes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes, codes)));
}

static inline void expand_int8_row(uint16_t *to, const RowAt *at, int64_t dim) {
    const char *codes = codes_at(at);
    const __m512 scale = half_at(at->page + at->side->scales + 2 * row_number(at));
    for (int64_t i = 0; i < dim; i += 32) {
        const __m512 low = int8_numbers(codes + i, first_lanes(dim - i));
        const __m512 high = int8_numbers(codes + i + 16, first_lanes(dim - i - 16));
        store_two(to + i, dim - i, _mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale));
    }
}

/* As halves the bits of an e4m3 number, moved to where those have them, are the number over 256. Not as
 * float32, where it would be the number times 2^-120: the compiler may put factors together, and 2^120
 * times the scale overflows. */
static inline void expand_fp8_row(uint16_t *to, const RowAt *at, int64_t dim) {
    const char *codes = codes_at(at);
    const __m512 scale = half_at(at->page + at->side->scales + 2 * row_number(at));
    for (int64_t i = 0; i < dim; i += 16) {
        const __mmask16 lanes = first_lanes(dim - i);
        const __m256i code = _mm256_cvtepi8_epi16(_mm_maskz_loadu_epi8(lanes, codes + i));
        const __m256i sign = _mm256_and_si256(code, _mm256_set1_epi16(INT16_MIN));
        const __m256i size = _mm256_and_si256(code, _mm256_set1_epi16(0x7f));
        const __m512 half = _mm512_cvtph_ps(_mm256_or_si256(sign, _mm256_slli_epi16(size, 7)));
        const __m512 value = _mm512_mul_ps(half, _mm512_set1_ps(256.0f));
        store_narrow(to + i, lanes, _mm512_mul_ps(value, scale));
    }
}

/* What each of the 16 codes stands for is rounded once, and then looked up. */
static inline void expand_int4_row(uint16_t *to, const RowAt *at, int64_t dim) {
    const char *codes = codes_at(at), *scales = at->page + at->side->scales + 4 * row_number(at);
    const __m512 code = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 value = _mm512_fmadd_ps(code, half_at(scales), half_at(scales + 2));
    const __m512i table = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(value));
    for (int64_t i = 0; i < dim; i += 32) {
        const int64_t left = dim - i;
        const __m512i both =
            _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_lanes(left / 2), codes + i / 2));
        /* The odd channel's code in the high half; of each half 4 bits count, as the table is there
         * twice. */
        const __m512i split = _mm512_or_si512(both, _mm512_slli_epi32(both, 12));
        const __mmask32 lanes = left >= 32 ? 0xffffffff : (1u << left) - 1;
        _mm512_mask_storeu_epi16(to + i, lanes, _mm512_permutexvar_epi16(split, table));
    }
}

/* The page's mean, in bfloat16, where rows are what differs from it; else NULL. */
static inline uint16_t *means_at(const RowAt *at) {
    if (at->side->means < 0) return NULL;
    return (uint16_t *)(at->page + at->side->means) + at->head * at->layout->head_dim;
}

static inline void expand_mustafar_row(uint16_t *to, const RowAt *at, int64_t dim) {
    const char *bits = at->page + at->side->bits + row_number(at) * (dim / 8);
    const uint16_t *kept = (const uint16_t *)codes_at(at), *means = means_at(at);
    int64_t left = at->layout->code_bytes / 2;
    for (int64_t first = 0; first < dim; first += 64) {
        uint64_t map = 0;
        memcpy(&map, bits + first / 8, least(64, dim - first) / 8);
        for (int64_t i = first; i < least(first + 64, dim); i += 16) {
            const __mmask16 lanes = first_lanes(dim - i);
            /* Not from what was before, so that none waits for another. */
            const int64_t before = __builtin_popcountll(map & ~(~0ull << (i - first)));
            const __m512i some = _mm512_cvtepu16_epi32(
                _mm256_maskz_loadu_epi16(first_lanes(left - before), kept + before));
            const __m512i spread = _mm512_maskz_expand_epi32(map >> (i - first), some);
            if (means) {
                const __m512 rest = _mm512_castsi512_ps(_mm512_slli_epi32(spread, 16));
                store_narrow(to + i, lanes, _mm512_add_ps(load_wide(lanes, means + i), rest));
            } else
                _mm256_mask_storeu_epi16(to + i, lanes, _mm512_cvtepi32_epi16(spread));
        }
        kept += __builtin_popcountll(map);
        left -= __builtin_popcountll(map);
    }
}

/* Rows of one side and head, of the tokens that have a page; rows of `to` are `stride` apart. The
 * usual sizes are constants for the compiler. */
#define EXPAND_ROWS(FORMAT)                                                                      \
    static inline __attribute__((always_inline)) void expand_##FORMAT##_rows(                    \
        uint16_t *to, int64_t stride, RowAt at, const Tile *tile, const int64_t dim) {           \
        for (int64_t i = 0; i < KEYS; i++)                                                       \
            if (tile->pages[i]) {                                                                \
                at.page = tile->pages[i];                                                        \
                at.place = tile->places[i];                                                      \
                expand_##FORMAT##_row(to + i * stride, &at, dim);                                \
            }                                                                                    \
    }                                                                                            \
    static void expand_##FORMAT(uint16_t *to, int64_t stride, RowAt at, const Tile *tile) {      \
        switch (at.layout->head_dim) {                                                           \
        case 64: expand_##FORMAT##_rows(to, stride, at, tile, 64); break;                        \
        case 128: expand_##FORMAT##_rows(to, stride, at, tile, 128); break;                      \
        default: expand_##FORMAT##_rows(to, stride, at, tile, at.layout->head_dim);              \
        }                                                                                        \
    }
EXPAND_ROWS(int8)
EXPAND_ROWS(fp8)
EXPAND_ROWS(int4)
EXPAND_ROWS(mustafar)
