// Instruction sets: vector types, the integer dot product, and the few operations that differ between CPUs.
//
// Everything above this file counts in *dwords*: one int32 lane of a vector holds four consecutive int8 values of
// the reduction (`Dot8`, `Dot7`) or two int16 values (`Dot16`). A file that includes this one never names an
// instruction set again, except for the transposes in int8_pack.h.
//
// The compiler's own macros choose the variant; QUAFF_ISA_AVX2, QUAFF_ISA_AVX_VNNI and QUAFF_ISA_GENERIC override them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(QUAFF_ISA_GENERIC)
#define QUAFF_GENERIC 1
#elif defined(QUAFF_ISA_AVX2)
#define QUAFF_AVX2 1
#elif defined(QUAFF_ISA_AVX_VNNI)
#define QUAFF_AVX2 1
#define QUAFF_AVX_VNNI 1
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define QUAFF_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define QUAFF_AVX2 1
#if defined(__AVXVNNI__)
#define QUAFF_AVX_VNNI 1
#endif
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define QUAFF_NEON 1
#else
#define QUAFF_GENERIC 1
#endif

#if defined(QUAFF_AVX512) || defined(QUAFF_AVX2)
#include <immintrin.h>
#elif defined(QUAFF_NEON)
#include <arm_neon.h>
#endif

namespace quaff {

// kLanes: dwords in a vector. kVectors: vectors in one row of a tile. kMaxRows: rows of the largest tile, as many as
// leave the accumulators, one row of weights and one broadcast in registers. kPackRows: how many rows of a tile cost as
// much as packing its weights, measured.
#if defined(QUAFF_AVX512)
constexpr int kLanes = 16, kVectors = 2, kMaxRows = 14, kPackRows = 16;
constexpr const char* kName = "avx512_vnni";
#elif defined(QUAFF_AVX_VNNI)
constexpr int kLanes = 8, kVectors = 2, kMaxRows = 6, kPackRows = 12;
constexpr const char* kName = "avx_vnni";
#elif defined(QUAFF_AVX2)
constexpr int kLanes = 8, kVectors = 2, kMaxRows = 4, kPackRows = 8;
constexpr const char* kName = "avx2";
#elif defined(QUAFF_NEON)
constexpr int kLanes = 4, kVectors = 4, kMaxRows = 4, kPackRows = 8;
constexpr const char* kName = "neon_dotprod";
#else
constexpr int kLanes = 4, kVectors = 4, kMaxRows = 4, kPackRows = 8;
constexpr const char* kName = "generic";
#endif

constexpr int kPanel = kLanes * kVectors;  // output columns of a tile
static_assert(kMaxRows <= kLanes, "a block of activations is packed with one transpose");

typedef int32_t vint __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vuint __attribute__((vector_size(kLanes * 4)));
typedef uint8_t vbytes __attribute__((vector_size(kLanes * 4)));
typedef float vfloat __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vhalf __attribute__((vector_size(kLanes * 2)));

template <class Vector, class Pointer>
static inline Vector load(const Pointer* from) {
  Vector value;
  std::memcpy(&value, from, sizeof(Vector));
  return value;
}

template <class Vector, class Pointer>
static inline void store(Pointer* to, Vector value) {
  std::memcpy(to, &value, sizeof(Vector));
}

// Keeps a value in a register. Without it gcc 12 spills accumulators of the tile and loses a third of the speed.
#if defined(QUAFF_AVX512)
#define QUAFF_PIN(value) __asm__ volatile("" : "+v"(value))
#elif defined(QUAFF_AVX2)
#define QUAFF_PIN(value) __asm__ volatile("" : "+x"(value))
#elif defined(QUAFF_NEON)
#define QUAFF_PIN(value) __asm__ volatile("" : "+w"(value))
#else
#define QUAFF_PIN(value)
#endif

// Ends a rounding: without it the compiler fuses a product with the sum after it, which rounds once where numerics.py,
// whose bits this gives, rounds twice.
#if defined(QUAFF_AVX512)
#define QUAFF_ROUNDED(value) __asm__("" : "+v"(value))
#elif defined(__SSE__)
#define QUAFF_ROUNDED(value) __asm__("" : "+x"(value))
#elif defined(__ARM_NEON)
#define QUAFF_ROUNDED(value) __asm__("" : "+w"(value))
#else
#define QUAFF_ROUNDED(value) __asm__("" : "+m"(value))
#endif

// Dot products.
// A Dot says how a dword of activations meets a dword of weights:
//   kSplit   how many dwords hold four int8 values (1: as they are, 2: widened to int16)
//   kOffset  whether activations are stored unsigned, with an offset; the start value of the accumulators takes its
//            product with the column sums of the weights off again
//   accumulate(acc, a, w)   acc += dot(a, w) in every lane, exact modulo 2^32
//   sum(acc, w)             acc += the sum of a dword's weights, for those start values

#if defined(QUAFF_AVX512) || defined(QUAFF_AVX_VNNI)

// vpdpbusd: unsigned activations times signed weights, four products added in 32 bits. Exact for all of int8.
struct Dot8 {
  static constexpr int kSplit = 1;
  static constexpr bool kOffset = true;
  static inline void accumulate(vint& acc, vint a, vint w) {
#if defined(QUAFF_AVX512)
    acc = (vint)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)w);
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
    acc = (vint)_mm256_dpbusd_epi32((__m256i)acc, (__m256i)a, (__m256i)w);
#else
    acc = (vint)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)w);
