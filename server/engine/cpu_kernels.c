/* What a step does between two matrix products, on a CPU: one pass over memory each, every row by itself. And products of
   8 bits.

   Floats are computed in fp32 and stored as the model's type (bf16 rounded to nearest even). Every function gives the same
   bits for a row whatever runs beside it, on as many threads as the calling one may use. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* Wider vectors than the processor's gcc takes apart into single numbers where it compares and shuffles them. */
#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
enum { BLOCK_SIZE = 16, CHUNK = 128, MAX_GROUP = 8, MAX_HEAD_DIM = 512 };
typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Eights __attribute__((vector_size(32)));
#define INLINE static inline __attribute__((always_inline))

INLINE float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

INLINE float load(const void *from, long i, int is_bf16) {
    return is_bf16 ? from_bits((uint32_t)((const uint16_t *)from)[i] << 16) : ((const float *)from)[i];
}

INLINE uint16_t rounded(float x) {
    uint32_t bits = to_bits(x);
    uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : nearest; /* a NaN stays one */
}

INLINE void store(void *to, long i, float x, int is_bf16) {
    if (is_bf16) ((uint16_t *)to)[i] = rounded(x);
    else ((float *)to)[i] = x;
}

INLINE float as_stored(float x, int is_bf16) { return is_bf16 ? from_bits((uint32_t)rounded(x) << 16) : x; }

/* e^x to 2 units in the last place (Cephes' polynomial); 0 below -87, a NaN stays one. For x <= 88. */
INLINE float exponential(float x) {
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    float power = n > -127.0f ? n : -127.0f; /* also of a NaN: C leaves undefined which integer it is */
    return x < -87.0f ? 0.0f : p * from_bits((uint32_t)((int32_t)power + 127) << 23);
}

/* out = weight * x / sqrt(mean(x^2) + epsilon) over rows of `dim`, rounded before the weight as Llama's is; Gemma's
   (`plus_one`) is weighted by 1 + weight before it is rounded. */
INLINE void norm_row(const void *x, const void *weight, void *out, long dim, float epsilon, int plus_one, int is_bf16) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < dim; i++) { float v = load(x, i, is_bf16); sum += v * v; }
    float scale = 1.0f / sqrtf(sum / dim + epsilon);
#pragma omp simd
    for (long i = 0; i < dim; i++) {
        float v = load(x, i, is_bf16) * scale, w = load(weight, i, is_bf16);
        store(out, i, plus_one ? v * (1.0f + w) : as_stored(v, is_bf16) * w, is_bf16);
    }
}

void rms_norm(const char *x, const void *weight, char *out, long rows, long dim, float epsilon, int plus_one,
              int is_bf16) {
    long bytes = dim * (is_bf16 ? 2 : 4);
#pragma omp parallel for if (rows * dim > 8192)
    for (long row = 0; row < rows; row++) {
        if (is_bf16) norm_row(x + row * bytes, weight, out + row * bytes, dim, epsilon, plus_one, 1);
        else norm_row(x + row * bytes, weight, out + row * bytes, dim, epsilon, plus_one, 0);
    }
}

/* out [rows, dim] = silu(gate_up[:, :dim]) * gate_up[:, dim:] */
INLINE void gated_row(const void *gate, const void *up, void *out, long dim, int is_bf16) {
#pragma omp simd
    for (long i = 0; i < dim; i++) {
        float g = load(gate, i, is_bf16), u = load(up, i, is_bf16);
        float bounded = g < -88.0f ? -88.0f : (g > 88.0f ? 88.0f : g);
        store(out, i, as_stored(g / (1.0f + exponential(-bounded)), is_bf16) * u, is_bf16);
    }
}

void silu_mul(const char *gate_up, char *out, long rows, long dim, int is_bf16) {
    long bytes = dim * (is_bf16 ? 2 : 4);
#pragma omp parallel for if (rows * dim > 4096)
    for (long row = 0; row < rows; row++) {
        const char *gate = gate_up + 2 * row * bytes;
        if (is_bf16) gated_row(gate, gate + bytes, out + row * bytes, dim, 1);
        else gated_row(gate, gate + bytes, out + row * bytes, dim, 0);
    }
}

/* x [tokens, heads, dim] by strides in elements, turned in place: halves (a, b) to (a cos - b sin, b cos + a sin).
   cosine and sine [tokens, dim]. */
