/* Paged attention that reads keys and values where they lie (arXiv:2309.06180), with the running
 * softmax of arXiv:2205.14135.
 *
 * The query heads that share a key head are rows of one product. KEYS keys at a time are laid out
 * for it in a buffer that stays in the first-level cache; a key beyond a sequence's end, whose place
 * in the page may hold anything, is a row of zeros.
 */
enum {
    KEYS = PANEL,
    /* Rows of scores that one thread computes at a time, and of them in one product. */
    MOST_SCORES = 64,
    SCORE_ROWS = 8,
    MOST_HEAD_DIM = 256,
};

typedef struct {
    int64_t start, length, context; /* as `ops.SequenceSlice` */
    int64_t first_page;             /* in `pages` */
    int64_t first_item;
    int64_t heads_at_once; /* key heads of one item: all of them read pages from end to end */
} Slice;

typedef struct {
    int64_t heads, kv_heads, head_dim, block_size, window; /* window: 0 where all is seen */
    int64_t num_slices, num_items;
    const Slice *slices;
    const int64_t *pages;
    double scale;
} Plan;

typedef struct {
    const Plan *plan;
    uint16_t *out; /* [tokens, heads, head_dim] */
    int64_t out_stride;
    const uint16_t *queries;
    int64_t query_stride;
    const uint16_t *kv; /* [pages, 2, block_size, kv_heads, head_dim] */
} Attention;

/* 16 rows of 16 pairs, transposed. */
static inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

/* keys: KEYS rows -> packed [pairs, KEYS]; an odd number of a row is paired with 0 */
static void pack_keys(uint32_t *packed, const uint16_t *const *keys, int64_t head_dim) {
    const int64_t pairs = (head_dim + 1) / 2;
    for (int64_t key = 0; key < KEYS; key += 16)
        for (int64_t k = 0; k < pairs; k += 16) {
            const int64_t left = head_dim - 2 * k;
            const __mmask32 lanes = left >= 32 ? 0xffffffff : (1u << left) - 1;
            __m512i rows[16];
            for (int i = 0; i < 16; i++)
                rows[i] = _mm512_maskz_loadu_epi16(lanes, keys[key + i] + 2 * k);
            transpose(rows);
            for (int i = 0; i < least(16, pairs - k); i++)
                _mm512_storeu_si512(packed + (k + i) * KEYS + key, rows[i]);
        }
}

/* values: KEYS rows -> packed [KEYS / 2, padded] */
static void pack_values(uint32_t *packed, const uint16_t *const *values, int64_t head_dim,
                        int64_t padded) {
    uint16_t order[64]; /* the first number of one row, the first of the other, and so on */
    for (int i = 0; i < 64; i++) order[i] = i / 2 + i % 2 * 32;
    const __m512i low = _mm512_loadu_si512(order), high = _mm512_loadu_si512(order + 32);
    for (int64_t i = 0; i < padded; i += PANEL) {
        const int64_t left = head_dim - i;
        const __mmask32 lanes = left >= PANEL ? 0xffffffff : (1u << left) - 1;
        for (int64_t key = 0; key < KEYS; key += 2) {
            const __m512i even = _mm512_maskz_loadu_epi16(lanes, values[key] + i);
            const __m512i odd = _mm512_maskz_loadu_epi16(lanes, values[key + 1] + i);
            uint32_t *to = packed + key / 2 * padded + i;
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(even, high, odd));
        }
    }
}