#endif
  }
  static inline void sum(vint& acc, vint w) { accumulate(acc, (vint)(vuint{} + 0x01010101u), w); }
};
using DotFull = Dot8;
using DotSmall = Dot8;

#elif defined(QUAFF_AVX2)

// vpmaddubsw adds two products in 16 bits and saturates. Activations in [-64, 63] stored with +64 keep the sum within
// 2 * 127 * 128 = 32512, so it is exact; the driver refuses other values.
struct Dot7 {
  static constexpr int kSplit = 1;
  static constexpr bool kOffset = true;
  static inline void accumulate(vint& acc, vint a, vint w) {
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)w);
    acc += (vint)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  static inline void sum(vint& acc, vint w) { accumulate(acc, (vint)(vuint{} + 0x01010101u), w); }
};

// vpmaddwd on values widened to int16: exact for all of int8. The sign trick on vpmaddubsw needs the same number of
// instructions, three of them on two ports, and is slower where this was measured.
struct Dot16 {
  static constexpr int kSplit = 2;
  static constexpr bool kOffset = false;
  static inline void accumulate(vint& acc, vint a, vint w) {
    acc += (vint)_mm256_madd_epi16((__m256i)a, (__m256i)w);
  }
  static inline void sum(vint&, vint) {}
};
using DotFull = Dot16;
using DotSmall = Dot7;

#elif defined(QUAFF_NEON)

// sdot: signed times signed.
struct DotSigned {
  static constexpr int kSplit = 1;
  static constexpr bool kOffset = false;
  static inline void accumulate(vint& acc, vint a, vint w) {
    acc = (vint)vdotq_s32((int32x4_t)acc, (int8x16_t)a, (int8x16_t)w);
  }
  static inline void sum(vint&, vint) {}
};
using DotFull = DotSigned;
using DotSmall = DotSigned;

#else

// Plain C++ on int16 pairs.
struct DotPlain {
  static constexpr int kSplit = 2;
  static constexpr bool kOffset = false;
  static inline void accumulate(vint& acc, vint a, vint w) {
    acc += ((vint)((vuint)a << 16) >> 16) * ((vint)((vuint)w << 16) >> 16) + (a >> 16) * (w >> 16);
  }
  static inline void sum(vint&, vint) {}
};
using DotFull = DotPlain;
using DotSmall = DotPlain;

#endif

