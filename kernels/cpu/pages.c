/* An adapter's bytes in pages of the pool, which may lie anywhere: into them, and where they are.
 *
 * Rows of its matrices begin at multiples of 64 bytes, and so do pages: a vector of 32 numbers is
 * never cut.
 */
typedef struct {
    uintptr_t memory;     /* of a layer */
    const int64_t *pages; /* where each begins, in bytes from there */
    int64_t page_bytes;
} Pages;

/* A byte of them. */
typedef struct {
    const int64_t *page;
    int64_t place;
} Place;

/* What lies in one piece anywhere: its addresses are places in one page. */
static const int64_t NO_PAGE[1] = {0};
static const Pages ANYWHERE = {0, NO_PAGE, INT64_MAX};

static inline Place place_of(const Pages *pages, int64_t offset) {
    const int64_t page = offset / pages->page_bytes;
    return (Place){pages->pages + page, offset - page * pages->page_bytes};
}

static inline void move_on(Place *at, const Pages *pages, int64_t bytes) {
    for (at->place += bytes; at->place >= pages->page_bytes; at->page++)
        at->place -= pages->page_bytes;
}

static inline const uint16_t *numbers_at(const Place *at, const Pages *pages) {
    return (const uint16_t *)(pages->memory + *at->page + at->place);
}

/* Numbers until the page ends. */
static inline int64_t numbers_left(const Place *at, const Pages *pages) {
    return (pages->page_bytes - at->place) / 2;
}

/* layers: their bytes one after the other, `sizes` of each, into the same pages of each layer of
 * the pool. */
typedef struct {
    char *pool;
    int64_t layer_bytes; /* of the pool */
    const char *const *layers;
    const int64_t *sizes;
    const int64_t *pages; /* as above */
    int64_t num_layers, num_pages, page_bytes;
} Writing;

static void write_item(const void *task, int64_t layer) {
    const Writing *writing = task;
    const char *from = writing->layers[layer];
    char *to = writing->pool + layer * writing->layer_bytes;
    for (int64_t page = 0, left = writing->sizes[layer]; left > 0; page++) {
        const int64_t bytes = left < writing->page_bytes ? left : writing->page_bytes;
        memcpy(to + writing->pages[page], from, bytes);
        from += bytes;
        left -= bytes;
    }
}

void polydelta_write_pages(Pool *pool, const Writing *writing) {
    share(pool, write_item, writing, writing->num_layers);
}