#define ATTEND(ROWS)                                                                           \
    static void score_##ROWS(float (*scores)[KEYS], const uint16_t *const *queries,            \
                             const uint32_t *keys, int64_t pairs) {                            \
        __m512 sums[ROWS][2];                                                                  \
        for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();          \
        multiply_pairs(ROWS, queries, keys, KEYS, pairs, sums);                                \
        for (int r = 0; r < ROWS; r++)                                                         \
            for (int half = 0; half < 2; half++)                                               \
                _mm512_storeu_ps(scores[r] + 16 * half, sums[r][half]);                        \
    }                                                                                          \
    static void mix_##ROWS(float *mixed, const uint16_t *const *weights,                       \
                           const uint32_t *values, int64_t padded) {                           \
        for (int64_t i = 0; i < padded; i += PANEL) {                                          \
            __m512 sums[ROWS][2];                                                              \
            for (int r = 0; r < ROWS; r++)                                                     \
                for (int half = 0; half < 2; half++)                                           \
                    sums[r][half] = _mm512_loadu_ps(mixed + r * padded + i + 16 * half);       \
            multiply_pairs(ROWS, weights, values + i, padded, KEYS / 2, sums);                 \
            for (int r = 0; r < ROWS; r++)                                                     \
                for (int half = 0; half < 2; half++)                                           \
                    _mm512_storeu_ps(mixed + r * padded + i + 16 * half, sums[r][half]);       \
        }                                                                                      \
    }
ATTEND(1) ATTEND(2) ATTEND(3) ATTEND(4) ATTEND(5) ATTEND(6) ATTEND(7) ATTEND(8)
static void (*const SCORE[])(float (*)[KEYS], const uint16_t *const *, const uint32_t *, int64_t) = {
    NULL, score_1, score_2, score_3, score_4, score_5, score_6, score_7, score_8};
static void (*const MIX[])(float *, const uint16_t *const *, const uint32_t *, int64_t) = {
    NULL, mix_1, mix_2, mix_3, mix_4, mix_5, mix_6, mix_7, mix_8};

/* Of the keys first, first + 1, ...: bit i is set where the query sees key i. */
static inline uint32_t seen_keys(int64_t position, int64_t first, int64_t window) {
    const int64_t after = position + 1 - first;
    uint32_t seen = after >= KEYS ? 0xffffffff : after <= 0 ? 0 : (1u << after) - 1;
    if (window) {
        const int64_t before = after - window; /* so many of them are too far back */
        if (before >= KEYS) return 0;
        if (before > 0) seen &= 0xffffffffu << before;
    }
    return seen;
}

/* One step of the running softmax of a row: scores become weights. Returns what earlier sums are
 * to be multiplied with. */
static inline float soften(uint16_t *weights, const float *scores, uint32_t seen, float scale,
                           float *highest, __m512 *total) {
    const __m512 none = _mm512_set1_ps(-__builtin_inff()), by = _mm512_set1_ps(scale);
    const __mmask16 first = seen & 0xffff, second = seen >> 16;
    const __m512 a = _mm512_mask_mul_ps(none, first, _mm512_loadu_ps(scores), by);
    const __m512 b = _mm512_mask_mul_ps(none, second, _mm512_loadu_ps(scores + 16), by);
    float top = _mm512_reduce_max_ps(_mm512_max_ps(a, b));
    if (top < *highest) top = *highest;
    float faded = 1.0f;
    if (top > *highest) {
        const __m512 fade = exp_lanes(_mm512_set1_ps(*highest - top));
        faded = _mm512_cvtss_f32(fade);
        *total = _mm512_mul_ps(*total, fade);
        *highest = top;
    }
    const __m512 zero = _mm512_set1_ps(top);
    const __m512 p = _mm512_maskz_mov_ps(first, exp_lanes(_mm512_sub_ps(a, zero)));
    const __m512 q = _mm512_maskz_mov_ps(second, exp_lanes(_mm512_sub_ps(b, zero)));
    *total = _mm512_add_ps(*total, _mm512_add_ps(p, q));
    store_narrow(weights, 0xffff, p);
    store_narrow(weights + 16, 0xffff, q);
    return faded;
}

static const uint16_t NOTHING[MOST_HEAD_DIM];

/* Where the keys of tokens first, first + 1, ... lie, for one head; a row of zeros for those that are
 * not in from : stop. */
