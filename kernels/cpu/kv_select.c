/* Which tokens a query reads, as `kv_selecting.select`: candidates are scored, KEYS rows of numbers
 * at a time, and the best are put into a list. */

/* Of one slice; less is done before another thread has begun. */
enum { CANDIDATES_PER_ITEM = 256 };

/* As `kv_selection.Quest`. */
static const float REACH = 0.5f;

/* Rows of numbers that queries are multiplied with, and that they may be found in. */
typedef struct {
    const uint16_t *rows[2][KEYS]; /* PAGES_BY_BOUNDS: the most and the least of a page's channels */
    Tile tile;                     /* others: whose they are */
} Candidates;

/* Of one slice, for some kv heads. */
typedef struct {
    const KVReading *of;
    const KVSlice *slice;
    const KVChoice *choice;
    int64_t first_head, heads;
    int64_t at_once;   /* of them: labels lie beside one another, and are packed together */
    int64_t numbers;   /* that a query has for a candidate, rounded up to pairs */
    int64_t each, stop; /* rows of one candidate; the last candidate, not included */
    uint16_t queries[MOST_SCORES][2 * MOST_HEAD_DIM];
    const uint16_t *query_rows[MOST_SCORES];
    uint32_t packed[MOST_HEAD_DIM * KEYS];
    uint16_t room[KEYS * MOST_HEAD_DIM];
} Scoring;

/* Of one of the kv heads. */
static void prepare_queries(Scoring *scoring, int64_t head) {
    const KVReading *of = scoring->of;
    const KVLayout *layout = of->cache.layout;
    const int64_t dim = layout->head_dim, group = group_of(of), num = layout->num_labels;
    for (int64_t r = 0; r < group; r++) {
        const uint16_t *query = of->queries + scoring->slice->start * of->query_stride +
                                (head * group + r) * dim;
        const int64_t row = (head - scoring->first_head) * group + r;
        uint16_t *own = scoring->queries[row];
        scoring->query_rows[row] = own;
        switch (scoring->choice->way) {
        case PAGES_BY_BOUNDS: /* what the most of a channel is multiplied with, then the least */
            for (int64_t i = 0; i < dim; i += 16) {
                const __mmask16 lanes = first_lanes(dim - i);
                const __m512 x = load_wide(lanes, query + i);
                const __m512 toward = _mm512_mul_ps(x, _mm512_set1_ps((1 + REACH) / 2));
                const __m512 away = _mm512_mul_ps(x, _mm512_set1_ps((1 - REACH) / 2));
                const __mmask16 negative =
                    _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
                store_narrow(own + i, lanes, _mm512_mask_mov_ps(toward, negative, away));
                store_narrow(own + dim + i, lanes, _mm512_mask_mov_ps(away, negative, toward));
            }
            break;
        case TOKENS_BY_LABELS:
            for (int64_t i = 0; i < num; i++) own[i] = query[of->labels[head * num + i]];
            own[num] = 0;
            break;
        default:
            scoring->query_rows[row] = query;
        }
    }
}

/* Candidates from this one on, as many as fit KEYS rows, for one kv head or what is at once; and sends
 * for them. */
static void find_candidates(Candidates *found, const Scoring *scoring, int64_t first, int64_t head) {
    const KVCache *cache = &scoring->of->cache;
    const KVLayout *of = cache->layout;
    const int64_t count = least(KEYS / scoring->each, scoring->stop - first);
    const int64_t labels = of->kv_heads * of->num_labels;
    const int64_t at = scoring->choice->first_candidate + first;
    const int64_t *pages = scoring->of->plan->pages + scoring->slice->first_page + at;
    if (count <= 0) return;
    switch (scoring->choice->way) {
    case PAGES_BY_BOUNDS:
        for (int64_t i = 0; i < KEYS; i++) {
            const char *page = i < count ? page_at(cache, pages[i]) : NULL;
            for (int64_t side = 0; side < 2; side++) {
                const int64_t bounds = (side ? of->least : of->most) + 2 * head * of->head_dim;
                found->rows[side][i] = page ? (const uint16_t *)(page + bounds) : NOTHING;
            }
        }
        return;
    case TOKENS_BY_LABELS:
        find_tokens(&found->tile, scoring->of, scoring->slice, NULL, at, count);
        for (int64_t i = 0; i < KEYS; i++)
            if (found->tile.pages[i])
                _mm_prefetch(found->tile.pages[i] + of->labels + 2 * found->tile.places[i] * labels,
                             _MM_HINT_T0);
        return;
    default:
        found->tile.opened = 0;
        for (int64_t i = 0; i < KEYS; i++) {
            const int64_t page = i / scoring->each, number = head * scoring->each + i % scoring->each;
            int16_t place = 0;
            found->tile.pages[i] = page < count ? page_at(cache, pages[page]) : NULL;
            if (found->tile.pages[i])
                memcpy(&place, found->tile.pages[i] + of->representatives + 2 * number, sizeof place);
            found->tile.places[i] = place;
        }
        send_for(cache, KEY_SIDE, VALUE_SIDE, head, &found->tile, 0, KEYS);
    }
}

