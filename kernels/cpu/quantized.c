/* y = x W^T + bias in bfloat16 like products.c, for weights of 4 or 8 bits.
 *
 * GROUP columns of a row share a scale d, and with 4 bits a least value m: a weight is d q + m,
 * rounded to bfloat16. Sums are taken as in products.c, so that y has the bits of the product with
 * such weights in bfloat16.
 *
 * A block is GROUP columns of a panel: the scales of its rows, the least values, then the codes in
 * the order in which they are used; blocks of a panel are adjacent, the last has zeros behind `in`.
 */
enum {
    GROUP = 32,
    GROUP_PAIRS = GROUP / 2,
    /* Up to so many rows of x weights become bfloat16 in registers. */
    REGISTER_ROWS = 6,
    /* For more, weights are written to a buffer that stays in the first-level cache. */
    BUFFER_GROUPS = 8,
    BUFFER_PAIRS = BUFFER_GROUPS * GROUP_PAIRS,
    /* Rows whose sums are kept meanwhile. */
    KEPT_ROWS = 192,
    /* Bytes between what is multiplied and what is fetched. */
    FETCH_AHEAD = 2048,
};

typedef struct {
    uint16_t *y; /* [rows, out]; float32 if `wide` */
    int64_t y_stride;
    const uint16_t *x; /* [rows, in] */
    int64_t x_stride;
    const uint8_t *weight; /* [panels, groups, block] */
    const float *bias;     /* [out], or NULL */
    int64_t rows, in, out, bits, wide;
} QuantizedProduct;

typedef struct {
    const QuantizedProduct *of;
    int64_t panels, panels_per_item, items_across, rows_per_item;
} SharedQuantizedProduct;

/* Of one block; `bits` is a constant where these are used. */
typedef struct {
    /* By half of the panel, and half of that: each row's number twice, for a pair of columns. */
    __m512 scales[2][2], least[2][2];
    const uint8_t *codes;
} CodeBlock;

static inline int64_t block_bytes(int64_t bits) {
    return bits == 4 ? 4 * PANEL + GROUP * PANEL / 2 : 2 * PANEL + GROUP * PANEL;
}

static inline void load_twice(__m512 *to, const uint8_t *halves) {
    const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512 rows = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves));
    to[0] = _mm512_permutexvar_ps(low, rows);
    to[1] = _mm512_permutexvar_ps(_mm512_add_epi32(low, _mm512_set1_epi32(8)), rows);
}

static inline __attribute__((always_inline)) CodeBlock load_block(const int bits, const uint8_t *at) {
    CodeBlock block = {.codes = at + (bits == 4 ? 4 : 2) * PANEL};
    for (int half = 0; half < 2; half++) {
        load_twice(block.scales[half], at + half * PANEL);
        if (bits == 4) load_twice(block.least[half], at + 2 * PANEL + half * PANEL);
    }
    return block;
}

/* Weights of a pair of columns and half of the panel's rows. codes: of two pairs; `pair` is which of
 * them. */
static inline __attribute__((always_inline)) __m512bh weights_of(
    const int bits, const CodeBlock *block, const uint8_t *codes, const int pair, const int half) {
    const __m512 *scales = block->scales[half], *least_of = block->least[half];
    __m512 parts[2];
    for (int part = 0; part < 2; part++)
        if (bits == 4) {
            /* The low 4 bits of each lane choose a number. */
            const __m512 numbers =
                _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
            const __m512i lanes =
                _mm512_srli_epi32(_mm512_loadu_si512(codes), 16 * pair + 8 * half + 4 * part);
            parts[part] = _mm512_fmadd_ps(_mm512_permutexvar_ps(lanes, numbers), scales[part],
                                          least_of[part]);
        } else {
            const __m128i *at = (const __m128i *)(codes + 64 * pair + 32 * half + 16 * part);
            const __m512i lanes = _mm512_cvtepi8_epi32(_mm_loadu_si128(at));
            parts[part] = _mm512_mul_ps(_mm512_cvtepi32_ps(lanes), scales[part]);
        }
    return _mm512_cvtne2ps_pbh(parts[1], parts[0]);
}

