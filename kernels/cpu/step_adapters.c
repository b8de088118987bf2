/* The adapters of a step, as the kernels are told of them, and where their bytes are. */
typedef void (*ApplyDelta)(uint16_t *y, int64_t y_stride, const uint16_t *x, int64_t x_stride,
                           int64_t rows, int64_t in, const void *delta, float *scratch);

typedef struct {
    ApplyDelta apply; /* NULL where `delta` is a LowRank */
    const void *delta;
    int64_t per_number, per_row, per_column, once; /* floats of scratch, see native_deltas.py */
} Delta;

/* What one adapter does to one linear layer. */
typedef struct {
    int64_t low_rank; /* whether all its deltas are */
    int64_t num_deltas;
    const Delta *deltas;
    int64_t first_byte, num_bytes; /* where these are among a layer's bytes, if they are in pages */
} Site;

typedef struct {
    const Site *site; /* NULL where it does nothing */
    int64_t layer;    /* whose bytes its deltas are in, if they are in pages */
} Bound;

typedef struct {
    const Bound *sites;
    uintptr_t pool; /* whose pages it is in; 0 where its deltas have addresses there */
    int64_t layer_bytes;
    const int64_t *pages;
    int64_t num_pages, page_bytes;
    /* Where a layer's bytes are copied together, since its deltas have addresses there; NULL where
     * they are read in place. */
    char *copy;
    int64_t *copied; /* the layer that was */
} Adapter;

typedef struct {
    int64_t start, rows; /* of the step */
    int64_t turn;        /* segments with the same rows have different turns */
    const Adapter *adapter;
    double weight; /* of what low-rank deltas add */
} Segment;

/* Those of a step; another step's may take their place between two calls. */
typedef struct {
    const Segment *segments;
    int64_t num_segments, num_turns;
} Segments;

typedef struct {
    const Segments *of;
    int64_t site;
    uint16_t *y; /* [rows, out] */
    int64_t y_stride;
    const uint16_t *x; /* [rows, in] */
    int64_t x_stride;
    int64_t in;
} Group;

enum { SCRATCH, ENTRIES, SHRUNK, SHRUNK_WHOLE, RUNS, COPIES, NUM_KEPT };

/* Memory of a thread that grows and stays. */
static void *keep(int which, size_t bytes) {
    static __thread struct {
        void *memory;
        size_t bytes;
    } kept[NUM_KEPT];
    if (kept[which].bytes < bytes) {
        free(kept[which].memory);
        kept[which].memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
        kept[which].bytes = bytes;
    }
    return kept[which].memory;
}

static inline Pages pages_of(const Adapter *adapter, const Bound *bound) {
    if (!adapter->pool || adapter->copy) return ANYWHERE;
    return (Pages){adapter->pool + bound->layer * adapter->layer_bytes, adapter->pages,
                   adapter->page_bytes};
}

static inline int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

/* The bytes in pages that the group reads. */
static Runs list_runs(const Group *group) {
    const Segments *of = group->of;
    int64_t most = 1, count = 0;
    for (int64_t i = 0; i < of->num_segments; i++) {
        const Adapter *adapter = of->segments[i].adapter;
        const Site *site = adapter->sites[group->site].site;
        if (site && site->num_bytes) most += 2 + site->num_bytes / adapter->page_bytes;
    }
    Run *runs = keep(RUNS, most * sizeof *runs);
    Runs all = {runs, 0};
    for (int64_t i = 0; i < of->num_segments; i++) {
        const Adapter *adapter = of->segments[i].adapter;
        const Bound *bound = adapter->sites + group->site;
        if (!bound->site || !bound->site->num_bytes) continue;
        const Pages pages = pages_of(adapter, bound);
        Place at = place_of(&pages, bound->site->first_byte);
        for (int64_t left = bound->site->num_bytes, bytes; left > 0; left -= bytes) {
            bytes = least(left, 2 * numbers_left(&at, &pages));
            runs[count] = (Run){(const char *)numbers_at(&at, &pages), parts(bytes, 64)};
            all.lines += runs[count++].lines;
            move_on(&at, &pages, bytes);
        }
    }
    runs[count] = (Run){NULL, 0};
    return all;
}

/* A page of an adapter on its way to the copy of a layer. */
typedef struct {
    char *to;
    const char *from;
    int64_t bytes;
} Copy;

static void copy_item(const void *task, int64_t item) {
    const Copy *copy = (const Copy *)task + item;
    memcpy(copy->to, copy->from, copy->bytes);
}

/* Copies the layer at hand together for those that need it, once for all of its sites. */
static void copy_layers(Pool *pool, const Group *group) {
    const Segments *of = group->of;
    int64_t most = 0, count = 0;
    for (int64_t i = 0; i < of->num_segments; i++)
        if (of->segments[i].adapter->copy) most += of->segments[i].adapter->num_pages;
    if (!most) return;
    Copy *copies = keep(COPIES, most * sizeof *copies);
    for (int64_t i = 0; i < of->num_segments; i++) {
        const Adapter *adapter = of->segments[i].adapter;
        const Bound *bound = adapter->sites + group->site;
        if (!adapter->copy || !bound->site || *adapter->copied == bound->layer) continue;
        *adapter->copied = bound->layer;
        const char *layer = (const char *)(adapter->pool + bound->layer * adapter->layer_bytes);
        for (int64_t page = 0; page < adapter->num_pages; page++)
            copies[count++] = (Copy){adapter->copy + page * adapter->page_bytes,
                                     layer + adapter->pages[page], adapter->page_bytes};
    }
    share(pool, copy_item, copies, count);
}
