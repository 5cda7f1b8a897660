// As in experts.cpp, over weights packed for oneDNN's matrix kernels, which use the CPU's matrix units (AMX) or bfloat16 dot
// products: [E, N / 32, D / 2, 32, 2], that is, for 32 columns at a time, pairs of consecutive values of D.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
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
  void share(const RowOf& row_of, const Take& take) const {
    int threads = at::get_num_threads();
    int64_t tiles = columns / kColumns;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; ++part)
      run(tiles * part / threads * kColumns, tiles * (part + 1) / threads * kColumns, row_of, take);
  }
};

Experts experts_of(const Tensor& x, const Tensor& blocks, const Tensor& offsets) {
  TORCH_CHECK(x.dim() == 2 && blocks.dim() == 5 && x.size(1) == 2 * blocks.size(2), "x [rows, D] and blocks do not fit");
  TORCH_CHECK(blocks.is_contiguous() && blocks.size(3) == kColumns && blocks.size(4) == 2, "blocks are [E, N / 32, D / 2, 32, 2]");
  TORCH_CHECK(offsets.scalar_type() == at::kLong && offsets.numel() == blocks.size(0) + 1, "offsets are int64 [E + 1]");
  return {blocks.const_data_ptr<BFloat16>(), blocks.size(0), blocks.size(1) * kColumns, 2 * blocks.size(2),
          offsets.const_data_ptr<int64_t>()};
}

Tensor along_rows(const Tensor& x) { return x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous(); }

Tensor linear_packed(const Tensor& x, const std::optional<Tensor>& pairs, int64_t top_k, const Tensor& blocks,
                     const Tensor& offsets) {
  Experts experts = experts_of(x, blocks, offsets);
  int64_t columns = experts.columns;
  Tensor given = along_rows(x), out = at::empty({(pairs ? *pairs : x).size(0), columns}, x.options());
  const BFloat16* from = given.const_data_ptr<BFloat16>();
  const int64_t* pair = pairs ? pairs->const_data_ptr<int64_t>() : nullptr;
  BFloat16* rows = out.mutable_data_ptr<BFloat16>();
  experts.share([=, stride = given.stride(0)](int64_t r) { return from + (pair ? pair[r] / top_k : r) * stride; },
                [=](int64_t r, int64_t n, const float* values) {
                  BFloat16* to = rows + r * columns + n;
                  for (int64_t j = 0; j < kColumns; ++j) to[j] = values[j];
                });
  return out;
}

Tensor linear_combine_packed(const Tensor& x, const Tensor& pairs, int64_t top_k, const Tensor& row_weights,
                             const Tensor& blocks, const Tensor& offsets, int64_t tokens) {
  Experts experts = experts_of(x, blocks, offsets);
  int64_t columns = experts.columns;
  Tensor given = along_rows(x), scales = row_weights.contiguous();
  Tensor out = at::zeros({tokens, columns}, x.options().dtype(at::kFloat));
  const BFloat16* from = given.const_data_ptr<BFloat16>();
  const float* weights = scales.const_data_ptr<float>();
  const int64_t* pair = pairs.const_data_ptr<int64_t>();
  float* totals = out.mutable_data_ptr<float>();
  experts.share([=, stride = given.stride(0)](int64_t r) { return from + r * stride; },
                [=](int64_t r, int64_t n, const float* values) {
                  float* token = totals + pair[r] / top_k * columns + n;
                  for (int64_t j = 0; j < kColumns; ++j) token[j] += weights[r] * values[j];
                });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(modes_fx, CPU, library) {
  library.impl("linear_packed", linear_packed);
  library.impl("linear_combine_packed", linear_combine_packed);
}
