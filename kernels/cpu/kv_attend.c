/* Attention over a KV cache of any format, as in attention.c: of all tokens up to a query's, of those
 * in a window, or of a list of them. */

/* Of the running softmax of some rows; a row that has seen nothing has the highest score -inf. */
typedef struct {
    float *highest, *total, *mixed; /* mixed: [rows, padded] */
} Sums;

static inline Sums sums_at(float *memory, int64_t rows) {
    return (Sums){memory, memory + rows, memory + 2 * rows};
}

static void clear_sums(Sums sums, int64_t rows, int64_t padded) {
    for (int64_t r = 0; r < rows; r++) sums.highest[r] = -__builtin_inff(), sums.total[r] = 0;
    memset(sums.mixed, 0, rows * padded * sizeof *sums.mixed);
}

static void add_sums(Sums to, Sums part, int64_t rows, int64_t padded) {
    for (int64_t r = 0; r < rows; r++) {
        if (part.highest[r] == -__builtin_inff()) continue;
        const float top = to.highest[r] > part.highest[r] ? to.highest[r] : part.highest[r];
        const __m512 fade = exp_lanes(_mm512_set1_ps(to.highest[r] - top));
        const __m512 share = exp_lanes(_mm512_set1_ps(part.highest[r] - top));
        to.highest[r] = top;
        to.total[r] = to.total[r] * _mm512_cvtss_f32(fade) + part.total[r] * _mm512_cvtss_f32(share);
        for (int64_t i = r * padded; i < (r + 1) * padded; i += 16) {
            const __m512 more = _mm512_mul_ps(_mm512_loadu_ps(part.mixed + i), share);
            const __m512 sum = _mm512_fmadd_ps(_mm512_loadu_ps(to.mixed + i), fade, more);
            _mm512_storeu_ps(to.mixed + i, sum);
        }
    }
}

/* Some queries of a slice, for all the query heads of each of some kv heads; in this order from the
 * outside: kv head, query, query head. */
typedef struct {
    const KVReading *of;
    const KVSlice *slice;
    int64_t first_query, queries, first_kv_head, kv_heads;
} KVRows;

static inline int64_t offset_of(const KVRows *rows, int64_t row, int64_t stride) {
    const int64_t group = group_of(rows->of), each = rows->queries * group;
    const int64_t token = rows->slice->start + rows->first_query + row % each / group;
    const int64_t head = (rows->first_kv_head + row / each) * group + row % group;
    return token * stride + head * rows->of->cache.layout->head_dim;
}

static void write_rows(const KVRows *rows, Sums sums) {
    const int64_t dim = rows->of->cache.layout->head_dim, padded = padded_dim(rows->of);
    const int64_t count = rows->kv_heads * rows->queries * group_of(rows->of);
    for (int64_t r = 0; r < count; r++) {
        uint16_t *out = rows->of->out + offset_of(rows, r, rows->of->out_stride);
        const __m512 share_of = _mm512_set1_ps(1.0f / sums.total[r]);
        for (int64_t i = 0; i < dim; i += 16)
            store_narrow(out + i, first_lanes(dim - i),
                         _mm512_mul_ps(_mm512_loadu_ps(sums.mixed + r * padded + i), share_of));
    }
}

/* The next tile that a query may see something of, from `first` on. */
static inline int64_t next_tile(const KVRows *rows, int64_t first) {
    const KVSlice *slice = rows->slice;
    const int64_t oldest = slice->context - slice->length + rows->first_query;
    const int64_t window = rows->of->plan->window;
    if (slice->listed) return first;
    if (window && first + KEYS <= oldest - window + 1)
        first = (oldest - window + 1) / KEYS * KEYS;
    if (slice->recent && first >= slice->sinks && first + KEYS <= oldest - slice->recent + 1)
        first = (oldest - slice->recent + 1) / KEYS * KEYS;
    return first;
}

/* Tiles of one part, which each kv head goes through before the next one does. Where heads have lists
 * of their own, they come along together: what one of them reads of a page brings much of what others
 * may want of it. */
enum { BLOCK = 2, MOST_LISTS = 8 };
typedef struct {
    Tile tiles[BLOCK];
    int64_t count, part;
} TileBlock;

/* What a thread needs for a tile. */
typedef struct {
    KVStream stream;
    TileBlock blocks[2][MOST_LISTS];
    uint32_t keys[MOST_HEAD_DIM / 2 * KEYS], values[KEYS / 2 * MOST_HEAD_DIM];
    uint16_t room[KEYS * MOST_HEAD_DIM];
    float scores[MOST_SCORES][KEYS];
    uint16_t weights[MOST_SCORES][KEYS];
    const uint16_t *query_rows[MOST_SCORES], *weight_rows[MOST_SCORES];
    __m512 totals[MOST_SCORES];
} TileRoom;

/* Sends for a quarter of what comes next: some of the pages, or the same head of the next tile. */
enum { QUARTERS = 4 };
static inline void send_ahead(TileRoom *in, const KVRows *rows, int64_t head, const Tile *ahead,
                              int64_t quarter) {
    if (in->stream.lines)
        advance_pages(&in->stream, in->stream.lines);
    else if (ahead)
        send_for(&rows->of->cache, KEY_SIDE, SIDES, head, ahead, quarter * KEYS / QUARTERS,
                 (quarter + 1) * KEYS / QUARTERS);
}

