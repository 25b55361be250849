// Products with ternary weights that stay packed, four to a byte, and with bf16 weights; for AVX2, else plain C++.
//
// x_q w_q^T is a sum of whole numbers, so it is exact here as in PyTorch, and the rest rounds alike: without
// contraction of a * b + c (-ffp-contract=off) both give the same bits.

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
    const uint8_t* packed;
    int64_t bytes, outputs;
    const float* scale;      // gamma of each section
    const int64_t* sections;  // rows of each
    int64_t count;
};

template <int N>
void tile(const Weight& w, int64_t first, int64_t last, const float* gamma, const Token* tokens, float* y) {
    int32_t sums[N];
    for (int64_t o = first; o < last; ++o) {
        row_sums<N>(w.packed + o * w.bytes, w.bytes, tokens, sums);
        for (int n = 0; n < N; ++n) {
            const auto product = static_cast<float>(sums[n] - tokens[n].sum);
            const float step = tokens[n].step;
            y[n * w.outputs + o] = w.count > 1 ? product * step * gamma[o] : product * (step * gamma[o]);
        }
    }
}

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

// y [tokens, outputs] = BitLinear(x [tokens, inputs]) with the packed weight [outputs, ceil(inputs / 4)].
void bitlinear(const float* x, int64_t tokens, int64_t inputs, const uint8_t* packed, int64_t outputs,
               const float* scale, const int64_t* sections, int64_t count, float* y) {
    const Weight weight{packed, (inputs + 3) / 4, outputs, scale, sections, count};
    std::vector<float> gamma;
    gamma.reserve(outputs);
    for (int64_t s = 0; s < count; ++s) gamma.insert(gamma.end(), sections[s], scale[s]);
    std::vector<Token> quantized(tokens);
    for (int64_t t = 0; t < tokens; ++t) quantize(x + t * inputs, inputs, weight.bytes, quantized[t]);
    for (int64_t first = 0; first < outputs; first += kRows) {
        const int64_t last = std::min(outputs, first + kRows);
        int64_t t = 0;
        for (; t + kTile <= tokens; t += kTile)
            tile<kTile>(weight, first, last, gamma.data(), &quantized[t], y + t * outputs);
        for (; t < tokens; ++t) tile<1>(weight, first, last, gamma.data(), &quantized[t], y + t * outputs);
    }
}

// y [tokens, outputs] = x [tokens, width] w^T with w [outputs, width] in bf16, sums in fp32.
void bf16_linear(const float* x, int64_t tokens, int64_t width, const uint16_t* w, int64_t outputs, float* y) {
    for (int64_t o = 0; o < outputs; ++o)
        for (int64_t t = 0; t < tokens; ++t) y[t * outputs + o] = dot_bf16(x + t * width, w + o * width, width);
}

}
