// The int8 product on CPUs, as a C interface for ctypes. Read int8_isa.h, int8_pack.h and int8_tile.h first.
//
// The reduction is not blocked: a panel of weights for the whole reduction stays in the second-level cache while all
// blocks of activations pass by it, so the int32 sums never leave the registers. Weights are packed anew in every call,
// from one row-major copy for both directions; that costs a few per cent and saves a second copy of the model.

#include <cstdlib>
#include <memory>
#include <pthread.h>

#include "int8_few.h"
#include "int8_isa.h"
#include "int8_pack.h"
#include "int8_quantize.h"
#include "int8_rotate.h"
#include "int8_tile.h"

namespace quaff {

enum Status : int { kOk = 0, kActivationTooLarge = 1, kNoMemory = 2, kBadChannel = 3 };

// The top bits of the OR of all activations + 64: clear exactly when all are within [-64, 63].
constexpr uint32_t kTooLarge = 0x80808080u;

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
static thread_local Scratch rotation_scratch;    // rotated outlier rows and bias of a call

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

// The cut with the least time on the busiest thread, in rows of one panel.
static Split choose_split(int64_t panels, int64_t blocks, int64_t block_rows, bool is_transposed, int threads) {
  Split best = {};
  int64_t best_cost = INT64_MAX;
  for (int width = kStripPanels; width >= 1; width /= 2) {
    const int64_t strips = (panels + width - 1) / width;
    // A narrow strip of columns uses a part of each cache line, and its neighbours fetch the line again.
    const int64_t pack = is_transposed && width < kStripPanels ? 2 * kPackRows : kPackRows;
    for (int64_t chunks = 1; chunks <= blocks && chunks <= 4 * threads; chunks++) {
      const int64_t rows = (blocks + chunks - 1) / chunks * block_rows;
      const int64_t cost = (strips * chunks + threads - 1) / threads * width * (rows + pack);
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
static int64_t panel_dwords(const Product& product) {
  return (product.reduction + 3) / 4 * Dot::kSplit * kPanel;
}

// Fills in what the epilogue needs of a panel; `outlier` has room for outliers x kPanel values.
static void describe_panel(const Product& product, const Weights& weights, int64_t first, float* outlier,
                           Panel& panel) {
  panel.first = first;
  panel.columns = static_cast<int>(product.columns - first < kPanel ? product.columns - first : kPanel);
  panel.outlier = outlier;
  for (int i = 0; i < kPanel; i++) {
    const int64_t column = first + (i < panel.columns ? i : panel.columns - 1);
    panel.scale[i] = weights.w_scale ? weights.w_scale[column] : 1.0f;
    panel.bias[i] = weights.bias ? weights.bias[column] : 0.0f;
    for (int64_t o = 0; o < product.outliers; o++) {
      outlier[o * kPanel + i] = weights.w_outlier[o * product.columns + column];
    }
  }
}

// Packs the weights of columns [first, first + columns) into `memory` and describes them in `panels`.
template <class Dot>
static void pack_strip(const Product& product, const Weights& weights, int64_t first, int columns, int offset,
                       int32_t* memory, Panel* panels) {
  const int64_t size = panel_dwords<Dot>(product);
  float* const outlier = reinterpret_cast<float*>(memory + kStripPanels * size);
  int32_t sums[kStrip] = {};
  if (weights.transposed) {
    pack_strip_columns<Dot>(weights.w + first, product.reduction, product.columns, columns, memory, size, sums);
  }
  for (int p = 0; p * kPanel < columns; p++) {
    const int64_t start = first + p * kPanel;
    if (!weights.transposed) {
      const int here = columns - p * kPanel < kPanel ? columns - p * kPanel : kPanel;
      pack_panel_rows<Dot>(weights.w + start * product.reduction, product.reduction, here, memory + p * size,
                           sums + p * kPanel);
    }
    describe_panel(product, weights, start, outlier + p * product.outliers * kPanel, panels[p]);
    for (int i = 0; i < kPanel; i++) {
      const uint32_t shift = static_cast<uint32_t>(offset) * static_cast<uint32_t>(sums[p * kPanel + i]);
      panels[p].start[i] = Dot::kOffset ? static_cast<int32_t>(0u - shift) : 0;
    }
    panels[p].weights = memory + p * size;
    panels[p].groups = size / kPanel;
  }
}

template <class Dot>
static int multiply_many(const int8_t* a, const Product& product, const Weights& weights, int activation_max,
                        int threads) {
  const int offset = activation_max > 63 ? 128 : 64;
  const int64_t reduction = product.reduction, groups = (reduction + 3) / 4 * Dot::kSplit;
  const int64_t blocks = (product.tokens + kMaxRows - 1) / kMaxRows;
  const int64_t block_rows = product.tokens / blocks, longer = product.tokens % blocks;
  const auto first_row = [=](int64_t block) { return block * block_rows + (block < longer ? block : longer); };
  int32_t* const packed = static_cast<int32_t*>(activation_scratch.grow((product.tokens * groups + kLanes) * 4));
  if (packed == nullptr) return kNoMemory;

  threads = usable_threads(threads, (product.tokens + kPackRows) * product.columns * product.reduction / 64);
  const int64_t panels = (product.columns + kPanel - 1) / kPanel;
  const Split cut = choose_split(panels, blocks, block_rows + (longer > 0), weights.transposed, threads);
  const int64_t width = cut.panels * kPanel;
  const auto pack_block = [=](int64_t block) {
    const int64_t row = first_row(block);
    const int rows = static_cast<int>(first_row(block + 1) - row);
    return pack_rows<Dot>(a + row * reduction, reduction, rows, offset, packed + row * groups);
  };
  // Few activations are packed by the calling thread: a barrier costs more, above all where processors are shared.
  constexpr int64_t kSharedBytes = 1 << 18;
  const bool is_shared = threads > 1 && product.tokens * groups * 4 > kSharedBytes;
  uint32_t seen = 0;
  for (int64_t block = 0; block < blocks && !is_shared; block++) seen |= pack_block(block);
  int status = kOk;
#pragma omp parallel num_threads(threads) reduction(| : seen) reduction(max : status)
  {
    if (is_shared) {
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks; block++) seen |= pack_block(block);
    }
    const size_t bytes = kStripPanels * (panel_dwords<Dot>(product) + product.outliers * kPanel) * 4;
    int32_t* const memory = static_cast<int32_t*>(weight_scratch.grow(bytes));
    if (memory == nullptr) status = kNoMemory;
    Panel strip[kStripPanels];
#pragma omp for schedule(dynamic, 1) nowait
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
  if (activation_max <= 63 && (seen & kTooLarge)) return kActivationTooLarge;
  return status;
}

// Few tokens in the forward direction: jobs are panels.
template <class Dot>
static int multiply_few_forward(const int8_t* a, const Product& product, const Weights& weights, int activation_max,
                                int threads) {
  const int offset = activation_max > 63 ? 128 : 64;
  const int64_t row_vectors = (product.reduction + kChunk - 1) / kChunk * Dot::kSplit;
  const int tokens = static_cast<int>(product.tokens), half = tokens > kFewRows ? (tokens + 1) / 2 : tokens;
  vint* const copy = static_cast<vint*>(activation_scratch.grow((row_vectors * tokens + 1) * sizeof(vint)));
  if (copy == nullptr) return kNoMemory;
  uint32_t seen = copy_rows<Dot>(a, product.reduction, half, offset, copy);
  seen |= copy_rows<Dot>(a + half * product.reduction, product.reduction, tokens - half, offset,
                         copy + half * row_vectors);
  if (activation_max <= 63 && (seen & kTooLarge)) return kActivationTooLarge;
  threads = usable_threads(threads, (tokens + kPackRows) * product.columns * product.reduction / 64);
  int status = kOk;
#pragma omp parallel num_threads(threads) reduction(max : status)
  {
    float* const outlier = static_cast<float*>(weight_scratch.grow((product.outliers + 1) * kPanel * sizeof(float)));
    if (outlier == nullptr) status = kNoMemory;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t first = 0; first < product.columns; first += kPanel) {
      if (outlier == nullptr) continue;
      Panel panel;
      describe_panel(product, weights, first, outlier, panel);
      const int8_t* const w = weights.w + first * product.reduction;
      few_tile_of<Dot>(half)(product, panel, copy, w, 0, offset);
      if (half < tokens) {
        few_tile_of<Dot>(tokens - half)(product, panel, copy + half * row_vectors, w, half, offset);
      }
    }
  }
  return status;
}

// Few tokens in the backward direction: jobs are ranges of up to kFewStrips strips of columns.
template <class Dot, int rows = kFewBackward>
static int multiply_few_backward(const int8_t* a, const Product& product, const Weights& weights, int activation_max,
                                 int threads) {
  if constexpr (rows > 1) {
    if (product.tokens < rows) {
      return multiply_few_backward<Dot, rows - 1>(a, product, weights, activation_max, threads);
    }
  }
  threads = usable_threads(threads, (rows + kPackRows) * product.columns * product.reduction / 64);
  const int offset = activation_max > 63 ? 128 : 64;
  const int64_t groups = (product.reduction + 3) / 4 * Dot::kSplit;
  int32_t* const packed = static_cast<int32_t*>(activation_scratch.grow((rows * groups + kLanes) * 4));
  if (packed == nullptr) return kNoMemory;
  const uint32_t seen = pack_rows<Dot>(a, product.reduction, rows, offset, packed);
  if (activation_max <= 63 && (seen & kTooLarge)) return kActivationTooLarge;
  const int64_t strips = (product.columns + kStrip - 1) / kStrip, share = (strips + threads - 1) / threads;
  const int64_t width = (share < kFewStrips ? share : kFewStrips) * kStrip;
  int status = kOk;
#pragma omp parallel num_threads(threads) reduction(max : status)
  {
    constexpr int kVectorsPerRow = kFewStrips * kStrip / kLanes;
    const size_t bytes = (rows + 1) * kVectorsPerRow * sizeof(vint);
    char* const memory = static_cast<char*>(weight_scratch.grow(bytes + product.outliers * kPanel * sizeof(float)));
    if (memory == nullptr) status = kNoMemory;
    vint* const total = reinterpret_cast<vint*>(memory);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t first = 0; first < product.columns; first += width) {
      if (memory == nullptr) continue;
      const int columns = static_cast<int>(product.columns - first < width ? product.columns - first : width);
      add_columns<Dot, rows>(packed, weights.w + first, product.reduction, product.columns, columns, total);
      for (int at = 0; at < columns; at += kPanel) {
        vint acc[rows][kVectors];
        for (int r = 0; r < rows; r++) std::memcpy(acc[r], total + r * kVectorsPerRow + at / kLanes, sizeof(acc[r]));
        Panel panel;
        describe_panel(product, weights, first + at, reinterpret_cast<float*>(memory + bytes), panel);
        store_few<Dot, rows>(product, panel, 0, offset, total + rows * kVectorsPerRow + at / kLanes, acc);
      }
    }
  }
  return status;
}

template <class Dot>
static int multiply_all(const int8_t* a, const Product& product, const Weights& weights, int activation_max,
                        int threads) {
  auto multiply = multiply_many<Dot>;
  if (weights.transposed && product.tokens <= kFewBackward) multiply = multiply_few_backward<Dot, kFewBackward>;
  if (!weights.transposed && product.tokens <= kFewForward) multiply = multiply_few_forward<Dot>;
  return multiply(a, product, weights, activation_max, threads);
}

// Makes out = rotated(acc * scales) + a_outlier w_outlier + bias: the rest is rotated beforehand, all afterwards, since
// rotating twice is doing nothing. Sums are float32 until then: a narrow kind could overflow before the rotation.
template <class Dot>
static int multiply_rotated(const int8_t* a, const Product& product, const Weights& weights, int activation_max,
                            int rotation, int threads) {
  const int64_t columns = product.columns;
  const bool is_narrow = product.out_kind != kFloat32;
  Weights rotated = weights;
  float* const memory = static_cast<float*>(rotation_scratch.grow((product.outliers + 1) * columns * sizeof(float)));
  if (memory == nullptr) return kNoMemory;
  const auto rotated_copy = [&](const float* rows, int64_t count, float* to) {
    if (rows == nullptr) return rows;
    std::memcpy(to, rows, count * columns * sizeof(float));
    for (int64_t row = 0; row < count; row++) rotate_row(to + row * columns, columns, rotation);
    return static_cast<const float*>(to);
  };
  rotated.bias = rotated_copy(weights.bias, 1, memory);
  rotated.w_outlier = rotated_copy(weights.w_outlier, product.outliers, memory + columns);
  const std::unique_ptr<float, decltype(&std::free)> wide(
      is_narrow ? static_cast<float*>(std::malloc(product.tokens * columns * sizeof(float))) : nullptr, std::free);
  if (is_narrow && wide == nullptr) return kNoMemory;
  Product sums = product;
  if (is_narrow) sums.out = wide.get(), sums.out_kind = kFloat32;
  const int status = multiply_all<Dot>(a, sums, rotated, activation_max, threads);
  if (status != kOk) return status;
  threads = usable_threads(threads, product.tokens * columns);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t token = 0; token < product.tokens; token++) {
    float* const row = static_cast<float*>(sums.out) + token * columns;
    void* const to = is_narrow ? static_cast<uint16_t*>(product.out) + token * columns : static_cast<void*>(row);
    rotate_row_to(row, columns, rotation, to, product.out_kind);
  }
  return kOk;
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
#pragma omp for schedule(static) nowait
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
// Pointers to what is not there are null. out_kind is a quaff::Kind, the result a quaff::Status. With a rotation > 1,
// which divides columns, the scaled product is rotated before the rest is added; out is floating then.
int quaff_int8_linear(const int8_t* a, const int8_t* w, int64_t tokens, int64_t reduction, int64_t columns,
                      int transpose_w, int activation_max, const float* a_scale, const float* w_scale,
                      const float* a_outlier, const float* w_outlier, int64_t outliers, const float* bias, void* out,
                      int out_kind, int rotation, int threads) {
  if (tokens == 0 || columns == 0) return quaff::kOk;
  const quaff::Product product = {tokens, reduction, columns, a_scale, a_outlier, outliers, out, out_kind};
  const quaff::Weights weights = {w, w_scale, w_outlier, bias, transpose_w != 0};
  if (rotation > 1) {
    auto multiply = quaff::multiply_rotated<quaff::DotFull>;
    if (activation_max <= 63) multiply = quaff::multiply_rotated<quaff::DotSmall>;
    return multiply(a, product, weights, activation_max, rotation, threads);
  }
  auto multiply = quaff::multiply_all<quaff::DotFull>;
  if (activation_max <= 63) multiply = quaff::multiply_all<quaff::DotSmall>;
  return multiply(a, product, weights, activation_max, threads);
}

// x: `tokens` rows of x_kind, row_stride values apart; channels, smoothing (outliers,); rotation 1 or a power of
// two that divides width.
// x_int8 (tokens, width), x_scale (tokens,), x_outlier (tokens, outliers).
int quaff_quantize_rows(const void* x, int x_kind, int64_t tokens, int64_t width, int64_t row_stride,
                        const int64_t* channels, const float* smoothing, int64_t outliers, int activation_max,
                        int rotation, int8_t* x_int8, float* x_scale, float* x_outlier, int threads) {
  const quaff::Rows rows = {x, x_kind, width, row_stride, channels, smoothing, outliers, activation_max, rotation};
  return quaff::quantize_all(rows, tokens, x_int8, x_scale, x_outlier, threads);
}

}  // extern "C"
