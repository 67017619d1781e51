/* y = x (S + B A)^T + bias on a CPU, with S as kept values plus a bitmask (mendlm/packing.py); and, for the refinement,
 * a residual completed on its mask (mendlm/refiners/_completion.py).
 *
 * Plain C on raw pointers, no headers of torch or Python: called through ctypes. One binary holds a version for each
 * instruction set. Sums are in float32 and do not depend on the number of threads.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c,bmi,popcnt")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,bmi,popcnt")))
#endif

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

enum dtype { BF16, FP16, FP32 };
enum isa { GENERIC, WITH_AVX2, WITH_AVX512 };
enum status { DONE, OUT_OF_MEMORY, INCONSISTENT, NOT_SERVED };

#define BLOCK 32 /* columns that the widest version takes at a time */
#define TILE 4   /* tokens that share one expansion of a row */
#define AHEAD 4096 /* bytes; the hardware's own prefetching stops at every page */
#define ABI 4      /* of the exported functions; mendlm/kernels/_cpu.py expects the same */

/* ---- Threads: torch's own pool, through the libgomp that it loaded; without one, a single thread. ---- */

extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));
extern void GOMP_barrier(void) __attribute__((weak));

EXPORT int mendlm_abi(void) { return ABI; }

EXPORT int mendlm_has_threads(void) { return GOMP_parallel && GOMP_barrier; }

static void run(void (*body)(void *), void *job, int threads) {
    if (threads > 1 && mendlm_has_threads())
        GOMP_parallel(body, job, (unsigned)threads, 0);
    else
        body(job);
}

static void barrier(int threads) {
    if (threads > 1 && mendlm_has_threads()) GOMP_barrier();
}

/* Hands out [0, n) in pieces, so that a thread that the system holds up does not hold up the others. */
static int next_piece(int64_t *counter, int64_t n, int64_t piece, int64_t *begin, int64_t *end) {
    *begin = __atomic_fetch_add(counter, piece, __ATOMIC_RELAXED);
    *end = *begin + piece < n ? *begin + piece : n;
    return *begin < n;
}

/* Rows of a piece: long runs for the prefetching, yet some pieces for every thread. */
static int64_t rows_a_piece(int64_t rows, int threads) {
    int64_t piece = rows / (8 * (threads > 0 ? threads : 1));
    return piece < 8 ? 8 : piece > 128 ? 128 : piece;
}

/* ---- Scalars ---- */

INLINE float as_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint32_t as_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

INLINE float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    /* Exponents move by 112; multiplying by 2^112 does that for subnormals too. */
    return as_float(sign | as_bits(as_float(rest << 13) * 0x1p112f));
}

