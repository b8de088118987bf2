/* What a decoder layer does between its products, in bfloat16 and by rows. */

/* Rows that one thread takes at a time: fewer are done before another thread has begun. */
enum { ROWS_PER_ITEM = 8 };

static inline int64_t row_items(int64_t rows) { return (rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM; }

typedef struct {
    uint16_t *y; /* [rows, groups, size], dense */
    const uint16_t *x; /* [rows, groups, size] */
    int64_t x_stride; /* between rows */
    const uint16_t *weight; /* [size] */
    int64_t rows, groups, size;
    double eps;
} Norm;

static void norm_item(const void *task, int64_t item) {
    const Norm *of = task;
    const int64_t stop = least(of->rows, (item + 1) * ROWS_PER_ITEM);
    for (int64_t row = item * ROWS_PER_ITEM; row < stop; row++)
        for (int64_t group = 0; group < of->groups; group++) {
            const uint16_t *x = of->x + row * of->x_stride + group * of->size;
            uint16_t *y = of->y + (row * of->groups + group) * of->size;
            __m512 squares = _mm512_setzero_ps();
            for (int64_t i = 0; i < of->size; i += 16) {
                const __m512 v = load_wide(first_lanes(of->size - i), x + i);
                squares = _mm512_fmadd_ps(v, v, squares);
            }
            const float mean = _mm512_reduce_add_ps(squares) / of->size;
            const __m512 factor = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + (float)of->eps));
            for (int64_t i = 0; i < of->size; i += 16) {
                const __mmask16 lanes = first_lanes(of->size - i);
                const __m512 v = _mm512_mul_ps(load_wide(lanes, x + i), factor);
                store_narrow(y + i, lanes, _mm512_mul_ps(v, load_wide(lanes, of->weight + i)));
            }
        }
}

void polydelta_rms_norm(Pool *pool, const Norm *of) {
    share(pool, norm_item, of, row_items(of->rows));
}

typedef struct {
    uint16_t *x; /* [rows, heads, size], changed in place */
    int64_t x_stride;
    const uint16_t *cos, *sin; /* [rows, size], dense; the sign of the swap is in sin */
    int64_t rows, heads, size;
} Rotation;

static void rotate_item(const void *task, int64_t item) {
    const Rotation *of = task;
    const int64_t half = of->size / 2, stop = least(of->rows, (item + 1) * ROWS_PER_ITEM);
    for (int64_t row = item * ROWS_PER_ITEM; row < stop; row++)
        for (int64_t head = 0; head < of->heads; head++) {
            uint16_t *x = of->x + row * of->x_stride + head * of->size;
            const uint16_t *cos = of->cos + row * of->size, *sin = of->sin + row * of->size;
            for (int64_t i = 0; i < half; i += 16) {
                const __mmask16 lanes = first_lanes(half - i);
                const __m512 a = load_wide(lanes, x + i), b = load_wide(lanes, x + half + i);
                const __m512 low = _mm512_mul_ps(a, load_wide(lanes, cos + i));
                const __m512 high = _mm512_mul_ps(b, load_wide(lanes, cos + half + i));
                store_narrow(x + i, lanes, _mm512_fmadd_ps(b, load_wide(lanes, sin + i), low));
                store_narrow(x + half + i, lanes,
                             _mm512_fmadd_ps(a, load_wide(lanes, sin + half + i), high));
            }
        }
}

void polydelta_embed_positions(Pool *pool, const Rotation *of) {
    share(pool, rotate_item, of, row_items(of->rows));
}

typedef struct {
    uint16_t *y; /* [rows, size] */
    const uint16_t *x; /* [rows, 2 * size], gate beside up */
    int64_t rows, size;
} SiluMul;

static void silu_mul_item(const void *task, int64_t item) {
    const SiluMul *of = task;
    const int64_t stop = least(of->rows, (item + 1) * ROWS_PER_ITEM);
    for (int64_t row = item * ROWS_PER_ITEM; row < stop; row++) {
        const uint16_t *gate = of->x + row * 2 * of->size, *up = gate + of->size;
        for (int64_t i = 0; i < of->size; i += 16) {
            const __mmask16 lanes = first_lanes(of->size - i);
            const __m512 g = load_wide(lanes, gate + i);
            const __m512 e = exp_lanes(_mm512_sub_ps(_mm512_setzero_ps(), g));
            const __m512 silu = _mm512_div_ps(g, _mm512_add_ps(e, _mm512_set1_ps(1.0f)));
            store_narrow(of->y + row * of->size + i, lanes,
                         _mm512_mul_ps(silu, load_wide(lanes, up + i)));
        }
    }
}

