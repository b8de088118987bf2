/* One-bit deltas: y += scale * x @ signs^T, where a sign is a bit. */
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef struct {
    int64_t out_start, out;
    const uint8_t *bits; /* [out, in / 8 rounded up] */
    int64_t stride;
    const float *scale; /* [1] */
} OneBit;

/* The sum of those x whose bit is 1; n is a multiple of 16, and x is 0 beyond the last input. */
static float sum_of_ones(const float *restrict x, const uint8_t *restrict bits, int64_t n) {
#ifdef __AVX512F__
    /* A bit is a lane of a mask: one addition for 16 inputs. */
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        uint32_t word;
        memcpy(&word, bits + i / 8, sizeof word);
        even = _mm512_mask_add_ps(even, (__mmask16)word, even, _mm512_loadu_ps(x + i));
        odd = _mm512_mask_add_ps(odd, (__mmask16)(word >> 16), odd, _mm512_loadu_ps(x + i + 16));
    }
    if (i < n) {
        uint16_t word;
        memcpy(&word, bits + i / 8, sizeof word);
        even = _mm512_mask_add_ps(even, (__mmask16)word, even, _mm512_loadu_ps(x + i));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
#else
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * (float)(bits[i / 8] >> (i % 8) & 1);
    return sum;
#endif
}

/* scratch: rows * (in rounded up to 16 + 1). Rows of bits may be read up to the next multiple of 2
 * bytes, which the stride leaves room for. */
void polydelta_add_one_bit(uint16_t *y, int64_t y_stride, const uint16_t *x, int64_t x_stride,
                           int64_t rows, int64_t in, const OneBit *d, float *scratch) {
    const int64_t n = (in + 15) / 16 * 16;
    float *all = scratch + rows * n;
    for (int64_t row = 0; row < rows; row++) {
        float *wide = scratch + row * n;
        widen_rows(wide, x + row * x_stride, x_stride, 1, in);
        memset(wide + in, 0, (n - in) * sizeof *wide);
        all[row] = 0;
        for (int64_t i = 0; i < n; i++) all[row] += wide[i];
    }
    for (int64_t i = 0; i < d->out; i++)
        for (int64_t row = 0; row < rows; row++) {
            /* Ones count 1, the others -1. */
            const float ones = sum_of_ones(scratch + row * n, d->bits + i * d->stride, n);
            uint16_t *out = y + row * y_stride + d->out_start + i;
            *out = narrow(widen(*out) + *d->scale * (2 * ones - all[row]));
        }
}

/* Writes count signs, 8 at most. */
static inline void unpack_byte(uint16_t *restrict signs, uint8_t byte, int64_t count) {
    uint16_t eight[8];
    for (int j = 0; j < 8; j++) eight[j] = 0xbf80 ^ (uint16_t)((byte >> j & 1) << 15);
    memcpy(signs, eight, count * sizeof *eight);
}

/* bits [out, *] to signs [out, in], 1 and -1. */
void polydelta_unpack_signs(uint16_t *restrict signs, const uint8_t *restrict bits, int64_t stride,
                            int64_t out, int64_t in) {
    for (int64_t row = 0; row < out; row++) {
        const uint8_t *byte = bits + row * stride;
        int64_t left = in;
        for (; left >= 8; left -= 8, signs += 8) unpack_byte(signs, *byte++, 8);
        if (left) unpack_byte(signs, *byte, left);
        signs += left;
    }
}
