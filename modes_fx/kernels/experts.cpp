// GEMMs of experts over the rows of their kept pairs. Shapes: T tokens, K experts a token, E experts, R rows (kept pairs in
// expert order), D inner, N outer size. Weights [E, N, D] are read as they lie in memory, each once for all rows of its expert.
//
// Both operands run along D, so a tile of ROWS x COLUMNS dot products needs no packing. Threads share the columns of every
// expert evenly, whatever the routing, and none writes where another does.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define MODES_FX_AVX512
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;
constexpr int kRows = 6, kColumns = 4;  // of a tile: 24 accumulators in 32 registers
constexpr int64_t kChunk = 192;         // rows of one expert that stay in the L2 cache while its weights pass by

typedef float Vec __attribute__((vector_size(kBytes)));
typedef uint32_t Bits __attribute__((vector_size(kBytes)));
struct bfloat16 { uint16_t bits; };

inline float to_float(float value) { return value; }
inline float to_float(bfloat16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline void store(float* to, float value) { *to = value; }
inline void store(bfloat16* to, float value) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = nan ? uint16_t((bits >> 16) | 0x40) : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline Vec load(const void* from) {
  Vec result;
  std::memcpy(&result, from, kBytes);
  return result;
}
inline void multiply_add(Vec& sum, Vec a, Vec b, float) { sum += a * b; }
inline void multiply_add(Vec& sum, Vec a, Vec b, bfloat16) {  // two products a lane
#if defined(MODES_FX_AVX512) && defined(__AVX512BF16__)
  sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  Bits x = (Bits)a, y = (Bits)b;
  sum += (Vec)(x << 16) * (Vec)(y << 16);
  sum += (Vec)(x & 0xffff0000u) * (Vec)(y & 0xffff0000u);
#endif
}

#if defined(MODES_FX_AVX512)
inline void sums(const Vec* v, float* out) {  // of the lanes of four vectors
  auto fold = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
  __m512d ab = (__m512d)fold((__m512)v[0], (__m512)v[1]), cd = (__m512d)fold((__m512)v[2], (__m512)v[3]);
  __m512 all = _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
#endif
template <int COLUMNS>
inline void sums_of(const Vec* v, float* out) {
#if defined(MODES_FX_AVX512)
  if constexpr (COLUMNS == 4) return sums(v, out);
#endif
  for (int j = 0; j < COLUMNS; ++j) {
    out[j] = 0;
    for (int lane = 0; lane < kLanes; ++lane) out[j] += v[j][lane];
  }
}

// ROWS x COLUMNS dot products of length `inner`.
template <typename T, int ROWS, int COLUMNS>
inline void tile(const T* const* rows, const T* weight, int64_t stride, int64_t inner, float (*out)[kColumns]) {
  constexpr int64_t step = kBytes / sizeof(T);
  Vec sum[ROWS][COLUMNS] = {};
  int64_t d = 0;
  for (; d + step <= inner; d += step) {
    Vec columns[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) {
      columns[j] = load(weight + j * stride + d);
      // Of a tile to come: each row of weights may lie in a page of its own, where the hardware does not look ahead.
      __builtin_prefetch(weight + (j + 2 * COLUMNS) * stride + d, 0, 2);
    }
    for (int i = 0; i < ROWS; ++i) {
      Vec row = load(rows[i] + d);
      for (int j = 0; j < COLUMNS; ++j) multiply_add(sum[i][j], row, columns[j], T{});
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    sums_of<COLUMNS>(sum[i], out[i]);
    for (int64_t rest = d; rest < inner; ++rest)
      for (int j = 0; j < COLUMNS; ++j) out[i][j] += to_float(rows[i][rest]) * to_float(weight[j * stride + rest]);
  }
}

template <typename T, int COLUMNS>
inline void tile_of(int count, const T* const* rows, const T* weight, int64_t stride, int64_t inner, float (*out)[kColumns]) {
  switch (count) {
    case 1: return tile<T, 1, COLUMNS>(rows, weight, stride, inner, out);
    case 2: return tile<T, 2, COLUMNS>(rows, weight, stride, inner, out);
    case 3: return tile<T, 3, COLUMNS>(rows, weight, stride, inner, out);
    case 4: return tile<T, 4, COLUMNS>(rows, weight, stride, inner, out);
    case 5: return tile<T, 5, COLUMNS>(rows, weight, stride, inner, out);
    default: return tile<T, 6, COLUMNS>(rows, weight, stride, inner, out);
  }
}

template <typename T>
struct Experts {
  const T* weight;
  int64_t expert_stride, column_stride, experts, columns, inner;
  const int64_t* offsets;  // [E + 1], of each expert's rows

  // Call take(r, n, values, count) for the products of row r with columns n, n + 1, ...
  template <typename Take>
  void run(int64_t begin, int64_t end, const T* const* rows, const Take& take) const {
    float out[kRows][kColumns];
    for (int64_t e = 0; e < experts; ++e) {
      for (int64_t first = offsets[e]; first < offsets[e + 1]; first += kChunk) {
        int64_t count = std::min(offsets[e + 1] - first, kChunk), blocks = (count + kRows - 1) / kRows;
        for (int64_t n = begin; n < end;) {
          int width = end - n >= kColumns ? kColumns : 1;
          const T* column = weight + e * expert_stride + n * column_stride;
          for (int64_t block = 0; block < blocks; ++block) {  // of nearly equal height
            int64_t low = first + count * block / blocks, high = first + count * (block + 1) / blocks;
            int height = int(high - low);
            if (width == kColumns) tile_of<T, kColumns>(height, rows + low, column, column_stride, inner, out);
            else tile_of<T, 1>(height, rows + low, column, column_stride, inner, out);
            for (int i = 0; i < height; ++i) take(low + i, n, out[i], width);
          }
          n += width;
        }
      }
    }
  }

  template <typename Take>
  void share(int threads, const T* const* rows, const Take& take) const {
    int64_t tiles = (columns + kColumns - 1) / kColumns;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; ++part)
      run(std::min(columns, tiles * part / threads * kColumns), std::min(columns, tiles * (part + 1) / threads * kColumns),
          rows, take);
  }
};

template <typename T>
void linear(const T* x, int64_t x_stride, const int64_t* pairs, int64_t top_k, Experts<T> experts, T* out, int threads) {
  std::vector<const T*> rows(experts.offsets[experts.experts]);
  for (size_t r = 0; r < rows.size(); ++r) rows[r] = x + (pairs ? pairs[r] / top_k : int64_t(r)) * x_stride;
  experts.share(threads, rows.data(), [=](int64_t r, int64_t n, const float* values, int count) {
    for (int j = 0; j < count; ++j) store(out + r * experts.columns + n + j, values[j]);
  });
}

template <typename T>
void combine(const T* x, int64_t x_stride, const int64_t* pairs, int64_t top_k, const float* weights, Experts<T> experts,
             float* out, int threads) {
  std::vector<const T*> rows(experts.offsets[experts.experts]);
  std::vector<float*> tokens(rows.size());
  for (size_t r = 0; r < rows.size(); ++r) {
    rows[r] = x + r * x_stride;
    tokens[r] = out + pairs[r] / top_k * experts.columns;
  }
  experts.share(threads, rows.data(), [=, tokens = tokens.data()](int64_t r, int64_t n, const float* values, int count) {
    for (int j = 0; j < count; ++j) tokens[r][n + j] += weights[r] * values[j];
  });
}

}  // namespace

#define MODES_FX_EXPORT extern "C" __attribute__((visibility("default")))
#define MODES_FX_FOR(NAME, T)                                                                                                    \
  MODES_FX_EXPORT void modes_fx_linear_##NAME(const T* x, int64_t x_stride, const int64_t* pairs, int64_t top_k, const T* weight, \
      int64_t expert_stride, int64_t column_stride, const int64_t* offsets, int64_t experts, int64_t columns, int64_t inner,     \
      T* out, int threads) {                                                                                                     \
    linear<T>(x, x_stride, pairs, top_k, {weight, expert_stride, column_stride, experts, columns, inner, offsets}, out, threads); \
  }                                                                                                                              \
  MODES_FX_EXPORT void modes_fx_combine_##NAME(const T* x, int64_t x_stride, const int64_t* pairs, int64_t top_k,                \
      const float* weights, const T* weight, int64_t expert_stride, int64_t column_stride, const int64_t* offsets,               \
      int64_t experts, int64_t columns, int64_t inner, float* out, int threads) {                                                \
    combine<T>(x, x_stride, pairs, top_k, weights,                                                                               \
               {weight, expert_stride, column_stride, experts, columns, inner, offsets}, out, threads);                          \
  }
MODES_FX_FOR(float32, float)
MODES_FX_FOR(bfloat16, bfloat16)

// Sort kept pairs by expert, in their own order within an expert; return how many there are, or -1 if some has no expert in
// [0, experts). `offsets`: [E + 1].
MODES_FX_EXPORT int64_t modes_fx_sort_pairs(const bool* keep, const int64_t* expert_ids, int64_t total, int64_t experts,
                                            int64_t* pairs, int64_t* offsets) {
  std::fill(offsets, offsets + experts + 1, 0);
  for (int64_t pair = 0; pair < total; ++pair) {
    if (!keep[pair]) continue;
    if (uint64_t(expert_ids[pair]) >= uint64_t(experts)) return -1;
    ++offsets[expert_ids[pair] + 1];
  }
  for (int64_t e = 0; e < experts; ++e) offsets[e + 1] += offsets[e];
  for (int64_t pair = 0; pair < total; ++pair)
    if (keep[pair]) pairs[offsets[expert_ids[pair]]++] = pair;
  std::copy_backward(offsets, offsets + experts, offsets + experts + 1);  // each has moved to its expert's end
  offsets[0] = 0;
  return offsets[experts];
}