/* One kv head of a tile, on the way to which is the next one. */
static void attend_tile(const KVRows *rows, int64_t number, const Tile *tile, const Tile *ahead,
                        TileRoom *in, Sums sums) {
    const KVReading *of = rows->of;
    const KVSlice *slice = rows->slice;
    const int64_t dim = of->cache.layout->head_dim, padded = padded_dim(of), group = group_of(of);
    const int64_t each = rows->queries * group, top = number * each, stop = top + each;
    const int64_t head = rows->first_kv_head + number;
    const int64_t position = slice->context - slice->length + rows->first_query;
    const uint16_t *found[KEYS];
    load_rows(found, in->room, &of->cache, KEY_SIDE, head, tile);
    send_ahead(in, rows, head, ahead, 0);
    pack_keys(in->keys, found, dim);
    send_ahead(in, rows, head, ahead, 1);
    for (int64_t r = top; r < stop; r += SCORE_ROWS)
        SCORE[least(SCORE_ROWS, stop - r)](in->scores + r, in->query_rows + r, in->keys, dim / 2);
    for (int64_t r = top; r < stop; r++) {
        const uint32_t seen =
            seen_tokens(tile, position + (r - top) / group, of->plan->window, slice);
        if (!seen) { /* a row that saw nothing yet has no highest score */
            memset(in->weights[r], 0, sizeof in->weights[r]);
            continue;
        }
        const float faded = soften(in->weights[r], in->scores[r], seen, of->plan->scale,
                                   sums.highest + r, in->totals + r);
        if (faded != 1.0f)
            for (int64_t i = 0; i < padded; i++) sums.mixed[r * padded + i] *= faded;
    }
    send_ahead(in, rows, head, ahead, 2);
    load_rows(found, in->room, &of->cache, VALUE_SIDE, head, tile);
    pack_values(in->values, found, dim, padded);
    send_ahead(in, rows, head, ahead, 3);
    for (int64_t r = top; r < stop; r += SCORE_ROWS)
        MIX[least(SCORE_ROWS, stop - r)](sums.mixed + r * padded, in->weight_rows + r, in->values,
                                         padded);
}

/* The next tiles of one part, of each list; returns where others begin. */
static int64_t find_blocks(TileBlock *blocks, const KVRows *rows, int64_t first, int64_t stop) {
    const KVReading *of = rows->of;
    const KVSlice *slice = rows->slice;
    const int64_t listed = (slice->listed + KEYS - 1) / KEYS * KEYS, part = first / PART;
    int64_t starts[BLOCK], count = 0;
    for (; count < BLOCK && first < stop && first / PART == part; first = next_tile(rows, first + KEYS))
        starts[count++] = first;
    for (int64_t i = 0; i < (listed ? rows->kv_heads : 1); i++) {
        const int32_t *list =
            listed ? of->plan->lists + slice->list + (rows->first_kv_head + i) * listed : NULL;
        blocks[i].count = count;
        blocks[i].part = part;
        for (int64_t k = 0; k < count; k++)
            find_tokens(blocks[i].tiles + k, of, slice, list ? list + starts[k] : NULL, starts[k],
                        stop - starts[k]);
    }
    return first;
}

/* Tokens first : stop, or those places of a list. Where `parts` is given, the sums of each part are
 * left there, `stride` floats apart; else they are added to `all`. */
static void attend_tokens(const KVRows *rows, int64_t first, int64_t stop, float *parts,
                          int64_t stride, Sums all) {
    const KVReading *of = rows->of;
    const KVSlice *slice = rows->slice;
    const int64_t padded = padded_dim(of), heads = of->plan->heads;
    const int64_t count = rows->kv_heads * rows->queries * group_of(of);
    const int64_t first_head = rows->first_kv_head * group_of(of);
    const int64_t lists = slice->listed ? rows->kv_heads : 0;
    TileRoom in;
    float memory[MOST_SCORES * (MOST_HEAD_DIM + 2)];
    Sums sums = sums_at(memory, count);
    for (int64_t r = 0; r < count; r++) {
        in.query_rows[r] = of->queries + offset_of(rows, r, of->query_stride);
        in.weight_rows[r] = in.weights[r];
    }
    int64_t following = next_tile(rows, first);
    const int64_t size = of->cache.layout->block_size;
    begin_stream(&in.stream, of, slice, rows->first_kv_head, rows->kv_heads, following, stop, QUARTERS);
    advance_pages(&in.stream, 2 * BLOCK * QUARTERS * rows->kv_heads * in.stream.lines);
    const TileBlock *block = in.blocks[0];
    following = find_blocks(in.blocks[0], rows, following, stop);
    for (int64_t i = 0; i < lists && !in.stream.lines; i++)
        for (int64_t k = 0; k < block->count; k++)
            send_for(&of->cache, KEY_SIDE, SIDES, rows->first_kv_head + i, block[i].tiles + k, 0, KEYS);
    for (int64_t part = first / PART; part * PART < stop; part++) {
        if (parts) {
            const Sums whole = sums_at(parts + part * stride, heads);
            sums.highest = whole.highest + first_head;
            sums.total = whole.total + first_head;
            sums.mixed = whole.mixed + first_head * padded;
        }
        if (!block->count || block->part != part) { /* nothing of it is seen */
            for (int64_t r = 0; r < count; r++) sums.highest[r] = -__builtin_inff();
            continue;
        }
        clear_sums(sums, count, padded);
        for (int64_t r = 0; r < count; r++) in.totals[r] = _mm512_setzero_ps();
        while (block->count && block->part == part) {
            TileBlock *next = in.blocks[block == in.blocks[0]];
            if (!lists && in.stream.page < following / size) begin_page(&in.stream, following / size);
            following = find_blocks(next, rows, following, stop);
            for (int64_t head = 0; head < rows->kv_heads; head++) {
                const int64_t list = lists ? head : 0;
                for (int64_t i = 0; i < block->count; i++)
                    attend_tile(rows, head, block[list].tiles + i,
                                i < next->count ? next[list].tiles + i : NULL, &in, sums);
            }
            block = next;
        }
        for (int64_t r = 0; r < count; r++) sums.total[r] = _mm512_reduce_add_ps(in.totals[r]);
        if (!parts) add_sums(all, sums, count, padded);
    }
}

