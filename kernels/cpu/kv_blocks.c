/* Which blocks of keys a block of a prompt's queries reads, as `kv_prefill.block_mask`: those that
 * receive most of its attention, by products along the antidiagonals of tiles of `stride` queries
 * and as many keys (arXiv:2503.16428).
 */
enum { BLOCK_TOKENS = 128, BLOCK_TILES = BLOCK_TOKENS / KEYS };

typedef struct {
    int64_t start, length, context, slot, first_page; /* as `KVSlice` */
    int64_t stride;
    double threshold;
    int64_t first_item; /* the number of its first block of queries */
    int64_t shares;     /* [heads, blocks of queries, blocks of keys], in the plan's memory */
} KVPrompt;

typedef struct {
    int64_t heads, num_prompts, num_blocks; /* of queries, of all prompts */
    const KVPrompt *prompts;
    const int64_t *pages;
    float *shares;
    double scale;
} KVPrompts;

typedef struct {
    KVCache cache;
    const KVPrompts *plan;
    uint16_t *out; /* [tokens, heads, head_dim] */
    int64_t out_stride;
    const uint16_t *queries;
    int64_t query_stride;
} KVBlocks;

/* A block of queries. */
typedef struct {
    const KVBlocks *of;
    const KVPrompt *prompt;
    int64_t number, first, queries; /* of the prompt's; the first one's row in it, and how many */
    int64_t own;                    /* the block of keys that they belong to */
    /* For `find_tokens`. */
    KVPlan plan;
    KVReading reading;
    KVSlice slice;
} QueryBlock;

