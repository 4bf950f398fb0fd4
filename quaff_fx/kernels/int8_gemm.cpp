// The int8 product on CPUs, as a C interface for ctypes. Read int8_isa.h, int8_pack.h and int8_tile.h first.
//
// The reduction is not blocked: a panel of weights for the whole reduction stays in the second-level cache while all
// blocks of activations pass by it, so the int32 sums never leave the registers. Weights are packed anew in every call,
// from one row-major copy for both directions; that costs a few per cent and saves a second copy of the model.

#include <cstdlib>
#include <pthread.h>

#include "int8_isa.h"
#include "int8_pack.h"
#include "int8_quantize.h"
#include "int8_tile.h"

namespace quaff {

enum Status : int { kOk = 0, kActivationTooLarge = 1, kNoMemory = 2, kBadChannel = 3 };

// A buffer of each thread that grows and is freed with the thread.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  void* grow(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      memory_ = std::aligned_alloc(4096, size_);
      if (memory_ == nullptr) size_ = 0;
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

static thread_local Scratch activation_scratch;  // packed activations, read by all threads of a call
static thread_local Scratch weight_scratch;      // one strip of packed weights
static thread_local Scratch row_scratch;         // one row in float32

// libgomp's threads do not survive a fork, and a parallel region in the child would wait for them for ever.
static bool is_forked_child = false;
static const int fork_handler = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });

static int usable_threads(int threads, int64_t work) {
  constexpr int64_t kWorkPerThread = 1 << 15;  // below this, waking a thread costs more than it brings
  (void)fork_handler;
  if (is_forked_child || work < 2 * kWorkPerThread) return 1;
  return threads < work / kWorkPerThread ? threads : static_cast<int>(work / kWorkPerThread);
}

// How the output is cut into jobs: strips of `panels` panels times `chunks` ranges of blocks.
struct Split {
  int64_t strips, chunks;
  int panels;
};

// The cut with the least time on the busiest thread: packing a panel costs as much as multiplying about four rows.
static Split choose_split(int64_t panels, int64_t blocks, int64_t rows_per_block, int threads) {
  constexpr int64_t kPackRows = 6;
  Split best = {};
  int64_t best_cost = INT64_MAX;
  for (int width = kStripPanels; width >= 1; width /= 2) {
    const int64_t strips = (panels + width - 1) / width;
    for (int64_t chunks = 1; chunks <= blocks && chunks <= 4 * threads; chunks++) {
      const int64_t chunk_blocks = (blocks + chunks - 1) / chunks;
      const int64_t jobs = (strips * chunks + threads - 1) / threads;
      // Narrow strips read cache lines of the weight twice in the backward direction.
      const int64_t cost = jobs * width * (chunk_blocks * rows_per_block + kPackRows * (kStripPanels + width) / width);
      if (cost < best_cost) {
        best_cost = cost;
        best = {strips, chunks, width};
      }
    }
  }
  return best;
}

// What a call got besides Product.
struct Weights {
  const int8_t* w;
  const float* w_scale;
  const float* w_outlier;
  const float* bias;
  bool transposed;
};

template <class Dot>
static int64_t strip_dwords(const Product& product) {
  return (product.reduction + 3) / 4 * Dot::kSplit * kPanel;
}

// Packs the weights of columns [first, first + columns) into `memory` and describes them in `panels`.
template <class Dot>
static void pack_strip(const Product& product, const Weights& weights, int64_t first, int columns, int offset,
                       int32_t* memory, Panel* panels) {
  const int64_t panel_size = strip_dwords<Dot>(product);
  float* const outlier = reinterpret_cast<float*>(memory + kStripPanels * panel_size);
  int32_t sums[kStrip];
  if (weights.transposed) {
    pack_strip_columns<Dot>(weights.w + first, product.reduction, product.columns, columns, memory, panel_size, sums);
  }
  for (int p = 0; p * kPanel < columns; p++) {
    Panel& panel = panels[p];
    panel.weights = memory + p * panel_size;
    panel.groups = panel_size / kPanel;
    panel.outlier = outlier + p * product.outliers * kPanel;
    panel.first = first + p * kPanel;
    panel.columns = columns - p * kPanel < kPanel ? columns - p * kPanel : kPanel;
    if (!weights.transposed) {
      pack_panel_rows<Dot>(weights.w + panel.first * product.reduction, product.reduction, panel.columns,
                           memory + p * panel_size, sums + p * kPanel);
    }
    for (int i = 0; i < kPanel; i++) {
      const int64_t column = panel.first + (i < panel.columns ? i : panel.columns - 1);
      const uint32_t shift = static_cast<uint32_t>(offset) * static_cast<uint32_t>(sums[p * kPanel + i]);
      panel.start[i] = Dot::kOffset ? static_cast<int32_t>(0u - shift) : 0;
      panel.scale[i] = weights.w_scale ? weights.w_scale[column] : 1.0f;
      panel.bias[i] = weights.bias ? weights.bias[column] : 0.0f;
    }
    for (int64_t o = 0; o < product.outliers; o++) {
      for (int i = 0; i < kPanel; i++) {
        outlier[(p * product.outliers + o) * kPanel + i] =
            i < panel.columns ? weights.w_outlier[o * product.columns + panel.first + i] : 0.0f;
      }
    }
  }
}

