// GEMMs of experts over the rows of their kept pairs. Shapes: T tokens, K experts a token, E experts, R rows (kept pairs in
// expert order), D inner, N outer size. Weights [E, N, D] are read as they lie in memory, each once for all rows of its expert.
//
// Both operands run along D, so a tile of ROWS x COLUMNS dot products needs no packed weights, nor do matrix units; rows are
// copied, a chunk at a time. Threads share the columns of every expert evenly, whatever the routing, and none writes where
// another does.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "matrix_units.h"

namespace {

using at::BFloat16;
using at::Tensor;

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
constexpr int64_t kChunk = 96;             // rows of one expert that stay in the L2 cache while its weights pass by
constexpr int64_t kChunkOfUnits = 128;     // the same of matrix units
constexpr int64_t kBytesAhead = 16 * 4096;

typedef float Vec __attribute__((vector_size(kBytes)));
typedef uint32_t Bits __attribute__((vector_size(kBytes)));

inline Vec load(const void* from) {
  Vec result;
  std::memcpy(&result, from, kBytes);
  return result;
}
inline void multiply_add(Vec& sum, Vec a, Vec b, float) {
#if defined(MODES_FX_AVX512)
  sum = (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
  sum = (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  sum += a * b;
#endif
}
inline void multiply_add(Vec& sum, Vec a, Vec b, BFloat16) {  // two products a lane
#if defined(MODES_FX_AVX512) && defined(__AVX512BF16__)
  sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  Bits x = (Bits)a, y = (Bits)b;
  multiply_add(sum, (Vec)(x << 16), (Vec)(y << 16), float{});
  multiply_add(sum, (Vec)(x & 0xffff0000u), (Vec)(y & 0xffff0000u), float{});
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
#else
inline void sums(const Vec* v, float* out) {
  for (int j = 0; j < kColumns; ++j) {
    out[j] = 0;
    for (int lane = 0; lane < kLanes; ++lane) out[j] += v[j][lane];
  }
}
#endif

// ROWS x COLUMNS dot products of length `inner`: of four columns side by side, which share the loads of a row; or of one, so
// that memory is read from one end to the other. Either adds up in the same order.
template <typename T, int ROWS, int COLUMNS>
inline void tile(const T* rows, int64_t pitch, const T* weight, int64_t stride, int64_t inner, float (*out)[kColumns]) {
  constexpr int64_t step = kBytes / sizeof(T);
  const T* ahead = weight + 2 * COLUMNS * stride;  // a tile to come
  Vec sum[ROWS][kColumns] = {};
  int64_t d = 0;
  // The hardware looks ahead within a page alone; so that the address of a page to come is known by then:
  if (COLUMNS == 1) __builtin_prefetch(reinterpret_cast<const char*>(weight) + kBytesAhead, 0, 2);
  for (; d + step <= inner; d += step) {
    Vec columns[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) {
      if (COLUMNS > 1) __builtin_prefetch(ahead + COLUMNS * d + j * step, 0, 2);
      columns[j] = load(weight + j * stride + d);
    }
    for (int i = 0; i < ROWS; ++i) {
      Vec row = load(rows + i * pitch + d);
      for (int j = 0; j < COLUMNS; ++j) multiply_add(sum[i][j], row, columns[j], T{});
    }
  }
  for (int i = 0; i < ROWS; ++i) sums(sum[i], out[i]);
  for (; d < inner; ++d)
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < COLUMNS; ++j) out[i][j] += float(rows[i * pitch + d]) * float(weight[j * stride + d]);
}

template <typename T>
struct Experts {
  const T* weight;
  int64_t expert_stride, column_stride, experts, columns, inner;
  const int64_t* offsets;  // [E + 1], of each expert's rows
  bool on_units;           // see matrix_units.h

  // Multiply rows, of which row_of(r) is the start, with columns begin to end.
  template <typename RowOf, typename To>
  void run(int64_t begin, int64_t end, const RowOf& row_of, const To& to) const {
#if defined(MODES_FX_MATRIX_UNITS)
    if constexpr (std::is_same_v<T, BFloat16>)
      if (on_units) return run_on_units(begin, end, row_of, to);
#endif
    int64_t pitch = inner + kBytes / sizeof(T);  // no power of 2, at which rows would drive each other out of the caches
    std::unique_ptr<T[]> rows(new T[pitch * std::min(offsets[experts], kChunk)]);
    for (int64_t e = 0; e < experts; ++e) {
      int64_t total = offsets[e + 1] - offsets[e], chunks = (total + kChunk - 1) / kChunk;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {  // of nearly equal height, as the blocks below
        int64_t first = offsets[e] + total * chunk / chunks, count = offsets[e] + total * (chunk + 1) / chunks - first;
        for (int64_t i = 0; i < count; ++i) std::memcpy(&rows[i * pitch], row_of(first + i), inner * sizeof(T));
        int64_t blocks = (count + kRows - 1) / kRows;
        int64_t width = blocks == 1 ? end - begin : kColumns;  // that all blocks share while it is in the L1 cache
        for (int64_t n = begin; n < end; n += width) {
          for (int64_t block = 0; block < blocks; ++block) {
            int64_t low = count * block / blocks, high = count * (block + 1) / blocks;
            strip(int(high - low), e, &rows[low * pitch], pitch, first + low, n, std::min(n + width, end), to);
          }
        }
      }
    }
  }

#if defined(MODES_FX_MATRIX_UNITS)
  template <typename RowOf, typename To>
  void run_on_units(int64_t begin, int64_t end, const RowOf& row_of, const To& to) const {
    using namespace matrix_units;
    InUse units;
    int64_t most = std::min((offsets[experts] + kSide - 1) / kSide * kSide, kChunkOfUnits);
    std::unique_ptr<T, decltype(&std::free)> rows(static_cast<T*>(std::aligned_alloc(64, most * inner * sizeof(T))), std::free);
    for (int64_t e = 0; e < experts; ++e) {
      int64_t total = offsets[e + 1] - offsets[e], chunks = (total + kChunkOfUnits - 1) / kChunkOfUnits;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        int64_t first = offsets[e] + total * chunk / chunks, count = offsets[e] + total * (chunk + 1) / chunks - first;
        pack(count, inner, [&](int64_t r) { return row_of(first + r); }, rows.get());
        for (int64_t n = begin, width; n < end; n += width) {
          width = std::min(end - n, 2 * kSide);
          const T* strip = weight + e * expert_stride + n * column_stride;
          multiply_strip(strip, column_stride, width, rows.get(), count, inner, first, n, to);
        }
      }
    }
  }
#endif

  template <typename To>
  void strip(int height, int64_t e, const T* rows, int64_t pitch, int64_t r, int64_t n, int64_t end, const To& to) const {
    switch (height) {
      case 1: return strip_of<1>(e, rows, pitch, r, n, end, to);
      case 2: return strip_of<2>(e, rows, pitch, r, n, end, to);
      case 3: return strip_of<3>(e, rows, pitch, r, n, end, to);
      case 4: return strip_of<4>(e, rows, pitch, r, n, end, to);
      case 5: return strip_of<5>(e, rows, pitch, r, n, end, to);
      default: return strip_of<6>(e, rows, pitch, r, n, end, to);
    }
  }

  template <int ROWS, typename To>
  void strip_of(int64_t e, const T* rows, int64_t pitch, int64_t r, int64_t n, int64_t end, const To& to) const {
    constexpr int across = ROWS == 1 ? 1 : kColumns;
    float out[ROWS][kColumns];
    while (n < end) {
      int count = end - n >= across ? across : 1;
      const T* column = weight + e * expert_stride + n * column_stride;
      if (count == across) tile<T, ROWS, across>(rows, pitch, column, column_stride, inner, out);
      else tile<T, ROWS, 1>(rows, pitch, column, column_stride, inner, out);
      for (int i = 0; i < ROWS; ++i) to.put(r + i, n, out[i], count);
      n += count;
    }
  }

  template <typename RowOf, typename To>
  void share(const RowOf& row_of, const To& to) const {
    int threads = at::get_num_threads();
    int64_t side = on_units ? matrix_units::kSide : kColumns, tiles = (columns + side - 1) / side;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; ++part)
      run(std::min(columns, tiles * part / threads * side), std::min(columns, tiles * (part + 1) / threads * side), row_of, to);
  }
};

template <typename T>
bool suits_units(int64_t columns, int64_t inner) {
  return std::is_same_v<T, BFloat16> && matrix_units::fit(columns, inner);
}

template <typename T>
Experts<T> experts_of(const Tensor& weight, const Tensor& offsets) {
  int64_t columns = weight.size(1), inner = weight.size(2);
  return {weight.const_data_ptr<T>(), weight.stride(0), weight.stride(1), weight.size(0), columns, inner,
          offsets.const_data_ptr<int64_t>(), suits_units<T>(columns, inner)};
}

// Where products go: at(r, n) is the place of row r and column n, put(r, n, values, count) leaves those from n on there.
template <typename T>
struct Rows {
  T* out;
  int64_t columns;
  const T* bias;
  T* at(int64_t r, int64_t n) const { return out + r * columns + n; }
  void put(int64_t r, int64_t n, const float* values, int count) const {
    T* to = at(r, n);
    if (bias) {
      for (int j = 0; j < count; ++j) to[j] = T(values[j] + float(bias[n + j]));
      return;
    }
#if defined(MODES_FX_AVX512) && defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, BFloat16>)
      if (count == kLanes) return _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(values)));
#endif
    for (int j = 0; j < count; ++j) to[j] = T(values[j]);
  }
};

