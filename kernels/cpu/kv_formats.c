/* Keys and values of a KV cache of any format as bfloat16: up to KEYS rows of one head at a time, in
 * a buffer that stays in the first-level cache.
 */
enum { NATIVE, INT8, FP8, INT4, MUSTAFAR, KIVI, GEAR };
enum { KEY_SIDE, VALUE_SIDE, SIDES };

/* Numbers of KIVI that share a range, as `codes.GROUP`. */
enum { CODE_GROUP = 32 };

/* Bytes from the beginning of a page to sections of keys, or of values; below 0 where the format has
 * none of the kind. means: of the page, a row for each head. */
typedef struct {
    int64_t codes, scales, bits, outliers, outlier_places, rows, columns, means;
} KVSide;

typedef struct {
    int64_t format, by_page, block_size, kv_heads, head_dim;
    int64_t stored_bytes; /* of a page, for keys and values */
    /* Of a token and head: bytes of codes, bits of one of them, outliers, and the rank. */
    int64_t code_bytes, code_bits, outliers, rank;
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

/* Pairs of float16, a scale and a zero each. */
static inline __m512 scales_of(__m512i pairs) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
}
static inline __m512 zeros_of(__m512i pairs) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
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
    for (int64_t i = 0; i < dim; i += 16) {
        const __mmask16 lanes = first_lanes(dim - i);
        const uint32_t map = (uint8_t)bits[i / 8] | (i + 8 < dim ? (uint8_t)bits[i / 8 + 1] << 8 : 0);
        const __m512i some = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(left), kept));
        const __m512i spread = _mm512_maskz_expand_epi32(map, some);
        if (means) {
            const __m512 rest = _mm512_castsi512_ps(_mm512_slli_epi32(spread, 16));
            store_narrow(to + i, lanes, _mm512_add_ps(load_wide(lanes, means + i), rest));
        } else
            _mm256_mask_storeu_epi16(to + i, lanes, _mm512_cvtepi32_epi16(spread));
        const int64_t taken = least(left, __builtin_popcount(map));
        kept += taken;
        left -= taken;
    }
}

/* 16 codes of 2 or 4 bits from the i-th on. */
static inline __m512 small_codes(const RowAt *at, int64_t i) {
    const int64_t bits = at->layout->code_bits;
    const __mmask16 bytes = first_lanes(least(16, at->layout->head_dim - i) * bits / 8);
    const __m128i packed = _mm_maskz_loadu_epi8(bytes, codes_at(at) + i * bits / 8);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if (bits == 2) {
        const __m512i words = _mm512_broadcastd_epi32(packed);
        const __m512i codes = _mm512_srlv_epi32(words, _mm512_slli_epi32(lanes, 1));
        return _mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32(3)));
    }
    const __m512i words =
        _mm512_permutexvar_epi32(_mm512_srli_epi32(lanes, 3), _mm512_castsi128_si512(packed));
    const __m512i shifts = _mm512_and_si512(_mm512_slli_epi32(lanes, 2), _mm512_set1_epi32(31));
    const __m512i codes = _mm512_srlv_epi32(words, shifts);
    return _mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32(15)));
}

/* 16 numbers of KIVI, from the i-th on: keys share ranges by channel, values by token. */
static inline __m512 kivi_numbers(const RowAt *at, int64_t i, __mmask16 lanes) {
    const KVLayout *of = at->layout;
    const char *scales = at->page + at->side->scales;
    __m512i pairs;
    if (at->side == of->sides + KEY_SIDE) {
        const int64_t group = at->place / CODE_GROUP * of->kv_heads + at->head;
        pairs = _mm512_maskz_loadu_epi32(lanes, scales + 4 * (group * of->head_dim + i));
    } else {
        const int64_t groups = (of->head_dim + CODE_GROUP - 1) / CODE_GROUP;
        int32_t pair;
        memcpy(&pair, scales + 4 * (row_number(at) * groups + i / CODE_GROUP), sizeof pair);
        pairs = _mm512_set1_epi32(pair);
    }
    return _mm512_fmadd_ps(small_codes(at, i), scales_of(pairs), zeros_of(pairs));
}

static inline void expand_kivi_row(uint16_t *to, const RowAt *at, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 16) {
        const __mmask16 lanes = first_lanes(dim - i);
        store_narrow(to + i, lanes, kivi_numbers(at, i, lanes));
    }
}

