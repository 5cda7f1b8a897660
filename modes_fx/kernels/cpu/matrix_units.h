// Products of rows with weights as they lie in memory, on the CPU's matrix units (AMX). These multiply two tiles of bfloat16,
// A [16, 32] and B [32, 16], into one of float32; of B they want pairs of rows side by side, [16, 16, 2].
//
// Weights [N, D] are A as they are, a tile 16 of their rows. It is the rows [R, D] to be multiplied, which are few, that are
// turned into B as they are copied, not the weights, which are many: so nothing has to be packed beforehand. The product is
// [N, R], and is turned back as it is put where it belongs.

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define MODES_FX_MATRIX_UNITS
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace matrix_units {

using at::BFloat16;
constexpr int64_t kSide = 16, kInner = 32;

#if !defined(MODES_FX_MATRIX_UNITS)
inline bool available() { return false; }
#else
inline bool available() {  // Linux hands out the units' registers to a process that asks: XFEATURE_XTILEDATA
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

struct alignas(64) Shapes {  // what _tile_loadconfig reads: palette 1, eight tiles of 16 rows of 64 bytes
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const Shapes kShapes;  // not a local: gcc 12 drops stores to one before it is read

struct InUse {
  InUse() { _tile_loadconfig(&kShapes); }
  ~InUse() { _tile_release(); }
};

inline void turn(__m512i* v) {  // 16 x 16 of 32 bits
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
  }
}

// Make rows tiles: of each 16 [D / 32, 16, 16, 2], the missing ones 0.
template <typename RowOf>
void pack(int64_t count, int64_t inner, const RowOf& row_of, BFloat16* to) {
  for (int64_t low = 0; low < count; low += kSide, to += kSide * inner) {
    const BFloat16* from[kSide];
    int rows = int(std::min(kSide, count - low));
    for (int i = 0; i < rows; ++i) from[i] = row_of(low + i);
    for (int64_t d = 0; d < inner; d += kInner) {
      __m512i v[kSide];
      for (int i = 0; i < kSide; ++i) v[i] = i < rows ? _mm512_loadu_si512(from[i] + d) : _mm512_setzero_si512();
      turn(v);
      for (int i = 0; i < kSide; ++i) _mm512_store_si512(to + d * kSide + i * kInner, v[i]);
    }
  }
}

// COLUMNS x ROWS tiles of products, float32 [16 * COLUMNS, 16 * ROWS]. Asking for weights ahead slows it: the hardware does.
template <int COLUMNS, int ROWS>
void multiply(const BFloat16* weight, int64_t stride, const BFloat16* rows, int64_t inner, float* out) {
  constexpr int pitch = ROWS * kSide, below = kSide * pitch;
  const BFloat16 *more_weight = weight + kSide * stride, *more_rows = rows + kSide * inner;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t d = 0; d < inner; d += kInner) {
    _tile_loadd(6, rows + d * kSide, 64);
    _tile_loadd(4, weight + d, 2 * stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (ROWS == 2) {
      _tile_loadd(7, more_rows + d * kSide, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (COLUMNS == 2) {
      _tile_loadd(5, more_weight + d, 2 * stride);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (ROWS == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, 4 * pitch);
  if constexpr (ROWS == 2) _tile_stored(1, out + kSide, 4 * pitch);
  if constexpr (COLUMNS == 2) _tile_stored(2, out + below, 4 * pitch);
  if constexpr (COLUMNS == 2 && ROWS == 2) _tile_stored(3, out + below + kSide, 4 * pitch);
}

// Multiply `count` packed rows with 16 or 32 columns of weights, and put the products where row `r` and column `n` begin.
template <typename To>
void multiply_strip(const BFloat16* weight, int64_t stride, int64_t width, const BFloat16* rows, int64_t count, int64_t inner,
                    int64_t r, int64_t n, const To& to) {
  alignas(64) float out[2 * kSide * 2 * kSide], turned[kSide * kSide];
  for (int64_t low = 0; low < count; low += 2 * kSide) {
    int64_t high = std::min(count, low + 2 * kSide), pitch = high - low > kSide ? 2 * kSide : kSide;
    auto product = width > kSide ? (pitch > kSide ? multiply<2, 2> : multiply<2, 1>)
                                 : (pitch > kSide ? multiply<1, 2> : multiply<1, 1>);
    for (int64_t i = low; i < high; ++i)
      for (int64_t c = 0; c < width; c += kSide) __builtin_prefetch(to.at(r + i, n + c), 1);
    product(weight, stride, rows + low * inner, inner, out);
    for (int64_t c = 0; c < width; c += kSide) {
      for (int64_t block = low; block < high; block += kSide) {
        __m512i v[kSide];
        for (int i = 0; i < kSide; ++i) v[i] = _mm512_load_si512(out + (c + i) * pitch + block - low);
        turn(v);
        for (int i = 0; i < kSide; ++i) _mm512_store_si512(turned + i * kSide, v[i]);
        for (int64_t i = block; i < std::min(high, block + kSide); ++i)
          to.put(r + i, n + c, turned + (i - block) * kSide, int(kSide));
      }
    }
  }
}

#endif

inline bool fit(int64_t columns, int64_t inner) { return columns % kSide == 0 && inner % kInner == 0 && available(); }

}  // namespace matrix_units