INLINE uint16_t float_to_half(float f) {
    uint32_t bits = as_bits(f), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) /* subnormal: the unit of 0.5f is 2^-24, so this addition rounds to it */
        return (uint16_t)(sign | (as_bits(as_float(rest) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

INLINE uint16_t float_to_bfloat(float f) {
    uint32_t bits = as_bits(f);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float get(const void *p, int64_t i, enum dtype dtype) {
    if (dtype == FP32) return ((const float *)p)[i];
    uint16_t bits = ((const uint16_t *)p)[i];
    return dtype == BF16 ? as_float((uint32_t)bits << 16) : half_to_float(bits);
}

INLINE void put(void *p, int64_t i, float f, enum dtype dtype) {
    if (dtype == FP32)
        ((float *)p)[i] = f;
    else
        ((uint16_t *)p)[i] = dtype == BF16 ? float_to_bfloat(f) : float_to_half(f);
}

INLINE int64_t size_of(enum dtype dtype) { return dtype == FP32 ? 4 : 2; }

INLINE const char *at(const void *p, int64_t i, enum dtype dtype) { return (const char *)p + i * size_of(dtype); }

INLINE uint64_t load_bits(const uint8_t *p, int64_t bytes) {
    uint64_t bits = 0;
    memcpy(&bits, p, (size_t)bytes);
    return bits;
}

/* Kept entries of a row; 8 bytes at a time. */
INLINE int64_t count_row(const uint8_t *bits, int64_t bytes) {
    int64_t count = 0, j = 0;
    for (; j + 8 <= bytes; j += 8) count += __builtin_popcountll(load_bits(bits + j, 8));
    for (; j < bytes; j++) count += __builtin_popcount(bits[j]);
    return count;
}

/* ---- Columns from `j` on that no vector version took, for one row and up to TILE tokens ----
 *
 * x holds the tokens in float32, `stride` apart; positions beyond d_in are 0, so padding bits do no harm.
 */

INLINE void sparse_tail(float *sum, int tokens, const char *values, const uint8_t *bits, int64_t j, int64_t d_in,
                        const float *x, int64_t stride, enum dtype dtype) {
    int64_t k = 0;
    for (; j < d_in; j += 8)
        for (unsigned byte = bits[j / 8]; byte; byte &= byte - 1, k++) {
            float value = get(values, k, dtype);
            const float *column = x + j + __builtin_ctz(byte);
            for (int t = 0; t < tokens; t++) sum[t] += value * column[t * stride];
        }
}

INLINE void dense_tail(float *sum, int tokens, const char *row, int64_t j, int64_t n, const float *x, int64_t stride,
                       enum dtype dtype) {
    for (; j < n; j++) {
        float value = get(row, j, dtype);
        for (int t = 0; t < tokens; t++) sum[t] += value * x[t * stride + j];
    }
}

/* Where column j of a block lies in the split copy of x: even columns first. The others use x as it is. */
INLINE int64_t split(int64_t j) { return (j & ~(int64_t)(BLOCK - 1)) | (j & 1) << 4 | (j & (BLOCK - 1)) >> 1; }

/* ---- Rows: sparse_<isa> and dense_<isa> add their product to sum[tokens]; both are specialised by inlining.
 *
 * `readable` is how many values lie between `values` and the end of their buffer; `xs` is the split copy of x.
 */

INLINE void sparse_generic(float *sum, int tokens, const char *values, int64_t readable, const uint8_t *bits,
                           int64_t d_in, const float *x, const float *xs, int64_t stride, enum dtype dtype) {
    (void)readable, (void)xs;
    sparse_tail(sum, tokens, values, bits, 0, d_in, x, stride, dtype);
}

INLINE void dense_generic(float *sum, int tokens, const char *row, int64_t n, const float *x, const float *xs,
                          int64_t stride, enum dtype dtype) {
    (void)xs;
    dense_tail(sum, tokens, row, 0, n, x, stride, dtype);
}

INLINE void expand_generic(char *out, const char *values, int64_t readable, const uint8_t *bits, int64_t d_in,
                           enum dtype dtype) {
    (void)readable;
    int64_t k = 0;
    for (int64_t j = 0; j < d_in; j++) {
        int kept = bits[j / 8] >> (j & 7) & 1;
        if (dtype == FP32)
            ((uint32_t *)out)[j] = kept ? ((const uint32_t *)values)[k] : 0;
        else
            ((uint16_t *)out)[j] = kept ? ((const uint16_t *)values)[k] : 0;
        k += kept;
    }
}

#ifdef X86

/* order[b][i]: which of the next values lands in column i of a byte b; the others are masked off. */
static uint8_t order[256][8];

__attribute__((constructor)) static void fill_order(void) {
    for (int byte = 0; byte < 256; byte++)
        for (int i = 0, k = 0; i < 8; i++)
            if (byte >> i & 1) order[byte][i] = (uint8_t)k++;
}

AVX2 INLINE __m256 load8(const char *p, enum dtype dtype) {
    if (dtype == FP32) return _mm256_loadu_ps((const float *)p);
    __m128i half = _mm_loadu_si128((const __m128i *)p);
    if (dtype == FP16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* The next values in their columns, 0 elsewhere. */
AVX2 INLINE __m256 spread8(const char *p, unsigned byte, enum dtype dtype) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)byte), each), each);
    __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)order[byte]));
    return _mm256_and_ps(_mm256_permutevar8x32_ps(load8(p, dtype), index), _mm256_castsi256_ps(kept));
}