/* KIVI's numbers and what the factors add; outliers take their places. */
static inline void expand_gear_row(uint16_t *to, const RowAt *at, int64_t dim) {
    const KVLayout *of = at->layout;
    const int64_t outliers = row_number(at) * of->outliers;
    const uint16_t *exact = (const uint16_t *)(at->page + at->side->outliers) + outliers;
    const uint8_t *channels = (const uint8_t *)at->page + at->side->outlier_places + outliers;
    const char *row = at->page + at->side->rows + 2 * row_number(at) * of->rank;
    const char *columns = at->page + at->side->columns + 2 * at->head * of->rank * dim;
    for (int64_t i = 0; i < dim; i += 16) {
        const __mmask16 lanes = first_lanes(dim - i);
        __m512 sum = kivi_numbers(at, i, lanes);
        for (int64_t r = 0; r < of->rank; r++) {
            const __m256i column = _mm256_maskz_loadu_epi16(lanes, columns + 2 * (r * dim + i));
            sum = _mm512_fmadd_ps(half_at(row + 2 * r), _mm512_cvtph_ps(column), sum);
        }
        store_narrow(to + i, lanes, sum);
    }
    for (int64_t i = 0; i < of->outliers; i++) to[least(channels[i], dim - 1)] = exact[i];
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
EXPAND_ROWS(kivi)
EXPAND_ROWS(gear)
static void (*const EXPAND[])(uint16_t *, int64_t, RowAt, const Tile *) = {
    NULL, expand_int8, expand_fp8, expand_int4, expand_mustafar, expand_kivi, expand_gear};

/* Finds one side of one head of a tile's tokens, or makes it in `room` for KEYS * MOST_HEAD_DIM
 * numbers; a row of zeros for none. */
static void load_rows(const uint16_t **rows, uint16_t *room, const KVCache *cache, int64_t side,
                      int64_t head, const Tile *tile) {
    const KVLayout *of = cache->layout;
    const int64_t stride = (of->head_dim + PANEL - 1) / PANEL * PANEL;
    const RowAt at = {of, of->sides + side, NULL, 0, head};
    const int64_t native = of->format == NATIVE;
    if (native) {
        /* 8 addresses at a time; where there is no page, NOTHING's. */
        const __m512i each = _mm512_set1_epi64(of->kv_heads * of->code_bytes);
        const __m512i first = _mm512_set1_epi64(at.side->codes + head * of->code_bytes);
        for (int64_t i = 0; i < KEYS; i += 8) {
            const __m512i pages = _mm512_loadu_si512(tile->pages + i);
            const __m512i places = _mm512_loadu_si512(tile->places + i);
            const __m512i row = _mm512_add_epi64(first, _mm512_mullo_epi64(places, each));
            const __m512i none = _mm512_set1_epi64((intptr_t)NOTHING);
            const __mmask8 found = _mm512_test_epi64_mask(pages, pages);
            _mm512_storeu_si512(rows + i, _mm512_mask_add_epi64(none, found, pages, row));
        }
    } else
        for (int64_t i = 0; i < KEYS; i++)
            rows[i] = tile->pages[i] ? room + i * stride : NOTHING;
    for (uint32_t opened = tile->opened; opened; opened &= opened - 1) {
        const int64_t i = __builtin_ctz(opened);
        rows[i] = open_row(cache, tile->slot, tile->places[i], side, head);
    }
    if (!native) EXPAND[of->format](room, stride, at, tile);
}

/* Sends for some sides of some of a tile's tokens, of one head. */
static inline void send_for(const KVCache *cache, int64_t first_side, int64_t stop_side, int64_t head,
                            const Tile *tile, int64_t from, int64_t stop) {
    const KVLayout *of = cache->layout;
    for (int64_t i = from; i < stop; i++) {
        const char *page = tile->pages[i];
        if (!page) continue;
        const int64_t row = tile->places[i] * of->kv_heads + head;
        for (int64_t side = first_side; side < stop_side; side++)
            for (int64_t at = 0; at < of->code_bytes; at += 64)
                _mm_prefetch(page + of->sides[side].codes + row * of->code_bytes + at, _MM_HINT_T0);
    }
}
