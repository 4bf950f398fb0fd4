// The micro-kernel: one tile of the product, kept in registers from the first product to the stored result.
#pragma once

#include "int8_isa.h"

// Loops over the vectors of a tile must be unrolled, or the tile is an array in memory.
#define QUAFF_UNROLL _Pragma("GCC unroll 16")

namespace quaff {

// One product as the caller gave it; shapes are in int8_gemm.cpp.
struct Product {
  int64_t tokens, reduction, columns;
  const float* a_scale;    // (tokens,), null: 1
  const float* a_outlier;  // (tokens, outliers)
  int64_t outliers;
  void* out;  // (tokens, columns) of out_kind
  int out_kind;
};

// A panel of kPanel output columns: packed weights and what else the epilogue needs of these columns, padded.
struct Panel {
  const int32_t* weights;    // [groups][kPanel]
  int64_t groups;            // dwords of the reduction
  const float* outlier;      // [outliers][kPanel]
  int64_t first;             // first output column
  int columns;               // columns that exist
  int32_t start[kPanel];     // start value of the accumulators
  float scale[kPanel];
  float bias[kPanel];
};

template <class Dot, int rows>
static inline __attribute__((always_inline)) void multiply(const int32_t* a, const Panel& panel,
                                                           vint (&acc)[rows][kVectors]) {
  QUAFF_UNROLL
  for (int r = 0; r < rows; r++) {
    QUAFF_UNROLL
    for (int v = 0; v < kVectors; v++) acc[r][v] = load<vint>(panel.start + v * kLanes);
  }
  const int32_t* w = panel.weights;
  for (int64_t group = 0; group < panel.groups; group++) {
    vint b[kVectors];
    QUAFF_UNROLL
    for (int v = 0; v < kVectors; v++) b[v] = load<vint>(w + v * kLanes);
    QUAFF_UNROLL
    for (int r = 0; r < rows; r++) {
      const vint x = vint{} + a[r];
      QUAFF_UNROLL
      for (int v = 0; v < kVectors; v++) {
        Dot::accumulate(acc[r][v], x, b[v]);
        QUAFF_PIN(acc[r][v]);
      }
    }
    a += rows;
    w += kPanel;
  }
}

// Where the results of a tile go: straight to the output, or through a buffer where the panel is not whole.
template <int rows>
struct Target {
  static constexpr int kLargest = 4;  // bytes of a result
  int size;
  char* output;  // row 0 of the tile
  int64_t output_stride;
  bool is_whole;
  alignas(64) char edge[rows * kPanel * kLargest];

  Target(const Product& product, const Panel& panel, int64_t row)
      : size(product.out_kind == kInt32 || product.out_kind == kFloat32 ? 4 : 2),
        output(static_cast<char*>(product.out) + (row * product.columns + panel.first) * size),
        output_stride(product.columns),
        is_whole(panel.columns == kPanel) {}

  // Results are written once, to lines that nobody has read: asks for them while the sums are still being made.
  void prefetch() const {
    for (int r = 0; r < rows; r++) {
      __builtin_prefetch(output + r * output_stride * size, 1);
      __builtin_prefetch(output + (r * output_stride + kPanel - 1) * size, 1);
    }
  }
  char* memory() { return is_whole ? output : edge; }
  int64_t stride() const { return is_whole ? output_stride : kPanel; }
  void finish(int columns) const {
    if (is_whole) return;
    for (int r = 0; r < rows; r++) {
      std::memcpy(output + r * output_stride * size, edge + r * kPanel * size, columns * size);
    }
  }
};

// Stores the sums of rows [row, row + rows): out = acc * a_scale * w_scale + bias + a_outlier w_outlier.
template <int rows>
static inline __attribute__((always_inline)) void store_tile(const Product& product, const Panel& panel, int64_t row,
                                                             const vint (&acc)[rows][kVectors], Target<rows>& target) {
  char* const out = target.memory();
  const int64_t stride = target.stride();
  if (product.out_kind == kInt32) {
    QUAFF_UNROLL
    for (int r = 0; r < rows; r++) {
      QUAFF_UNROLL
      for (int v = 0; v < kVectors; v++) store(reinterpret_cast<int32_t*>(out) + r * stride + v * kLanes, acc[r][v]);
    }
  } else {
    vfloat result[rows][kVectors];
    QUAFF_UNROLL
    for (int r = 0; r < rows; r++) {
      const float a_scale = product.a_scale ? product.a_scale[row + r] : 1.0f;
      QUAFF_UNROLL
      for (int v = 0; v < kVectors; v++) {
        const vfloat scale = load<vfloat>(panel.scale + v * kLanes);
        result[r][v] = to_float(acc[r][v]) * a_scale * scale + load<vfloat>(panel.bias + v * kLanes);
      }
    }
    for (int64_t o = 0; o < product.outliers; o++) {
      vfloat w[kVectors];
      QUAFF_UNROLL
      for (int v = 0; v < kVectors; v++) w[v] = load<vfloat>(panel.outlier + o * kPanel + v * kLanes);
      QUAFF_UNROLL
      for (int r = 0; r < rows; r++) {
        const float x = product.a_outlier[(row + r) * product.outliers + o];
        QUAFF_UNROLL
        for (int v = 0; v < kVectors; v++) {
          result[r][v] += x * w[v];
          QUAFF_PIN(result[r][v]);
        }
      }
    }
    QUAFF_UNROLL
    for (int r = 0; r < rows; r++) {
      QUAFF_UNROLL
      for (int v = 0; v < kVectors; v++) store_kind(out, product.out_kind, r * stride + v * kLanes, result[r][v]);
    }
  }
  target.finish(panel.columns);
}

// One tile from packed operands: rows [row, row + rows) of the panel's columns.
template <class Dot, int rows>
static void run_tile(const Product& product, const Panel& panel, const int32_t* a, int64_t row) {
  Target<rows> target(product, panel, row);
  target.prefetch();
  vint acc[rows][kVectors];
  multiply<Dot, rows>(a, panel, acc);
  store_tile<rows>(product, panel, row, acc, target);
}

typedef void (*Tile)(const Product&, const Panel&, const int32_t*, int64_t);

// tile_of<Dot>(rows): the tile for 1 <= rows <= kMaxRows.
template <class Dot, int rows = kMaxRows>
static Tile tile_of(int wanted) {
  if constexpr (rows > 1) {
    if (wanted < rows) return tile_of<Dot, rows - 1>(wanted);
  }
  return run_tile<Dot, rows>;
}

}  // namespace quaff