AVX2 INLINE float sum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* 16 columns of a row, with their part of each token. */
AVX2 INLINE void add8x2(__m256 (*total)[2], int tokens, __m256 v0, __m256 v1, const float *x, int64_t stride) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
        total[t][0] = _mm256_fmadd_ps(v0, _mm256_loadu_ps(x + t * stride), total[t][0]);
        total[t][1] = _mm256_fmadd_ps(v1, _mm256_loadu_ps(x + t * stride + 8), total[t][1]);
    }
}

AVX2 INLINE void sparse_avx2(float *sum, int tokens, const char *values, int64_t readable, const uint8_t *bits,
                             int64_t d_in, const float *x, const float *xs, int64_t stride, enum dtype dtype) {
    (void)xs;
    __m256 total[TILE][2];
    for (int t = 0; t < tokens; t++) total[t][0] = total[t][1] = _mm256_setzero_ps();
    int64_t j = 0, k = 0;
    for (; j + 16 <= d_in && k + 16 <= readable; j += 16) {
        unsigned low = bits[j / 8], high = bits[j / 8 + 1];
        _mm_prefetch(at(values, k, dtype) + AHEAD, _MM_HINT_T0);
        __m256 v0 = spread8(at(values, k, dtype), low, dtype);
        k += __builtin_popcount(low);
        __m256 v1 = spread8(at(values, k, dtype), high, dtype);
        k += __builtin_popcount(high);
        add8x2(total, tokens, v0, v1, x + j, stride);
    }
    sparse_tail(sum, tokens, at(values, k, dtype), bits, j, d_in, x, stride, dtype);
    for (int t = 0; t < tokens; t++) sum[t] += sum8(_mm256_add_ps(total[t][0], total[t][1]));
}

AVX2 INLINE void dense_avx2(float *sum, int tokens, const char *row, int64_t n, const float *x, const float *xs,
                            int64_t stride, enum dtype dtype) {
    (void)xs;
    __m256 total[TILE][2];
    for (int t = 0; t < tokens; t++) total[t][0] = total[t][1] = _mm256_setzero_ps();
    int64_t j = 0;
    for (; j + 16 <= n; j += 16) {
        __m256 v0 = load8(at(row, j, dtype), dtype), v1 = load8(at(row, j + 8, dtype), dtype);
        add8x2(total, tokens, v0, v1, x + j, stride);
    }
    dense_tail(sum, tokens, row, j, n, x, stride, dtype);
    for (int t = 0; t < tokens; t++) sum[t] += sum8(_mm256_add_ps(total[t][0], total[t][1]));
}

/* 16-bit values pass through float32 registers as bit patterns. */
AVX2 INLINE void expand_avx2(char *out, const char *values, int64_t readable, const uint8_t *bits, int64_t d_in,
                             enum dtype dtype) {
    int64_t j = 0, k = 0;
    for (; j + 8 <= d_in && k + 8 <= readable; j += 8) {
        unsigned byte = bits[j / 8];
        __m256 v = spread8(at(values, k, dtype), byte, dtype == FP32 ? FP32 : BF16);
        k += __builtin_popcount(byte);
        if (dtype == FP32) {
            _mm256_storeu_ps((float *)out + j, v);
        } else {
            __m256i words = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
            words = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 8);
            _mm_storeu_si128((__m128i *)((uint16_t *)out + j), _mm256_castsi256_si128(words));
        }
    }
    expand_generic(out + j * size_of(dtype), at(values, k, dtype), 0, bits + j / 8, d_in - j, dtype);
}

/* The lines that 32 values will come from. Prefetching beyond a buffer is harmless: it reads nothing. */
AVX512 INLINE void prefetch(const char *p, enum dtype dtype) {
    _mm_prefetch(p + AHEAD, _MM_HINT_T0);
    if (dtype == FP32) _mm_prefetch(p + AHEAD + 64, _MM_HINT_T0);
}

/* Two registers of 16 floats from 32 columns: of bf16 the even and the odd ones, of the others the halves. */
AVX512 INLINE void widen(__m512i v, __m512 *first, __m512 *second, enum dtype dtype) {
    if (dtype == BF16) {
        *first = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
        *second = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)));
    } else {
        *first = _mm512_cvtph_ps(_mm512_castsi512_si256(v));
        *second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1));
    }
}