INLINE void turn(void *x, const void *cosine, const void *sine, long dim, int is_bf16) {
    long half = dim / 2;
#pragma omp simd
    for (long i = 0; i < half; i++) {
        float a = load(x, i, is_bf16), b = load(x, i + half, is_bf16);
        float first = a * load(cosine, i, is_bf16) - b * load(sine, i, is_bf16);
        float second = b * load(cosine, i + half, is_bf16) + a * load(sine, i + half, is_bf16);
        store(x, i, first, is_bf16);
        store(x, i + half, second, is_bf16);
    }
}

void rotate(char *x, const char *cosine, const char *sine, long tokens, long heads, long dim, long token_stride,
            long head_stride, int is_bf16) {
    long size = is_bf16 ? 2 : 4;
#pragma omp parallel for if (tokens * heads * dim > 16384)
    for (long token = 0; token < tokens; token++)
        for (long head = 0; head < heads; head++) {
            char *at = x + (token * token_stride + head * head_stride) * size;
            const char *c = cosine + token * dim * size, *s = sine + token * dim * size;
            if (is_bf16) turn(at, c, s, dim, 1);
            else turn(at, c, s, dim, 0);
        }
}

/* A token's K and V [heads, dim] into slot slots[token] of a layer's [2, blocks, heads, BLOCK_SIZE, dim]. */
void write_kv(char *layer, const long *slots, const char *key, const char *value, long tokens, long heads, long dim,
              long blocks, long key_token_stride, long key_head_stride, long value_token_stride, long value_head_stride,
              long size) {
    for (long token = 0; token < tokens; token++)
        for (long head = 0; head < heads; head++) {
            long slot = (slots[token] / BLOCK_SIZE * heads + head) * BLOCK_SIZE + slots[token] % BLOCK_SIZE;
            memcpy(layer + slot * dim * size, key + (token * key_token_stride + head * key_head_stride) * size,
                   dim * size);
            memcpy(layer + (slot + blocks * heads * BLOCK_SIZE) * dim * size,
                   value + (token * value_token_stride + head * value_head_stride) * size, dim * size);
        }
}

/* One query a row. softmax(q K^T * scaling) V over the slots of the row's blocks whose position is at most the query's
   and less than `window` before it (Milakov and Gimelshein, 2018). */
typedef struct {
    const char *layer;         /* [2, num_blocks, kv_heads, BLOCK_SIZE, head_dim] */
    const char *query;         /* [tokens, heads, head_dim] by strides */
    char *out;                 /* [tokens, heads, head_dim] */
    const long *query_index;   /* [rows], a token each */
    const long *block_tables;  /* [rows, max_blocks] */
    const long *row_blocks;    /* [rows] */
    const long *key_positions; /* [rows, max_blocks * BLOCK_SIZE] */
    const long *positions;     /* [rows], of the queries */
    const float *seen_out;     /* [tokens, heads, head_dim], what was attended already; null: nothing */
    const float *seen_lse;     /* [tokens, heads] */
    long rows, heads, kv_heads, head_dim, num_blocks, max_blocks, token_stride, head_stride, window;
    float scaling;
} Decode;

INLINE Vector load_vector(const void *from, long i, int is_bf16) {
    if (is_bf16) {
        Halves halves;
        memcpy(&halves, (const uint16_t *)from + i, sizeof halves);
        return (Vector)(__builtin_convertvector(halves, Words) << 16);
    }
    Vector found;
    memcpy(&found, (const float *)from + i, sizeof found);
    return found;
}

/* As `exponential`, a lane each. */
INLINE Vector exponentials(Vector x) {
    Vector n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Words is_above = (Words)(n > -127.0f);
    Vector bounded = (Vector)(((Words)n & is_above) | ((Words)((Vector){0} - 127.0f) & ~is_above));
    Words power = (Words)(__builtin_convertvector(bounded, Ints) + 127) << 23;
    return (Vector)((Words)(p * (Vector)power) & ~(Words)(x < -87.0f));
}