struct Totals {
  float* const* tokens;
  const float* weights;
  float* at(int64_t r, int64_t n) const { return tokens[r] + n; }
  void put(int64_t r, int64_t n, const float* __restrict values, int count) const {
    float* __restrict to = at(r, n);
    float weight = weights[r];
    for (int j = 0; j < count; ++j) to[j] += weight * values[j];
  }
};

template <typename T>
void multiply_rows(const Tensor& x, const int64_t* pairs, int64_t top_k, const Experts<T>& experts, T* out,
                   const T* bias = nullptr) {
  const T* from = x.const_data_ptr<T>();
  experts.share([=, stride = x.stride(0)](int64_t r) { return from + (pairs ? pairs[r] / top_k : r) * stride; },
                Rows<T>{out, experts.columns, bias});
}

template <typename T>
void combine_rows(const Tensor& x, const int64_t* pairs, int64_t top_k, const float* weights, const Experts<T>& experts,
                  float* out) {
  const T* from = x.const_data_ptr<T>();
  std::vector<float*> tokens(x.size(0));
  for (size_t r = 0; r < tokens.size(); ++r) tokens[r] = out + pairs[r] / top_k * experts.columns;
  experts.share([=, stride = x.stride(0)](int64_t r) { return from + r * stride; }, Totals{tokens.data(), weights});
}

