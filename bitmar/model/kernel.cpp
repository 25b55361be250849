// Products with ternary weights that stay packed, four to a byte, and with bf16 weights, and a whole block of them for
// reading token by token; for AVX2, else plain C++.
//
// x_q w_q^T is a sum of whole numbers, so it is exact here as in PyTorch, and the rest rounds alike: without
// contraction of a * b + c (-ffp-contract=off) both give the same bits. Norms and attention of a block are in fp64.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr float kEps = 1e-5f;    // as EPS in bitmar/model/quantize.py
constexpr float kLevels = 127.0f;
constexpr int64_t kChunk = 32;   // bytes of a register: 128 weights
constexpr int64_t kChunks = 16;  // whose products fit into 16 bits: 16 * 4 * 2 * 2 * 127 < 2^15
constexpr int kTile = 4;         // tokens that share an unpacked register
constexpr int64_t kRows = 64;    // of the weight that stay in the first cache

// A token's activations in four planes: plane k holds the inputs 4b + k of each byte b.
struct Token {
    std::vector<int8_t> planes;
    float step;
    int32_t sum;
};

void quantize(const float* x, int64_t inputs, int64_t bytes, Token& token) {
    float largest = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < inputs; ++i) {
        largest = std::max(largest, std::fabs(x[i]));
        finite &= std::isfinite(x[i]);
    }
    token.step = finite ? std::max(largest, kEps) / kLevels : std::numeric_limits<float>::quiet_NaN();
    token.sum = 0;
    token.planes.assign(4 * bytes, 0);
    if (!finite) return;
    for (int64_t i = 0; i < inputs; ++i) {
        const auto level = static_cast<int8_t>(std::nearbyintf(x[i] / token.step));
        token.planes[(i % 4) * bytes + i / 4] = level;
        token.sum += level;
    }
}

// The sums of (w + 1) x_q of one row of weights for N tokens.
template <int N>
void row_sums(const uint8_t* row, int64_t bytes, const Token* tokens, int32_t* sums) {
    int64_t begin = 0;
    std::fill(sums, sums + N, 0);
#ifdef __AVX2__
    const __m256i low = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    __m256i wide[N];
    for (int n = 0; n < N; ++n) wide[n] = _mm256_setzero_si256();
    while (begin + kChunk <= bytes) {
        __m256i narrow[N];
        for (int n = 0; n < N; ++n) narrow[n] = _mm256_setzero_si256();
        for (int64_t chunk = 0; chunk < kChunks && begin + kChunk <= bytes; ++chunk, begin += kChunk) {
            const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + begin));
            const __m256i digits[4] = {
                _mm256_and_si256(packed, low), _mm256_and_si256(_mm256_srli_epi16(packed, 2), low),
                _mm256_and_si256(_mm256_srli_epi16(packed, 4), low), _mm256_and_si256(_mm256_srli_epi16(packed, 6), low)};
            for (int n = 0; n < N; ++n) {
                const int8_t* plane = tokens[n].planes.data() + begin;
                for (int k = 0; k < 4; ++k) {
                    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane + k * bytes));
                    narrow[n] = _mm256_add_epi16(narrow[n], _mm256_maddubs_epi16(digits[k], x));
                }
            }
        }
        for (int n = 0; n < N; ++n) wide[n] = _mm256_add_epi32(wide[n], _mm256_madd_epi16(narrow[n], ones));
    }
    for (int n = 0; n < N; ++n) {
        alignas(32) int32_t parts[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(parts), wide[n]);
        for (int32_t part : parts) sums[n] += part;
    }
#endif
    for (int64_t b = begin; b < bytes; ++b)
        for (int k = 0; k < 4; ++k) {
            const int32_t digit = row[b] >> (2 * k) & 3;
            for (int n = 0; n < N; ++n) sums[n] += digit * tokens[n].planes[k * bytes + b];
        }
}

struct Weight {
    const uint8_t* packed;    // [outputs, ceil(inputs / 4)]
    const float* scale;       // gamma of each section
    const int64_t* sections;  // rows of each
    int64_t count, inputs, outputs;
};