/* 32 columns of a row, with their part of each token. */
AVX512 INLINE void add16x2(__m512 (*total)[2], int tokens, __m512 v0, __m512 v1, const float *x, int64_t stride) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
        total[t][0] = _mm512_fmadd_ps(v0, _mm512_loadu_ps(x + t * stride), total[t][0]);
        total[t][1] = _mm512_fmadd_ps(v1, _mm512_loadu_ps(x + t * stride + 16), total[t][1]);
    }
}

AVX512 INLINE void sparse_avx512(float *sum, int tokens, const char *values, int64_t readable, const uint8_t *bits,
                                 int64_t d_in, const float *x, const float *xs, int64_t stride, enum dtype dtype) {
    const float *xv = dtype == BF16 ? xs : x;
    __m512 total[TILE][2];
    for (int t = 0; t < tokens; t++) total[t][0] = total[t][1] = _mm512_setzero_ps();
    int64_t j = 0, k = 0;
    for (; j + BLOCK <= d_in && k + BLOCK <= readable; j += BLOCK) {
        uint32_t mask = (uint32_t)load_bits(bits + j / 8, 4);
        const char *p = at(values, k, dtype);
        prefetch(p, dtype);
        __m512 v0, v1;
        if (dtype == FP32) {
            v0 = _mm512_maskz_expand_ps((__mmask16)mask, _mm512_loadu_ps(p));
            p += 4 * __builtin_popcount(mask & 0xffff);
            v1 = _mm512_maskz_expand_ps((__mmask16)(mask >> 16), _mm512_loadu_ps(p));
        } else {
            widen(_mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(p)), &v0, &v1, dtype);
        }
        k += __builtin_popcount(mask);
        add16x2(total, tokens, v0, v1, xv + j, stride);
    }
    sparse_tail(sum, tokens, at(values, k, dtype), bits, j, d_in, x, stride, dtype);
    for (int t = 0; t < tokens; t++) sum[t] += _mm512_reduce_add_ps(_mm512_add_ps(total[t][0], total[t][1]));
}

AVX512 INLINE void dense_avx512(float *sum, int tokens, const char *row, int64_t n, const float *x, const float *xs,
                                int64_t stride, enum dtype dtype) {
    const float *xv = dtype == BF16 ? xs : x;
    __m512 total[TILE][2];
    for (int t = 0; t < tokens; t++) total[t][0] = total[t][1] = _mm512_setzero_ps();
    int64_t j = 0;
    for (; j + BLOCK <= n; j += BLOCK) {
        const char *p = at(row, j, dtype);
        __m512 v0, v1;
        if (dtype == FP32) {
            v0 = _mm512_loadu_ps(p), v1 = _mm512_loadu_ps(p + 64);
        } else {
            widen(_mm512_loadu_si512(p), &v0, &v1, dtype);
        }
        add16x2(total, tokens, v0, v1, xv + j, stride);
    }
    dense_tail(sum, tokens, row, j, n, x, stride, dtype);
    for (int t = 0; t < tokens; t++) sum[t] += _mm512_reduce_add_ps(_mm512_add_ps(total[t][0], total[t][1]));
}

AVX512 INLINE void expand_avx512(char *out, const char *values, int64_t readable, const uint8_t *bits, int64_t d_in,
                                 enum dtype dtype) {
    const int64_t block = dtype == FP32 ? 16 : 32;
    int64_t j = 0, k = 0;
    for (; j + block <= d_in && k + block <= readable; j += block) {
        uint32_t mask = (uint32_t)load_bits(bits + j / 8, block / 8);
        __m512i v = _mm512_loadu_si512(at(values, k, dtype));
        v = dtype == FP32 ? _mm512_maskz_expand_epi32((__mmask16)mask, v) : _mm512_maskz_expand_epi16(mask, v);
        _mm512_storeu_si512(out + j * size_of(dtype), v);
        k += __builtin_popcount(mask);
    }
    expand_generic(out + j * size_of(dtype), at(values, k, dtype), 0, bits + j / 8, d_in - j, dtype);
}

