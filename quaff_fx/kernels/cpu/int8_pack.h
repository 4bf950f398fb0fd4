// Packing: from row-major int8 to the order in which a tile reads its operands.
//
// A panel of weights is [dwords of the reduction][kPanel columns], a block of activations [dwords][rows of the block];
// a dword holds four consecutive values of the reduction (two where Dot splits them). Values past the end of the
// reduction are zero in the weights, so what stands there in the activations does not matter.
#pragma once

#include "int8_isa.h"

namespace quaff {

constexpr int kChunk = kLanes * 4;  // reduction values packed at a time: one vector of int8

// How far ahead a row of weights is fetched; and how many rows ahead where a strip of columns is packed, a pattern
// that the hardware does not see across pages. More rows than this push each other out of the first-level cache.
constexpr int kPrefetchBytes = 256, kPrefetchRows = 16;

// Transposes of kLanes x kLanes dwords.

#if defined(QUAFF_AVX512)
static inline void transpose(vint (&rows)[16]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 8; i++) {
    a[2 * i] = _mm512_unpacklo_epi32((__m512i)rows[2 * i], (__m512i)rows[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32((__m512i)rows[2 * i], (__m512i)rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    const __m512i even = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88), odd = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
    const __m512i odd2 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
    rows[i] = (vint)_mm512_shuffle_i32x4(even, even2, 0x88);
    rows[8 + i] = (vint)_mm512_shuffle_i32x4(even, even2, 0xdd);
    rows[4 + i] = (vint)_mm512_shuffle_i32x4(odd, odd2, 0x88);
    rows[12 + i] = (vint)_mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
}
#elif defined(QUAFF_AVX2)
static inline void transpose(vint (&rows)[8]) {
  __m256i a[8], b[8];
  for (int i = 0; i < 4; i++) {
    a[2 * i] = _mm256_unpacklo_epi32((__m256i)rows[2 * i], (__m256i)rows[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_epi32((__m256i)rows[2 * i], (__m256i)rows[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    rows[i] = (vint)_mm256_permute2x128_si256(b[i], b[4 + i], 0x20);
    rows[4 + i] = (vint)_mm256_permute2x128_si256(b[i], b[4 + i], 0x31);
  }
}
#else
static inline void transpose(vint (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; i++) {
    for (int j = i + 1; j < kLanes; j++) {
      const int32_t upper = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = upper;
    }
  }
}
#endif

// Interleaving four rows of bytes: result[i] holds columns i * kLanes ... of them, one dword per column.

#if defined(QUAFF_AVX512)
constexpr int kInterleaved = 4;
static inline void interleave(const int8_t* const (&from)[4], vint (&result)[4]) {
  const __m512i r0 = _mm512_loadu_si512(from[0]), r1 = _mm512_loadu_si512(from[1]);
  const __m512i r2 = _mm512_loadu_si512(from[2]), r3 = _mm512_loadu_si512(from[3]);
  const __m512i low01 = _mm512_unpacklo_epi8(r0, r1), high01 = _mm512_unpackhi_epi8(r0, r1);
  const __m512i low23 = _mm512_unpacklo_epi8(r2, r3), high23 = _mm512_unpackhi_epi8(r2, r3);
  const __m512i q0 = _mm512_unpacklo_epi16(low01, low23), q1 = _mm512_unpackhi_epi16(low01, low23);
  const __m512i q2 = _mm512_unpacklo_epi16(high01, high23), q3 = _mm512_unpackhi_epi16(high01, high23);
  // Lane l of q_i holds columns 16 l + 4 i; a 4 x 4 transpose of lanes brings them in order.
  const __m512i a = _mm512_shuffle_i32x4(q0, q1, 0x44), b = _mm512_shuffle_i32x4(q2, q3, 0x44);
  const __m512i c = _mm512_shuffle_i32x4(q0, q1, 0xee), d = _mm512_shuffle_i32x4(q2, q3, 0xee);
  result[0] = (vint)_mm512_shuffle_i32x4(a, b, 0x88);
  result[1] = (vint)_mm512_shuffle_i32x4(a, b, 0xdd);
  result[2] = (vint)_mm512_shuffle_i32x4(c, d, 0x88);
  result[3] = (vint)_mm512_shuffle_i32x4(c, d, 0xdd);
}
#elif defined(QUAFF_AVX2)
constexpr int kInterleaved = 4;
static inline void interleave(const int8_t* const (&from)[4], vint (&result)[4]) {
  const __m256i r0 = _mm256_loadu_si256((const __m256i*)from[0]), r1 = _mm256_loadu_si256((const __m256i*)from[1]);
  const __m256i r2 = _mm256_loadu_si256((const __m256i*)from[2]), r3 = _mm256_loadu_si256((const __m256i*)from[3]);
  const __m256i low01 = _mm256_unpacklo_epi8(r0, r1), high01 = _mm256_unpackhi_epi8(r0, r1);
  const __m256i low23 = _mm256_unpacklo_epi8(r2, r3), high23 = _mm256_unpackhi_epi8(r2, r3);
  const __m256i q0 = _mm256_unpacklo_epi16(low01, low23), q1 = _mm256_unpackhi_epi16(low01, low23);
  const __m256i q2 = _mm256_unpacklo_epi16(high01, high23), q3 = _mm256_unpackhi_epi16(high01, high23);
  result[0] = (vint)_mm256_permute2x128_si256(q0, q1, 0x20);
  result[1] = (vint)_mm256_permute2x128_si256(q2, q3, 0x20);
  result[2] = (vint)_mm256_permute2x128_si256(q0, q1, 0x31);
  result[3] = (vint)_mm256_permute2x128_si256(q2, q3, 0x31);
}
#elif defined(QUAFF_NEON)
constexpr int kInterleaved = 4;
static inline void interleave(const int8_t* const (&from)[4], vint (&result)[4]) {
  const int8x16x2_t r01 = vzipq_s8(vld1q_s8(from[0]), vld1q_s8(from[1]));
  const int8x16x2_t r23 = vzipq_s8(vld1q_s8(from[2]), vld1q_s8(from[3]));
  for (int half = 0; half < 2; half++) {
    const int16x8x2_t q = vzipq_s16(vreinterpretq_s16_s8(r01.val[half]), vreinterpretq_s16_s8(r23.val[half]));
    result[2 * half] = (vint)vreinterpretq_s32_s16(q.val[0]);
    result[2 * half + 1] = (vint)vreinterpretq_s32_s16(q.val[1]);
  }
}
#else
constexpr int kInterleaved = 4;
static inline void interleave(const int8_t* const (&from)[4], vint (&result)[4]) {
  for (int column = 0; column < 4 * kLanes; column++) {
    const int8_t values[4] = {from[0][column], from[1][column], from[2][column], from[3][column]};
    std::memcpy(reinterpret_cast<char*>(&result[column / kLanes]) + 4 * (column % kLanes), values, 4);
  }
}
#endif

constexpr int kInterleavedColumns = kInterleaved * kLanes;
constexpr int kStrip = 64;  // columns packed together in the backward direction: a cache line of each row
constexpr int kStripPanels = kStrip / kPanel;
static_assert(kStrip % kPanel == 0 && kStrip % kInterleavedColumns == 0, "a strip is whole panels");

// Interleaves the first kInterleavedColumns columns of four rows that are `stride` apart; what lies beyond `rows` or
// `columns` is 0.
static inline void interleave_rows(const int8_t* from, int64_t rows, int64_t stride, int columns,
                                   vint (&result)[kInterleaved]) {
  if (rows >= 4 && columns >= kInterleavedColumns) {
    interleave({from, from + stride, from + 2 * stride, from + 3 * stride}, result);
    return;
  }
  int8_t edge[4][kInterleavedColumns] = {};
  const int width = columns < kInterleavedColumns ? columns : kInterleavedColumns;
  for (int i = 0; i < 4 && i < rows; i++) std::memcpy(edge[i], from + i * stride, width);
  interleave({edge[0], edge[1], edge[2], edge[3]}, result);
}

// Writes one vector of weight dwords (columns `at` of a panel, dword `group`) and adds it to the column sums.
template <class Dot>
static inline void put_weights(int32_t* panel, int64_t group, int at, vint packed, vint& sums) {
  vint halves[2];
  split<Dot>(packed, halves);
  for (int i = 0; i < Dot::kSplit; i++) store(panel + (group * Dot::kSplit + i) * kPanel + at, halves[i]);
  if constexpr (Dot::kOffset) Dot::sum(sums, packed);
}

// Forward, acc = a wT: packs rows [0, columns) of w, each `reduction` long, into one panel. Missing columns repeat the
// last one; nobody reads their results.
template <class Dot>
static void pack_panel_rows(const int8_t* w, int64_t reduction, int columns, int32_t* panel, int32_t* sums) {
  for (int at = 0; at < kPanel; at += kLanes) {
    vint sum[4] = {};  // four, so that additions need not wait for each other
    const int8_t* rows[kLanes];
    for (int i = 0; i < kLanes; i++) rows[i] = w + (at + i < columns ? at + i : columns - 1) * reduction;
    vint tile[kLanes];
    int64_t k = 0;
    for (; k + kChunk <= reduction; k += kChunk) {
      for (int i = 0; i < kLanes; i++) {
        tile[i] = load<vint>(rows[i] + k);
        __builtin_prefetch(rows[i] + k + kPrefetchBytes);
      }
      transpose(tile);
      for (int i = 0; i < kLanes; i++) put_weights<Dot>(panel, k / 4 + i, at, tile[i], sum[i % 4]);
    }
    if (k < reduction) {
      for (int i = 0; i < kLanes; i++) {
        tile[i] = vint{};
        std::memcpy(&tile[i], rows[i] + k, reduction - k);
      }
      transpose(tile);
      for (int i = 0; 4 * i < reduction - k; i++) put_weights<Dot>(panel, k / 4 + i, at, tile[i], sum[i % 4]);
    }
    store(sums + at, sum[0] + sum[1] + sum[2] + sum[3]);
  }
}

// Backward, acc = a w: packs `columns` <= kStrip neighbouring columns of w, whose rows are `stride` apart, into the
// panels of a strip, which are `panel_size` dwords apart. A strip is as wide as a cache line where vectors are.
template <class Dot>
static void pack_strip_columns(const int8_t* w, int64_t reduction, int64_t stride, int columns, int32_t* panels,
                               int64_t panel_size, int32_t* sums) {
  vint sum[kStrip / kLanes] = {};
  const int used = (columns + kPanel - 1) / kPanel * kVectors;  // vectors that belong to a panel in use
  for (int64_t k = 0; k < reduction; k += 4) {
    for (int i = 0; i < 4; i++) __builtin_prefetch(w + (k + kPrefetchRows + i) * stride);
    for (int first = 0; first < columns; first += kInterleavedColumns) {
      vint packed[kInterleaved];
      interleave_rows(w + k * stride + first, reduction - k, stride, columns - first, packed);
      for (int i = 0; i < kInterleaved; i++) {
        const int at = first / kLanes + i;
        if (at >= used) break;
        put_weights<Dot>(panels + at / kVectors * panel_size, k / 4, at % kVectors * kLanes, packed[i], sum[at]);
      }
    }
  }
  for (int i = 0; i < used; i++) store(sums + i * kLanes, sum[i]);
}

static inline void put_rows(int32_t* to, vint value, int rows, bool may_spill) {
#if defined(QUAFF_AVX512)
  (void)may_spill;
  _mm512_mask_storeu_epi32(to, (__mmask16)((1u << rows) - 1), (__m512i)value);
#else
  if (may_spill) {
    store(to, value);
  } else {
    std::memcpy(to, &value, 4 * rows);
  }
#endif
}

// Packs `rows` <= kMaxRows rows of `a` into one block, with `offset` added where Dot wants it. Returns the OR of all
// values with the offset: with an offset of 64 its top bits are clear exactly when all values are within [-64, 63].
template <class Dot>
static uint32_t pack_rows(const int8_t* a, int64_t reduction, int rows, int offset, int32_t* block) {
  vuint seen = {};
  const int64_t groups = (reduction + 3) / 4;
  for (int64_t k = 0; k < reduction; k += kChunk) {
    vint tile[kLanes] = {};
    for (int i = 0; i < rows; i++) {
      if (k + kChunk <= reduction) {
        tile[i] = load<vint>(a + i * reduction + k);
      } else {
        std::memcpy(&tile[i], a + i * reduction + k, reduction - k);
      }
      const vuint shifted = (vuint)((vbytes)tile[i] + static_cast<uint8_t>(offset));
      seen |= shifted;
      if constexpr (Dot::kOffset) tile[i] = (vint)shifted;
    }
    transpose(tile);
    for (int i = 0; i < kLanes && k / 4 + i < groups; i++) {
      vint halves[2];
      split<Dot>(tile[i], halves);
      for (int j = 0; j < Dot::kSplit; j++) {
        const int64_t at = ((k / 4 + i) * Dot::kSplit + j) * rows;
        // A whole vector spills into the entries after it, which are written next.
        put_rows(block + at, halves[j], rows, at + kLanes <= groups * Dot::kSplit * rows);
      }
    }
  }
  uint32_t all = 0;
  for (int lane = 0; lane < kLanes; lane++) all |= seen[lane];
  return all;
}

}  // namespace quaff