template <int N>
void tile(const Weight& w, int64_t first, int64_t last, const float* gamma, const Token* tokens, float* y) {
    const int64_t bytes = (w.inputs + 3) / 4;
    int32_t sums[N];
    for (int64_t o = first; o < last; ++o) {
        row_sums<N>(w.packed + o * bytes, bytes, tokens, sums);
        for (int n = 0; n < N; ++n) {
            const auto product = static_cast<float>(sums[n] - tokens[n].sum);
            const float step = tokens[n].step;
            y[n * w.outputs + o] = w.count > 1 ? product * step * gamma[o] : product * (step * gamma[o]);
        }
    }
}

// y [tokens, outputs] = BitLinear(x [tokens, inputs])
void linear(const Weight& w, const float* x, int64_t tokens, float* y) {
    std::vector<float> gamma;
    gamma.reserve(w.outputs);
    for (int64_t s = 0; s < w.count; ++s) gamma.insert(gamma.end(), w.sections[s], w.scale[s]);
    std::vector<Token> quantized(tokens);
    for (int64_t t = 0; t < tokens; ++t) quantize(x + t * w.inputs, w.inputs, (w.inputs + 3) / 4, quantized[t]);
    for (int64_t first = 0; first < w.outputs; first += kRows) {
        const int64_t last = std::min(w.outputs, first + kRows);
        int64_t t = 0;
        for (; t + kTile <= tokens; t += kTile)
            tile<kTile>(w, first, last, gamma.data(), &quantized[t], y + t * w.outputs);
        for (; t < tokens; ++t) tile<1>(w, first, last, gamma.data(), &quantized[t], y + t * w.outputs);
    }
}

double dot(const float* a, const float* b, int64_t width) {
    double parts[8] = {};
    int64_t i = 0;
    for (; i + 8 <= width; i += 8)
        for (int k = 0; k < 8; ++k) parts[k] += static_cast<double>(a[i + k]) * b[i + k];
    for (; i < width; ++i) parts[i % 8] += static_cast<double>(a[i]) * b[i];
    return ((parts[0] + parts[4]) + (parts[1] + parts[5])) + ((parts[2] + parts[6]) + (parts[3] + parts[7]));
}

// RMSNorm of rows in place; its mean of squares is of `count` numbers, in fp64.
void norm(float* x, int64_t tokens, int64_t width, int64_t count, const float* gain) {
    for (float* row = x; row != x + tokens * width; row += width) {
        const auto root = static_cast<float>(1.0 / std::sqrt(dot(row, row, width) / count + kEps));
        for (int64_t i = 0; i < width; ++i) row[i] = row[i] * root * gain[i];
    }
}

// Rotary embedding, halves convention.
void turn(const float* x, const float* cosine, const float* sine, int64_t width, float* y) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; ++i) {
        y[i] = x[i] * cosine[i] - x[half + i] * sine[i];
        y[half + i] = x[half + i] * cosine[half + i] + x[i] * sine[half + i];
    }
}

struct Span {
    int64_t rows, count, begin, capacity;  // `count` new columns from `begin` on
    const float *cosine, *sine;            // [rows, count, width of a head]
    const uint8_t* allowed;                // [rows, count, begin + count]: who may look at whom
};

// What one query finds, in fp64 as sums over the allowed columns in their order.
void look(const float* query, const float* keys, const float* values, const uint8_t* allowed, int64_t columns,
          int64_t width, std::vector<double>& weights, float* found) {
    weights.assign(columns + width, 0.0);
    double largest = -std::numeric_limits<double>::infinity(), total = 0.0;
    const double root = std::sqrt(static_cast<double>(width));
    for (int64_t j = 0; j < columns; ++j)
        if (allowed[j]) largest = std::max(largest, weights[j] = dot(query, keys + j * width, width) / root);
    double* mixed = weights.data() + columns;
    for (int64_t j = 0; j < columns; ++j) {
        if (!allowed[j]) continue;
        const double weight = std::exp(weights[j] - largest);
        total += weight;
        for (int64_t e = 0; e < width; ++e) mixed[e] += weight * values[j * width + e];
    }
    for (int64_t e = 0; e < width; ++e) found[e] = static_cast<float>(mixed[e] / total);
}

struct Block {
    Weight qkv, output, gate_up, down;
    const float *attention_norm, *sub_norm, *feed_forward_norm, *hidden_norm;
    const float* mask;       // of the heads' numbers, or null
    int64_t heads, width;    // width of a head
    int64_t sub_norm_count;  // what the sub-norm divides by
};