#endif

/* ---- Products ---- */

struct product {
    void *y;
    const void *x, *values, *A, *B, *bias;
    const uint8_t *bits;
    const int64_t *starts;
    float *x32, *xs, *h, *hs; /* tokens in float32, padded with zeros to `stride` and `h_stride`; s: split */
    int64_t tokens, d_out, d_in, rank, kept, stride, h_stride;
    int64_t next_factor, next_row, inconsistent;
    int threads;
};

INLINE int row_is_consistent(const int64_t *starts, int64_t i, int64_t kept, const uint8_t *bits, int64_t bytes) {
    return starts[i] >= 0 && starts[i + 1] <= kept && count_row(bits, bytes) == starts[i + 1] - starts[i];
}

typedef void sparse_row(float *, int, const char *, int64_t, const uint8_t *, int64_t, const float *, const float *,
                        int64_t, enum dtype);
typedef void dense_row(float *, int, const char *, int64_t, const float *, const float *, int64_t, enum dtype);
typedef void expand_row(char *, const char *, int64_t, const uint8_t *, int64_t, enum dtype);

INLINE void factor_rows(struct product *p, int64_t begin, int64_t end, int64_t t, int tokens, dense_row dense,
                        enum dtype dtype) {
    for (int64_t i = begin; i < end; i++) {
        float sum[TILE] = {0};
        dense(sum, tokens, at(p->A, i * p->d_in, dtype), p->d_in, p->x32 + t * p->stride, p->xs + t * p->stride,
              p->stride, dtype);
        for (int u = 0; u < tokens; u++) {
            p->h[(t + u) * p->h_stride + i] = sum[u];
            p->hs[(t + u) * p->h_stride + split(i)] = sum[u];
        }
    }
}

INLINE void output_row(struct product *p, int64_t i, int64_t t, int tokens, sparse_row sparse, dense_row dense,
                       enum dtype dtype) {
    float sum[TILE] = {0};
    sparse(sum, tokens, at(p->values, p->starts[i], dtype), p->kept - p->starts[i],
           p->bits + i * ((p->d_in + 7) / 8), p->d_in, p->x32 + t * p->stride, p->xs + t * p->stride, p->stride, dtype);
    dense(sum, tokens, at(p->B, i * p->rank, dtype), p->rank, p->h + t * p->h_stride, p->hs + t * p->h_stride,
          p->h_stride, dtype);
    for (int u = 0; u < tokens; u++)
        put(p->y, (t + u) * p->d_out + i, p->bias ? sum[u] + get(p->bias, i, dtype) : sum[u], dtype);
}

/* What each thread does: its share of h = A x, then, once h is complete, its share of the rows. */
INLINE void work(struct product *p, sparse_row sparse, dense_row dense, enum dtype dtype) {
    const int64_t row_bytes = (p->d_in + 7) / 8, piece = rows_a_piece(p->d_out, p->threads);
    int64_t begin, end, t;
    while (next_piece(&p->next_factor, p->rank, 4, &begin, &end)) {
        for (t = 0; t + TILE <= p->tokens; t += TILE) factor_rows(p, begin, end, t, TILE, dense, dtype);
        for (; t < p->tokens; t++) factor_rows(p, begin, end, t, 1, dense, dtype);
    }
    barrier(p->threads);
    while (next_piece(&p->next_row, p->d_out, piece, &begin, &end))
        for (int64_t i = begin; i < end; i++) {
            if (!row_is_consistent(p->starts, i, p->kept, p->bits + i * row_bytes, row_bytes)) {
                __atomic_store_n(&p->inconsistent, 1, __ATOMIC_RELAXED);
                continue;
            }
            for (t = 0; t + TILE <= p->tokens; t += TILE) output_row(p, i, t, TILE, sparse, dense, dtype);
            for (; t < p->tokens; t++) output_row(p, i, t, 1, sparse, dense, dtype);
        }
}

struct unpacking {
    char *out;
    const void *values;
    const uint8_t *bits;
    const int64_t *starts;
    int64_t d_out, d_in, kept, next_row, inconsistent;
    int threads;
};

