// As in experts.cpp, over weights packed for oneDNN's matrix kernels, which use the CPU's matrix units (AMX) or bfloat16 dot
// products: [E, N / 32, D / 2, 32, 2], that is, for 32 columns at a time, pairs of consecutive values of D.

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using at::BFloat16;
constexpr int64_t kColumns = 32, kRows = 64;

struct Experts {
  const BFloat16* weight;
  int64_t experts, columns, inner;
  const int64_t* offsets;  // [E + 1], of each expert's rows

  // Call row_of(r) for the start of row r, and take(r, n, values) for its products with columns n to n + 31.
  template <typename RowOf, typename Take>
  void run(int64_t begin, int64_t end, const RowOf& row_of, const Take& take) const {
    std::vector<BFloat16> rows(kRows * inner);
    alignas(64) float out[kRows * kColumns];
    for (int64_t e = 0; e < experts; ++e) {
      int64_t total = offsets[e + 1] - offsets[e], chunks = (total + kRows - 1) / kRows;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {  // of nearly equal height
        int64_t first = offsets[e] + total * chunk / chunks, count = offsets[e] + total * (chunk + 1) / chunks - first;
        for (int64_t i = 0; i < count; ++i) std::memcpy(&rows[i * inner], row_of(first + i), inner * sizeof(BFloat16));
        for (int64_t n = begin; n < end; n += kColumns) {
          at::native::cpublas::brgemm(count, kColumns, inner, inner, kColumns, kColumns, false, rows.data(),
                                      weight + (e * columns + n) * inner, out, true);
          for (int64_t i = 0; i < count; ++i) take(first + i, n, out + i * kColumns);
        }
      }
    }
    at::native::cpublas::brgemm_release(true);
  }

  template <typename RowOf, typename Take>
  void share(int threads, const RowOf& row_of, const Take& take) const {
    int64_t tiles = columns / kColumns;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; ++part)
      run(tiles * part / threads * kColumns, tiles * (part + 1) / threads * kColumns, row_of, take);
  }
};

}  // namespace

#define MODES_FX_EXPORT extern "C" __attribute__((visibility("default")))

MODES_FX_EXPORT void modes_fx_linear_packed(const BFloat16* x, int64_t x_stride, const int64_t* pairs, int64_t top_k,
                                            const BFloat16* weight, const int64_t* offsets, int64_t experts, int64_t columns,
                                            int64_t inner, BFloat16* out, int threads) {
  Experts{weight, experts, columns, inner, offsets}.share(
      threads, [=](int64_t r) { return x + (pairs ? pairs[r] / top_k : r) * x_stride; },
      [=](int64_t r, int64_t n, const float* values) {
        BFloat16* to = out + r * columns + n;
        for (int64_t j = 0; j < kColumns; ++j) to[j] = values[j];
      });
}

MODES_FX_EXPORT void modes_fx_combine_packed(const BFloat16* x, int64_t x_stride, const int64_t* pairs, int64_t top_k,
                                             const float* weights, const BFloat16* weight, const int64_t* offsets,
                                             int64_t experts, int64_t columns, int64_t inner, float* out, int threads) {
  Experts{weight, experts, columns, inner, offsets}.share(
      threads, [=](int64_t r) { return x + r * x_stride; },
      [=](int64_t r, int64_t n, const float* values) {
        float* token = out + pairs[r] / top_k * columns + n;
        for (int64_t j = 0; j < kColumns; ++j) token[j] += weights[r] * values[j];
      });
}
