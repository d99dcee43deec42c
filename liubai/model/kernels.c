/* The passes over memory that PyTorch's operators make one at a time, each made once.
 *
 * C with OpenMP, float32, compiled at the first use by the machine's own compiler (kernels.py); without one
 * the PyTorch code beside each call does the same. Every row is computed alone and in one order, so
 * results do not depend on the batch or on the number of threads, except where it says so.
 *
 * Sizes are checked by the caller, kernels.py. Functions that return int return 0, or why they failed.
 * N rows, D numbers a row, H query heads, K key/value heads, G = H/K, E head size, V vocabulary.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
enum { NO_MEMORY = 1, BAD_VALUE = 2 };

typedef int64_t i64;

/* Less work than this many numbers is not worth waking a thread for. */
#define ALONE 8192
#define PRAGMA(text) _Pragma(#text)
#define PARALLEL_ROWS(work) PRAGMA(omp parallel for schedule(static) if ((work) > ALONE))
#define SIMD PRAGMA(omp simd)
#define SIMD_SUM(...) PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#define SIMD_MAX(top) PRAGMA(omp simd reduction(max : top))

/* e^x to 2 units in the last place; 0 below -87.3, where e^x leaves the normal numbers, infinite above 88.
 * NaN stays. x = n·ln 2 + f, e^x = 2^n·e^f, and e^f by the polynomial of Cephes (Moshier). No branches:
 * loops around it become vector code. */
static inline float exponential(float x)
{
    float y = x < -87.3f ? -87.3f : x;
    y = y > 88.0f ? 88.0f : y;
    float n = rintf((y == y ? y : 0.0f) * 1.44269504f); /* NaN is no integer; it stays in f */
    float f = y - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    union { uint32_t i; float f; } power = {(uint32_t)((int32_t)n + 127) << 23};
    p *= power.f;
    p = x > 88.0f ? INFINITY : p;
    return x < -87.3f ? 0.0f : p;
}

