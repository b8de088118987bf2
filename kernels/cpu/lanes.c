/* What AVX-512 kernels share: 16 float32 numbers at a time, and products of pairs of bfloat16. */
#include <immintrin.h>

/* Wide enough for two vectors: columns of packed matrices come in panels of so many. */
enum { PANEL = 32 };

static inline __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? 0xffff : (1u << (count < 0 ? 0 : count)) - 1;
}

static inline __m512 load_wide(__mmask16 lanes, const uint16_t *from) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

static inline void store_narrow(uint16_t *to, __mmask16 lanes, __m512 values) {
    _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(values));
}

/* Reads one number of every line. The processor sees such a run coming, where it waits for a few
 * lines here and there; as many prefetch instructions at once do not have that effect. */
static inline void touch(const uint16_t *from, int64_t count) {
    for (int64_t i = 0; i < count; i += 32) (void)*(const volatile uint16_t *)(from + i);
}

/* Two adjacent bfloat16 numbers in every lane. */
static inline __m512bh pair_of(const uint16_t *from) {
    int32_t pair;
    memcpy(&pair, from, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

/* sums[r] += x[r] W for two vectors of columns; a row of w has the pairs of PANEL columns, and
 * rows of w are `stride` pairs apart. `rows` is a constant where this is used, so that the sums are
 * registers. */
static inline __attribute__((always_inline)) void multiply_pairs(
    const int rows, const uint16_t *const *x, const uint32_t *w, int64_t stride, int64_t pairs,
    __m512 (*sums)[2]) {
    for (int64_t k = 0; k < pairs; k++) {
        const __m512bh left = (__m512bh)_mm512_loadu_si512(w + k * stride);
        const __m512bh right = (__m512bh)_mm512_loadu_si512(w + k * stride + 16);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const __m512bh both = pair_of(x[r] + 2 * k);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, left);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, right);
        }
    }
}

/* e^x within 2 units in the last place; 0 below -87, and no infinities: for x <= 88. */
static inline __m512 exp_lanes(__m512 x) {
    const __mmask16 tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_LT_OQ);
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), x); /* in this order a NaN stays one */
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    /* ln 2 in two parts, so that the rest is exact. */
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(~tiny, p, n);
}