static inline void find_keys(const uint16_t **keys, const Attention *of, const int64_t *pages,
                             int64_t kv_head, int64_t first, int64_t from, int64_t stop) {
    const Plan *plan = of->plan;
    const int64_t size = plan->block_size, stride = plan->kv_heads * plan->head_dim;
    const uint16_t *head = of->kv + kv_head * plan->head_dim;
    int64_t page = first / size, place = first % size; /* divided once: it takes 20 cycles */
    for (int64_t i = 0; i < KEYS; i++) {
        const int64_t token = first + i;
        keys[i] = NOTHING;
        if (token >= from && token < stop) keys[i] = head + (pages[page] * 2 * size + place) * stride;
        if (++place == size) place = 0, page++;
    }
}

/* Pages on their way to a cache, line after line. */
typedef struct {
    const uint16_t *kv;
    int64_t page_size; /* keys and values of a page */
    const int64_t *pages;
    int64_t page, stop; /* places in the block table */
    int64_t done;       /* of the page */
} Stream;

/* Sends for some lines. Memory is busy then while scores are computed; sent for all at once they
 * would be waited for (decoding 16 sequences of 160 tokens, 30 layers: 6 ms without, 4 with the next
 * 128 tokens at once, 3 with a fifth of a step's lines at five places). */
static inline void advance(Stream *stream, int64_t lines) {
    for (; lines > 0 && stream->page < stream->stop; lines--) {
        const int64_t page = stream->pages[stream->page];
        _mm_prefetch(stream->kv + page * stream->page_size + stream->done, _MM_HINT_T0);
        stream->done += 32;
        if (stream->done >= stream->page_size) stream->page++, stream->done = 0;
    }
}

/* Rows of scores: some queries of a sequence, for some of the query heads of each of some key heads,
 * in this order from the outside: key head, query, query head. */
typedef struct {
    const Slice *slice;
    int64_t first_query, queries, first_kv_head, kv_heads, first_head, heads;
} ScoreRows;

