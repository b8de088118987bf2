/* Attention that tokens receive, and the one that leaves for a new one, as kv_eviction.py has it. */

/* The last `rows` tokens of a sequence ask all before them. */
typedef struct {
    KVCache cache;
    int64_t heads, rows, context, slot;
    const int64_t *pages;
    double scale;
    const uint16_t *queries; /* [rows, heads, head_dim] */
    int64_t query_stride;
    float *softmax;   /* for each kv head, query and head of it: the highest score, and 1 / total */
    double *received; /* [kv_heads, context] */
} KVVoting;

/* Some of the queries, for one kv head; and a tile of tokens that they ask. */
typedef struct {
    KVPlan plan;
    KVReading reading;
    KVSlice slice;
    int64_t head, group, first, count; /* count: rows, queries and heads of them */
    const uint16_t *query_rows[MOST_SCORES];
    Tile tile;
    uint32_t keys[MOST_HEAD_DIM / 2 * KEYS];
    uint16_t room[KEYS * MOST_HEAD_DIM];
    float scores[MOST_SCORES][KEYS];
} Votes;

static void begin_votes(Votes *votes, const KVVoting *of, int64_t head) {
    votes->plan = (KVPlan){.heads = of->heads, .pages = of->pages, .scale = of->scale};
    votes->reading = (KVReading){.cache = of->cache, .plan = &votes->plan};
    votes->slice = (KVSlice){.length = of->rows, .context = of->context, .slot = of->slot};
    votes->head = head;
    votes->group = of->heads / of->cache.layout->kv_heads;
}

static void find_votes(Votes *votes, const KVVoting *of, int64_t first) {
    const int64_t group = votes->group;
    votes->first = first;
    votes->count = least(MOST_SCORES / group, of->rows - first) * group;
    for (int64_t r = 0; r < votes->count; r++)
        votes->query_rows[r] = of->queries + (first + r / group) * of->query_stride +
                               (votes->head * group + r % group) * of->cache.layout->head_dim;
}

static void load_asked(Votes *votes, int64_t token, int64_t count) {
    const uint16_t *found[KEYS];
    const KVCache *cache = &votes->reading.cache;
    find_tokens(&votes->tile, &votes->reading, &votes->slice, NULL, token, count);
    load_rows(found, votes->room, cache, KEY_SIDE, votes->head, &votes->tile);
    pack_keys(votes->keys, found, cache->layout->head_dim);
}

static void score_votes(Votes *votes) {
    const int64_t pairs = votes->reading.cache.layout->head_dim / 2;
    for (int64_t r = 0; r < votes->count; r += SCORE_ROWS)
        SCORE[least(SCORE_ROWS, votes->count - r)](votes->scores + r, votes->query_rows + r,
                                                   votes->keys, pairs);
}

/* Which of the tile's tokens a row sees. */
static uint32_t seen_votes(const Votes *votes, int64_t row) {
    const KVSlice *slice = &votes->slice;
    const int64_t position = slice->context - slice->length + votes->first + row / votes->group;
    return seen_tokens(&votes->tile, position, 0, slice);
}

static float *softmax_of(const KVVoting *of, const Votes *votes, int64_t row) {
    return of->softmax + 2 * ((votes->head * of->rows + votes->first) * votes->group + row);
}

static void measure_item(const void *task, int64_t item) {
    const KVVoting *of = task;
    const int64_t at_once = MOST_SCORES / (of->heads / of->cache.layout->kv_heads);
    const int64_t blocks = (of->rows + at_once - 1) / at_once;
    Votes votes;
    begin_votes(&votes, of, item / blocks);
    find_votes(&votes, of, item % blocks * at_once);
    float highest[MOST_SCORES];
    __m512 totals[MOST_SCORES];
    uint16_t weights[KEYS];
    for (int64_t r = 0; r < votes.count; r++)
        highest[r] = -__builtin_inff(), totals[r] = _mm512_setzero_ps();
    const int64_t stop = of->context - of->rows + votes.first + votes.count / votes.group;
    for (int64_t token = 0; token < stop; token += KEYS) {
        load_asked(&votes, token, least(KEYS, stop - token));
        score_votes(&votes);
        for (int64_t r = 0; r < votes.count; r++) {
            const uint32_t seen = seen_votes(&votes, r);
            if (seen) soften(weights, votes.scores[r], seen, of->scale, highest + r, totals + r);
        }
    }
    for (int64_t r = 0; r < votes.count; r++) {
        float *softmax = softmax_of(of, &votes, r);
        softmax[0] = highest[r];
        softmax[1] = 1.0f / _mm512_reduce_add_ps(totals[r]);
    }
}