float dot_bf16(const float* x, const uint16_t* w, int64_t width) {
    int64_t i = 0;
    float sum = 0.0f;
#ifdef __AVX2__
    __m256 parts[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (; i + 32 <= width; i += 32)
        for (int k = 0; k < 4; ++k) {
            const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + i + 8 * k));
            const __m256 weight = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
            parts[k] = _mm256_add_ps(parts[k], _mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * k), weight));
        }
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, _mm256_add_ps(_mm256_add_ps(parts[0], parts[1]), _mm256_add_ps(parts[2], parts[3])));
    for (float lane : lanes) sum += lane;
#endif
    for (; i < width; ++i) {
        const uint32_t bits = static_cast<uint32_t>(w[i]) << 16;
        float weight;
        __builtin_memcpy(&weight, &bits, sizeof weight);
        sum += x[i] * weight;
    }
    return sum;
}

}  // namespace

extern "C" {

void bitlinear(const Weight* weight, const float* x, int64_t tokens, float* y) { linear(*weight, x, tokens, y); }

// x [rows, count, D] through a block, in place; keys and values [rows, heads, capacity, width] take the new columns.
void block(const Block* b, const Span* span, float* x, float* keys, float* values) {
    const int64_t tokens = span->rows * span->count, dimension = b->qkv.inputs, width = b->width;
    const int64_t inner = b->heads * width, hidden = b->down.inputs, end = span->begin + span->count;
    std::vector<float> input(x, x + tokens * dimension), qkv(tokens * 3 * inner), found(tokens * inner);
    std::vector<float> query(width), made(tokens * dimension), up(tokens * 2 * hidden), gated(tokens * hidden);
    std::vector<double> weights;
    norm(input.data(), tokens, dimension, dimension, b->attention_norm);
    linear(b->qkv, input.data(), tokens, qkv.data());
    for (int64_t row = 0; row < span->rows; ++row)
        for (int64_t head = 0; head < b->heads; ++head) {
            float* key = keys + (row * b->heads + head) * span->capacity * width;
            float* value = values + (row * b->heads + head) * span->capacity * width;
            for (int64_t n = 0; n < span->count; ++n) {
                const int64_t token = row * span->count + n, column = (span->begin + n) * width;
                const float* own = qkv.data() + token * 3 * inner + head * width;
                turn(own + inner, span->cosine + token * width, span->sine + token * width, width, key + column);
                std::copy_n(own + 2 * inner, width, value + column);
            }
            for (int64_t n = 0; n < span->count; ++n) {
                const int64_t token = row * span->count + n;
                const float* own = qkv.data() + token * 3 * inner + head * width;
                turn(own, span->cosine + token * width, span->sine + token * width, width, query.data());
                look(query.data(), key, value, span->allowed + token * end, end, width, weights,
                     found.data() + token * inner + head * width);
            }
        }
    if (b->mask)
        for (int64_t i = 0; i < tokens * inner; ++i) found[i] *= b->mask[i % inner];
    norm(found.data(), tokens, inner, b->sub_norm_count, b->sub_norm);
    linear(b->output, found.data(), tokens, made.data());
    for (int64_t i = 0; i < tokens * dimension; ++i) input[i] = x[i] += made[i];
    norm(input.data(), tokens, dimension, dimension, b->feed_forward_norm);
    linear(b->gate_up, input.data(), tokens, up.data());
    for (int64_t token = 0; token < tokens; ++token)
        for (int64_t i = 0; i < hidden; ++i) {
            const float positive = std::max(up[token * 2 * hidden + i], 0.0f);
            gated[token * hidden + i] = positive * positive * up[(token * 2 + 1) * hidden + i];
        }
    norm(gated.data(), tokens, hidden, hidden, b->hidden_norm);
    linear(b->down, gated.data(), tokens, made.data());
    for (int64_t i = 0; i < tokens * dimension; ++i) x[i] += made[i];
}

// y [tokens, outputs] = x [tokens, width] w^T with w [outputs, width] in bf16, sums in fp32.
void bf16_linear(const float* x, int64_t tokens, int64_t width, const uint16_t* w, int64_t outputs, float* y) {
    for (int64_t o = 0; o < outputs; ++o)
        for (int64_t t = 0; t < tokens; ++t) y[t * outputs + o] = dot_bf16(x + t * width, w + o * width, width);
}

}