static void attend_rows(const Attention *of, const ScoreRows *rows) {
    const Plan *plan = of->plan;
    const Slice *slice = rows->slice;
    const int64_t dim = plan->head_dim, padded = (dim + PANEL - 1) / PANEL * PANEL;
    const int64_t side = plan->block_size * plan->kv_heads * dim;
    const int64_t each = rows->queries * rows->heads, count = each * rows->kv_heads;
    const int64_t position = slice->context - slice->length + rows->first_query;
    const int64_t *pages = of->plan->pages + slice->first_page;
    uint32_t keys[MOST_HEAD_DIM / 2 * KEYS], values[KEYS / 2 * MOST_HEAD_DIM];
    float scores[MOST_SCORES][KEYS], mixed[MOST_SCORES * MOST_HEAD_DIM], highest[MOST_SCORES];
    uint16_t weights[MOST_SCORES][KEYS];
    __m512 totals[MOST_SCORES];
    const uint16_t *query_rows[MOST_SCORES], *weight_rows[MOST_SCORES];
    uint16_t *out_rows[MOST_SCORES];
    for (int64_t r = 0; r < count; r++) {
        const int64_t token = slice->start + rows->first_query + r % each / rows->heads;
        const int64_t head = (rows->first_kv_head + r / each) * (plan->heads / plan->kv_heads) +
                             rows->first_head + r % rows->heads;
        query_rows[r] = of->queries + token * of->query_stride + head * dim;
        out_rows[r] = of->out + token * of->out_stride + head * dim;
        weight_rows[r] = weights[r];
        highest[r] = -__builtin_inff();
        totals[r] = _mm512_setzero_ps();
    }
    memset(mixed, 0, count * padded * sizeof *mixed);
    const int64_t from = plan->window ? position + 1 - plan->window : 0;
    const int64_t start = from > 0 ? from / KEYS * KEYS : 0, stop = position + rows->queries;
    /* Many queries find keys and values in a cache, where the first ones have brought them. */
    const int64_t keys_ahead = slice->length == 1 ? stop : 0;
    Stream stream = {.kv = of->kv, .page_size = 2 * side, .pages = pages};
    stream.page = start / plan->block_size;
    stream.stop = (keys_ahead + plan->block_size - 1) / plan->block_size;
    const int64_t lines = 2 * side * KEYS / plan->block_size / 32 / rows->kv_heads;
    advance(&stream, lines * rows->kv_heads);
    for (int64_t first = start; first < stop; first += KEYS) {
        for (int64_t top = 0; top < count; top += each) {
            const uint16_t *key_rows[KEYS], *value_rows[KEYS];
            find_keys(key_rows, of, pages, rows->first_kv_head + top / each, first, from,
                      slice->context);
            for (int64_t i = 0; i < KEYS; i++)
                value_rows[i] = key_rows[i] == NOTHING ? NOTHING : key_rows[i] + side;
            advance(&stream, lines / 5 + 1);
            pack_keys(keys, key_rows, dim);
            advance(&stream, lines / 5 + 1);
            for (int64_t r = top; r < top + each; r += SCORE_ROWS)
                SCORE[least(SCORE_ROWS, top + each - r)](scores + r, query_rows + r, keys, dim / 2);
            advance(&stream, lines / 5 + 1);
            for (int64_t r = top; r < top + each; r++) {
                const uint32_t seen =
                    seen_keys(position + (r - top) / rows->heads, first, plan->window);
                if (!seen) { /* a row that saw nothing yet has no highest score */
                    memset(weights[r], 0, sizeof weights[r]);
                    continue;
                }
                const float faded =
                    soften(weights[r], scores[r], seen, plan->scale, highest + r, totals + r);
                if (faded != 1.0f)
                    for (int64_t i = 0; i < padded; i++) mixed[r * padded + i] *= faded;
            }
            advance(&stream, lines / 5 + 1);
            pack_values(values, value_rows, dim, padded);
            advance(&stream, lines / 5 + 1);
            for (int64_t r = top; r < top + each; r += SCORE_ROWS)
                MIX[least(SCORE_ROWS, top + each - r)](mixed + r * padded, weight_rows + r, values,
                                                       padded);
        }
    }
    for (int64_t r = 0; r < count; r++) {
        const __m512 share_of = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(totals[r]));
        for (int64_t i = 0; i < dim; i += 16)
            store_narrow(out_rows[r] + i, first_lanes(dim - i),
                         _mm512_mul_ps(_mm512_loadu_ps(mixed + r * padded + i), share_of));
    }
}

static void attend_item(const void *task, int64_t item) {
    const Attention *of = task;
    const Plan *plan = of->plan;
    int64_t low = 0, high = plan->num_slices; /* the last slice that begins at or before the item */
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (plan->slices[middle].first_item <= item)
            low = middle;
        else
            high = middle;
    }
    const Slice *slice = plan->slices + low;
    const int64_t group = plan->heads / plan->kv_heads, across = plan->kv_heads / slice->heads_at_once;
    const int64_t number = item - slice->first_item;
    ScoreRows rows = {.slice = slice, .kv_heads = slice->heads_at_once};
    const int64_t most = MOST_SCORES / (group * rows.kv_heads), block = most ? most : 1;
    rows.first_query = number / across * block;
    rows.queries = least(block, slice->length - rows.first_query);
    rows.first_kv_head = number % across * rows.kv_heads;
    for (; rows.first_head < group; rows.first_head += MOST_SCORES) {
        rows.heads = least(MOST_SCORES, group - rows.first_head);
        attend_rows(of, &rows);
    }
}

void polydelta_attend(Pool *pool, const Attention *of) {
    share(pool, attend_item, of, of->plan->num_items);
}