static void sum_item(const void *task, int64_t item) {
    const KVVoting *of = task;
    const int64_t parts = (of->context + PART - 1) / PART, first = item % parts * PART;
    const __m512 scale = _mm512_set1_ps(of->scale);
    Votes votes;
    begin_votes(&votes, of, item / parts);
    for (int64_t token = first; token < least(of->context, first + PART); token += KEYS) {
        const int64_t count = least(KEYS, of->context - token);
        double *received = of->received + votes.head * of->context + token;
        load_asked(&votes, token, count);
        memset(received, 0, count * sizeof *received);
        for (int64_t query = 0; query < of->rows; query += votes.count / votes.group) {
            __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            float together[KEYS];
            find_votes(&votes, of, query);
            if (!seen_votes(&votes, votes.count - 1)) continue;
            score_votes(&votes);
            for (int64_t r = 0; r < votes.count; r++) {
                const uint32_t seen = seen_votes(&votes, r);
                const float *softmax = softmax_of(of, &votes, r);
                const __m512 highest = _mm512_set1_ps(softmax[0]), by = _mm512_set1_ps(softmax[1]);
                for (int half = 0; half < 2; half++) {
                    const __m512 score = _mm512_loadu_ps(votes.scores[r] + 16 * half);
                    const __m512 share = exp_lanes(_mm512_fmsub_ps(score, scale, highest));
                    sums[half] = _mm512_mask3_fmadd_ps(share, by, sums[half], seen >> 16 * half);
                }
            }
            for (int half = 0; half < 2; half++) _mm512_storeu_ps(together + 16 * half, sums[half]);
            for (int64_t i = 0; i < count; i++) received[i] += together[i];
        }
    }
}

void polydelta_note_attention(Pool *pool, const KVVoting *of) {
    const int64_t kv_heads = of->cache.layout->kv_heads, at_once = MOST_SCORES / (of->heads / kv_heads);
    share(pool, measure_item, of, kv_heads * ((of->rows + at_once - 1) / at_once));
    share(pool, sum_item, of, kv_heads * ((of->context + PART - 1) / PART));
}

/* One sequence, whose newest token lies in place `kept` and asks all of them: it takes the place of the
 * one that has received least of those whose position is below `recent`. */
typedef struct {
    const int64_t *pages;
    int64_t row, kept, position, recent; /* row: of the queries */
    double *received;   /* [kv_heads, kept] */
    int64_t *positions; /* [kv_heads, kept] */
    float *scores;      /* room for [heads, kept + 1, up to a multiple of KEYS] */
} KVLeaving;

typedef struct {
    int64_t count;
    const KVLeaving *sequences;
} KVLeavings;

typedef struct {
    KVCache cache;
    int64_t heads;
    const KVLeavings *leaving;
    double scale, similarity;
    const uint16_t *queries; /* [tokens, heads, head_dim] */
    int64_t query_stride;
} KVEvicting;

/* Of one of these sequences. */
typedef struct {
    KVCache cache;
    const int64_t *pages;
    int64_t kept;
    double similarity;
} KVReplacing;

static RowAt row_in(const KVReplacing *of, int64_t side, int64_t place, int64_t head) {
    const KVLayout *layout = of->cache.layout;
    const char *page = page_at(&of->cache, of->pages[place / layout->block_size]);
    return (RowAt){layout, layout->sides + side, page, place % layout->block_size, head};
}

/* One token and side of a head, where it lies or in `room`. */
static const uint16_t *read_token(uint16_t *room, const KVReplacing *of, int64_t side, int64_t place,
                                  int64_t head) {
    const RowAt at = row_in(of, side, place, head);
    const uint16_t *rows[KEYS];
    Tile tile = {.slot = -1};
    tile.pages[0] = at.page;
    tile.places[0] = at.place;
    load_rows(rows, room, &of->cache, side, head, &tile);
    return rows[0];
}

