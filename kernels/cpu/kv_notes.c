/* What pages note of their keys as they are stored, as `kv_notes`: labels of each token, and of
 * pages that are full the bounds of each channel or the tokens that represent them. */

typedef struct {
    KVCache cache;
    const KVStored *stored;
    const int64_t *labels; /* channels, [kv_heads, num_labels] */
} KVNoting;

static void note_labels(const KVNoting *of, char *page, int64_t place, int64_t head) {
    const KVLayout *layout = of->cache.layout;
    const int64_t count = layout->num_labels;
    Tile tile = {.tokens = {0}};
    tile.pages[0] = page;
    tile.places[0] = place;
    const uint16_t *rows[KEYS];
    uint16_t room[KEYS * MOST_HEAD_DIM];
    load_rows(rows, room, &of->cache, KEY_SIDE, head, &tile);
    uint16_t *to = (uint16_t *)(page + layout->labels) + (place * layout->kv_heads + head) * count;
    for (int64_t i = 0; i < count; i++) to[i] = rows[0][of->labels[head * count + i]];
}

/* A page's keys of one head, KEYS places from `first` on. */
static void load_keys(const uint16_t **rows, uint16_t *room, const KVCache *cache, const char *page,
                      int64_t head, int64_t first) {
    Tile tile = {.tokens = {0}};
    for (int64_t i = 0; i < least(KEYS, cache->layout->block_size - first); i++) {
        tile.pages[i] = page;
        tile.places[i] = first + i;
    }
    load_rows(rows, room, cache, KEY_SIDE, head, &tile);
}

static void note_bounds(const KVCache *cache, char *page, int64_t head) {
    const KVLayout *layout = cache->layout;
    const int64_t dim = layout->head_dim, size = layout->block_size;
    uint16_t *lowest = (uint16_t *)(page + layout->least) + head * dim;
    uint16_t *highest = (uint16_t *)(page + layout->most) + head * dim;
    uint16_t room[KEYS * MOST_HEAD_DIM];
    const uint16_t *rows[KEYS];
    for (int64_t first = 0; first < size; first += KEYS) {
        load_keys(rows, room, cache, page, head, first);
        for (int64_t i = 0; i < dim; i += 16) {
            const __mmask16 lanes = first_lanes(dim - i);
            __m512 low = load_wide(lanes, first ? lowest + i : rows[0] + i);
            __m512 high = load_wide(lanes, first ? highest + i : rows[0] + i);
            for (int64_t r = 0; r < least(KEYS, size - first); r++) {
                const __m512 key = load_wide(lanes, rows[r] + i);
                low = _mm512_min_ps(low, key);
                high = _mm512_max_ps(high, key);
            }
            store_narrow(lowest + i, lanes, low);
            store_narrow(highest + i, lanes, high);
        }
    }
}

/* The tokens whose keys score highest against the sum of all, best first; of equal ones the first.
 * Where the page has fewer, they come again. */
static void note_representatives(const KVCache *cache, char *page, int64_t head) {
    const KVLayout *layout = cache->layout;
    const int64_t dim = layout->head_dim, size = layout->block_size;
    const int64_t count = layout->num_representatives;
    char *places = page + layout->representatives + 2 * head * count;
    uint16_t room[KEYS * MOST_HEAD_DIM];
    const uint16_t *rows[KEYS];
    float sum[MOST_HEAD_DIM], best[KEYS];
    int16_t order[KEYS];
    memset(sum, 0, sizeof sum);
    for (int64_t first = 0; first < size; first += KEYS) {
        load_keys(rows, room, cache, page, head, first);
        for (int64_t r = 0; r < least(KEYS, size - first); r++)
            for (int64_t i = 0; i < dim; i++) sum[i] += widen(rows[r][i]);
    }
    int64_t known = 0;
    for (int64_t first = 0; first < size; first += KEYS) {
        load_keys(rows, room, cache, page, head, first);
        for (int64_t r = 0; r < least(KEYS, size - first); r++) {
            const float score = dot(sum, rows[r], dim);
            int64_t at = known;
            while (at > 0 && score > best[at - 1]) at--;
            if (at == count) continue;
            known = least(count, known + 1);
            for (int64_t k = known - 1; k > at; k--) best[k] = best[k - 1], order[k] = order[k - 1];
            best[at] = score;
            order[at] = first + r;
        }
    }
    for (int64_t i = 0; i < count; i++) memcpy(places + 2 * i, order + i % known, sizeof *order);
}

static void note_row_item(const void *task, int64_t item) {
    const KVNoting *of = task;
    const KVLayout *layout = of->cache.layout;
    const int64_t at = of->stored->places[item / layout->kv_heads];
    char *page = page_at(&of->cache, at / layout->block_size);
    note_labels(of, page, at % layout->block_size, item % layout->kv_heads);
}

static void note_page_item(const void *task, int64_t item) {
    const KVNoting *of = task;
    const KVLayout *layout = of->cache.layout;
    const int64_t head = item % layout->kv_heads;
    char *page = page_at(&of->cache, of->stored->closing[item / layout->kv_heads]);
    if (layout->labels >= 0 && layout->by_page)
        for (int64_t place = 0; place < layout->block_size; place++)
            note_labels(of, page, place, head);
    if (layout->most >= 0) note_bounds(&of->cache, page, head);
    if (layout->representatives >= 0) note_representatives(&of->cache, page, head);
}

void polydelta_note_tokens(Pool *pool, const KVNoting *of) {
    const KVLayout *layout = of->cache.layout;
    if (layout->labels >= 0 && !layout->by_page)
        share(pool, note_row_item, of, of->stored->count * layout->kv_heads);
    share(pool, note_page_item, of, of->stored->num_closing * layout->kv_heads);
}