static void store_sums(const QuantizedProduct *of, int64_t row, int64_t column, __m512 sum) {
    const __mmask16 lanes = first_lanes(of->out - column);
    __m512 bias = _mm512_setzero_ps();
    if (of->bias) bias = _mm512_maskz_loadu_ps(lanes, of->bias + column);
    sum = _mm512_add_ps(sum, bias);
    if (of->wide)
        _mm512_mask_storeu_ps((float *)of->y + row * of->y_stride + column, lanes, sum);
    else
        store_narrow(of->y + row * of->y_stride + column, lanes, sum);
}

/* All rows of x with one panel, for whole groups; bits and rows are constants where this is used. */
static inline __attribute__((always_inline)) void multiply_in_registers(
    const int bits, const int rows, const QuantizedProduct *of, int64_t panel) {
    const int64_t groups = of->in / GROUP, bytes = block_bytes(bits), stride = of->x_stride;
    const uint8_t *at = of->weight + panel * groups * bytes;
    const uint16_t *x = of->x;
    __m512 sums[REGISTER_ROWS][2];
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; group++, at += bytes) {
        const CodeBlock block = load_block(bits, at);
        for (int64_t byte = 0; byte < bytes; byte += 64)
            _mm_prefetch((const char *)at + FETCH_AHEAD + byte, _MM_HINT_T0);
        for (const uint8_t *codes = block.codes; codes < at + bytes; codes += 16 * bits)
#pragma GCC unroll 2
            for (int pair = 0; pair < 2; pair++, x += 2) {
                const __m512bh left = weights_of(bits, &block, codes, pair, 0);
                const __m512bh right = weights_of(bits, &block, codes, pair, 1);
#pragma GCC unroll 6
                for (int r = 0; r < rows; r++) {
                    const __m512bh both = pair_of(x + r * stride);
                    sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, left);
                    sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, right);
                }
            }
    }
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++)
            store_sums(of, r, panel * PANEL + 16 * half, sums[r][half]);
}

/* Groups as panels of bfloat16 have them: [GROUP_PAIRS * groups, PANEL, 2]. */
static inline __attribute__((always_inline)) void dequantize(const int bits, uint16_t *to,
                                                             const uint8_t *at, int64_t groups) {
    const int64_t bytes = block_bytes(bits);
    for (int64_t group = 0; group < groups; group++, at += bytes) {
        const CodeBlock block = load_block(bits, at);
        for (int64_t byte = 0; byte < bytes; byte += 64)
            _mm_prefetch((const char *)at + BUFFER_GROUPS * bytes + byte, _MM_HINT_T0);
        for (const uint8_t *codes = block.codes; codes < at + bytes; codes += 16 * bits)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++, to += PANEL)
                _mm512_store_si512(to, (__m512i)weights_of(bits, &block, codes, i / 2, i % 2));
    }
}

/* Adds to sums [rows, 2] what some columns contribute; rows is a constant where this is used. */
static inline __attribute__((always_inline)) void add_products(const int rows, __m512 (*kept)[2],
                                                               const uint16_t *x, int64_t stride,
                                                               const uint16_t *w, int64_t pairs) {
    __m512 sums[MOST_ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++) sums[r][half] = kept[r][half];
    for (int64_t k = 0; k < pairs; k++) {
        const __m512bh left = (__m512bh)_mm512_load_si512(w + k * 2 * PANEL);
        const __m512bh right = (__m512bh)_mm512_load_si512(w + k * 2 * PANEL + PANEL);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const __m512bh both = pair_of(x + r * stride + 2 * k);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, left);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, right);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++) kept[r][half] = sums[r][half];
}

#define ADD(ROWS)                                                                                \
    static void add_products_##ROWS(__m512(*kept)[2], const uint16_t *x, int64_t stride,         \
                                    const uint16_t *w, int64_t pairs) {                          \
        add_products(ROWS, kept, x, stride, w, pairs);                                           \
    }
