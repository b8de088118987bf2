/* The deltas of all adapters of a step on one linear layer, in one call.
 *
 * Low-rank ones are two products, x A^T and the expansion by B, of which every thread takes parts:
 * the idea of grouping the rows of each adapter is Punica's (arXiv:2310.18547). Other kinds go to
 * the kernels of deltas.c, a few rows at a time.
 */
enum {
    /* Rows and ranks of one item of a shrink, rows and columns of one of an expansion. */
    SHRINK_ROWS = 64,
    SHRINK_RANKS = 16,
    EXPAND_ROWS = 64,
    EXPAND_COLUMNS = 512,
    /* Up to so many rows an adapter's delta is one item for each of its parts: there is little to
     * share, and much to wait for. */
    WHOLE_ROWS = 4,
    /* Rows of one item of the other kinds. */
    OTHER_ROWS = 16,
};

/* One adapter's delta in a turn. */
typedef struct {
    const Segment *segment;
    const Site *site;
    const LowRank *low_rank; /* NULL for deltas of other kinds */
    Pages pages;             /* that it is in */
    uint16_t *shrunk; /* [rows, rank + 1]: the last is a pair's other half */
    int64_t first_item, items_across;
} Entry;

typedef struct {
    const Group *group;
    Entry *entries;
    int64_t num_entries;
    int expanding; /* the second half of a turn */
} Turn;

/* Sets `items_across` to the items for the same rows; returns all items of an entry. */
static int64_t count_items(Entry *entry, int expanding) {
    const int64_t rows = entry->segment->rows;
    const LowRank *of = entry->low_rank;
    entry->items_across = 1;
    if (!of) return expanding ? 0 : parts(rows, OTHER_ROWS);
    if (rows <= WHOLE_ROWS) {
        entry->items_across = of->num_blocks;
        return expanding ? 0 : of->num_blocks;
    }
    if (!expanding) {
        entry->items_across = parts(of->rank, SHRINK_RANKS);
        return entry->items_across * parts(rows, SHRINK_ROWS);
    }
    entry->items_across = 0;
    for (int64_t b = 0; b < of->num_blocks; b++)
        entry->items_across += parts(of->blocks[b].out_features, EXPAND_COLUMNS);
    return entry->items_across * parts(rows, EXPAND_ROWS);
}

/* Deltas of other kinds, on some rows. */
static void apply_others(const Group *group, const Entry *entry, int64_t row) {
    const int64_t rows = least(OTHER_ROWS, entry->segment->rows - row), in = group->in;
    const int64_t first = entry->segment->start + row;
    for (int64_t i = 0; i < entry->site->num_deltas; i++) {
        const Delta *delta = entry->site->deltas + i;
        const int64_t floats = rows * (in * delta->per_number + delta->per_row) +
                               in * delta->per_column + delta->once;
        delta->apply(group->y + first * group->y_stride, group->y_stride,
                     group->x + first * group->x_stride, group->x_stride, rows, in, delta->delta,
                     keep(SCRATCH, floats * sizeof(float)));
    }
}

static void turn_item(const void *task, int64_t item) {
    const Turn *turn = task;
    const Group *group = turn->group;
    int64_t low = 0, high = turn->num_entries;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (turn->entries[middle].first_item <= item)
            low = middle;
        else
            high = middle;
    }
    const Entry *entry = turn->entries + low;
    const Segment *segment = entry->segment;
    const LowRank *of = entry->low_rank;
    int64_t across = (item - entry->first_item) % entry->items_across;
    const int64_t down = (item - entry->first_item) / entry->items_across;
    if (!of) {
        apply_others(group, entry, down * OTHER_ROWS);
        return;
    }
    const int64_t width = of->rank + 1;
    const PagedLowRank paged = {of, &entry->pages};
    uint16_t *y = group->y + segment->start * group->y_stride;
    const uint16_t *x = group->x + segment->start * group->x_stride;
    if (segment->rows <= WHOLE_ROWS) {
        const Block *block = of->blocks + across;
        const int64_t first = block->rank_start, last = first + block->rank;
        uint16_t *shrunk = keep(SHRUNK_WHOLE, WHOLE_ROWS * (width + 4) * sizeof *shrunk);
        shrink(shrunk, width, x, group->x_stride, segment->rows, paged, first, last, group->in,
               segment->weight);
        touch_block(block, &entry->pages);
        expand(y, group->y_stride, shrunk, width, segment->rows, block, &entry->pages, 0,
               block->out_features);
    } else if (!turn->expanding) {
        const int64_t row = down * SHRINK_ROWS, first = across * SHRINK_RANKS;
        shrink(entry->shrunk + row * width, width, x + row * group->x_stride, group->x_stride,
               least(SHRINK_ROWS, segment->rows - row), paged, first,
               least(first + SHRINK_RANKS, of->rank), group->in, segment->weight);
    } else {
        const Block *block = of->blocks;
        while (across >= parts(block->out_features, EXPAND_COLUMNS))
            across -= parts((block++)->out_features, EXPAND_COLUMNS);
        const int64_t row = down * EXPAND_ROWS, column = across * EXPAND_COLUMNS;
        expand(y + row * group->y_stride, group->y_stride, entry->shrunk + row * width, width,
               least(EXPAND_ROWS, segment->rows - row), block, &entry->pages, column,
               least(column + EXPAND_COLUMNS, block->out_features));
    }
}

