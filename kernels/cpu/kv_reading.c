/* What the queries of a step read of a KV cache, and finding it. */

/* Tokens whose running softmax is a part of its own: a long context is several threads' work, and
 * sums are the same bits however parts are shared out. */
enum { PART = 256 };

/* How tokens are chosen. */
enum { ALL, PAGES_BY_BOUNDS, TOKENS_BY_LABELS, PAGES_BY_REPRESENTATIVES };

typedef struct {
    int64_t start, length, context, slot; /* as `ops.SequenceSlice` */
    int64_t first_page;                   /* in `pages` */
    int64_t sinks, recent;                /* of `Window`; recent: 0 where all is seen */
    int64_t first_item, kv_heads_at_once, parts, parts_at_once; /* parts: 0 with many queries */
    int64_t sums, waiting;                /* places in the plan's memory: one part's sums, a counter */
    /* Of `listed` tokens for each kv head, at `list`, in multiples of KEYS; 0 where all are read. */
    int64_t listed, list;
} KVSlice;

/* Slices that choose: of so many candidates, tokens or pages of the sequence, the `chosen` best. */
typedef struct {
    int64_t slice, way, first_candidate, candidates, chosen, first_item, scores;
} KVChoice;

typedef struct {
    int64_t heads, window; /* window: 0 where all is seen */
    int64_t num_slices, num_items, num_choices, num_scoring_items;
    const KVSlice *slices;
    const KVChoice *choices;
    const int64_t *pages;
    float *sums;
    int32_t *lists;
    float *scores;
    _Atomic int32_t *waiting;
    double scale;
} KVPlan;

typedef struct {
    KVCache cache;
    const KVPlan *plan;
    uint16_t *out; /* [tokens, heads, head_dim] */
    int64_t out_stride;
    const uint16_t *queries;
    int64_t query_stride;
    const int64_t *labels; /* channels, [kv_heads, num_labels] */
} KVReading;

static inline int64_t padded_dim(const KVReading *of) {
    return (of->cache.layout->head_dim + PANEL - 1) / PANEL * PANEL;
}

static inline int64_t group_of(const KVReading *of) {
    return of->plan->heads / of->cache.layout->kv_heads;
}

/* Of one slice: `count` positions from an ascending list, or first, first + 1, ... where there is
 * none. */
static void find_tokens(Tile *tile, const KVReading *of, const KVSlice *slice, const int32_t *list,
                        int64_t first, int64_t count) {
    const KVCache *cache = &of->cache;
    const int64_t size = cache->layout->block_size;
    const int64_t own = cache->layout->by_page ? (slice->context - 1) / size : -1;
    const int64_t *pages = of->plan->pages + slice->first_page;
    count = least(KEYS, count);
    tile->opened = 0;
    tile->slot = slice->slot;
    for (int64_t i = 0, run; i < count; i += run) { /* of one page, one after the other */
        const int64_t token = list ? list[i] : first + i, block = token / size;
        const int64_t place = token - block * size;
        run = least(count - i, size - place);
        if (list && list[i + run - 1] != token + run - 1)
            for (run = 1; list[i + run] == token + run;) run++;
        const char *page = block == own ? NULL : page_at(cache, pages[block]);
        if (block == own) tile->opened |= (uint32_t)(((uint64_t)1 << run) - 1) << i;
        const int known = page || block == own; /* else it was given back: nobody reads it */
        for (int64_t k = 0; k < run; k++) tile->tokens[i + k] = known ? token + k : NO_TOKEN;
        for (int64_t k = 0; k < run; k++) tile->places[i + k] = place + k;
        for (int64_t k = 0; k < run; k++) tile->pages[i + k] = page;
    }
    for (int64_t i = count; i < KEYS; i++) {
        tile->tokens[i] = NO_TOKEN;
        tile->places[i] = 0;
        tile->pages[i] = NULL;
    }
}

/* Bit i is set where the query at a position sees the tile's token i. */
static inline uint32_t seen_tokens(const Tile *tile, int64_t position, int64_t window,
                                   const KVSlice *slice) {
    uint32_t seen = 0;
    for (int half = 0; half < 2; half++) {
        const __m512i tokens = _mm512_loadu_si512(tile->tokens + 16 * half);
        __mmask16 some = _mm512_cmple_epi32_mask(tokens, _mm512_set1_epi32(position));
        if (window)
            some &= _mm512_cmpgt_epi32_mask(tokens, _mm512_set1_epi32(position - window));
        if (slice->recent)
            some &= _mm512_cmplt_epi32_mask(tokens, _mm512_set1_epi32(slice->sinks)) |
                    _mm512_cmpgt_epi32_mask(tokens, _mm512_set1_epi32(position - slice->recent));
        seen |= (uint32_t)some << 16 * half;
    }
    return seen;
}

/* The last of so many things, each of which begins at some item, that begins at or before this. */
#define LAST_BEGUN(things, count, item)                        \
    ({                                                         \
        int64_t low = 0, high = count;                         \
        while (high - low > 1) {                               \
            const int64_t middle = (low + high) / 2;           \
            if ((things)[middle].first_item <= item)           \
                low = middle;                                  \
            else                                               \
                high = middle;                                 \
        }                                                      \
        (things) + low;                                        \
    })