INLINE void unpack_rows(struct unpacking *u, expand_row expand, enum dtype dtype) {
    const int64_t row_bytes = (u->d_in + 7) / 8, piece = rows_a_piece(u->d_out, u->threads);
    int64_t begin, end;
    while (next_piece(&u->next_row, u->d_out, piece, &begin, &end))
        for (int64_t i = begin; i < end; i++) {
            const uint8_t *bits = u->bits + i * row_bytes;
            if (row_is_consistent(u->starts, i, u->kept, bits, row_bytes))
                expand(u->out + i * u->d_in * size_of(dtype), at(u->values, u->starts[i], dtype),
                       u->kept - u->starts[i], bits, u->d_in, dtype);
            else
                __atomic_store_n(&u->inconsistent, 1, __ATOMIC_RELAXED);
        }
}

/* ---- Completion: out = mask ? L : W, ||out - L||^2 and ||out||^2 ---- */

#define LANES 32 /* sums of a row, which do not wait for each other */

struct completion {
    float *out; /* may be NULL: nothing but the sum */
    const float *L, *W;
    const uint8_t *mask;
    double *sums; /* two of each row */
    int64_t rows, columns, out_stride, L_stride, W_stride, mask_stride, next_row;
    int threads;
};

INLINE void complete_row(double *sums, float *out, const float *L, const float *W, const uint8_t *mask, int64_t n,
                         int writes) {
    float left[LANES] = {0}, all[LANES] = {0}, left_sum = 0, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) {
            const float value = mask[i + j] ? L[i + j] : W[i + j], difference = value - L[i + j];
            if (writes) out[i + j] = value;
            left[j] += difference * difference;
            all[j] += value * value;
        }
    for (int j = 0; i < n; i++, j++) {
        const float value = mask[i] ? L[i] : W[i], difference = value - L[i];
        if (writes) out[i] = value;
        left[j] += difference * difference;
        all[j] += value * value;
    }
    for (int j = 0; j < LANES; j++) left_sum += left[j], sum += all[j];
    sums[0] = left_sum;
    sums[1] = sum;
}

INLINE void complete(struct completion *c) {
    int64_t begin, end;
    while (next_piece(&c->next_row, c->rows, rows_a_piece(c->rows, c->threads), &begin, &end))
        for (int64_t i = begin; i < end; i++) {
            const float *L = c->L + i * c->L_stride, *W = c->W + i * c->W_stride;
            const uint8_t *mask = c->mask + i * c->mask_stride;
            if (c->out)
                complete_row(c->sums + 2 * i, c->out + i * c->out_stride, L, W, mask, c->columns, 1);
            else
                complete_row(c->sums + 2 * i, NULL, L, W, mask, c->columns, 0);
        }
}

#define VERSION(isa, attribute)                                                                                  \
    attribute static void work_##isa##_bf16(void *p) { work(p, sparse_##isa, dense_##isa, BF16); }               \
    attribute static void work_##isa##_fp16(void *p) { work(p, sparse_##isa, dense_##isa, FP16); }               \
    attribute static void work_##isa##_fp32(void *p) { work(p, sparse_##isa, dense_##isa, FP32); }               \
    attribute static void unpack_##isa##_16(void *u) { unpack_rows(u, expand_##isa, BF16); }                     \
    attribute static void unpack_##isa##_32(void *u) { unpack_rows(u, expand_##isa, FP32); }                     \
    attribute static void complete_##isa##_32(void *c) { complete(c); }

typedef void body(void *);

VERSION(generic, )
#ifdef X86
VERSION(avx2, AVX2)
VERSION(avx512, AVX512)
#define ROW(name, kind) {name##_generic_##kind, name##_avx2_##kind, name##_avx512_##kind}
#else
#define ROW(name, kind) {name##_generic_##kind, NULL, NULL}
#endif

static body *const products[3][3] = {ROW(work, bf16), ROW(work, fp16), ROW(work, fp32)};
static body *const unpackers[2][3] = {ROW(unpack, 16), ROW(unpack, 32)};
static body *const completers[3] = ROW(complete, 32);