template <class Dot>
static int multiply_all(const int8_t* a, const Product& product, const Weights& weights, int activation_max,
                        int threads) {
  const int offset = activation_max > 63 ? 128 : 64;
  const int64_t groups = (product.reduction + 3) / 4 * Dot::kSplit;
  const int64_t blocks = (product.tokens + kMaxRows - 1) / kMaxRows;
  const int64_t block_rows = product.tokens / blocks, longer = product.tokens % blocks;
  const auto first_row = [=](int64_t block) { return block * block_rows + (block < longer ? block : longer); };
  int32_t* const packed = static_cast<int32_t*>(activation_scratch.grow((product.tokens * groups + kLanes) * 4));
  if (packed == nullptr) return kNoMemory;

  threads = usable_threads(threads, product.tokens * product.columns / 4 * (product.reduction / 64 + 1));
  const int64_t panels = (product.columns + kPanel - 1) / kPanel;
  const Split cut = choose_split(panels, blocks, block_rows + (longer > 0), threads);
  const int64_t width = cut.panels * kPanel;
  uint32_t seen = 0;
  int status = kOk;
#pragma omp parallel num_threads(threads) reduction(| : seen) reduction(max : status)
  {
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t row = first_row(block);
      seen |= pack_rows<Dot>(a + row * product.reduction, product.reduction, static_cast<int>(first_row(block + 1) - row),
                             offset, packed + row * groups);
    }
    const size_t bytes = kStripPanels * (strip_dwords<Dot>(product) + product.outliers * kPanel) * 4;
    int32_t* const memory = static_cast<int32_t*>(weight_scratch.grow(bytes));
    if (memory == nullptr) status = kNoMemory;
    Panel strip[kStripPanels];
#pragma omp for schedule(dynamic, 1)
    for (int64_t job = 0; job < cut.strips * cut.chunks; job++) {
      if (memory == nullptr) continue;
      const int64_t first = job % cut.strips * width, chunk = job / cut.strips;
      const int columns = static_cast<int>(product.columns - first < width ? product.columns - first : width);
      pack_strip<Dot>(product, weights, first, columns, offset, memory, strip);
      const int64_t end = blocks * (chunk + 1) / cut.chunks;
      for (int64_t block = blocks * chunk / cut.chunks; block < end; block++) {
        const int64_t row = first_row(block);
        const Tile tile = tile_of<Dot>(static_cast<int>(first_row(block + 1) - row));
        for (int p = 0; p * kPanel < columns; p++) tile(product, strip[p], packed + row * groups, row);
      }
    }
  }
  if (activation_max <= 63 && (seen & 0x80808080u)) return kActivationTooLarge;
  return status;
}

static int quantize_all(const Rows& rows, int64_t tokens, int8_t* x_int8, float* x_scale, float* x_outlier,
                        int threads) {
  for (int64_t o = 0; o < rows.outliers; o++) {
    if (rows.channels[o] < 0 || rows.channels[o] >= rows.width) return kBadChannel;
  }
  int status = kOk;
  threads = usable_threads(threads, tokens * rows.width);
#pragma omp parallel num_threads(threads) reduction(max : status)
  {
    float* const row = static_cast<float*>(row_scratch.grow((rows.width + 4 * kLanes) * sizeof(float)));
    if (row == nullptr) status = kNoMemory;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < tokens; token++) {
      if (row != nullptr) quantize_row(rows, token, row, x_int8, x_scale, x_outlier);
    }
  }
  return status;
}

}  // namespace quaff

extern "C" {

const char* quaff_instruction_set() { return quaff::kName; }

// a (tokens, reduction) and w: (columns, reduction), or (reduction, columns) where transpose_w; out (tokens, columns).
// Pointers to what is not there are null. out_kind is a quaff::Kind, the result a quaff::Status.
int quaff_int8_linear(const int8_t* a, const int8_t* w, int64_t tokens, int64_t reduction, int64_t columns,
                      int transpose_w, int activation_max, const float* a_scale, const float* w_scale,
                      const float* a_outlier, const float* w_outlier, int64_t outliers, const float* bias, void* out,
                      int out_kind, int threads) {
  if (tokens == 0 || columns == 0) return quaff::kOk;
  const quaff::Product product = {tokens, reduction, columns, a_scale, a_outlier, outliers, out, out_kind};
  const quaff::Weights weights = {w, w_scale, w_outlier, bias, transpose_w != 0};
  const auto multiply = activation_max <= 63 ? quaff::multiply_all<quaff::DotSmall> : quaff::multiply_all<quaff::DotFull>;
  return multiply(a, product, weights, activation_max, threads);
}

// x: `tokens` rows of x_kind, row_stride values apart; column_scale (width,) or null; channels and smoothing (outliers,).
// x_int8 (tokens, width), x_scale (tokens,), x_outlier (tokens, outliers).
int quaff_quantize_rows(const void* x, int x_kind, int64_t tokens, int64_t width, int64_t row_stride,
                        const float* column_scale, const int64_t* channels, const float* smoothing, int64_t outliers,
                        int activation_max, int8_t* x_int8, float* x_scale, float* x_outlier, int threads) {
  const quaff::Rows rows = {x, x_kind, width, row_stride, column_scale, channels, smoothing, outliers, activation_max};
  return quaff::quantize_all(rows, tokens, x_int8, x_scale, x_outlier, threads);
}

}  // extern "C"
