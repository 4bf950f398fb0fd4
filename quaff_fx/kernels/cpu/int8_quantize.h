// Quantizing rows: one scale per token, int8 values, and the thin outlier operand of the correction.
#pragma once

#include "int8_isa.h"
#include "int8_rotate.h"

namespace quaff {

// Rows to quantize. Width is the number of columns; rows are row_stride values apart and of `kind`.
struct Rows {
  const void* x;
  int kind;
  int64_t width, row_stride;
  const int64_t* channels;  // (outliers,) columns that are divided by smoothing
  const float* smoothing;   // (outliers,)
  int64_t outliers;
  int limit;     // largest absolute value of the result
  int rotation;  // block of rotate_row, 1 for none
};

// Narrows four vectors of small integers to bytes.
static inline void store_int8(int8_t* to, const vint (&values)[4]) {
#if defined(QUAFF_AVX512)
  for (int i = 0; i < 4; i++) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * i), _mm512_cvtepi32_epi8((__m512i)values[i]));
  }
#elif defined(QUAFF_AVX2)
  const __m256i low = _mm256_packs_epi32((__m256i)values[0], (__m256i)values[1]);
  const __m256i high = _mm256_packs_epi32((__m256i)values[2], (__m256i)values[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
#else
  typedef int8_t vsmall __attribute__((vector_size(kLanes)));
  for (int i = 0; i < 4; i++) store(to + i * kLanes, __builtin_convertvector(values[i], vsmall));
#endif
}

// round(x * inverse), half to even, within +-limit.
static inline vint quantize_vector(vfloat x, float inverse, int limit) {
  vfloat quotient = x * inverse;
  QUAFF_ROUNDED(quotient);
  // Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the sum.
  vint value = (vint)(quotient + 12582912.0f) - 0x4b400000;
  const vint most = vint{} + limit;
  value = value < most ? value : most;
  return value > -most ? value : -most;
}

static inline float load_one(const void* from, int kind, int64_t index) {
  char value[kLanes * 4] = {};  // a vector of which only the first lane counts
  const int size = kind == kFloat32 ? 4 : 2;
  std::memcpy(value, static_cast<const char*>(from) + index * size, size);
  return load_kind(value, kind, 0)[0];
}

// Quantizes one row. `row` is scratch of width rounded up to 4 * kLanes floats.
static void quantize_row(const Rows& rows, int64_t token, float* row, int8_t* x_int8, float* x_scale,
                         float* x_outlier) {
  const int64_t width = rows.width, whole = width / kLanes * kLanes;
  const int64_t padded = (width + 4 * kLanes - 1) / (4 * kLanes) * (4 * kLanes);
  const int size = rows.kind == kFloat32 ? 4 : 2;
  const void* const x = static_cast<const char*>(rows.x) + token * rows.row_stride * size;
  for (int64_t i = 0; i < whole; i += kLanes) store(row + i, load_kind(x, rows.kind, i));
  for (int64_t i = whole; i < padded; i++) row[i] = i < width ? load_one(x, rows.kind, i) : 0.0f;
  for (int64_t o = 0; o < rows.outliers; o++) {
    const float value = load_one(x, rows.kind, rows.channels[o]);
    const float inverse = 1.0f / rows.smoothing[o];  // 0 for a channel that leaves the int8 product (s infinite)
    row[rows.channels[o]] = value * inverse;
    x_outlier[token * rows.outliers + o] = value * (1.0f - inverse);
  }
  if (rows.rotation > 1) rotate_row(row, width, rows.rotation);

  // As integers, absolute values order like floats, with infinity and NaN on top.
  vint largest[4] = {};
  for (int64_t i = 0; i < padded; i += 4 * kLanes) {
    for (int v = 0; v < 4; v++) {
      const vint bits = load<vint>(row + i + v * kLanes) & 0x7fffffff;
      largest[v] = largest[v] > bits ? largest[v] : bits;
    }
  }
  int32_t top = 0;
  for (int v = 0; v < 4; v++) {
    for (int lane = 0; lane < kLanes; lane++) {
      const int32_t bits = largest[v][lane];
      top = top > bits ? top : bits;
    }
  }
  float absmax;
  std::memcpy(&absmax, &top, 4);
  const bool is_finite = top < 0x7f800000;
  // As in numerics.quantize_rows, operation for operation. A subnormal scale counts as zero.
  const float scale = absmax * static_cast<float>(1.0 / rows.limit);
  const bool is_zero = scale < __FLT_MIN__;
  x_scale[token] = !is_finite ? __builtin_nanf("") : is_zero ? 0.0f : scale;
  int8_t* const to = x_int8 + token * width;
  if (!is_finite || is_zero) {
    if (width > 0) std::memset(to, 0, width);
    return;
  }
  const float inverse = 1.0f / absmax * static_cast<float>(rows.limit);
  for (int64_t i = 0; i < width; i += 4 * kLanes) {
    vint values[4];
    for (int v = 0; v < 4; v++) {
      values[v] = quantize_vector(load<vfloat>(row + i + v * kLanes), inverse, rows.limit);
    }
    if (i + 4 * kLanes <= width) {
      store_int8(to + i, values);
    } else {
      int8_t edge[4 * kLanes];
      store_int8(edge, values);
      std::memcpy(to + i, edge, width - i);
    }
  }
}

}  // namespace quaff
