/* The passes over memory that PyTorch's operators make one at a time, each made once.
 *
 * Plain C, float32, compiled at the first use by the machine's own compiler (kernels.py); without one
 * the PyTorch code beside each call does the same. Every row is computed alone and in one order, so
 * results do not depend on the batch or on the number of threads, except where it says so.
 *
 * Sizes: N rows, D numbers a row, H query heads, K key/value heads, G = H/K, E head size, V vocabulary.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
#endif

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
    float n = rintf(y * 1.44269504f);
    float f = y - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    union { int32_t i; float f; } power = {((int32_t)n + 127) << 23};
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

/* of_weight is summed thread by thread: the same number of threads gives the same bits. Returns 0, or
 * 1 without memory. */
int rms_norm_backward(const float *grad, const float *x, const float *scale, const float *weight, i64 N,
                      i64 D, float *of_x, float *of_weight)
{
    int threads = N * D > ALONE ? omp_get_max_threads() : 1;
    float *sums = calloc((size_t)(threads * D), sizeof *sums);
    if (!sums) return 1;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
    {
        i64 t = omp_get_thread_num();
        float *sum = sums + t * D;
        for (i64 n = N * t / threads; n < N * (t + 1) / threads; n++) {
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
#ifdef _OPENMP
#pragma omp parallel for simd schedule(static) if (n > ALONE)
#endif
    for (i64 i = 0; i < n; i++) out[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

void swiglu_backward(const float *grad, const float *gate, const float *up, i64 n, float *of_gate,
                     float *of_up)
{
#ifdef _OPENMP
#pragma omp parallel for simd schedule(static) if (n > ALONE)
#endif
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
 * exactly those are read. Returns 0, or 1 without memory or for heads larger than LARGEST_HEAD. */

#define LARGEST_HEAD 256

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
    int failed = E > LARGEST_HEAD;
    if (failed) return failed;
#ifdef _OPENMP
#pragma omp parallel reduction(| : failed) if (N * H * E > ALONE / 8)
#endif
    {
        float *weights = malloc((size_t)width * sizeof *weights);
        failed = !weights;
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (i64 nk = 0; nk < N * K; nk++) {
            if (!weights) continue;
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

/* ---- Log-probability of the target, entropy, probabilities; overwrites logits with the latter ---- */

void token_logprobs(float *logits, const i64 *targets, float temperature, i64 N, i64 V, float *logprobs,
                    float *entropy)
{
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
}

/* d/d logits of Σ grad · logprob: (onehot − p) · grad / temperature */
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
 * Returns 0, or 1 without memory. */

int sample(const float *logits, const double *uniform, const float *temperatures, i64 N, i64 V, i64 *ids,
           float *logprobs)
{
    int failed = 0;
#ifdef _OPENMP
#pragma omp parallel reduction(| : failed) if (N * V > ALONE)
#endif
    {
        float *p = malloc((size_t)V * sizeof *p);
        failed = !p;
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (i64 n = 0; n < N; n++) {
            if (!p) continue;
            const float *z = logits + n * V;
            float top = largest(z, V), sum = 0;
            float scale = temperatures[n] == 0 ? 1.0f : temperatures[n];
            SIMD_SUM(sum)
            for (i64 i = 0; i < V; i++) sum += p[i] = exponential((z[i] - top) / scale);
            i64 id = 0;
            if (temperatures[n] == 0) {
                while (id < V - 1 && z[id] != top) id++;
            } else {
                double total = 0, mass = 0;
                for (i64 i = 0; i < V; i++) total += p[i];
                double threshold = uniform[n] * total; /* < total, so a token of probability 0 is never it */
                while (id < V - 1 && (mass += p[id]) <= threshold) id++;
                while (id > 0 && p[id] == 0) id--; /* rounding at the very end */
            }
            ids[n] = id;
            logprobs[n] = (z[id] - top) / scale - logf(sum);
        }
        free(p);
    }
    return failed;
}