/* Sends for what pages first : stop note of all kv heads, line after line. */
static void send_for_notes(const Scoring *scoring, int64_t first, int64_t stop) {
    const KVCache *cache = &scoring->of->cache;
    const KVLayout *of = cache->layout;
    const int64_t *pages = scoring->of->plan->pages + scoring->slice->first_page;
    const int64_t bounds = 2 * of->kv_heads * of->head_dim;
    const int64_t places = 2 * of->kv_heads * of->num_representatives;
    for (int64_t i = first; i < least(stop, scoring->stop); i++) {
        const char *page = page_at(cache, pages[scoring->choice->first_candidate + i]);
        if (!page) continue;
        if (scoring->choice->way == PAGES_BY_REPRESENTATIVES)
            for (int64_t at = 0; at < places; at += 64)
                _mm_prefetch(page + of->representatives + at, _MM_HINT_T0);
        else
            for (int64_t at = 0; at < bounds; at += 64) {
                _mm_prefetch(page + of->least + at, _MM_HINT_T0);
                _mm_prefetch(page + of->most + at, _MM_HINT_T0);
            }
    }
}

static void pack_labels(Scoring *scoring, const Tile *tile, int64_t first) {
    const KVReading *of = scoring->of;
    const KVLayout *layout = of->cache.layout;
    const int64_t num = layout->num_labels;
    const uint16_t *rows[KEYS];
    for (int64_t i = 0; i < KEYS; i++) {
        const int64_t row = tile->places[i] * layout->kv_heads + first;
        rows[i] = NOTHING;
        if (tile->pages[i])
            rows[i] = (const uint16_t *)(tile->pages[i] + layout->labels) + row * num;
        else if (tile->opened >> i & 1) {
            uint16_t *own = scoring->room + i * MOST_HEAD_DIM;
            rows[i] = own;
            for (int64_t head = first; head < first + scoring->at_once; head++) {
                const uint16_t *key = open_row(&of->cache, tile->slot, tile->places[i], 0, head);
                for (int64_t k = 0; k < num; k++) *own++ = key[of->labels[head * num + k]];
            }
        }
    }
    pack_keys(scoring->packed, rows, scoring->at_once * num);
}

static void pack_candidates(Scoring *scoring, const Candidates *found, int64_t head) {
    const int64_t dim = scoring->of->cache.layout->head_dim;
    const uint16_t *rows[KEYS];
    switch (scoring->choice->way) {
    case PAGES_BY_BOUNDS:
        pack_keys(scoring->packed, found->rows[0], dim);
        pack_keys(scoring->packed + dim / 2 * KEYS, found->rows[1], dim);
        return;
    case TOKENS_BY_LABELS:
        pack_labels(scoring, &found->tile, head);
        return;
    default:
        load_rows(rows, scoring->room, &scoring->of->cache, KEY_SIDE, head, &found->tile);
        pack_keys(scoring->packed, rows, dim);
    }
}

/* Of each of a kv head's queries, rows of `to` that are `stride` apart, and of so many candidates; head
 * `number` of what is packed. */
static void score_candidates(const Scoring *scoring, int64_t head, int64_t number, float *to,
                             int64_t stride, int64_t count) {
    const int64_t group = group_of(scoring->of), pairs = (scoring->numbers + 1) / 2;
    const uint32_t *packed = scoring->packed + number * pairs * KEYS;
    const uint16_t *const *queries = scoring->query_rows + (head - scoring->first_head) * group;
    float scores[SCORE_ROWS][KEYS];
    for (int64_t first = 0; first < group; first += SCORE_ROWS) {
        const int64_t rows = least(SCORE_ROWS, group - first);
        SCORE[rows](scores, queries + first, packed, pairs);
        for (int64_t r = 0; r < rows; r++) {
            float *row = scores[r];
            for (int64_t k = 0; k < count && scoring->each > 1; k++) { /* the highest of each */
                row[k] = row[k * scoring->each];
                for (int64_t j = k * scoring->each + 1; j < (k + 1) * scoring->each; j++)
                    if (row[j] > row[k]) row[k] = row[j];
            }
            memcpy(to + (first + r) * stride, row, count * sizeof *row);
        }
    }
}

