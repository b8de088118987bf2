/* y = x W^T + bias in bfloat16, summed in float32 by AVX512-BF16, for weights packed once.
 *
 * A panel is PANEL rows of W, whose columns lie in pairs: [in / 2, PANEL, 2], padded with zeros.
 * Each row of y is summed in the same order whatever else is in the batch, so that its bits do not
 * depend on that.
 */
enum {
    /* Rows of x at a time: with two vectors for each they fill 24 of 32 registers. */
    MOST_ROWS = 12,
    /* Up to so many rows a product waits for its weights: they are fetched a panel ahead. */
    FEW_ROWS = 48,
    /* Pairs of columns after which one more line is fetched of what comes after a product. */
    FETCH_EVERY = 2,
};

typedef struct {
    uint16_t *y; /* [rows, out]; float32 if `wide` */
    int64_t y_stride;
    const uint16_t *x; /* [rows, in] */
    int64_t x_stride;
    const uint16_t *weight; /* packed */
    const float *bias;      /* [out], or NULL */
    int64_t rows, in, out, wide;
} Product;

/* What is done to rows and columns of y as soon as they are there, and still in a cache. */
typedef void (*Finish)(const void *with, int64_t row, int64_t rows, int64_t column, int64_t stop);

/* Cache lines that are read after a product. Few rows leave the memory time to bring them
 * meanwhile. */
typedef struct {
    const char *start;
    int64_t lines;
} Run;

typedef struct {
    const Run *runs; /* one more than there are */
    int64_t lines;   /* of all */
} Runs;

/* Those that are still to be fetched. */
typedef struct {
    const Run *run;
    const char *at;
    int64_t left_of_run, left;
} Fetch;

/* The share of one of so many items. */
static Fetch begin_fetch(const Runs *of, int64_t item, int64_t items) {
    int64_t first = of->lines * item / items;
    Fetch fetch = {.run = of->runs, .left = of->lines * (item + 1) / items - first};
    for (; fetch.left && first >= fetch.run->lines; fetch.run++) first -= fetch.run->lines;
    if (fetch.left) fetch.at = fetch.run->start + 64 * first;
    if (fetch.left) fetch.left_of_run = fetch.run->lines - first;
    return fetch;
}

static inline __attribute__((always_inline)) void fetch_line(Fetch *fetch) {
    if (!fetch->left) return;
    _mm_prefetch(fetch->at, _MM_HINT_T0);
    fetch->at += 64;
    fetch->left--;
    if (!--fetch->left_of_run) {
        fetch->at = (++fetch->run)->start;
        fetch->left_of_run = fetch->run->lines;
    }
}

typedef struct {
    const Product *of;
    int64_t panels, panels_per_item, items_across, rows_per_item, items;
    Finish finish; /* or NULL */
    const void *with;
    const Runs *ahead;
} SharedProduct;

/* rows is a constant where this is used, so that the sums are registers. */
static inline __attribute__((always_inline)) void multiply_tile(const int rows, const Product *of,
                                                                int64_t row, int64_t panel,
                                                                const int ahead, Fetch *fetch) {
    const int64_t pairs = of->in / 2, stride = of->x_stride;
    const uint16_t *x = of->x + row * stride, *w = of->weight + panel * pairs * 2 * PANEL;
    const char *next = (const char *)(w + pairs * 2 * PANEL);
    __m512 sums[MOST_ROWS][2];
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++) {
        const __m512bh left = (__m512bh)_mm512_loadu_si512(w + k * 2 * PANEL);
        const __m512bh right = (__m512bh)_mm512_loadu_si512(w + k * 2 * PANEL + PANEL);
        if (ahead & 1) _mm_prefetch(next + k * 4 * PANEL, _MM_HINT_T0);
        if (ahead & 2) _mm_prefetch(next + k * 4 * PANEL + 64, _MM_HINT_T0);
        if (ahead && k % FETCH_EVERY == 0) fetch_line(fetch);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const __m512bh both = pair_of(x + r * stride + 2 * k);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, left);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, right);
        }
    }
    for (int half = 0; half < 2; half++) {
        const int64_t column = panel * PANEL + 16 * half;
        const __mmask16 lanes = first_lanes(of->out - column);
        __m512 bias = _mm512_setzero_ps();
        if (of->bias) bias = _mm512_maskz_loadu_ps(lanes, of->bias + column);
        for (int r = 0; r < rows; r++) {
            const __m512 sum = _mm512_add_ps(sums[r][half], bias);
            const int64_t place = (row + r) * of->y_stride + column;
            if (of->wide)
                _mm512_mask_storeu_ps((float *)of->y + place, lanes, sum);
            else
                store_narrow(of->y + place, lanes, sum);
        }
    }
}