Tensor along_rows(const Tensor& x) { return x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous(); }

void check(const Tensor& x, const Tensor& rows, const Tensor& weight, const Tensor& offsets) {  // rows: pairs, or x itself
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 3 && x.size(1) == weight.size(2), "x [rows, D] and weight [E, N, D] do not fit");
  TORCH_CHECK(weight.stride(2) == 1 || weight.size(2) == 1, "weight does not lie along its last dimension");
  TORCH_CHECK(offsets.scalar_type() == at::kLong && offsets.numel() == weight.size(0) + 1, "offsets are int64 [E + 1]");
  TORCH_CHECK(offsets.is_contiguous() && offsets.const_data_ptr<int64_t>()[weight.size(0)] == rows.size(0),
              "offsets are of another number of rows");
}

template <typename Run>
void for_dtype(const Tensor& x, const Run& run) {
  if (x.scalar_type() == at::kFloat) return run(float{});
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "experts are computed in float32 and bfloat16, not in ", x.scalar_type());
  run(BFloat16{});
}

std::tuple<Tensor, Tensor> sort_pairs(const Tensor& keep, const Tensor& expert_ids, int64_t num_experts) {
  Tensor kept = keep.contiguous(), ids = expert_ids.to(at::kLong).contiguous();
  Tensor offsets = at::empty({num_experts + 1}, ids.options());
  const bool* is_kept = kept.const_data_ptr<bool>();
  const int64_t* expert = ids.const_data_ptr<int64_t>();
  int64_t* next = offsets.mutable_data_ptr<int64_t>();
  std::fill(next, next + num_experts + 1, 0);
  for (int64_t pair = 0; pair < ids.numel(); ++pair) {
    if (!is_kept[pair]) continue;
    TORCH_CHECK_INDEX(uint64_t(expert[pair]) < uint64_t(num_experts), "A router chose an expert outside of 0 to ",
                      num_experts - 1, ".");
    ++next[expert[pair] + 1];
  }
  for (int64_t e = 0; e < num_experts; ++e) next[e + 1] += next[e];
  Tensor pairs = at::empty({next[num_experts]}, ids.options());
  int64_t* to = pairs.mutable_data_ptr<int64_t>();
  for (int64_t pair = 0; pair < ids.numel(); ++pair)
    if (is_kept[pair]) to[next[expert[pair]]++] = pair;
  std::copy_backward(next, next + num_experts, next + num_experts + 1);  // each has moved to its expert's end
  next[0] = 0;
  return {pairs, offsets};
}