static inline int64_t scores_of(const KVChoice *choice) {
    return (choice->candidates + KEYS - 1) / KEYS * KEYS;
}

static void score_item(const void *task, int64_t item) {
    const KVReading *of = task;
    const KVChoice *choice = LAST_BEGUN(of->plan->choices, of->plan->num_choices, item);
    const KVLayout *layout = of->cache.layout;
    const int64_t start = (item - choice->first_item) * CANDIDATES_PER_ITEM;
    const int64_t labels = layout->num_labels, by_labels = choice->way == TOKENS_BY_LABELS;
    Scoring scoring; /* not zeros first: it is large */
    scoring.of = of;
    scoring.slice = of->plan->slices + choice->slice;
    scoring.choice = choice;
    scoring.stop = least(choice->candidates, start + CANDIDATES_PER_ITEM);
    scoring.each = choice->way == PAGES_BY_REPRESENTATIVES ? layout->num_representatives : 1;
    scoring.numbers = by_labels                           ? labels
                      : choice->way == PAGES_BY_BOUNDS ? 2 * layout->head_dim
                                                       : layout->head_dim;
    const int64_t most = MOST_SCORES / group_of(of), step = KEYS / scoring.each;
    for (scoring.first_head = 0; scoring.first_head < layout->kv_heads;
         scoring.first_head += scoring.heads) {
        const int64_t first_head = scoring.first_head;
        scoring.heads = least(most, layout->kv_heads - first_head);
        /* An odd number of labels would be paired with the next head's. */
        scoring.at_once = 1;
        if (by_labels && labels % 2 == 0 && scoring.heads * labels <= MOST_HEAD_DIM)
            scoring.at_once = scoring.heads;
        for (int64_t k = 0; k < scoring.heads; k++) prepare_queries(&scoring, first_head + k);
        Candidates found[2];
        int64_t turn = 0;
        /* Places must have come before the keys at them can be sent for, a step ahead. */
        const int64_t ahead = choice->way == PAGES_BY_REPRESENTATIVES ? 4 * step : step;
        find_candidates(found, &scoring, start, first_head);
        for (int64_t i = start; i < scoring.stop; i += step)
            for (int64_t k = 0; k < scoring.heads; k += scoring.at_once, turn ^= 1) {
                const int64_t head = first_head + k, last = k + scoring.at_once == scoring.heads;
                find_candidates(found + (turn ^ 1), &scoring, last ? i + step : i,
                                last ? first_head : head + scoring.at_once);
                if (!by_labels)
                    send_for_notes(&scoring, i + ahead + step * k / scoring.heads,
                                   i + ahead + step * (k + 1) / scoring.heads);
                pack_candidates(&scoring, found + turn, head);
                for (int64_t n = 0; n < scoring.at_once; n++) {
                    const int64_t stride = scores_of(choice);
                    float *scores = of->plan->scores + choice->scores +
                                    (head + n) * group_of(of) * stride;
                    score_candidates(&scoring, head + n, n, scores + i, stride,
                                     least(step, scoring.stop - i));
                }
            }
    }
}

/* Of the sum of the exponentials of scores, which are scaled first. */
static float log_total(const float *scores, int64_t count, float scale) {
    __m512 top = _mm512_set1_ps(-__builtin_inff()), total = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16)
        top = _mm512_mask_max_ps(top, first_lanes(count - i), top, _mm512_loadu_ps(scores + i));
    const __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int64_t i = 0; i < count; i += 16) {
        const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(scores + i), highest);
        const __m512 share = exp_lanes(_mm512_mul_ps(below, _mm512_set1_ps(scale)));
        total = _mm512_mask_add_ps(total, first_lanes(count - i), total, share);
    }
    return _mm512_cvtss_f32(highest) * scale + __builtin_logf(_mm512_reduce_add_ps(total));
}

