/* bfloat16 numbers as 16 bits, and sums of them in float32.
 *
 * The loops are plain so that the compiler makes vectors of them for whatever machine it runs on.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline float widen(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* To the nearest, ties to even; a NaN keeps its high bits, and stays one. */
static inline uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
    uint32_t is_nan = (bits & 0x7fffffff) > 0x7f800000;
    return (uint16_t)((is_nan ? (bits | 0x400000) : rounded) >> 16);
}

static float dot(const float *restrict x, const uint16_t *restrict a, int64_t n) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * widen(a[i]);
    return sum;
}

static void add_scaled(float *restrict sum, const uint16_t *restrict b, float scale, int64_t n) {
    for (int64_t i = 0; i < n; i++) sum[i] += scale * widen(b[i]);
}

/* rows of x [rows, n] into wide [rows, n]; x_stride in elements. */
static void widen_rows(float *restrict wide, const uint16_t *restrict x, int64_t x_stride,
                       int64_t rows, int64_t n) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < n; i++) wide[row * n + i] = widen(x[row * x_stride + i]);
}

static void add_rounded(uint16_t *restrict y, const float *restrict sum, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = narrow(widen(y[i]) + sum[i]);
}
