// Few tokens: the time is that of reading the weights once, so they are not packed. Forward takes dot products along
// the rows of the weight, backward adds up whole rows; both end in the epilogue of a tile.
#pragma once

#include "int8_isa.h"
#include "int8_pack.h"
#include "int8_tile.h"

namespace quaff {

// Up to these numbers of tokens this is faster than packing, measured. Forward takes up to kFewRows of them at a time.
constexpr int kFewForward = 16, kFewBackward = 4, kFewRows = 8;
constexpr int kFewStrips = 8;  // strips of columns that the backward direction adds up at a time, in first-level cache

// Copies `rows` rows of `a` to [chunks][kSplit][rows] vectors for multiply_rows. Returns what pack_rows returns.
template <class Dot>
static uint32_t copy_rows(const int8_t* a, int64_t reduction, int rows, int offset, vint* to) {
  vuint seen = {};
  for (int64_t k = 0; k < reduction; k += kChunk) {
    for (int r = 0; r < rows; r++) {
      vint value = {};
      std::memcpy(&value, a + r * reduction + k, reduction - k < kChunk ? reduction - k : kChunk);
      const vuint shifted = (vuint)((vbytes)value + static_cast<uint8_t>(offset));
      seen |= shifted;
      vint halves[2];
      split<Dot>(Dot::kOffset ? (vint)shifted : value, halves);
      for (int i = 0; i < Dot::kSplit; i++) to[(k / kChunk * Dot::kSplit + i) * rows + r] = halves[i];
    }
  }
  uint32_t all = 0;
  for (int lane = 0; lane < kLanes; lane++) all |= seen[lane];
  return all;
}

// Adds one vector of each of `count` rows of weights, times the same vector of the activations.
template <class Dot, int rows, int count>
static inline __attribute__((always_inline)) void add_chunk(const vint* a, const vint (&w)[count],
                                                            vint (&acc)[rows][count], vint (&sum)[count]) {
  QUAFF_UNROLL
  for (int c = 0; c < count; c++) {
    vint halves[2];
    split<Dot>(w[c], halves);
    QUAFF_UNROLL
    for (int i = 0; i < Dot::kSplit; i++) {
      QUAFF_UNROLL
      for (int r = 0; r < rows; r++) Dot::accumulate(acc[r][c], a[i * rows + r], halves[i]);
    }
    if constexpr (Dot::kOffset) Dot::sum(sum[c], w[c]);
  }
}

// Forward: acc[r] = row r of `a` times the `columns` <= kPanel rows of w, and the sums of those rows. Missing columns
// repeat the last one.
template <class Dot, int rows>
static void multiply_rows(const vint* a, const int8_t* w, int64_t reduction, int columns, vint (&acc)[rows][kVectors],
                          vint (&sums)[kVectors]) {
  constexpr int kCount = rows == 1 ? 4 : 2;  // rows of weights taken together, as registers allow
  for (int v = 0; v < kVectors; v++) {
    vint partial[rows + 1][kLanes];
    for (int first = 0; first < kLanes; first += kCount) {
      const int8_t* from[kCount];
      for (int c = 0; c < kCount; c++) {
        const int column = v * kLanes + first + c;
        from[c] = w + (column < columns ? column : columns - 1) * reduction;
      }
      vint local[rows][kCount] = {}, sum[kCount] = {}, values[kCount];
      const vint* x = a;
      int64_t k = 0;
      for (; k + kChunk <= reduction; k += kChunk, x += rows * Dot::kSplit) {
        QUAFF_UNROLL
        for (int c = 0; c < kCount; c++) values[c] = load<vint>(from[c] + k);
        add_chunk<Dot, rows, kCount>(x, values, local, sum);
      }
      if (k < reduction) {
        for (int c = 0; c < kCount; c++) {
          vint value = {};
          std::memcpy(&value, from[c] + k, reduction - k);
          values[c] = value;
        }
        add_chunk<Dot, rows, kCount>(x, values, local, sum);
      }
      QUAFF_UNROLL
      for (int c = 0; c < kCount; c++) {
        QUAFF_UNROLL
        for (int r = 0; r < rows; r++) partial[r][first + c] = local[r][c];
        partial[rows][first + c] = sum[c];
      }
    }
    // The sum over the lanes of each vector: transposed, it is a sum of vectors.
    for (int r = 0; r <= rows; r++) {
      transpose(partial[r]);
      vint total = {};
      for (int i = 0; i < kLanes; i++) total += partial[r][i];
      (r < rows ? acc[r] : sums)[v] = total;
    }
  }
}

// Backward: adds a block of packed activations times `columns` columns of w to acc[row][kFewStrips * kStrip], whose
// last row takes the column sums. Rows of w are `stride` apart.
template <class Dot, int rows>
static void add_columns(const int32_t* a, const int8_t* w, int64_t reduction, int64_t stride, int columns, vint* acc) {
  constexpr int kVectorsPerRow = kFewStrips * kStrip / kLanes;
  for (int i = 0; i < (rows + 1) * kVectorsPerRow; i++) acc[i] = vint{};
  for (int64_t k = 0; k < reduction; k += 4, a += rows * Dot::kSplit) {
    for (int first = 0; first < columns; first += kInterleavedColumns) {
      vint packed[kInterleaved];
      interleave_rows(w + k * stride + first, reduction - k, stride, columns - first, packed);
      QUAFF_UNROLL
      for (int i = 0; i < kInterleaved; i++) {
        vint* const at = acc + first / kLanes + i;
        vint halves[2];
        split<Dot>(packed[i], halves);
        QUAFF_UNROLL
        for (int r = 0; r < rows; r++) {
          QUAFF_UNROLL
          for (int j = 0; j < Dot::kSplit; j++) {
            Dot::accumulate(at[r * kVectorsPerRow], vint{} + a[j * rows + r], halves[j]);
          }
        }
        if constexpr (Dot::kOffset) Dot::sum(at[rows * kVectorsPerRow], packed[i]);
      }
    }
  }
}

// Takes the offset's share, `offset` times the column sums, off the sums of rows [row, row + rows) and stores them.
template <class Dot, int rows>
static void store_few(const Product& product, const Panel& panel, int64_t row, int offset, const vint* sums,
                      vint (&acc)[rows][kVectors]) {
  if constexpr (Dot::kOffset) {
    for (int r = 0; r < rows; r++) {
      for (int v = 0; v < kVectors; v++) {
        acc[r][v] = (vint)((vuint)acc[r][v] - (vuint)sums[v] * static_cast<uint32_t>(offset));
      }
    }
  }
  Target<rows> target(product, panel, row);
  store_tile<rows>(product, panel, row, acc, target);
}

// Forward, from rows copied by copy_rows: rows [row, row + rows) of the panel's columns, whose weights start at w.
template <class Dot, int rows>
static void run_few(const Product& product, const Panel& panel, const vint* a, const int8_t* w, int64_t row,
                    int offset) {
  vint acc[rows][kVectors], sums[kVectors];
  multiply_rows<Dot, rows>(a, w, product.reduction, panel.columns, acc, sums);
  store_few<Dot, rows>(product, panel, row, offset, sums, acc);
}

typedef void (*FewTile)(const Product&, const Panel&, const vint*, const int8_t*, int64_t, int);

// few_tile_of<Dot>(rows): run_few for 1 <= rows <= kFewRows.
template <class Dot, int rows = kFewRows>
static FewTile few_tile_of(int wanted) {
  if constexpr (rows > 1) {
    if (wanted < rows) return few_tile_of<Dot, rows - 1>(wanted);
  }
  return run_few<Dot, rows>;
}

}  // namespace quaff