/* The sums of LANES vectors, a lane each. */
#ifdef __AVX512F__
INLINE Vector sums(Vector *x) {
#define ADD(to, a, b, ...) to = __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
    for (int i = 0; i < 8; i++) {
        Vector low, high;
        ADD(low, x[2 * i], x[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        ADD(high, x[2 * i], x[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        x[i] = low + high;
    }
    for (int i = 0; i < 4; i++) {
        Vector low, high;
        ADD(low, x[2 * i], x[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        ADD(high, x[2 * i], x[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        x[i] = low + high;
    }
    for (int i = 0; i < 2; i++) {
        Vector low, high;
        ADD(low, x[2 * i], x[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29);
        ADD(high, x[2 * i], x[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
        x[i] = low + high;
    }
    Vector low, high;
    ADD(low, x[0], x[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    ADD(high, x[0], x[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return low + high;
#undef ADD
}
#else
INLINE Vector sums_of_two(Vector a, Vector b) {
    return __builtin_shuffle(a, b, (Ints){0, 2, 8, 10, 4, 6, 12, 14}) +
           __builtin_shuffle(a, b, (Ints){1, 3, 9, 11, 5, 7, 13, 15});
}

INLINE Vector sums(Vector *x) {
    Vector first = sums_of_two(sums_of_two(x[0], x[1]), sums_of_two(x[2], x[3]));
    Vector last = sums_of_two(sums_of_two(x[4], x[5]), sums_of_two(x[6], x[7]));
    return __builtin_shuffle(first, last, (Ints){0, 1, 2, 3, 8, 9, 10, 11}) +
           __builtin_shuffle(first, last, (Ints){4, 5, 6, 7, 12, 13, 14, 15});
}
#endif

INLINE void attend(const Decode *d, long row, long kv_head, long first, long group, long dim, int is_bf16) {
    Vector q[MAX_GROUP][MAX_HEAD_DIM / LANES], acc[MAX_GROUP][MAX_HEAD_DIM / LANES];
    float scores[MAX_GROUP][CHUNK], best[MAX_GROUP], total[MAX_GROUP];
    long size = is_bf16 ? 2 : 4, token = d->query_index[row], parts = dim / LANES;
    long block_elements = BLOCK_SIZE * dim;
    const char *values = d->layer + d->num_blocks * d->kv_heads * block_elements * size;
    for (long g = 0; g < group; g++) {
        long head = first + g;
        const char *from = d->query + (token * d->token_stride + head * d->head_stride) * size;
        for (long i = 0; i < parts; i++) q[g][i] = load_vector(from, i * LANES, is_bf16) * d->scaling;
        best[g] = d->seen_out ? d->seen_lse[token * d->heads + head] : -INFINITY;
        total[g] = d->seen_out ? 1 : 0;
        for (long i = 0; i < parts; i++)
            acc[g][i] = d->seen_out ? load_vector(d->seen_out, (token * d->heads + head) * dim + i * LANES, 0)
                                    : (Vector){0};
    }
    const long *table = d->block_tables + row * d->max_blocks;
    const long *key_positions = d->key_positions + row * d->max_blocks * BLOCK_SIZE;
    long position = d->positions[row], num_slots = d->row_blocks[row] * BLOCK_SIZE;
    for (long start = 0; start < num_slots; start += CHUNK) {
        long count = num_slots - start < CHUNK ? num_slots - start : CHUNK;
        unsigned char is_seen[CHUNK];
        long num_seen = 0;
        for (long t = 0; t < count; t++) {
            long distance = position - key_positions[start + t];
            is_seen[t] = distance >= 0 && distance < d->window;
            num_seen += is_seen[t];
        }
        if (!num_seen) continue;
        for (long t = 0; t < count; t += BLOCK_SIZE) {
            const char *keys = d->layer + (table[(start + t) / BLOCK_SIZE] * d->kv_heads + kv_head) * block_elements * size;
            Vector products[MAX_GROUP][BLOCK_SIZE];
            for (long k = 0; k < BLOCK_SIZE; k++) {
                Vector key[MAX_HEAD_DIM / LANES];
                for (long i = 0; i < parts; i++) key[i] = load_vector(keys, k * dim + i * LANES, is_bf16);
                for (long g = 0; g < group; g++) {
                    Vector product = q[g][0] * key[0];
                    for (long i = 1; i < parts; i++) product += q[g][i] * key[i];
                    products[g][k] = product;
                }
            }
            for (long g = 0; g < group; g++)
                for (long k = 0; k < BLOCK_SIZE; k += LANES) {
                    Vector found = sums(products[g] + k);
                    memcpy(scores[g] + t + k, &found, sizeof found);
                }
        }
        for (long g = 0; g < group; g++) {
            float highest = best[g];
            for (long t = 0; t < count; t++) {
                scores[g][t] = is_seen[t] ? scores[g][t] : -INFINITY;
                highest = scores[g][t] > highest ? scores[g][t] : highest;
            }
            float kept = best[g] == highest ? 1.0f : exponential(best[g] - highest);
            Vector sum = {0};
            for (long t = 0; t < count; t += LANES) {
                Vector weights = exponentials(load_vector(scores[g], t, 0) - highest);
                memcpy(scores[g] + t, &weights, sizeof weights);
                sum += weights;
            }
            float added = 0;
            for (int i = 0; i < LANES; i++) added += sum[i];
            total[g] = total[g] * kept + added;
            best[g] = highest;
            for (long i = 0; i < parts; i++) acc[g][i] *= kept;
        }
        for (long t = 0; t < count; t += BLOCK_SIZE) {
            const char *block = values + (table[(start + t) / BLOCK_SIZE] * d->kv_heads + kv_head) * block_elements * size;
            for (long k = 0; k < BLOCK_SIZE; k++) {
                if (!is_seen[t + k]) continue;
                for (long i = 0; i < parts; i++) {
                    Vector value = load_vector(block, k * dim + i * LANES, is_bf16);
                    for (long g = 0; g < group; g++) acc[g][i] += scores[g][t + k] * value;
                }
            }
        }
    }
    for (long g = 0; g < group; g++) {
        char *to = d->out + (token * d->heads + first + g) * dim * size;
        for (long i = 0; i < dim; i++) store(to, i, acc[g][i / LANES][i % LANES] / total[g], is_bf16);
    }
}

INLINE void attend_heads(const Decode *d, long row, long kv_head, int is_bf16) {
    long group = d->heads / d->kv_heads;
    for (long done = 0; done < group; done += MAX_GROUP) {
        long first = kv_head * group + done, count = group - done < MAX_GROUP ? group - done : MAX_GROUP;
        if (d->head_dim == 64 && count == 3) attend(d, row, kv_head, first, 3, 64, is_bf16);
        else if (d->head_dim == 64) attend(d, row, kv_head, first, count, 64, is_bf16);
        else if (d->head_dim == 128) attend(d, row, kv_head, first, count, 128, is_bf16);
        else attend(d, row, kv_head, first, count, d->head_dim, is_bf16);
    }
}

void attend_decode(const Decode *d, int is_bf16) {
#pragma omp parallel for collapse(2) schedule(dynamic, 1)
    for (long row = 0; row < d->rows; row++)
        for (long kv_head = 0; kv_head < d->kv_heads; kv_head++) {
            if (is_bf16) attend_heads(d, row, kv_head, 1);
            else attend_heads(d, row, kv_head, 0);
        }
}

/* out [rows, dim] = round(x * 127 / max|x|) + 128 in bytes, or around 0 in 16 bits (`is_wide`), and that row's scale
   max|x| / 127, which a NaN or an infinity makes NaN. */
INLINE float quantized_row(const void *x, void *out, long dim, int is_bf16, int is_wide) {
    float highest = 0, poison = 0;
#pragma omp simd reduction(max : highest) reduction(+ : poison)
    for (long i = 0; i < dim; i++) {
        float v = load(x, i, is_bf16), size = v < 0 ? -v : v;
        highest = size > highest ? size : highest;
        poison += v * 0.0f;
    }
    float larger = highest < 0x1p-100f ? 0x1p60f : 1.0f; /* or the inverse of the smallest numbers is infinite */
    float inverse = highest > 0 && poison == 0 ? 127.0f / (highest * larger) : 0.0f;
#pragma omp simd
    for (long i = 0; i < dim; i++) {
        float v = poison == 0 ? load(x, i, is_bf16) * larger : 0.0f;
        int32_t byte = (int32_t)(v * inverse + 128.5f);
        if (is_wide) ((int16_t *)out)[i] = (int16_t)(byte - 128);
        else ((uint8_t *)out)[i] = (uint8_t)byte;
    }
    return highest / 127.0f + poison;
}

void quantize(const char *x, uint8_t *out, float *scales, long rows, long dim, int is_bf16) {
    long bytes = dim * (is_bf16 ? 2 : 4);
#pragma omp parallel for if (rows * dim > 16384)
    for (long row = 0; row < rows; row++)
        scales[row] = is_bf16 ? quantized_row(x + row * bytes, out + row * dim, dim, 1, 0)
                              : quantized_row(x + row * bytes, out + row * dim, dim, 0, 0);
}

/* out [rows, dim rounded up to even], behind an odd dim a 0. */
void quantize_wide(const char *x, int16_t *out, float *scales, long rows, long dim, int is_bf16) {
    long bytes = dim * (is_bf16 ? 2 : 4), width = dim + dim % 2;
#pragma omp parallel for if (rows * dim > 16384)
    for (long row = 0; row < rows; row++) {
        int16_t *to = out + row * width;
        to[width - 1] = 0;
        scales[row] = is_bf16 ? quantized_row(x + row * bytes, to, dim, 1, 1) : quantized_row(x + row * bytes, to, dim, 0, 1);
    }
}

/* x [rows, dim] = x * scales[row] + bias, in place; bias may be null. */
INLINE void scale_row(void *x, float scale, const void *bias, long dim, int is_bf16) {
    if (bias) {
#pragma omp simd
        for (long i = 0; i < dim; i++) store(x, i, load(x, i, is_bf16) * scale + load(bias, i, is_bf16), is_bf16);
    } else {
#pragma omp simd
        for (long i = 0; i < dim; i++) store(x, i, load(x, i, is_bf16) * scale, is_bf16);
    }
}

void scale_rows(char *x, const float *scales, const void *bias, long rows, long dim, int is_bf16) {
    long bytes = dim * (is_bf16 ? 2 : 4);
#pragma omp parallel for if (rows * dim > 16384)
    for (long row = 0; row < rows; row++) {
        if (is_bf16) scale_row(x + row * bytes, scales[row], bias, dim, 1);
        else scale_row(x + row * bytes, scales[row], bias, dim, 0);
    }
}

/* out [rows, outs] = (x - 128) weight^T * scales, for few rows: x [rows, dim] unsigned, weight [outs, dim] signed, 128 times
   whose sums are `zeros`. As the product of many rows gives it, to the bit: sums are exact, and rounded at the same places. */
INLINE int32_t dot(const uint8_t *x, const int8_t *weight, long dim) {
    int32_t sum = 0;
    for (long i = 0; i < dim; i++) sum += (int32_t)x[i] * (int32_t)weight[i];
    return sum;
}

void few_rows(const uint8_t *x, const int8_t *weight, const int32_t *zeros, const float *scales, void *out, long rows,
              long outs, long dim, int is_bf16) {
#pragma omp parallel for schedule(static) if (outs * dim > 65536)
    for (long o = 0; o < outs; o++)
        for (long row = 0; row < rows; row++) {
            float product = (float)(dot(x + row * dim, weight + o * dim, dim) - zeros[o]) * scales[o];
            store(out, row * outs + o, product, is_bf16);
        }
}

enum { PANEL = 16, MAX_ROWS = 6 }; /* MAX_ROWS rows of a panel are what 16 registers hold */

#ifdef __AVX2__
INLINE Eights widened(const int8_t *from) { return (Eights)_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)from)); }
INLINE Eights dot_pairs(Eights a, Eights b) { return (Eights)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#else
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(32)));

INLINE Eights widened(const int8_t *from) {
    Bytes bytes;
    memcpy(&bytes, from, sizeof bytes);
    return (Eights)__builtin_convertvector(bytes, Shorts);
}

INLINE Eights dot_pairs(Eights a, Eights b) { return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16); }
#endif

INLINE Floats load_floats(const float *from) {
    Floats found;
    memcpy(&found, from, sizeof found);
    return found;
}

/* out [rows, outs] = x weight^T * scales * row_scales + bias. Pairs of products are summed in 32 bits: nothing saturates
   as it does in 16 on processors without VNNI, and no sum is rounded. */
typedef struct {
    const int16_t *x;        /* [rows, pairs, 2] */
    const int8_t *weight;    /* [panels, pairs, PANEL, 2] */
    const float *scales;     /* [panels * PANEL] */
    const float *row_scales; /* [rows] */
    const float *bias;       /* [panels * PANEL] */
    char *out;               /* [rows, outs] */
    long rows, outs, pairs;
} Product;

INLINE void multiply(const Product *p, long first, long rows, long out, int is_bf16) {
    const int16_t *x = p->x + first * 2 * p->pairs;
    const int8_t *weight = p->weight + out * 2 * p->pairs;
    Eights sum[MAX_ROWS][2];
#pragma GCC unroll 6
    for (long row = 0; row < rows; row++) sum[row][0] = sum[row][1] = (Eights){0};
    for (long k = 0; k < p->pairs; k++) {
        Eights low = widened(weight + k * 2 * PANEL), high = widened(weight + k * 2 * PANEL + PANEL);
#pragma GCC unroll 6
        for (long row = 0; row < rows; row++) {
            int32_t pair;
            memcpy(&pair, x + (row * p->pairs + k) * 2, sizeof pair);
            Eights both = pair - (Eights){0};
            sum[row][0] += dot_pairs(both, low);
            sum[row][1] += dot_pairs(both, high);
        }
    }
    long count = p->outs - out < PANEL ? p->outs - out : PANEL;
#pragma GCC unroll 6
    for (long row = 0; row < rows; row++) {
        float found[PANEL];
#pragma GCC unroll 2
        for (long half = 0; half < 2; half++) {
            long o = out + half * PANEL / 2;
            Floats product = __builtin_convertvector(sum[row][half], Floats) * load_floats(p->scales + o);
            product = product * p->row_scales[first + row] + load_floats(p->bias + o);
            memcpy(found + half * PANEL / 2, &product, sizeof product);
        }
        char *to = p->out + ((first + row) * p->outs + out) * (is_bf16 ? 2 : 4);
        if (count == PANEL)
            for (long i = 0; i < PANEL; i++) store(to, i, found[i], is_bf16);
        else
            for (long i = 0; i < count; i++) store(to, i, found[i], is_bf16);
    }
}

INLINE void multiply_panel(const Product *p, long out, int is_bf16) {
    for (long first = 0, rows; first < p->rows; first += rows) {
        long left = p->rows - first, blocks = (left + MAX_ROWS - 1) / MAX_ROWS;
        rows = (left + blocks - 1) / blocks;
        if (rows == 6) multiply(p, first, 6, out, is_bf16);
        else if (rows == 5) multiply(p, first, 5, out, is_bf16);
        else if (rows == 4) multiply(p, first, 4, out, is_bf16);
        else if (rows == 3) multiply(p, first, 3, out, is_bf16);
        else if (rows == 2) multiply(p, first, 2, out, is_bf16);
        else multiply(p, first, 1, out, is_bf16);
    }
}

void multiply_int8(const int16_t *x, const int8_t *weight, const float *scales, const float *row_scales, const float *bias,
                   char *out, long rows, long outs, long pairs, int is_bf16) {
    Product product = {x, weight, scales, row_scales, bias, out, rows, outs, pairs};
#pragma omp parallel for schedule(static) if (rows * outs * pairs > 32768)
    for (long panel = 0; panel < outs; panel += PANEL) {
        if (is_bf16) multiply_panel(&product, panel, 1);
        else multiply_panel(&product, panel, 0);
    }
}

/* The first index of each row's largest value; -1 where the row has a NaN or +infinity, or nothing but -infinity. */
INLINE long best_of(const void *row, long dim, int is_bf16) {
    float highest = -INFINITY;
    long finite = 1;
#pragma omp simd reduction(max : highest) reduction(& : finite)
    for (long i = 0; i < dim; i++) {
        float v = load(row, i, is_bf16);
        highest = v > highest ? v : highest;
        finite &= v < INFINITY;
    }
    if (!finite || highest == -INFINITY) return -1;
    long i = 0;
    while (load(row, i, is_bf16) != highest) i++;
    return i;
}

void argmax(const char *x, long *out, long rows, long dim, int is_bf16) {
    long bytes = dim * (is_bf16 ? 2 : 4);
#pragma omp parallel for if (rows * dim > 16384)
    for (long row = 0; row < rows; row++)
        out[row] = is_bf16 ? best_of(x + row * bytes, dim, 1) : best_of(x + row * bytes, dim, 0);
}