ADD(1) ADD(2) ADD(3) ADD(4) ADD(5) ADD(6) ADD(7) ADD(8) ADD(9) ADD(10) ADD(11) ADD(12)
static void (*const ADD_PRODUCTS[])(__m512 (*)[2], const uint16_t *, int64_t, const uint16_t *,
                                    int64_t) = {
    NULL,           add_products_1, add_products_2,  add_products_3,  add_products_4,
    add_products_5, add_products_6, add_products_7,  add_products_8,  add_products_9,
    add_products_10, add_products_11, add_products_12,
};

static void multiply_by_buffer(const QuantizedProduct *of, int64_t top, int64_t rows,
                               int64_t panel) {
    const int64_t groups = (of->in + GROUP - 1) / GROUP, bytes = block_bytes(of->bits);
    const int64_t tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;
    _Alignas(64) uint16_t buffer[BUFFER_PAIRS * PANEL * 2];
    __m512 sums[KEPT_ROWS][2];
    for (int64_t r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; group += BUFFER_GROUPS) {
        const uint8_t *at = of->weight + (panel * groups + group) * bytes;
        const int64_t count = least(BUFFER_GROUPS, groups - group), first = group * GROUP;
        if (of->bits == 4)
            dequantize(4, buffer, at, count);
        else
            dequantize(8, buffer, at, count);
        const int64_t pairs = least(BUFFER_PAIRS, (of->in - first) / 2);
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t from = rows * tile / tiles, to = rows * (tile + 1) / tiles;
            ADD_PRODUCTS[to - from](sums + from, of->x + (top + from) * of->x_stride + first,
                                    of->x_stride, buffer, pairs);
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++)
            store_sums(of, top + r, panel * PANEL + 16 * half, sums[r][half]);
}

#define IN_REGISTERS(ROWS)                                                                      \
    static void in_registers_##ROWS(const QuantizedProduct *of, int64_t panel) {                 \
        if (of->bits == 4)                                                                       \
            multiply_in_registers(4, ROWS, of, panel);                                           \
        else                                                                                     \
            multiply_in_registers(8, ROWS, of, panel);                                           \
    }
IN_REGISTERS(1) IN_REGISTERS(2) IN_REGISTERS(3) IN_REGISTERS(4) IN_REGISTERS(5) IN_REGISTERS(6)
static void (*const IN_REGISTERS[])(const QuantizedProduct *, int64_t) = {
    NULL,           in_registers_1, in_registers_2, in_registers_3,
    in_registers_4, in_registers_5, in_registers_6,
};

static void multiply_quantized_item(const void *task, int64_t item) {
    const SharedQuantizedProduct *shared = task;
    const QuantizedProduct *of = shared->of;
    const int64_t first = item % shared->items_across * shared->panels_per_item;
    const int64_t stop = least(first + shared->panels_per_item, shared->panels);
    const int64_t top = item / shared->items_across * shared->rows_per_item;
    const int64_t rows = least(shared->rows_per_item, of->rows - top);
    const int in_registers = of->rows <= REGISTER_ROWS && of->in % GROUP == 0;
    for (int64_t panel = first; panel < stop; panel++)
        if (in_registers)
            IN_REGISTERS[of->rows](of, panel);
        else
            multiply_by_buffer(of, top, rows, panel);
}

void polydelta_multiply_quantized(Pool *pool, const QuantizedProduct *of) {
    if (!of->rows) return;
    SharedQuantizedProduct shared = {.of = of, .panels = (of->out + PANEL - 1) / PANEL};
    shared.rows_per_item = least(of->rows, KEPT_ROWS);
    shared.panels_per_item = shared.panels > 256 ? 8 : shared.panels > 32 ? 3 : 1;
    shared.items_across = (shared.panels + shared.panels_per_item - 1) / shared.panels_per_item;
    const int64_t blocks = (of->rows + shared.rows_per_item - 1) / shared.rows_per_item;
    share(pool, multiply_quantized_item, &shared, shared.items_across * blocks);
}