static inline float largest(const float *x, i64 n)
{
    float top = -INFINITY;
    SIMD_MAX(top)
    for (i64 i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
    return top;
}

/* ---- RMSNorm: out = x · scale · weight, scale = 1/sqrt(mean(x²) + eps) ---- */

void rms_norm(const float *x, const float *weight, float eps, i64 N, i64 D, float *out, float *scale)
{
    PARALLEL_ROWS(N *D)
    for (i64 n = 0; n < N; n++) {
        const float *row = x + n * D;
        float squares = 0;
        SIMD_SUM(squares)
        for (i64 d = 0; d < D; d++) squares += row[d] * row[d];
        float s = scale[n] = 1.0f / sqrtf(squares / D + eps);
        SIMD
        for (i64 d = 0; d < D; d++) out[n * D + d] = row[d] * s * weight[d];
    }
}

/* of_weight is summed thread by thread: the same number of threads gives the same bits. */
int rms_norm_backward(const float *grad, const float *x, const float *scale, const float *weight, i64 N,
                      i64 D, float *of_x, float *of_weight)
{
    int threads = N * D > ALONE ? omp_get_max_threads() : 1;
    float *sums = calloc((size_t)(threads * D), sizeof *sums);
    if (!sums) return NO_MEMORY;
#pragma omp parallel num_threads(threads)
    {
        i64 t = omp_get_thread_num(), team = omp_get_num_threads(); /* may be fewer than asked for */
        float *sum = sums + t * D;
        for (i64 n = N * t / team; n < N * (t + 1) / team; n++) {
            const float *g = grad + n * D, *row = x + n * D;
            float dot = 0, s = scale[n];
            SIMD_SUM(dot)
            for (i64 d = 0; d < D; d++) dot += g[d] * weight[d] * row[d];
            float back = s * s * s * dot / D;
            SIMD
            for (i64 d = 0; d < D; d++) {
                of_x[n * D + d] = g[d] * weight[d] * s - row[d] * back;
                sum[d] += g[d] * row[d] * s;
            }
        }
    }
    memset(of_weight, 0, (size_t)D * sizeof *of_weight);
    for (i64 t = 0; t < threads; t++)
        for (i64 d = 0; d < D; d++) of_weight[d] += sums[t * D + d];
    free(sums);
    return 0;
}

/* ---- SwiGLU: out = silu(gate) · up, silu(g) = g / (1 + e^-g) ---- */

void swiglu(const float *gate, const float *up, i64 n, float *out)
{
#pragma omp parallel for simd schedule(static) if (n > ALONE)
    for (i64 i = 0; i < n; i++) out[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

void swiglu_backward(const float *grad, const float *gate, const float *up, i64 n, float *of_gate,
                     float *of_up)
{
#pragma omp parallel for simd schedule(static) if (n > ALONE)
    for (i64 i = 0; i < n; i++) {
        float g = gate[i], sigmoid = 1.0f / (1.0f + exponential(-g)), silu = g * sigmoid;
        of_up[i] = grad[i] * silu;
        of_gate[i] = grad[i] * up[i] * (sigmoid + silu * (1.0f - sigmoid));
    }
}

/* ---- RoPE: pairs (x[i], x[i + E/2]) of each head turned by the angle of the row ----
 * x has any strides over rows and heads; out [N, H, E] none. cos and sin are [N, E], the first half of the
 * sines negative (functions.rotate); direction 1 or -1. */

void rotate(const float *x, i64 outer, i64 inner, i64 outer_stride, i64 inner_stride, i64 head_stride,
            const float *cosines, const float *sines, float direction, i64 H, i64 E, float *out)
{
    i64 half = E / 2;
    PARALLEL_ROWS(outer *inner *H *E)
    for (i64 n = 0; n < outer * inner; n++) {
        const float *row = x + n / inner * outer_stride + n % inner * inner_stride;
        const float *c = cosines + n * E, *s = sines + n * E;
        for (i64 h = 0; h < H; h++) {
            const float *a = row + h * head_stride, *b = a + half;
            float *to = out + (n * H + h) * E;
            SIMD
            for (i64 i = 0; i < half; i++) {
                to[i] = a[i] * c[i] + direction * s[i] * b[i];
                to[half + i] = b[i] * c[half + i] + direction * s[half + i] * a[i];
            }
        }
    }
}

/* ---- One decoding step of attention ----
 * Row n writes its key and value at at[n] of its own cache [K, width, E] and looks at positions 0 … at[n];
 * exactly those are read. LARGEST_HEAD comes from kernels.py. */

/* One query head. Where E is known, query and output stay in registers. The processor does not see the
 * next row's cache coming, `ahead` numbers further on: each read asks for the same place there. */
static inline __attribute__((always_inline)) void look(const float *restrict query,
                                                       const float *restrict keys,
                                                       const float *restrict values, i64 ahead, i64 seen,
                                                       i64 E, float scale, float *restrict weights,
                                                       float *restrict out)
{
    float q[LARGEST_HEAD], sums[LARGEST_HEAD];
    for (i64 e = 0; e < E; e++) q[e] = query[e] * scale, sums[e] = 0;
    for (i64 t = 0; t < seen; t++) {
        float dot = 0;
        for (i64 e = 0; e < E; e += 16) __builtin_prefetch(keys + ahead + t * E + e, 0, 2);
        SIMD_SUM(dot)
        for (i64 e = 0; e < E; e++) dot += q[e] * keys[t * E + e];
        weights[t] = dot;
    }
    float top = largest(weights, seen), total = 0;
    SIMD_SUM(total)
    for (i64 t = 0; t < seen; t++) total += weights[t] = exponential(weights[t] - top);
    for (i64 t = 0; t < seen; t++) {
        float w = weights[t];
        for (i64 e = 0; e < E; e += 16) __builtin_prefetch(values + ahead + t * E + e, 0, 2);
        SIMD
        for (i64 e = 0; e < E; e++) sums[e] += w * values[t * E + e];
    }
    for (i64 e = 0; e < E; e++) out[e] = sums[e] / total;
}

int decode_attention(const float *q, const float *k, const float *v, const i64 *at, float *keys,
                     float *values, i64 N, i64 H, i64 K, i64 E, i64 width, float scale, float *out)
{
    i64 G = H / K, cache = width * E;
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (N * H * E > ALONE / 8)
    {
        float *weights = malloc((size_t)width * sizeof *weights);
        failed = weights ? 0 : NO_MEMORY;
#pragma omp for schedule(static)
        for (i64 nk = 0; nk < N * K; nk++) {
            if (!weights) continue;
            if (at[nk / K] < 0 || at[nk / K] >= width) {
                failed |= BAD_VALUE;
                continue;
            }
            i64 n = nk / K, seen = at[n] + 1, ahead = nk + 1 < N * K ? cache : 0;
            float *own_keys = keys + nk * cache, *own_values = values + nk * cache;
            memcpy(own_keys + at[n] * E, k + nk * E, (size_t)E * sizeof *k);
            memcpy(own_values + at[n] * E, v + nk * E, (size_t)E * sizeof *v);
            for (i64 head = nk * G; head < (nk + 1) * G; head++) {
                const float *query = q + head * E;
                float *to = out + head * E;
#define LOOK(size) look(query, own_keys, own_values, ahead, seen, size, scale, weights, to)
                if (E == 32) LOOK(32);
                else if (E == 64) LOOK(64);
                else if (E == 128) LOOK(128);
                else LOOK(E);
            }
        }
        free(weights);
    }
    return failed;
}

/* ---- Causal attention of short rows, forward and backward ----
 * q, out [B, T, H, E], k, v [B, S, K, E]; query t sees keys 0 … S − T + t; lse [B, H, T] keeps the logarithm
 * of the softmax's denominator. One key head of one row at a time: its matrices stay in a near cache. */

#ifdef __AVX512F__
#define WIDTH 16
#define ROWS 8 /* of a tile: its sums fill half of the registers */
#else
#define WIDTH 8
#define ROWS 4
#endif
#define COLS (2 * WIDTH) /* of a tile */
#define UP(n, to) (((n) + (to)-1) / (to) * (to))

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

/* c[r][j] += Σ a[r·ra + i·ka] · b[i·nb + j] for i from `from` to `to`: all products are made of these. */
static inline void tile(const float *a, i64 ra, i64 ka, const float *b, i64 nb, i64 from, i64 to, float *c,
                        i64 nc)
{
    vec sums[ROWS][2];
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < 2; j++) sums[r][j] = ((const vec *)(c + r * nc))[j];
    for (i64 i = from; i < to; i++) {
        vec first = ((const vec *)(b + i * nb))[0], second = ((const vec *)(b + i * nb))[1];
        PRAGMA(GCC unroll 8)
        for (int r = 0; r < ROWS; r++) {
            sums[r][0] += a[r * ra + i * ka] * first;
            sums[r][1] += a[r * ra + i * ka] * second;
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < 2; j++) ((vec *)(c + r * nc))[j] = sums[r][j];
}

/* A strip of ROWS rows: c[r][0 … n) += a · b */
static inline void strip(const float *a, i64 ra, i64 ka, const float *b, i64 nb, i64 from, i64 to, float *c,
                         i64 nc, i64 n)
{
    for (i64 j = 0; j < n; j += COLS) tile(a, ra, ka, b + j, nb, from, to, c + j, nc);
}

/* The sizes of the matrices of one head, rounded up to whole tiles. */
typedef struct {
    i64 T, S, H, K, E, Tp, Sp, Ep;
} Sizes;

/* n rows of E numbers, `stride` apart, as rows of Ep; the columns past E stay 0. */
static inline void gather(const float *from, i64 stride, i64 n, Sizes z, float scale, float *to)
{
    for (i64 i = 0; i < n; i++)
        for (i64 e = 0; e < z.E; e++) to[i * z.Ep + e] = from[i * stride + e] * scale;
}

static inline void scatter(const float *from, i64 stride, i64 n, Sizes z, float scale, float *to)
{
    for (i64 i = 0; i < n; i++)
        for (i64 e = 0; e < z.E; e++) to[i * stride + e] = from[i * z.Ep + e] * scale;
}

static inline void transpose(const float *from, Sizes z, float *to)
{
    for (i64 s = 0; s < z.S; s++)
        for (i64 e = 0; e < z.E; e++) to[e * z.Sp + s] = from[s * z.Ep + e];
}

static Sizes sizes(i64 T, i64 S, i64 H, i64 K, i64 E)
{
    return (Sizes){T, S, H, K, E, UP(T, ROWS), UP(S, COLS), UP(E, COLS)};
}

int attention(const float *q, const float *k, const float *v, i64 B, i64 T, i64 S, i64 H, i64 K, i64 E,
              float scale, float *out, float *lse)
{
    const Sizes z = sizes(T, S, H, K, E);
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (B * T * S * H > ALONE)
    {
        float *space = calloc((size_t)(3 * z.Sp * z.Ep + ROWS * (2 * z.Ep + z.Sp)), sizeof *space);
        float *keys = space, *values = keys + z.Sp * z.Ep, *across = values + z.Sp * z.Ep;
        float *query = across + z.Sp * z.Ep, *sums = query + ROWS * z.Ep, *w = sums + ROWS * z.Ep;
        failed = space ? 0 : NO_MEMORY;
#pragma omp for schedule(static)
        for (i64 bk = 0; bk < B * K; bk++) {
            if (!space) continue;
            i64 row = bk / K, from = (row * S * K + bk % K) * E;
            gather(k + from, K * E, S, z, 1, keys);
            gather(v + from, K * E, S, z, 1, values);
            transpose(keys, z, across);
            for (i64 h = bk % K * (H / K); h < (bk % K + 1) * (H / K); h++)
                for (i64 t = 0; t < T; t += ROWS) {
                    i64 n = T - t < ROWS ? T - t : ROWS, seen = S - T + t + n;
                    i64 at = ((row * T + t) * H + h) * E;
                    gather(q + at, H * E, n, z, scale, query);
                    memset(w, 0, (size_t)(ROWS * z.Sp) * sizeof *w);
                    strip(query, z.Ep, 1, across, z.Sp, 0, E, w, z.Sp, UP(seen, COLS));
                    for (i64 r = 0; r < n; r++) {
                        float *mine = w + r * z.Sp, sum = 0;
                        i64 own = S - T + t + r + 1;
                        float top = largest(mine, own);
                        SIMD_SUM(sum)
                        for (i64 s = 0; s < own; s++) sum += mine[s] = exponential(mine[s] - top);
                        float inverse = 1.0f / sum;
                        SIMD
                        for (i64 s = 0; s < own; s++) mine[s] *= inverse;
                        for (i64 s = own; s < seen; s++) mine[s] = 0;
                        lse[(row * H + h) * T + t + r] = top + logf(sum);
                    }
                    memset(sums, 0, (size_t)(ROWS * z.Ep) * sizeof *sums);
                    strip(w, z.Sp, 1, values, z.Ep, 0, seen, sums, z.Ep, z.Ep);
                    scatter(sums, H * E, n, z, 1, out + at);
                }
        }
        free(space);
    }
    return failed;
}

int attention_backward(const float *grad, const float *q, const float *k, const float *v, const float *out,
                       const float *lse, i64 B, i64 T, i64 S, i64 H, i64 K, i64 E, float scale, float *of_q,
                       float *of_k, float *of_v)
{
    const Sizes z = sizes(T, S, H, K, E);
    const i64 keys_size = z.Sp * z.Ep, rows_size = z.Tp * z.Ep, weights_size = z.Tp * z.Sp;
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (B * T * S * H > ALONE)
    {
        float *space = calloc((size_t)(6 * keys_size + 2 * rows_size + 2 * weights_size + ROWS * z.Ep),
                              sizeof *space);
        float *keys = space, *values = keys + keys_size, *keys_across = values + keys_size;
        float *values_across = keys_across + keys_size, *of_keys = values_across + keys_size;
        float *of_values = of_keys + keys_size, *queries = of_values + keys_size;
        float *grads = queries + rows_size, *w = grads + rows_size, *of_w = w + weights_size;
        float *sums = of_w + weights_size;
        failed = space ? 0 : NO_MEMORY;
#pragma omp for schedule(static)
        for (i64 bk = 0; bk < B * K; bk++) {
            if (!space) continue;
            i64 row = bk / K, from = (row * S * K + bk % K) * E;
            gather(k + from, K * E, S, z, 1, keys);
            gather(v + from, K * E, S, z, 1, values);
            transpose(keys, z, keys_across);
            transpose(values, z, values_across);
            memset(of_keys, 0, (size_t)(2 * keys_size) * sizeof *of_keys);
            for (i64 h = bk % K * (H / K); h < (bk % K + 1) * (H / K); h++) {
                i64 head = (row * T * H + h) * E;
                gather(q + head, H * E, T, z, scale, queries);
                gather(grad + head, H * E, T, z, 1, grads);
                memset(w, 0, (size_t)(2 * weights_size) * sizeof *w);
                for (i64 t = 0; t < T; t += ROWS) {
                    i64 n = T - t < ROWS ? T - t : ROWS, seen = S - T + t + n;
                    strip(queries + t * z.Ep, z.Ep, 1, keys_across, z.Sp, 0, E, w + t * z.Sp, z.Sp,
                          UP(seen, COLS));
                    strip(grads + t * z.Ep, z.Ep, 1, values_across, z.Sp, 0, E, of_w + t * z.Sp, z.Sp,
                          UP(seen, COLS));
                    for (i64 r = t; r < t + n; r++) {
                        float *mine = w + r * z.Sp, *of_mine = of_w + r * z.Sp, dot = 0;
                        float all = lse[(row * H + h) * T + r];
                        i64 own = S - T + r + 1;
                        for (i64 e = 0; e < E; e++) dot += grads[r * z.Ep + e] * out[head + r * H * E + e];
                        SIMD
                        for (i64 s = 0; s < own; s++) {
                            mine[s] = exponential(mine[s] - all);
                            of_mine[s] = mine[s] * (of_mine[s] - dot);
                        }
                        for (i64 s = own; s < UP(seen, COLS); s++) mine[s] = of_mine[s] = 0;
                    }
                    memset(sums, 0, (size_t)(ROWS * z.Ep) * sizeof *sums);
                    strip(of_w + t * z.Sp, z.Sp, 1, keys, z.Ep, 0, seen, sums, z.Ep, z.Ep);
                    scatter(sums, H * E, n, z, scale, of_q + head + t * H * E);
                }
                for (i64 s = 0; s < S; s += ROWS) { /* seen by queries from s − (S − T) on */
                    i64 first = s > S - T ? (s - (S - T)) / ROWS * ROWS : 0;
                    strip(w + s, 1, z.Sp, grads, z.Ep, first, T, of_values + s * z.Ep, z.Ep, z.Ep);
                    strip(of_w + s, 1, z.Sp, queries, z.Ep, first, T, of_keys + s * z.Ep, z.Ep, z.Ep);
                }
            }
            scatter(of_keys, K * E, S, z, 1, of_k + from);
            scatter(of_values, K * E, S, z, 1, of_v + from);
        }
        free(space);
    }
    return failed;
}

/* ---- Log-probability of the target, entropy, probabilities; overwrites logits with the latter ---- */

int token_logprobs(float *logits, const i64 *targets, float temperature, i64 N, i64 V, float *logprobs,
                    float *entropy)
{
    for (i64 n = 0; n < N; n++)
        if (targets[n] < 0 || targets[n] >= V) return BAD_VALUE;
    PARALLEL_ROWS(N *V)
    for (i64 n = 0; n < N; n++) {
        float *z = logits + n * V, top = largest(z, V), sum = 0, mean = 0;
        float target = (z[targets[n]] - top) / temperature;
        SIMD_SUM(sum, mean)
        for (i64 i = 0; i < V; i++) {
            float shifted = (z[i] - top) / temperature, p = exponential(shifted);
            sum += p;
            mean += p * shifted;
            z[i] = p;
        }
        float all = logf(sum), inverse = 1.0f / sum;
        logprobs[n] = target - all;
        entropy[n] = all - mean * inverse;
        SIMD
        for (i64 i = 0; i < V; i++) z[i] *= inverse;
    }
    return 0;
}

/* d/d logits of Σ grad · logprob: (onehot − p) · grad / temperature. The targets were checked on the way in. */
void token_logprobs_backward(const float *grad, const float *probs, const i64 *targets, float temperature,
                             i64 N, i64 V, float *of_logits)
{
    PARALLEL_ROWS(N *V)
    for (i64 n = 0; n < N; n++) {
        float g = grad[n] / temperature;
        SIMD
        for (i64 i = 0; i < V; i++) of_logits[n * V + i] = -g * probs[n * V + i];
        of_logits[n * V + targets[n]] += g;
    }
}

/* ---- The next token: inverse CDF in float64, greedy where the temperature is 0 (sampling.py) ----
 * Logits that are not numbers have no next token. */

int sample(const float *logits, const double *uniform, const float *temperatures, i64 N, i64 V, i64 *ids,
           float *logprobs)
{
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (N * V > ALONE)
    {
        float *p = malloc((size_t)V * sizeof *p);
        failed = p ? 0 : NO_MEMORY;
#pragma omp for schedule(static)
        for (i64 n = 0; n < N; n++) {
            if (!p) continue;
            const float *z = logits + n * V;
            float top = largest(z, V), sum = 0;
            float scale = temperatures[n] == 0 ? 1.0f : temperatures[n];
            SIMD_SUM(sum)
            for (i64 i = 0; i < V; i++) sum += p[i] = exponential((z[i] - top) / scale);
            if (!(sum > 0)) {
                failed |= BAD_VALUE;
                continue;
            }
            i64 id = 0;
            if (temperatures[n] == 0) {
                while (id < V - 1 && z[id] != top) id++;
            } else {
                double total = 0, mass = 0;
                for (i64 i = 0; i < V; i++) total += p[i];
                /* below the total: a token of probability 0 is never it */
                double threshold = fmin(uniform[n] * total, total * (1 - 0x1p-52));
                while (id < V - 1 && (mass += p[id]) <= threshold) id++;
            }
            ids[n] = id;
            logprobs[n] = (z[id] - top) / scale - logf(sum);
        }
        free(p);
    }
    return failed;
}
