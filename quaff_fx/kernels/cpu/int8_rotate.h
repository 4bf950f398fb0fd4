// Multiplying each block of neighbours in a row by H, the orthogonal Hadamard matrix of a power of two: numerics.rotate.
//
// H is a butterfly for each bit of the index. The lowest bits pair lanes of one vector, the others whole vectors. Bits
// are taken from the lowest on, as numerics.rotate does, so sums come out bit for bit the same.
#pragma once

#include "int8_isa.h"

namespace quaff {

// The first `count` lanes, at most kLanes; the others are zero, and are not stored.
static inline vfloat load_some(const float* from, int64_t count) {
#if defined(QUAFF_AVX512)
  return (vfloat)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), from);
#elif defined(QUAFF_AVX2)
  const vint lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  return (vfloat)_mm256_maskload_ps(from, (__m256i)(lanes < vint{} + static_cast<int32_t>(count)));
#else
  vfloat value = {};
  for (int64_t lane = 0; lane < count; lane++) value[lane] = from[lane];
  return value;
#endif
}

static inline void store_some(void* to, int kind, int64_t index, int64_t count, vfloat value) {
  char lanes[sizeof(vfloat)];
  store_kind(lanes, kind, 0, value);
  const int64_t size = kind == kFloat32 ? 4 : 2;
  std::memcpy(static_cast<char*>(to) + index * size, lanes, count * size);
}

// Lane i of the result is lane i ^ stride of x.
template <int stride>
static inline vfloat exchanged(vfloat x) {
#if defined(QUAFF_AVX512)
  if constexpr (stride == 1) return (vfloat)_mm512_permute_ps((__m512)x, 0xb1);
  if constexpr (stride == 2) return (vfloat)_mm512_permute_ps((__m512)x, 0x4e);
  if constexpr (stride == 4) return (vfloat)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xb1);
  if constexpr (stride == 8) return (vfloat)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x4e);
#elif defined(QUAFF_AVX2)
  if constexpr (stride == 1) return (vfloat)_mm256_permute_ps((__m256)x, 0xb1);
  if constexpr (stride == 2) return (vfloat)_mm256_permute_ps((__m256)x, 0x4e);
  if constexpr (stride == 4) return (vfloat)_mm256_permute2f128_ps((__m256)x, (__m256)x, 1);
#else
  static_assert(kLanes == 4, "a wider vector needs its own exchanges");
  if constexpr (stride == 1) return vfloat{x[1], x[0], x[3], x[2]};
  if constexpr (stride == 2) return vfloat{x[2], x[3], x[0], x[1]};
#endif
}

// -1 in the lanes that are the second of a pair, 1 in the first.
template <int stride>
struct Signs {
  float lanes[kLanes] = {};
  constexpr Signs() {
    for (int lane = 0; lane < kLanes; lane++) lanes[lane] = lane & stride ? -1.0f : 1.0f;
  }
};

template <int stride>
static constexpr Signs<stride> kSigns{};

// The butterflies of strides below `block` that pair lanes: first + second, first - second. A product with a sign is
// exact, so it may be fused with the sum.
template <int block, int stride = 1>
static inline __attribute__((always_inline)) vfloat rotate_lanes(vfloat x) {
  if constexpr (stride < block && stride < kLanes) {
    return rotate_lanes<block, 2 * stride>(x * load<vfloat>(kSigns<stride>.lanes) + exchanged<stride>(x));
  } else {
    return x;
  }
}

// The butterflies that pair vectors.
template <int vectors>
static inline __attribute__((always_inline)) void rotate_vectors(vfloat (&x)[vectors]) {
  for (int step = 1; step < vectors; step *= 2) {
    for (int v = 0; v < vectors; v++) {
      if (v & step) continue;
      const vfloat sum = x[v] + x[v + step], difference = x[v] - x[v + step];
      x[v] = sum;
      x[v + step] = difference;
    }
  }
}

constexpr int kPiece = 64;  // values of a row that are rotated in registers

// Rotates each `block` of a row, at most kPiece, with one reading and one writing; stores it at `to` as `kind`.
template <int block>
static void rotate_pieces(const float* row, int64_t width, float factor, void* to, int kind) {
  constexpr int vectors = block > kLanes ? block / kLanes : 1;
  for (int64_t i = 0; i < width; i += vectors * kLanes) {
    const int64_t count = width - i;
    const bool is_whole = vectors > 1 || count >= kLanes;
    vfloat x[vectors];
    for (int v = 0; v < vectors; v++) {
      x[v] = is_whole ? load<vfloat>(row + i + v * kLanes) : load_some(row + i, count);
      x[v] *= factor;
      QUAFF_ROUNDED(x[v]);
      x[v] = rotate_lanes<block>(x[v]);
    }
    rotate_vectors<vectors>(x);
    for (int v = 0; v < vectors; v++) {
      if (is_whole) {
        store_kind(to, kind, i + v * kLanes, x[v]);
      } else {
        store_some(to, kind, i, count, x[v]);
      }
    }
  }
}

typedef void (*RotatePieces)(const float*, int64_t, float, void*, int);

// rotate_pieces_of(block): rotate_pieces for a power of two up to kPiece; 1 copies.
template <int block = kPiece>
static RotatePieces rotate_pieces_of(int wanted) {
  if constexpr (block > 1) {
    if (wanted < block) return rotate_pieces_of<block / 2>(wanted);
  }
  return rotate_pieces<block>;
}

// The butterflies of strides `length` to `ways` * `length` / 2, whole vectors apart.
template <int ways>
static void rotate_far(float* row, int64_t width, int64_t length) {
  for (int64_t start = 0; start < width; start += ways * length) {
    for (int64_t i = start; i < start + length; i += kLanes) {
      vfloat x[ways];
      for (int w = 0; w < ways; w++) x[w] = load<vfloat>(row + i + w * length);
      rotate_vectors<ways>(x);
      for (int w = 0; w < ways; w++) store(row + i + w * length, x[w]);
    }
  }
}

// Rotates a row in place and stores it at `to` as `kind`; `to` may be the row. `block` is a power of two that divides
// its width.
static void rotate_row_to(float* row, int64_t width, int block, void* to, int kind) {
  const float factor = static_cast<float>(1.0 / __builtin_sqrt(block));
  if (block <= kPiece) return rotate_pieces_of(block)(row, width, factor, to, kind);
  rotate_pieces<kPiece>(row, width, factor, row, kFloat32);
  int64_t length = kPiece;
  for (; length * 4 <= block; length *= 4) rotate_far<4>(row, width, length);
  if (length < block) rotate_far<2>(row, width, length);
  if (row == to) return;
  for (int64_t i = 0; i < width; i += kLanes) store_kind(to, kind, i, load<vfloat>(row + i));
}

static void rotate_row(float* row, int64_t width, int block) { rotate_row_to(row, width, block, row, kFloat32); }

}  // namespace quaff