static float product(const uint16_t *a, const uint16_t *b, int64_t dim) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < dim; i += 32) {
        const __mmask32 lanes = dim - i >= 32 ? 0xffffffff : (1u << (dim - i)) - 1;
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(lanes, a + i),
                               (__m512bh)_mm512_maskz_loadu_epi16(lanes, b + i));
    }
    return _mm512_reduce_add_ps(sum);
}

/* Among the tokens but one, that with the key most like it, of equal ones the first; -1 where none is
 * like it enough. */
static int64_t most_like(const KVReplacing *of, int64_t head, int64_t leaving) {
    const int64_t dim = of->cache.layout->head_dim;
    const KVPlan plan = {.pages = of->pages};
    const KVReading reading = {.cache = of->cache, .plan = &plan};
    const KVSlice slice = {.context = of->kept + 1};
    uint16_t leaving_room[KEYS * MOST_HEAD_DIM], room[KEYS * MOST_HEAD_DIM];
    const uint16_t *key = read_token(leaving_room, of, KEY_SIDE, leaving, head), *rows[KEYS];
    uint32_t packed[MOST_HEAD_DIM / 2 * KEYS];
    float products[SCORE_ROWS][KEYS], likeness[16], best = of->similarity;
    const __m512 length = _mm512_set1_ps(sqrtf(product(key, key, dim)));
    int64_t found = -1;
    for (int64_t first = 0; first <= of->kept; first += KEYS) {
        const int64_t stop = least(KEYS, of->kept + 1 - first);
        Tile tile;
        find_tokens(&tile, &reading, &slice, NULL, first, stop);
        load_rows(rows, room, &of->cache, KEY_SIDE, head, &tile);
        pack_keys(packed, rows, dim);
        SCORE[1](products, &key, packed, dim / 2);
        for (int64_t i = 0; i < stop; i += 16) {
            __m512 squares = _mm512_setzero_ps();
            for (int64_t pair = 0; pair < dim / 2; pair++) {
                const __m512bh both = (__m512bh)_mm512_loadu_si512(packed + pair * KEYS + i);
                squares = _mm512_dpbf16_ps(squares, both, both);
            }
            const __m512 lengths = _mm512_mul_ps(length, _mm512_sqrt_ps(squares));
            const __mmask16 some = first_lanes(stop - i) &
                                   _mm512_cmp_ps_mask(lengths, _mm512_setzero_ps(), _CMP_GT_OQ);
            const __m512 each = _mm512_loadu_ps(products[0] + i);
            const __m512 alike = _mm512_maskz_div_ps(some, each, lengths);
            uint32_t near = _mm512_cmp_ps_mask(alike, _mm512_set1_ps(best), _CMP_GT_OQ);
            _mm512_storeu_ps(likeness, alike);
            for (; near; near &= near - 1) {
                const int64_t lane = __builtin_ctz(near), token = first + i + lane;
                if (token != leaving && likeness[lane] > best) best = likeness[lane], found = token;
            }
        }
    }
    return found;
}

/* Puts the mean of two tokens, the second of which has this weight, where the first one is. */
static void merge_tokens(const KVReplacing *of, int64_t head, int64_t to, int64_t from, double weight) {
    const int64_t dim = of->cache.layout->head_dim;
    uint16_t room[2][KEYS * MOST_HEAD_DIM], row[MOST_HEAD_DIM];
    for (int64_t side = 0; side < SIDES; side++) {
        const uint16_t *mine = read_token(room[0], of, side, to, head);
        const uint16_t *its = read_token(room[1], of, side, from, head);
        for (int64_t i = 0; i < dim; i += 16) {
            const __mmask16 lanes = first_lanes(dim - i);
            const __m512 a = load_wide(lanes, mine + i), b = load_wide(lanes, its + i);
            const __m512 mean = _mm512_fmadd_ps(_mm512_sub_ps(b, a), _mm512_set1_ps(weight), a);
            store_narrow(row + i, lanes, mean);
        }
        const RowAt at = row_in(of, side, to, head);
        encode_row(&at, row);
    }
}

