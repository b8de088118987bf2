/* Rows of a cache of any format, found or decoded, for tiles of tokens. */

/* By the numbers of formats. */
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