/* One query, some parts: whoever is the last adds all of them up, in their order. */
static void attend_parts(const KVRows *rows, int64_t number) {
    const KVReading *of = rows->of;
    const KVSlice *slice = rows->slice;
    const int64_t heads = of->plan->heads, padded = padded_dim(of), group = group_of(of);
    const int64_t stride = heads * (padded + 2), count = rows->kv_heads * group;
    const int64_t runs = (slice->parts + slice->parts_at_once - 1) / slice->parts_at_once;
    const int64_t stop = slice->listed ? slice->listed : slice->context;
    float *parts = of->plan->sums + slice->sums;
    const int64_t first = number * slice->parts_at_once;
    const Sums none = {NULL, NULL, NULL};
    attend_tokens(rows, first * PART, least(stop, (first + slice->parts_at_once) * PART), parts,
                  stride, none);
    _Atomic int32_t *waiting =
        of->plan->waiting + slice->waiting + rows->first_kv_head / rows->kv_heads;
    if (atomic_fetch_add(waiting, 1) + 1 < runs) return;
    atomic_store(waiting, 0);
    float memory[MOST_SCORES * (MOST_HEAD_DIM + 2)];
    const Sums sum = sums_at(memory, count);
    clear_sums(sum, count, padded);
    for (int64_t part = 0; part < slice->parts; part++) {
        Sums one = sums_at(parts + part * stride, heads);
        const int64_t head = rows->first_kv_head * group;
        one = (Sums){one.highest + head, one.total + head, one.mixed + head * padded};
        add_sums(sum, one, count, padded);
    }
    write_rows(rows, sum);
}

static void attend_kv_item(const void *task, int64_t item) {
    const KVReading *of = task;
    const KVSlice *slice = LAST_BEGUN(of->plan->slices, of->plan->num_slices, item);
    const int64_t across = of->cache.layout->kv_heads / slice->kv_heads_at_once;
    const int64_t number = item - slice->first_item;
    KVRows rows = {.of = of, .slice = slice, .kv_heads = slice->kv_heads_at_once};
    rows.first_kv_head = number % across * rows.kv_heads;
    if (slice->parts) {
        rows.queries = 1;
        attend_parts(&rows, number / across);
        return;
    }
    const int64_t block = MOST_SCORES / (group_of(of) * rows.kv_heads);
    rows.first_query = number / across * block;
    rows.queries = least(block, slice->length - rows.first_query);
    float memory[MOST_SCORES * (MOST_HEAD_DIM + 2)];
    const int64_t count = rows.kv_heads * rows.queries * group_of(of);
    const Sums sums = sums_at(memory, count);
    clear_sums(sums, count, padded_dim(of));
    const int64_t stop = slice->context - slice->length + rows.first_query + rows.queries;
    attend_tokens(&rows, 0, stop, NULL, 0, sums);
    write_rows(&rows, sums);
}

void polydelta_attend_kv(Pool *pool, const KVReading *of) {
    const KVPlan *plan = of->plan;
    share(pool, score_item, of, plan->num_scoring_items);
    share(pool, choose_item, of, plan->num_choices * of->cache.layout->kv_heads);
    share(pool, attend_kv_item, of, plan->num_items);
}

/* Rows that have no context. */
typedef struct {
    uint16_t *out; /* [tokens, size] */
    int64_t out_stride, size;
    const struct { int64_t count; const int64_t *rows; } *idle;
} Clearing;

void polydelta_clear_rows(Pool *pool, const Clearing *of) {
    (void)pool;
    for (int64_t i = 0; i < of->idle->count; i++)
        memset(of->out + of->idle->rows[i] * of->out_stride, 0, of->size * sizeof *of->out);
}
