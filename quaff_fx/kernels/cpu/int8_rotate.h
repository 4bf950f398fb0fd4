// Mixing the features of a row by H (x) I, H the orthogonal Hadamard matrix of a power of two: numerics.rotate.
//
// Features that meet lie a multiple of width / block apart, so a butterfly adds vectors of neighbours and shuffles none.
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

static inline void store_some(float* to, int64_t count, vfloat value) {
#if defined(QUAFF_AVX512)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1u), (__m512)value);
#elif defined(QUAFF_AVX2)
  const vint lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  _mm256_maskstore_ps(to, (__m256i)(lanes < vint{} + static_cast<int32_t>(count)), (__m256)value);
#else
  for (int64_t lane = 0; lane < count; lane++) to[lane] = value[lane];
#endif
}

// One butterfly of `ways` (2 or 4) pieces of `length` values each, scaled.
template <int ways>
static inline void butterfly(float* piece, int64_t length, float factor) {
  for (int64_t i = 0; i < length; i += kLanes) {
    const int64_t count = length - i;
    const bool is_whole = count >= kLanes;
    vfloat x[ways];
    for (int w = 0; w < ways; w++) {
      float* const from = piece + w * length + i;
      x[w] = is_whole ? load<vfloat>(from) : load_some(from, count);
      if (factor != 1.0f) {
        x[w] *= factor;
        QUAFF_ROUNDED(x[w]);
      }
    }
    for (int step = 1; step < ways; step *= 2) {
      for (int w = 0; w < ways; w++) {
        if (w & step) continue;
        const vfloat sum = x[w] + x[w + step], difference = x[w] - x[w + step];
        x[w] = sum;
        x[w + step] = difference;
      }
    }
    for (int w = 0; w < ways; w++) {
      float* const to = piece + w * length + i;
      if (is_whole) {
        store(to, x[w]);
      } else {
        store_some(to, count, x[w]);
      }
    }
  }
}

template <int ways>
static inline void butterflies(float* row, int64_t width, int64_t length, float factor) {
  for (int64_t start = 0; start < width; start += ways * length) butterfly<ways>(row + start, length, factor);
}

// Rotates a row in place; `block` is a power of two that divides its width.
static void rotate_row(float* row, int64_t width, int block) {
  float factor = static_cast<float>(1.0 / __builtin_sqrt(block));  // once, in the first pass
  int64_t length = width / block;
  int left = block;
  for (; left >= 4; left /= 4, length *= 4, factor = 1.0f) butterflies<4>(row, width, length, factor);
  if (left == 2) butterflies<2>(row, width, length, factor);
}

// Rotates a row in place and stores it at `to` as `kind`, unless it is there already.
static void rotate_row_to(float* row, int64_t width, int block, void* to, int kind) {
  rotate_row(row, width, block);
  if (row == to) return;
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store_kind(to, kind, i, load<vfloat>(row + i));
  if (whole < width) {
    char edge[kLanes * sizeof(float)];  // the compiler does not know that the kind is a narrow one
    store_kind(edge, kind, 0, load_some(row + whole, width - whole));
    std::memcpy(static_cast<uint16_t*>(to) + whole, edge, (width - whole) * sizeof(uint16_t));
  }
}

}  // namespace quaff