/* The best `enum isa` of this CPU; every lower one works too. */
EXPORT int mendlm_isa(void) {
#ifdef X86
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
          __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt")))
        return GENERIC;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vbmi2"))
        return WITH_AVX512;
    return WITH_AVX2;
#else
    return GENERIC;
#endif
}

/* y (tokens, d_out) from x (tokens, d_in), contiguous; bias may be NULL. Returns an `enum status`. */
EXPORT int mendlm_packed_linear(void *y, const void *x, const void *values, const void *bits, const void *starts,
                                const void *A, const void *B, const void *bias, int64_t tokens, int64_t d_out,
                                int64_t d_in, int64_t rank, int64_t kept, int dtype, int isa, int threads) {
    if (dtype < BF16 || dtype > FP32 || isa < GENERIC || isa > mendlm_isa()) return NOT_SERVED;
    const int64_t stride = (d_in + BLOCK - 1) / BLOCK * BLOCK, h_stride = (rank + BLOCK - 1) / BLOCK * BLOCK;
    const size_t size = (size_t)(2 * tokens * (stride + h_stride) + BLOCK) * sizeof(float);
    float *memory = aligned_alloc(64, size);
    if (!memory) return OUT_OF_MEMORY;
    memset(memory, 0, size);
    struct product p = {.y = y, .x = x, .values = values, .A = A, .B = B, .bias = bias, .bits = bits,
                        .starts = starts, .tokens = tokens, .d_out = d_out, .d_in = d_in, .rank = rank,
                        .kept = kept, .stride = stride, .h_stride = h_stride, .threads = threads};
    p.x32 = memory;
    p.xs = p.x32 + tokens * stride;
    p.h = p.xs + tokens * stride;
    p.hs = p.h + tokens * h_stride;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t j = 0; j < d_in; j++) {
            float value = get(x, t * d_in + j, (enum dtype)dtype);
            p.x32[t * stride + j] = value;
            p.xs[t * stride + split(j)] = value;
        }
    run(products[dtype][isa], &p, threads);
    free(memory);
    return p.inconsistent ? INCONSISTENT : DONE;
}

/* Dense S (d_out, d_in). Returns an `enum status`. */
EXPORT int mendlm_unpack(void *out, const void *values, const void *bits, const void *starts, int64_t d_out,
                         int64_t d_in, int64_t kept, int dtype, int isa, int threads) {
    if (dtype < BF16 || dtype > FP32 || isa < GENERIC || isa > mendlm_isa()) return NOT_SERVED;
    struct unpacking u = {
        .out = out, .values = values, .bits = bits, .starts = starts,
        .d_out = d_out, .d_in = d_in, .kept = kept, .threads = threads};
    run(unpackers[dtype == FP32][isa], &u, threads);
    return u.inconsistent ? INCONSISTENT : DONE;
}

/* out = mask ? L : W, unless out is NULL; the sums of (out - L)^2 and of out^2. Strides are of rows, in entries.
 * Returns an `enum status`. */
EXPORT int mendlm_complete(double *left, double *all, void *out, const void *L, const void *W, const void *mask,
                           int64_t rows, int64_t columns, int64_t out_stride, int64_t L_stride, int64_t W_stride,
                           int64_t mask_stride, int isa, int threads) {
    if (isa < GENERIC || isa > mendlm_isa()) return NOT_SERVED;
    double *sums = calloc((size_t)(rows ? 2 * rows : 1), sizeof(double));
    if (!sums) return OUT_OF_MEMORY;
    struct completion c = {.out = out, .L = L, .W = W, .mask = mask, .sums = sums, .rows = rows, .columns = columns,
                           .out_stride = out_stride, .L_stride = L_stride, .W_stride = W_stride,
                           .mask_stride = mask_stride, .threads = threads};
    run(completers[isa], &c, rows > 1 ? threads : 1);
    *left = *all = 0;
    for (int64_t i = 0; i < rows; i++) {
        *left += sums[2 * i];
        *all += sums[2 * i + 1];
    }
    free(sums);
    return DONE;
}