void polydelta_silu_mul(Pool *pool, const SiluMul *of) {
    share(pool, silu_mul_item, of, row_items(of->rows));
}

typedef struct {
    uint16_t *y; /* [count] */
    const uint16_t *x;
    int64_t count;
} Addition;

enum { NUMBERS_PER_ITEM = 8192 };

static void add_item(const void *task, int64_t item) {
    const Addition *of = task;
    const int64_t stop = least(of->count, (item + 1) * NUMBERS_PER_ITEM);
    for (int64_t i = item * NUMBERS_PER_ITEM; i < stop; i += 16) {
        const __mmask16 lanes = first_lanes(stop - i);
        store_narrow(of->y + i, lanes,
                     _mm512_add_ps(load_wide(lanes, of->y + i), load_wide(lanes, of->x + i)));
    }
}

void polydelta_add(Pool *pool, const Addition *of) {
    share(pool, add_item, of, (of->count + NUMBERS_PER_ITEM - 1) / NUMBERS_PER_ITEM);
}

typedef struct {
    uint16_t *y; /* [rows, size] */
    const uint16_t *table; /* [*, size] */
    const int64_t *rows_of; /* [rows]: rows of the table */
    int64_t rows, size;
} Gather;

static void gather_item(const void *task, int64_t item) {
    const Gather *of = task;
    const int64_t stop = least(of->rows, (item + 1) * ROWS_PER_ITEM);
    for (int64_t row = item * ROWS_PER_ITEM; row < stop; row++)
        memcpy(of->y + row * of->size, of->table + of->rows_of[row] * of->size, 2 * of->size);
}

void polydelta_gather(Pool *pool, const Gather *of) {
    share(pool, gather_item, of, row_items(of->rows));
}

typedef struct {
    uint16_t *kv; /* [pages, 2, block_size, size] */
    const uint16_t *keys, *values; /* [rows, size] */
    int64_t key_stride, value_stride;
    const int64_t *slots; /* [rows]: page * block_size + place */
    int64_t rows, size, block_size;
} Storing;

static void store_item(const void *task, int64_t item) {
    const Storing *of = task;
    const int64_t stop = least(of->rows, (item + 1) * ROWS_PER_ITEM);
    for (int64_t row = item * ROWS_PER_ITEM; row < stop; row++) {
        const int64_t page = of->slots[row] / of->block_size, place = of->slots[row] % of->block_size;
        uint16_t *key = of->kv + (page * 2 * of->block_size + place) * of->size;
        memcpy(key, of->keys + row * of->key_stride, 2 * of->size);
        memcpy(key + of->block_size * of->size, of->values + row * of->value_stride, 2 * of->size);
    }
}

void polydelta_store_kv(Pool *pool, const Storing *of) {
    share(pool, store_item, of, row_items(of->rows));
}

typedef struct {
    int64_t *places; /* [rows] */
    const float *x;  /* [rows, size] */
    int64_t rows, size;
} Argmax;

/* The first place of the largest number of a row. */
static void argmax_item(const void *task, int64_t row) {
    const Argmax *of = task;
    const float *x = of->x + row * of->size;
    const __m512 none = _mm512_set1_ps(-__builtin_inff());
    __m512 best = none;
    __m512i at = _mm512_setzero_si512();
    for (int64_t i = 0; i < of->size; i += 16) {
        const __m512 v = _mm512_mask_loadu_ps(none, first_lanes(of->size - i), x + i);
        const __mmask16 better = _mm512_cmp_ps_mask(v, best, _CMP_GT_OQ);
        best = _mm512_mask_mov_ps(best, better, v);
        at = _mm512_mask_set1_epi32(at, better, i / 16);
    }
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(best));
    const __m512i places = _mm512_add_epi32(_mm512_slli_epi32(at, 4), lanes);
    of->places[row] =
        _mm512_mask_reduce_min_epi32(_mm512_cmp_ps_mask(best, most, _CMP_EQ_OQ), places);
}

void polydelta_argmax(Pool *pool, const Argmax *of) { share(pool, argmax_item, of, of->rows); }
