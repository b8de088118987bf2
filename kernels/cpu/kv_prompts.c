/* Attention of a prompt's queries to the blocks of keys that they choose. A block's queries are
 * enough rows for keys to be laid out for each head by itself, whose choice is its own.
 */

/* What a thread needs to let the queries of one head read blocks. */
typedef struct {
    uint32_t keys[BLOCK_TILES][MOST_HEAD_DIM / 2 * KEYS];
    uint32_t values[BLOCK_TILES][KEYS / 2 * MOST_HEAD_DIM];
    uint16_t room[KEYS * MOST_HEAD_DIM];
    float scores[BLOCK_TILES][SCORE_ROWS][KEYS];
    uint16_t weights[BLOCK_TILES][SCORE_ROWS][KEYS];
    float highest[BLOCK_TOKENS], mixed[BLOCK_TOKENS * MOST_HEAD_DIM];
    __m512 totals[BLOCK_TOKENS];
} BlockRoom;

static void pack_block(BlockRoom *room, const QueryBlock *in, int64_t kv_head, int64_t block) {
    const int64_t dim = in->of->cache.layout->head_dim, padded = padded_dim(&in->reading);
    for (int64_t t = 0; t < BLOCK_TILES; t++) {
        const int64_t token = block * BLOCK_TOKENS + t * KEYS;
        const uint16_t *found[KEYS];
        Tile tile;
        if (token >= in->prompt->context) return; /* no query sees more */
        find_tokens(&tile, &in->reading, &in->slice, NULL, token, in->prompt->context - token);
        pack_tile(room->keys[t], room->room, in, kv_head, &tile);
        load_rows(found, room->room, &in->of->cache, VALUE_SIDE, kv_head, &tile);
        pack_values(room->values[t], found, dim, padded);
    }
}

/* As `soften`, for one of SCORE_ROWS rows and a block's first tokens, so many, in some tiles. */
static inline float soften_block(BlockRoom *room, int64_t place, int64_t seen, int64_t tiles,
                                 float scale, float *highest, __m512 *total) {
    const __m512 none = _mm512_set1_ps(-__builtin_inff()), by = _mm512_set1_ps(scale);
    __m512 scores[2 * BLOCK_TILES], top_lanes = none;
    for (int64_t i = 0; i < 2 * tiles; i++) {
        scores[i] = _mm512_mask_mul_ps(none, first_lanes(seen - 16 * i), by,
                                       _mm512_loadu_ps(room->scores[i / 2][place] + i % 2 * 16));
        top_lanes = _mm512_max_ps(top_lanes, scores[i]);
    }
    const float top = _mm512_reduce_max_ps(top_lanes);
    float faded = 1.0f;
    if (top > *highest) {
        const __m512 fade = exp_lanes(_mm512_set1_ps(*highest - top));
        faded = _mm512_cvtss_f32(fade);
        *total = _mm512_mul_ps(*total, fade);
        *highest = top;
    }
    const __m512 zero = _mm512_set1_ps(*highest);
    for (int64_t i = 0; i < 2 * tiles; i++) {
        const __m512 weight = exp_lanes(_mm512_sub_ps(scores[i], zero));
        *total = _mm512_add_ps(*total, weight);
        store_narrow(room->weights[i / 2][place] + i % 2 * 16, 0xffff, weight);
    }
    return faded;
}

static void attend_block(BlockRoom *room, const QueryBlock *in, int64_t head, int64_t block) {
    const int64_t dim = in->of->cache.layout->head_dim, padded = padded_dim(&in->reading);
    pack_block(room, in, head / (in->of->plan->heads / in->of->cache.layout->kv_heads), block);
    for (int64_t r = 0; r < in->queries; r += SCORE_ROWS) {
        const int64_t count = least(SCORE_ROWS, in->queries - r);
        const int64_t tiles = block == in->own ? (r + count - 1) / KEYS + 1 : BLOCK_TILES;
        const uint16_t *rows[SCORE_ROWS];
        for (int64_t i = 0; i < count; i++) rows[i] = query_at(in, r + i, head);
        for (int64_t t = 0; t < tiles; t++)
            SCORE[count](room->scores[t], rows, room->keys[t], dim / 2);
        for (int64_t i = 0; i < count; i++) {
            const int64_t seen = block == in->own ? r + i + 1 : BLOCK_TOKENS;
            const float faded = soften_block(room, i, seen, tiles, in->of->plan->scale,
                                             room->highest + r + i, room->totals + r + i);
            float *mixed = room->mixed + (r + i) * padded;
            if (faded != 1.0f)
                for (int64_t k = 0; k < padded; k++) mixed[k] *= faded;
        }
        for (int64_t t = 0; t < tiles; t++) {
            for (int64_t i = 0; i < count; i++) rows[i] = room->weights[t][i];
            MIX[count](room->mixed + r * padded, rows, room->values[t], padded);
        }
    }
}

/* One block of queries of one head. */
static void attend_block_item(const void *task, int64_t item) {
    const KVBlocks *of = task;
    const int64_t head = item % of->plan->heads;
    QueryBlock in;
    BlockRoom room;
    begin_block(&in, of, item / of->plan->heads);
    const int64_t dim = of->cache.layout->head_dim, padded = padded_dim(&in.reading);
    float *shares = shares_of(&in, head);
    choose_blocks(shares, in.own, in.prompt->threshold);
    memset(room.mixed, 0, in.queries * padded * sizeof *room.mixed);
    for (int64_t r = 0; r < in.queries; r++)
        room.highest[r] = -__builtin_inff(), room.totals[r] = _mm512_setzero_ps();
    for (int64_t block = 0; block <= in.own; block++)
        if (shares[block] == CHOSEN) attend_block(&room, &in, head, block);
    for (int64_t r = 0; r < in.queries; r++) {
        const __m512 share_of = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(room.totals[r]));
        uint16_t *out = of->out + (in.prompt->start + in.first + r) * of->out_stride + head * dim;
        for (int64_t i = 0; i < dim; i += 16)
            store_narrow(out + i, first_lanes(dim - i),
                         _mm512_mul_ps(_mm512_loadu_ps(room.mixed + r * padded + i), share_of));
    }
}

void polydelta_attend_blocks(Pool *pool, const KVBlocks *of) {
    const KVPrompts *plan = of->plan;
    share(pool, score_blocks_item, of, plan->num_blocks * of->cache.layout->kv_heads);
    share(pool, attend_block_item, of, plan->num_blocks * plan->heads);
}