/* Returns how many items the half of a turn has. */
static int64_t number_items(Turn *turn) {
    int64_t items = 0;
    for (int64_t i = 0; i < turn->num_entries; i++) {
        turn->entries[i].first_item = items;
        items += count_items(turn->entries + i, turn->expanding);
    }
    return items;
}

static void take_turn(Pool *pool, Turn *turn) {
    for (turn->expanding = 0; turn->expanding < 2; turn->expanding++)
        share(pool, turn_item, turn, number_items(turn));
}

/* Fills in the entries of a turn: the deltas at some depth of the segments of a number. Returns
 * whether there are more below. */
static int collect(Turn *turn, int64_t number, int64_t depth) {
    const Segments *of = turn->group->of;
    int64_t numbers = 0;
    int more = 0;
    turn->num_entries = 0;
    for (int64_t i = 0; i < of->num_segments; i++) {
        const Segment *segment = of->segments + i;
        const Adapter *adapter = segment->adapter;
        const Bound *bound = adapter->sites + turn->group->site;
        const Site *site = bound->site;
        if (segment->turn != number || !site) continue;
        const int64_t deltas = site->low_rank ? site->num_deltas : 1;
        more |= depth + 1 < deltas;
        if (depth >= deltas) continue;
        const LowRank *low_rank = site->low_rank ? site->deltas[depth].delta : NULL;
        turn->entries[turn->num_entries++] =
            (Entry){segment, site, low_rank, pages_of(adapter, bound), NULL, 0, 0};
        if (low_rank && segment->rows > WHOLE_ROWS) numbers += segment->rows * (low_rank->rank + 1);
    }
    uint16_t *shrunk = keep(SHRUNK, (numbers + 4) * sizeof *shrunk);
    for (int64_t i = 0; i < turn->num_entries; i++) {
        Entry *entry = turn->entries + i;
        entry->shrunk = shrunk;
        if (entry->low_rank && entry->segment->rows > WHOLE_ROWS)
            shrunk += entry->segment->rows * (entry->low_rank->rank + 1);
    }
    return more;
}

static Turn begin_turn(const Group *group) {
    return (Turn){.group = group, .entries = keep(ENTRIES, group->of->num_segments * sizeof(Entry))};
}

/* What follows one another on the same rows: segments by their turns, and each one's deltas. */
void polydelta_add_group(Pool *pool, const Group *group) {
    copy_layers(pool, group);
    Turn turn = begin_turn(group);
    for (int64_t number = 0; number < group->of->num_turns; number++)
        for (int64_t depth = 0, more = 1; more; depth++) {
            more = collect(&turn, number, depth);
            if (turn.num_entries) take_turn(pool, &turn);
        }
}

/* Expansions of a turn, of some rows and columns of y. */
static void expand_finished(const void *with, int64_t row, int64_t rows, int64_t column,
                            int64_t stop) {
    const Turn *turn = with;
    const Group *group = turn->group;
    for (int64_t i = 0; i < turn->num_entries; i++) {
        const Entry *entry = turn->entries + i;
        const Segment *segment = entry->segment;
        const int64_t first = segment->start > row ? segment->start : row;
        const int64_t last = least(segment->start + segment->rows, row + rows);
        const int64_t width = entry->low_rank->rank + 1;
        for (int64_t b = 0; first < last && b < entry->low_rank->num_blocks; b++) {
            const Block *block = entry->low_rank->blocks + b;
            const int64_t left = column > block->out_start ? column - block->out_start : 0;
            const int64_t right = least(stop - block->out_start, block->out_features);
            expand(group->y + first * group->y_stride, group->y_stride,
                   entry->shrunk + (first - segment->start) * width, width, last - first, block,
                   &entry->pages, left, right);
        }
    }
}

typedef struct {
    Product product;
    Group group;
} GroupProduct;

/* A product and what adapters add to it. Of few rows, their bytes are fetched meanwhile. Of many, y
 * is too large for a cache: where low-rank deltas are all there is, they are added while it is
 * computed. */
void polydelta_multiply_group(Pool *pool, const GroupProduct *both) {
    const Group *group = &both->group;
    copy_layers(pool, group);
    Turn turn = begin_turn(group);
    int fused = both->product.rows > FEW_ROWS && group->of->num_turns == 1 && !collect(&turn, 0, 0);
    for (int64_t i = 0; i < turn.num_entries; i++)
        fused &= turn.entries[i].low_rank && turn.entries[i].segment->rows > WHOLE_ROWS;
    if (!fused) {
        const Runs ahead = list_runs(group);
        multiply(pool, &both->product, NULL, NULL, &ahead);
        polydelta_add_group(pool, group);
        return;
    }
    share(pool, turn_item, &turn, number_items(&turn));
    multiply(pool, &both->product, expand_finished, &turn, &NO_RUNS);
}