#define TILE(ROWS)                                                                             \
    static void multiply_##ROWS(const Product *of, int64_t row, int64_t panel, int ahead,      \
                                Fetch *fetch) {                                                \
        switch (ahead) {                                                                       \
        case 0: multiply_tile(ROWS, of, row, panel, 0, fetch); break;                          \
        case 1: multiply_tile(ROWS, of, row, panel, 1, fetch); break;                          \
        case 2: multiply_tile(ROWS, of, row, panel, 2, fetch); break;                          \
        case 3: multiply_tile(ROWS, of, row, panel, 3, fetch); break;                          \
        default: multiply_tile(ROWS, of, row, panel, 4, fetch);                                \
        }                                                                                      \
    }
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
static void (*const MULTIPLY[])(const Product *, int64_t, int64_t, int, Fetch *) = {
    NULL,       multiply_1, multiply_2, multiply_3,  multiply_4,  multiply_5,  multiply_6,
    multiply_7, multiply_8, multiply_9, multiply_10, multiply_11, multiply_12,
};

/* Some panels for some rows, in tiles of about as many rows each. */
static void multiply_item(const void *task, int64_t item) {
    const SharedProduct *shared = task;
    const Product *of = shared->of;
    const int64_t first = item % shared->items_across * shared->panels_per_item;
    const int64_t stop = least(first + shared->panels_per_item, shared->panels);
    const int64_t top = item / shared->items_across * shared->rows_per_item;
    const int64_t rows = least(shared->rows_per_item, of->rows - top);
    const int64_t tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;
    Fetch fetch = begin_fetch(shared->ahead, item, shared->items);
    for (int64_t panel = first; panel < stop; panel++)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t from = rows * tile / tiles, to = rows * (tile + 1) / tiles;
            /* The first tile fetches one half of each pair of cache lines, the second the other. */
            int ahead = of->rows > FEW_ROWS ? 0 : tiles == 1 ? 3 : tile < 2 ? tile + 1 : 0;
            if (!ahead && fetch.left) ahead = 4;
            MULTIPLY[to - from](of, top + from, panel, ahead, &fetch);
        }
    if (shared->finish)
        shared->finish(shared->with, top, rows, first * PANEL, least(stop * PANEL, of->out));
}

static void multiply(Pool *pool, const Product *of, Finish finish, const void *with,
                     const Runs *ahead) {
    if (!of->rows) return;
    SharedProduct shared = {.of = of, .finish = finish, .with = with, .ahead = ahead};
    shared.panels = (of->out + PANEL - 1) / PANEL;
    /* Blocks of x stay in the second-level cache; few rows are one block. */
    shared.rows_per_item = of->rows <= 96 ? of->rows : 96;
    shared.panels_per_item = shared.panels > 256 ? 8 : shared.panels > 32 ? 3 : 1;
    if (of->rows > FEW_ROWS) shared.panels_per_item = 6;
    shared.items_across = (shared.panels + shared.panels_per_item - 1) / shared.panels_per_item;
    const int64_t blocks = (of->rows + shared.rows_per_item - 1) / shared.rows_per_item;
    shared.items = shared.items_across * blocks;
    share(pool, multiply_item, &shared, shared.items);
}

static const Runs NO_RUNS = {NULL, 0};

void polydelta_multiply(Pool *pool, const Product *of) { multiply(pool, of, NULL, NULL, &NO_RUNS); }

/* weight [out, in] (rows adjacent) to packed; pairs of columns are 4 bytes. */
typedef struct {
    uint32_t *packed; /* [panels, in / 2, PANEL] */
    const uint32_t *weight;
    int64_t out, pairs;
} Packing;

static void pack_item(const void *task, int64_t panel) {
    const Packing *packing = task;
    const int64_t pairs = packing->pairs, rows = least(PANEL, packing->out - panel * PANEL);
    uint32_t *packed = packing->packed + panel * pairs * PANEL;
    const uint32_t *weight = packing->weight + panel * PANEL * pairs;
    for (int64_t k = 0; k < pairs; k++)
        for (int64_t row = 0; row < PANEL; row++)
            packed[k * PANEL + row] = row < rows ? weight[row * pairs + k] : 0;
}

void polydelta_pack(Pool *pool, const Packing *packing) {
    share(pool, pack_item, packing, (packing->out + PANEL - 1) / PANEL);
}