static inline int64_t blocks_in(int64_t tokens) {
    return (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
}

/* The last blocks first: they read most. */
static void begin_block(QueryBlock *in, const KVBlocks *of, int64_t item) {
    const KVPrompt *prompt = LAST_BEGUN(of->plan->prompts, of->plan->num_prompts, item);
    const int64_t number = prompt->first_item + blocks_in(prompt->length) - 1 - item;
    in->of = of;
    in->prompt = prompt;
    in->number = number;
    in->first = number * BLOCK_TOKENS;
    in->queries = least(BLOCK_TOKENS, prompt->length - in->first);
    in->own = (prompt->context - prompt->length + in->first) / BLOCK_TOKENS;
    in->plan = (KVPlan){.pages = of->plan->pages};
    in->reading = (KVReading){.cache = of->cache, .plan = &in->plan};
    in->slice = (KVSlice){.context = prompt->context, .slot = prompt->slot};
    in->slice.first_page = prompt->first_page;
}

static inline const uint16_t *query_at(const QueryBlock *in, int64_t query, int64_t head) {
    return in->of->queries + (in->prompt->start + in->first + query) * in->of->query_stride +
           head * in->of->cache.layout->head_dim;
}

/* What each block of keys receives from this one. */
static inline float *shares_of(const QueryBlock *in, int64_t head) {
    const KVPrompt *prompt = in->prompt;
    const int64_t row = head * blocks_in(prompt->length) + in->number;
    return in->of->plan->shares + prompt->shares + row * blocks_in(prompt->context);
}

static void pack_tile(uint32_t *packed, uint16_t *room, const QueryBlock *in, int64_t kv_head,
                      const Tile *tile) {
    const uint16_t *found[KEYS];
    load_rows(found, room, &in->of->cache, KEY_SIDE, kv_head, tile);
    pack_keys(packed, found, in->of->cache.layout->head_dim);
}

/* Tiles of queries, one a row: for one kv head, those of its first query head come first. */
typedef struct {
    const QueryBlock *block;
    int64_t kv_head, first_head, tiles; /* tiles: of each query head */
    int64_t top, count;                 /* rows that are looked at together */
    uint32_t keys[MOST_HEAD_DIM / 2 * KEYS];
    uint16_t room[KEYS * MOST_HEAD_DIM];
    float scores[MOST_SCORES][KEYS];
    float highest[MOST_SCORES], total[MOST_SCORES];
} TileRows;

/* A query of a tile, where there is one. */
static inline const uint16_t *tile_query(const TileRows *rows, int64_t row, int64_t place) {
    const int64_t query = row % rows->tiles * rows->block->prompt->stride + place;
    if (query >= rows->block->queries) return NOTHING;
    return query_at(rows->block, query, rows->first_head + row / rows->tiles);
}

/* A token of each of KEYS tiles, as `find_tokens` for what `load_rows` wants; divided only once. */
static void find_column(Tile *tile, const QueryBlock *in, int64_t token) {
    const KVCache *cache = &in->of->cache;
    const KVPrompt *prompt = in->prompt;
    const int64_t size = cache->layout->block_size;
    const int64_t own = cache->layout->by_page ? (prompt->context - 1) / size : -1;
    const int64_t *pages = in->of->plan->pages + prompt->first_page;
    int64_t page = token / size, place = token % size;
    tile->opened = 0;
    tile->slot = prompt->slot;
    for (int64_t i = 0; i < KEYS; i++) {
        const int there = token < prompt->context;
        tile->opened |= (uint32_t)(there && page == own) << i;
        tile->pages[i] = there && page != own ? page_at(cache, pages[page]) : NULL;
        tile->places[i] = place;
        token += prompt->stride;
        for (place += prompt->stride; place >= size; page++) place -= size;
    }
}

/* Scores of so many tiles of keys, from one on. Of a tile the last query meets the first key. */
static void score_tiles(TileRows *rows, int64_t first) {
    const QueryBlock *in = rows->block;
    const int64_t stride = in->prompt->stride, pairs = in->of->cache.layout->head_dim / 2;
    memset(rows->scores, 0, rows->count * sizeof *rows->scores);
    for (int64_t place = 0; place < stride; place++) {
        Tile tile;
        find_column(&tile, in, first * stride + place);
        pack_tile(rows->keys, rows->room, in, rows->kv_head, &tile);
        for (int64_t r = 0; r < rows->count; r += SCORE_ROWS) {
            const uint16_t *queries[SCORE_ROWS];
            const int64_t some = least(SCORE_ROWS, rows->count - r), last = stride - 1 - place;
            for (int64_t i = 0; i < SCORE_ROWS; i++)
                queries[i] = i < some ? tile_query(rows, rows->top + r + i, last) : NOTHING;
            __m512 sums[SCORE_ROWS][2];
            for (int64_t i = 0; i < SCORE_ROWS; i++)
                for (int half = 0; half < 2; half++)
                    sums[i][half] = _mm512_loadu_ps(rows->scores[r + i] + 16 * half);
            multiply_pairs(SCORE_ROWS, queries, rows->keys, KEYS, pairs, sums);
            for (int64_t i = 0; i < some; i++)
                for (int half = 0; half < 2; half++)
                    _mm512_storeu_ps(rows->scores[r + i] + 16 * half, sums[i][half]);
        }
    }
}

/* One step of a row's running softmax, whose sums are of blocks. */
static void add_tiles(TileRows *rows, int64_t row, int64_t first, float *sums) {
    const QueryBlock *in = rows->block;
    const int64_t stride = in->prompt->stride, each = BLOCK_TOKENS / stride;
    const int64_t tile = (rows->top + row) % rows->tiles;
    const int64_t count = least(stride, in->queries - tile * stride);
    const int64_t seen = in->own * each + tile + 1 - first, at_once = least(16, each);
    if (seen <= 0) return;
    const __m512 scale = _mm512_set1_ps(in->of->plan->scale / count);
    const __m512 none = _mm512_set1_ps(-__builtin_inff());
    __m512 scores[2];
    for (int half = 0; half < 2; half++)
        scores[half] = _mm512_mask_mul_ps(none, first_lanes(seen - 16 * half), scale,
                                          _mm512_loadu_ps(rows->scores[row] + 16 * half));
    const float top = _mm512_reduce_max_ps(_mm512_max_ps(scores[0], scores[1]));
    if (top > rows->highest[row]) {
        const float fade = _mm512_cvtss_f32(exp_lanes(_mm512_set1_ps(rows->highest[row] - top)));
        for (int64_t i = 0; i * each < first; i++) sums[i] *= fade;
        rows->total[row] *= fade;
        rows->highest[row] = top;
    }
    for (int half = 0; half < 2; half++) {
        const __m512 shares = exp_lanes(
            _mm512_sub_ps(scores[half], _mm512_set1_ps(rows->highest[row])));
        for (int64_t i = 0; i < 16 && 16 * half + i < seen; i += at_once) {
            const __mmask16 lanes = first_lanes(at_once) << i;
            const float sum = _mm512_mask_reduce_add_ps(lanes, shares);
            sums[(first + 16 * half + i) / each] += sum;
            rows->total[row] += sum;
        }
    }
}

/* The shares of one block of queries, for the query heads of one kv head. */
static void score_blocks_item(const void *task, int64_t item) {
    const KVBlocks *of = task;
    const int64_t kv_heads = of->cache.layout->kv_heads, group = of->plan->heads / kv_heads;
    QueryBlock in;
    begin_block(&in, of, item / kv_heads);
    TileRows rows = {.block = &in, .kv_head = item % kv_heads};
    const int64_t stride = in.prompt->stride, blocks = in.own + 1;
    rows.first_head = rows.kv_head * group;
    rows.tiles = (in.queries + stride - 1) / stride;
    const int64_t size = blocks * sizeof(float);
    float *sums = malloc(MOST_SCORES * size); /* of a long prompt more than a thread's stack has */
    for (int64_t i = 0; i < group; i++)
        memset(shares_of(&in, rows.first_head + i), 0, size);
    for (; rows.top < group * rows.tiles; rows.top += MOST_SCORES) {
        rows.count = least(MOST_SCORES, group * rows.tiles - rows.top);
        memset(sums, 0, MOST_SCORES * size);
        for (int64_t r = 0; r < rows.count; r++)
            rows.highest[r] = -__builtin_inff(), rows.total[r] = 0;
        const int64_t stop = in.own * (BLOCK_TOKENS / stride) + rows.tiles;
        for (int64_t first = 0; first < stop; first += KEYS) {
            score_tiles(&rows, first);
            for (int64_t r = 0; r < rows.count; r++) add_tiles(&rows, r, first, sums + r * blocks);
        }
        for (int64_t r = 0; r < rows.count; r++) {
            float *shares = shares_of(&in, rows.first_head + (rows.top + r) / rows.tiles);
            for (int64_t i = 0; i < blocks; i++) shares[i] += sums[r * blocks + i] / rows.total[r];
        }
    }
    free(sums);
}

/* In the place of the chosen ones' shares. */
static const float CHOSEN = -1;

/* The first one and the queries' own, and then the fewest that reach the threshold with them. */
static void choose_blocks(float *shares, int64_t own, double threshold) {
    double total = 0, reached = shares[0] + (own ? shares[own] : 0);
    for (int64_t i = 0; i <= own; i++) total += shares[i];
    shares[0] = shares[own] = CHOSEN;
    while (reached < threshold * total || threshold >= 1) {
        int64_t most = -1;
        for (int64_t i = 1; i < own; i++)
            if (shares[i] != CHOSEN && (most < 0 || shares[i] > shares[most])) most = i;
        if (most < 0) return;
        reached += shares[most];
        shares[most] = CHOSEN;
    }
}