/* As int32 that are in the same order; both zeros are one. */
static inline __m512i in_order(__m512 numbers) {
    const __mmask16 zero = _mm512_cmp_ps_mask(numbers, _mm512_setzero_ps(), _CMP_EQ_OQ);
    const __m512i bits = _mm512_mask_mov_epi32(_mm512_castps_si512(numbers), zero,
                                               _mm512_setzero_si512());
    const __m512i below = _mm512_srai_epi32(bits, 31);
    return _mm512_xor_si512(bits, _mm512_srli_epi32(below, 1));
}

/* The largest share of attention that one of a kv head's query heads would give to each candidate, its
 * logarithm as `in_order`: in the place of the first head's scores. */
static int32_t *rank_candidates(float *scores, int64_t stride, int64_t heads, int64_t count,
                                float scale) {
    for (int64_t head = 0; head < heads; head++) {
        const float *row = scores + head * stride;
        const __m512 total = _mm512_set1_ps(log_total(row, count, scale));
        for (int64_t i = 0; i < count; i += 16) {
            const __m512 raw = _mm512_mul_ps(_mm512_loadu_ps(row + i), _mm512_set1_ps(scale));
            __m512 share = _mm512_sub_ps(raw, total);
            if (head) share = _mm512_max_ps(_mm512_loadu_ps(scores + i), share);
            _mm512_storeu_ps(scores + i, share);
        }
    }
    for (int64_t i = 0; i < count; i += 16)
        _mm512_storeu_si512(scores + i, in_order(_mm512_loadu_ps(scores + i)));
    return (int32_t *)scores;
}

static int64_t count_from(const int32_t *scores, int64_t count, int32_t lowest) {
    int64_t some = 0;
    for (int64_t i = 0; i < count; i += 16) {
        const __m512i vector = _mm512_maskz_loadu_epi32(first_lanes(count - i), scores + i);
        some += __builtin_popcount(_mm512_mask_cmpge_epi32_mask(first_lanes(count - i), vector,
                                                                _mm512_set1_epi32(lowest)));
    }
    return some;
}

/* The highest number that at least `wanted` scores are not below. */
static int32_t least_chosen(const int32_t *scores, int64_t count, int64_t wanted) {
    int64_t low = INT32_MIN, high = (int64_t)INT32_MAX + 1;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2, some = count_from(scores, count, middle);
        if (some == wanted) return middle;
        if (some > wanted)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static inline int32_t *list_run(int32_t *list, int64_t first, int64_t stop) {
    for (int64_t token = first; token < stop; token++) *list++ = token;
    return list;
}

/* The list of one kv head; equal scores go to the lower position. */
static void choose_item(const void *task, int64_t item) {
    const KVReading *of = task;
    const int64_t heads = of->cache.layout->kv_heads, head = item % heads;
    const KVChoice *choice = of->plan->choices + item / heads;
    const KVSlice *slice = of->plan->slices + choice->slice;
    const int64_t stride = scores_of(choice), group = group_of(of);
    const int32_t *scores =
        rank_candidates(of->plan->scores + choice->scores + head * group * stride, stride, group,
                        choice->candidates, of->plan->scale);
    const int32_t lowest = least_chosen(scores, choice->candidates, choice->chosen);
    int64_t ties = choice->chosen;
    if (lowest < INT32_MAX) ties -= count_from(scores, choice->candidates, lowest + 1);
    const int64_t unit = choice->way == TOKENS_BY_LABELS ? 1 : of->cache.layout->block_size;
    const int64_t first = choice->first_candidate, end = first + choice->candidates;
    const int64_t room = (slice->listed + KEYS - 1) / KEYS * KEYS;
    int32_t *list = of->plan->lists + slice->list + head * room, *at = list;
    at = list_run(at, 0, first * unit);
    for (int64_t i = 0; i < choice->candidates; i += 16) {
        const __m512i some = _mm512_maskz_loadu_epi32(first_lanes(end - first - i), scores + i);
        uint32_t near = _mm512_mask_cmpge_epi32_mask(first_lanes(end - first - i), some,
                                                     _mm512_set1_epi32(lowest));
        for (; near; near &= near - 1) {
            const int64_t k = i + __builtin_ctz(near);
            if (scores[k] == lowest && ties-- <= 0) continue;
            at = list_run(at, (first + k) * unit, (first + k + 1) * unit);
        }
    }
    list_run(at, end * unit, slice->context);
}