Tensor linear(const Tensor& x, const std::optional<Tensor>& pairs, int64_t top_k, const Tensor& weight, const Tensor& offsets) {
  check(x, pairs ? *pairs : x, weight, offsets);
  int64_t rows = (pairs ? *pairs : x).size(0);
  Tensor given = along_rows(x), out = at::empty({rows, weight.size(1)}, x.options());
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t* pair = pairs ? pairs->const_data_ptr<int64_t>() : nullptr;
    multiply_rows<T>(given, pair, top_k, experts_of<T>(weight, offsets), out.mutable_data_ptr<T>());
  });
  return out;
}

Tensor linear_combine(const Tensor& x, const Tensor& pairs, int64_t top_k, const Tensor& row_weights, const Tensor& weight,
                      const Tensor& offsets, int64_t tokens) {
  check(x, pairs, weight, offsets);
  TORCH_CHECK(x.size(0) == pairs.size(0), "x has ", x.size(0), " rows for ", pairs.size(0), " pairs");
  Tensor out = at::zeros({tokens, weight.size(1)}, x.options().dtype(at::kFloat));
  Tensor given = along_rows(x), weights = row_weights.contiguous();
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    combine_rows<T>(given, pairs.const_data_ptr<int64_t>(), top_k, weights.const_data_ptr<float>(),
                    experts_of<T>(weight, offsets), out.mutable_data_ptr<float>());
  });
  return out;
}

constexpr int64_t kFewRows = 16;  // for more, ATen's product gains on ours: benchmarks/few_rows.py

Tensor dense(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  TORCH_CHECK(weight.dim() == 2 && x.dim() && x.size(-1) == weight.size(1), "x [..., D] and weight [N, D] do not fit");
  TORCH_CHECK(weight.stride(1) == 1 || weight.size(1) == 1, "weight does not lie along its last dimension");
  TORCH_CHECK(!bias || bias->numel() == weight.size(0), "bias is [N]");
  int64_t inner = weight.size(1), columns = weight.size(0), rows = inner ? x.numel() / inner : 0;
  if (rows > kFewRows || !rows) return at::linear(x, weight, bias);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = columns;
  int64_t offsets[] = {0, rows};
  Tensor given = x.reshape({rows, inner}).contiguous(), added = bias ? bias->contiguous() : Tensor();
  Tensor out = at::empty(shape, x.options());
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    bool on_units = suits_units<T>(columns, inner);
    Experts<T> whole{weight.const_data_ptr<T>(), 0, weight.stride(0), 1, columns, inner, offsets, on_units};
    multiply_rows<T>(given, nullptr, 1, whole, out.mutable_data_ptr<T>(), bias ? added.const_data_ptr<T>() : nullptr);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(modes_fx, CPU, library) {
  library.impl("sort_pairs", sort_pairs);
  library.impl("linear", linear);
  library.impl("linear_combine", linear_combine);
  library.impl("dense", dense);
}