// Brings a vector of dwords of four int8 values into the form that Dot reads. Which two of the four values share an
// int16 dword is free as long as both operands agree.
template <class Dot>
static inline void split(vint packed, vint (&halves)[2]) {
  if constexpr (Dot::kSplit == 1) {
    halves[0] = packed;
  } else {
    typedef int16_t vshort __attribute__((vector_size(kLanes * 4)));
    typedef uint16_t vushort __attribute__((vector_size(kLanes * 4)));
    halves[0] = (vint)((vshort)((vushort)packed << 8) >> 8);
    halves[1] = (vint)((vshort)packed >> 8);
  }
}

// Conversions.

enum Kind : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt32 = 3 };

static inline vfloat to_float(vint value) { return __builtin_convertvector(value, vfloat); }

static inline vhalf to_bfloat16(vfloat value) {
  const vuint bits = (vuint)value;
  const vuint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vuint quiet = (bits >> 16) | 0x40u;
  const vuint is_nan = (vuint)((bits & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector((quiet & is_nan) | (rounded & ~is_nan), vhalf);
}

static inline vfloat from_bfloat16(vhalf value) { return (vfloat)(__builtin_convertvector(value, vuint) << 16); }

#if defined(QUAFF_AVX512)
static inline vhalf to_float16(vfloat value) {
  return (vhalf)_mm512_maskz_cvtps_ph(0xffff, (__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline vfloat from_float16(vhalf value) { return (vfloat)_mm512_cvtph_ps((__m256i)value); }
#elif defined(QUAFF_AVX2)
static inline vhalf to_float16(vfloat value) {
  return (vhalf)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline vfloat from_float16(vhalf value) { return (vfloat)_mm256_cvtph_ps((__m128i)value); }
#elif defined(QUAFF_NEON)
static inline vhalf to_float16(vfloat value) { return (vhalf)vcvt_f16_f32((float32x4_t)value); }
static inline vfloat from_float16(vhalf value) { return (vfloat)vcvt_f32_f16((float16x4_t)value); }
#else
// After F. Giesen's public-domain float_to_half_fast3_rtne and half_to_float.
static inline uint16_t to_float16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x47800000u) return sign | 0x7c00u;
  if (bits < 0x38800000u) {  // subnormal half: adding 0.5 aligns the bits and rounds to nearest even
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | (bits - 0x3f000000u);
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1u);
  return sign | (bits >> 13);
}
static inline float from_float16(uint16_t half) {
  uint32_t bits = (half & 0x7fffu) << 13;
  const uint32_t exponent = bits & 0x0f800000u;
  bits += 0x38000000u;
  float value;
  if (exponent == 0x0f800000u) bits += 0x38000000u;
  if (exponent == 0) {
    bits += 0x00800000u;
    std::memcpy(&value, &bits, 4);
    value -= 6.103515625e-05f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= (half & 0x8000u) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
}
static inline vhalf to_float16(vfloat value) {
  vhalf half;
  for (int lane = 0; lane < kLanes; lane++) half[lane] = to_float16(static_cast<float>(value[lane]));
  return half;
}
static inline vfloat from_float16(vhalf half) {
  vfloat value;
  for (int lane = 0; lane < kLanes; lane++) value[lane] = from_float16(static_cast<uint16_t>(half[lane]));
  return value;
}
#endif

static inline vfloat load_kind(const void* from, int kind, int64_t index) {
  if (kind == kFloat32) return load<vfloat>(static_cast<const float*>(from) + index);
  const vhalf half = load<vhalf>(static_cast<const uint16_t*>(from) + index);
  return kind == kBFloat16 ? from_bfloat16(half) : from_float16(half);
}

static inline void store_kind(void* to, int kind, int64_t index, vfloat value) {
  if (kind == kFloat32) {
    store(static_cast<float*>(to) + index, value);
  } else {
    store(static_cast<uint16_t*>(to) + index, kind == kBFloat16 ? to_bfloat16(value) : to_float16(value));
  }
}

}  // namespace quaff
