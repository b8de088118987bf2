/* Pages on their way to a cache, line after line, as `Stream` in attention.c.
 *
 * The processor sees such a run coming, and has many more lines on their way than if rows were sent
 * for here and there: 4 times as many bytes in the same time. So pages are sent for as a whole even
 * where a list leaves some heads' rows of them out. */
enum { MOST_MARKED = 1 << 16 };

typedef struct {
    const KVCache *cache;
    const int64_t *pages;
    int64_t page, stop; /* places in the block table */
    const char *at;     /* of this page; NULL where nobody reads it */
    int64_t left;       /* bytes of it */
    int64_t lines;      /* to be sent for at a time; 0 where there is no stream */
    int64_t marked;     /* pages that a list has something of; all where this is 0 */
    uint64_t marks[MOST_MARKED / 64];
} KVStream;

static inline int is_marked(const KVStream *stream, int64_t page) {
    return !stream->marked || stream->marks[page / 64] >> page % 64 & 1;
}

static inline void begin_page(KVStream *stream, int64_t page) {
    while (page < stream->stop && !is_marked(stream, page)) page++;
    stream->page = page;
    stream->left = 0;
    if (page >= stream->stop) return;
    stream->at = page_at(stream->cache, stream->pages[page]);
    stream->left = stream->at ? stream->cache->layout->stored_bytes : 0;
}

static inline void advance_pages(KVStream *stream, int64_t lines) {
    while (lines > 0 && stream->page < stream->stop) {
        for (; lines > 0 && stream->left > 0; lines--, stream->left -= 64, stream->at += 64)
            _mm_prefetch(stream->at, _MM_HINT_T0);
        if (stream->left <= 0) begin_page(stream, stream->page + 1);
    }
}

/* Marks pages of tokens first : stop of a list. */
static void mark_pages(KVStream *stream, const int32_t *list, int64_t first, int64_t stop) {
    const int64_t size = stream->cache->layout->block_size;
    for (int64_t i = first; i < stop;) {
        const int64_t token = list[i], page = token / size, run = (page + 1) * size - token;
        uint64_t *marks = stream->marks + page / 64;
        stream->marked += !(*marks >> page % 64 & 1);
        *marks |= (uint64_t)1 << page % 64;
        i += i + run <= stop && list[i + run - 1] == token + run - 1 ? run : 1;
    }
}

/* Tokens first : stop of a slice, for some kv heads, of which each calls `advance_pages` so many
 * times a tile; or as many places of each one's list, where it has one. */
static void begin_stream(KVStream *stream, const KVReading *of, const KVSlice *slice,
                         int64_t first_head, int64_t heads, int64_t first, int64_t stop,
                         int64_t calls) {
    const KVLayout *layout = of->cache.layout;
    const int64_t size = layout->block_size, listed = (slice->listed + KEYS - 1) / KEYS * KEYS;
    const int64_t lines = (layout->stored_bytes + 63) / 64, tiles = (stop - first + KEYS - 1) / KEYS;
    stream->cache = &of->cache;
    stream->pages = of->plan->pages + slice->first_page;
    stream->lines = stream->marked = stream->page = stream->stop = 0;
    if (slice->length > 1 || stop <= first) return; /* what comes first brings it for many queries */
    if (!listed) {
        stream->stop = (stop + size - 1) / size;
        stream->lines = lines * KEYS / size / (calls * heads) + 1;
        begin_page(stream, first / size);
        return;
    }
    const int64_t pages = (slice->context + size - 1) / size;
    if (pages > MOST_MARKED) return;
    memset(stream->marks, 0, (pages + 63) / 64 * sizeof *stream->marks);
    const int32_t *list = of->plan->lists + slice->list + first_head * listed;
    for (int64_t i = 0; i < heads; i++) mark_pages(stream, list + i * listed, first, stop);
    /* Of all that is sent for, two fifths are to be read. */
    if (5 * heads * (stop - first) < 2 * stream->marked * size * layout->kv_heads) return;
    stream->stop = pages;
    stream->lines = stream->marked * lines / (calls * heads * tiles) + 1;
    begin_page(stream, 0);
}