/* As it is stored: native, or with a scale as int8 has it; others encode whole pages. */
static void move_token(const KVReplacing *of, int64_t head, int64_t to, int64_t from) {
    const KVLayout *layout = of->cache.layout;
    for (int64_t side = 0; side < SIDES; side++) {
        const RowAt at = row_in(of, side, to, head), source = row_in(of, side, from, head);
        const int64_t scales = at.side->scales;
        memcpy((char *)codes_at(&at), codes_at(&source), layout->code_bytes);
        if (layout->format != NATIVE)
            memcpy((char *)at.page + scales + 2 * row_number(&at),
                   source.page + scales + 2 * row_number(&source), 2);
    }
}

/* What a kv head's queries give of their attention to each of the tokens, is added to what these have
 * received; returns what the newest one gets. */
static double receive(const KVEvicting *of, const KVLeaving *sequence, int64_t head) {
    const int64_t context = sequence->kept + 1, stride = (context + KEYS - 1) / KEYS * KEYS;
    const __m512 scale = _mm512_set1_ps(of->scale);
    const KVVoting voting = {.cache = of->cache,
                             .heads = of->heads,
                             .rows = 1,
                             .context = context,
                             .slot = -1,
                             .pages = sequence->pages,
                             .scale = of->scale,
                             .queries = of->queries + sequence->row * of->query_stride,
                             .query_stride = of->query_stride};
    Votes votes;
    begin_votes(&votes, &voting, head);
    find_votes(&votes, &voting, 0);
    float highest[MOST_SCORES], *scores = sequence->scores + head * votes.group * stride;
    __m512 totals[MOST_SCORES];
    uint16_t weights[KEYS];
    for (int64_t r = 0; r < votes.count; r++)
        highest[r] = -__builtin_inff(), totals[r] = _mm512_setzero_ps();
    for (int64_t token = 0; token < context; token += KEYS) {
        const int64_t count = least(KEYS, context - token);
        load_asked(&votes, token, count);
        score_votes(&votes);
        const uint32_t seen = seen_votes(&votes, 0);
        for (int64_t r = 0; r < votes.count; r++) {
            soften(weights, votes.scores[r], seen, of->scale, highest + r, totals + r);
            memcpy(scores + r * stride + token, votes.scores[r], sizeof votes.scores[r]);
        }
    }
    double *received = sequence->received + head * sequence->kept, newest = 0;
    for (int64_t r = 0; r < votes.count; r++)
        totals[r] = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(totals[r]));
    for (int64_t token = 0; token < context; token += 16) {
        __m512 sum = _mm512_setzero_ps();
        float together[16];
        for (int64_t r = 0; r < votes.count; r++) {
            const __m512 score = _mm512_loadu_ps(scores + r * stride + token);
            const __m512 top = _mm512_set1_ps(highest[r]);
            sum = _mm512_fmadd_ps(exp_lanes(_mm512_fmsub_ps(score, scale, top)), totals[r], sum);
        }
        _mm512_storeu_ps(together, sum);
        for (int64_t i = 0; i < least(16, context - token); i++)
            *(token + i < sequence->kept ? received + token + i : &newest) += together[i];
    }
    return newest;
}

static void replace_item(const void *task, int64_t item) {
    const KVEvicting *of = task;
    const int64_t kv_heads = of->cache.layout->kv_heads, head = item % kv_heads;
    const KVLeaving *sequence = of->leaving->sequences + item / kv_heads;
    const KVReplacing in = {of->cache, sequence->pages, sequence->kept, of->similarity};
    double newest = receive(of, sequence, head);
    double *received = sequence->received + head * sequence->kept;
    int64_t *positions = sequence->positions + head * sequence->kept;
    int64_t leaving = -1;
    for (int64_t i = 0; i < sequence->kept; i++)
        if (positions[i] < sequence->recent && (leaving < 0 || received[i] < received[leaving]))
            leaving = i;
    const double gone = received[leaving];
    const int64_t like = gone > 0 ? most_like(&in, head, leaving) : -1;
    if (like >= 0) {
        double *weight = like == sequence->kept ? &newest : received + like;
        *weight += gone;
        merge_tokens(&in, head, like, leaving, gone / *weight);
    }
    move_token(&in, head, leaving, sequence->kept);
    received[leaving] = newest;
    positions[leaving] = sequence->position;
}

void polydelta_replace_tokens(Pool *pool, const KVEvicting *of) {
    share(pool, replace_item, of, of->leaving->count * of->cache.layout->kv_heads);
}
