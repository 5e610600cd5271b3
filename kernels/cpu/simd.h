// Vector primitives. The library is compiled once per instruction set; this header knows which. To add one, give it a block
// below and a row in build.py. Tile registers are no vectors: amx.h has them, and gemm_amx.cpp and attention_amx.h are written
// for them in place of gemm_vectors.cpp and attention_vectors.h.
//
// Vectors are the compiler's own vector types, so + - * / work on them in every variant.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace octavo {

using bf16 = uint16_t;

// ---------------------------------------------------------------- width and registers

#if defined(__AVX512F__) && defined(__AVX512VL__)
#define OCTAVO_AVX512 1
#if defined(__AVX512BF16__)
#define OCTAVO_AVX512_BF16 1
#endif
#if defined(__AVX512VNNI__)
#define OCTAVO_AVX512_VNNI 1
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define OCTAVO_AMX 1  // see amx.h
#endif
constexpr int kLanes = 16;         // float32 values in a vector
constexpr int kAccumulators = 24;  // vector registers that a kernel may fill with sums
constexpr int kMaxTileRows = 12;   // rows that a kernel multiplies at once
#elif defined(__AVX2__) && defined(__FMA__)
#define OCTAVO_AVX2 1
#if defined(__AVXVNNI__)
#define OCTAVO_AVX_VNNI 1
#endif
constexpr int kLanes = 8;
constexpr int kAccumulators = 8;
constexpr int kMaxTileRows = 4;
#elif defined(__aarch64__)
#define OCTAVO_NEON 1
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define OCTAVO_NEON_BF16 1
#endif
#if defined(__ARM_FEATURE_DOTPROD)
#define OCTAVO_NEON_DOTPROD 1
#endif
constexpr int kLanes = 4;
constexpr int kAccumulators = 24;
constexpr int kMaxTileRows = 6;
#else
constexpr int kLanes = 4;
constexpr int kAccumulators = 8;
constexpr int kMaxTileRows = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));
typedef int8_t ByteVec __attribute__((vector_size(kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes * 4)));  // a whole vector of them

// ---------------------------------------------------------------- loads, stores, lanes

inline Vec load(const float* source) {
  Vec value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

inline void store(float* target, Vec value) { std::memcpy(target, &value, sizeof value); }

// Store what is not read soon past the caches, where the instruction set can. `target` is a multiple of the vector's size.
// `order_stores` comes between such stores and what tells other threads of them.
inline void store_past_caches(float* target, Vec value) {
#if defined(OCTAVO_AVX512)
  _mm512_stream_ps(target, value);
#elif defined(OCTAVO_AVX2)
  _mm256_stream_ps(target, value);
#else
  store(target, value);
#endif
}
inline void order_stores() {
#if defined(OCTAVO_AVX512) || defined(OCTAVO_AVX2)
  _mm_sfence();
#endif
}

inline Vec broadcast(float value) { return value - Vec{}; }
inline IntVec broadcast(int32_t value) { return value - IntVec{}; }

inline Vec to_float(IntVec value) { return __builtin_convertvector(value, Vec); }

inline IntVec bits(Vec value) { return reinterpret_cast<IntVec>(value); }
inline Vec from_bits(IntVec value) { return reinterpret_cast<Vec>(value); }

// ---------------------------------------------------------------- arithmetic

// a * b + c, rounded once where the instruction set can.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(OCTAVO_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(OCTAVO_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(OCTAVO_NEON)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// The larger of the two; b where one is not a number.
inline Vec maximum(Vec a, Vec b) {
#if defined(OCTAVO_AVX512)
  return _mm512_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline Vec minimum(Vec a, Vec b) {
#if defined(OCTAVO_AVX512)
  return _mm512_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// Sum and maximum over the lanes, always in the same order.
inline float sum_lanes(Vec value) {
#if defined(OCTAVO_AVX512)
  return _mm512_reduce_add_ps(value);
#else
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) value[i] += value[i + width];
  return value[0];
#endif
}

inline float max_lanes(Vec value) {
#if defined(OCTAVO_AVX512)
  return _mm512_reduce_max_ps(value);
#else
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) value[i] = value[i] > value[i + width] ? value[i] : value[i + width];
  return value[0];
#endif
}

// A polynomial of x, by its coefficients from that of the highest power on.
template <class... Floats>
inline Vec polynomial(Vec x, float highest, Floats... lower) {
  Vec sum = broadcast(highest);
  ((sum = multiply_add(sum, x, broadcast(lower))), ...);
  return sum;
}

#if defined(OCTAVO_AVX512)
// What lies between x and the integer below it. With AMX 0 where x is infinite, else not a number there.
inline Vec fraction_of(Vec x) {
#if defined(OCTAVO_AMX)
  return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  return x - _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#endif
}
#endif

// 2^x for x up to 127, by a polynomial that approximates 2^fraction for fractions in [0, 1]. Exactly 0 below -126: a product that
// underflows takes a hundred times as long.
template <class... Floats>
inline Vec exp2_by(Vec x, Floats... coefficients) {
#if defined(OCTAVO_AVX512)
  const Vec fraction = fraction_of(x);
#else
  const Vec clamped = maximum(x, broadcast(-126.0f));
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = clamped - broadcast(0.5f) + magic;
  const Vec fraction = clamped - (shifted - magic);
#endif
  const Vec power = polynomial(fraction, coefficients...);
#if defined(OCTAVO_AVX512)
  const __mmask16 is_normal = _mm512_cmp_ps_mask(x, broadcast(-126.0f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(is_normal, power, x);  // by 2 to the power of the integer below x
#else
  const IntVec exponent = (bits(shifted) - bits(magic)) << 23;
  const Vec result = from_bits(bits(power) + exponent);
  return x < broadcast(-126.0f) ? Vec{} : result;
#endif
}

// 2^x, relative error below 3e-7; exactly 1 at 0 and exactly 0 below -126. x must not exceed 127.
inline Vec exp2(Vec x) {
  return exp2_by(x, 1.8671183e-3f, 9.0170549e-3f, 5.5799894e-2f, 2.4016446e-1f, 6.9315130e-1f, 1.0f);
}

// The same for what becomes an activation, with a relative error below 9e-5 where that is bf16, which is a 22nd of what rounding
// does, and below 3e-6 else. With AMX the result is 0 below -126 only while SubnormalsAreZero lives.
inline Vec short_exp2(Vec x) {
#if defined(OCTAVO_AMX)
  return _mm512_scalef_ps(polynomial(fraction_of(x), 7.7067040e-2f, 2.2764500e-1f, 6.9511676e-1f, 1.0f), x);
#elif defined(OCTAVO_AVX512_BF16) || defined(OCTAVO_NEON_BF16)
  return exp2_by(x, 7.7067040e-2f, 2.2764500e-1f, 6.9511676e-1f, 1.0f);
#else
  return exp2_by(x, 1.3426519e-2f, 5.2242741e-2f, 2.4128008e-1f, 6.9304484e-1f, 1.0f);
#endif
}

// Upper and lower halves of the 64-bit products a * b.
inline void multiply_wide(UintVec a, uint32_t b, UintVec& high, UintVec& low) {
#if defined(OCTAVO_AVX512)
  const __m512i factor = _mm512_set1_epi32(static_cast<int32_t>(b));
  const __m512i even = _mm512_mul_epu32(reinterpret_cast<__m512i>(a), factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(reinterpret_cast<__m512i>(a), 32), factor);
  high = reinterpret_cast<UintVec>(_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd));
  low = reinterpret_cast<UintVec>(_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32)));
#elif defined(OCTAVO_AVX2)
  const __m256i factor = _mm256_set1_epi32(static_cast<int32_t>(b));
  const __m256i even = _mm256_mul_epu32(reinterpret_cast<__m256i>(a), factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(reinterpret_cast<__m256i>(a), 32), factor);
  high = reinterpret_cast<UintVec>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
  low = reinterpret_cast<UintVec>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * b;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
#endif
}

inline int32_t sum_lanes(IntVec value) {
#if defined(OCTAVO_AVX512)
  return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(value));
#else
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) value[i] += value[i + width];
  return value[0];
#endif
}

inline int32_t max_lanes(IntVec value) {
#if defined(OCTAVO_AVX512)
  return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(value));
#else
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) value[i] = value[i] > value[i + width] ? value[i] : value[i + width];
  return value[0];
#endif
}

// Whether a comparison holds in any lane.
inline bool any_lane(IntVec mask) {
#if defined(OCTAVO_AVX512)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(OCTAVO_AVX2)
  return _mm256_movemask_epi8(reinterpret_cast<__m256i>(mask)) != 0;
#elif defined(OCTAVO_NEON)
  return vmaxvq_u32(reinterpret_cast<uint32x4_t>(mask)) != 0;
#else
  bool result = false;
  for (int lane = 0; lane < kLanes; ++lane) result |= mask[lane] != 0;
  return result;
#endif
}

template <int kRows, int kColumns>
inline void clear(Vec (&values)[kRows][kColumns]) {
  for (auto& row : values)
    for (Vec& value : row) value = Vec{};
}

// ---------------------------------------------------------------- bytes

constexpr int kTableBytes = 16;
#if defined(OCTAVO_AVX512) || defined(OCTAVO_AVX2) || defined(OCTAVO_NEON)
constexpr bool kHasLookUp = true;  // as an instruction
#else
constexpr bool kHasLookUp = false;
#endif

// A table of so many bytes, in the form that `look_up` takes.
inline Bytes load_table(const uint8_t* source) {
#if defined(OCTAVO_AVX512)
  return reinterpret_cast<Bytes>(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
#elif defined(OCTAVO_AVX2)
  return reinterpret_cast<Bytes>(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
#else
  Bytes table;
  static_assert(sizeof table == kTableBytes);
  std::memcpy(&table, source, sizeof table);
  return table;
#endif
}

inline Bytes load_bytes(const uint8_t* source) {
  Bytes bytes;
  std::memcpy(&bytes, source, sizeof bytes);
  return bytes;
}

// Bits by `count` places, from each byte into those beside it as well: these are to be masked away.
typedef uint16_t BytePlaces __attribute__((vector_size(kLanes * 4)));
inline Bytes shift_left(Bytes bytes, int count) {
  return reinterpret_cast<Bytes>(reinterpret_cast<BytePlaces>(bytes) << count);
}
inline Bytes shift_right(Bytes bytes, int count) {
  return reinterpret_cast<Bytes>(reinterpret_cast<BytePlaces>(bytes) >> count);
}

// The table's byte number `index`, which is below kTableBytes, for each byte.
inline Bytes look_up(Bytes table, Bytes index) {
#if defined(OCTAVO_AVX512)
  return reinterpret_cast<Bytes>(_mm512_shuffle_epi8(reinterpret_cast<__m512i>(table), reinterpret_cast<__m512i>(index)));
#elif defined(OCTAVO_AVX2)
  return reinterpret_cast<Bytes>(_mm256_shuffle_epi8(reinterpret_cast<__m256i>(table), reinterpret_cast<__m256i>(index)));
#elif defined(OCTAVO_NEON)
  return vqtbl1q_u8(table, index);
#else
  for (size_t i = 0; i < sizeof index; ++i) index[i] = table[index[i]];
  return index;
#endif
}

// Two vectors of bytes as one of pairs, in two halves: of each 16 bytes the first eight, and the others. In a pair `upper` is
// behind `lower`.
struct BytePairs {
  Bytes first;
  Bytes last;
};

inline BytePairs interleave(Bytes lower, Bytes upper) {
#if defined(OCTAVO_AVX512)
  const auto a = reinterpret_cast<__m512i>(lower), b = reinterpret_cast<__m512i>(upper);
  return {reinterpret_cast<Bytes>(_mm512_unpacklo_epi8(a, b)), reinterpret_cast<Bytes>(_mm512_unpackhi_epi8(a, b))};
#elif defined(OCTAVO_AVX2)
  const auto a = reinterpret_cast<__m256i>(lower), b = reinterpret_cast<__m256i>(upper);
  return {reinterpret_cast<Bytes>(_mm256_unpacklo_epi8(a, b)), reinterpret_cast<Bytes>(_mm256_unpackhi_epi8(a, b))};
#elif defined(OCTAVO_NEON)
  return {vzip1q_u8(lower, upper), vzip2q_u8(lower, upper)};
#else
  BytePairs pairs;
  for (size_t i = 0; i < sizeof lower; ++i) (i < 8 ? pairs.first : pairs.last)[i % 8 * 2] = lower[i];
  for (size_t i = 0; i < sizeof upper; ++i) (i < 8 ? pairs.first : pairs.last)[i % 8 * 2 + 1] = upper[i];
  return pairs;
#endif
}

// ---------------------------------------------------------------- bf16

inline float bf16_to_float(bf16 value) {
  const uint32_t word = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

// Round to nearest even; a value that is not a number stays one.
inline bf16 float_to_bf16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  if ((word & 0x7fffffff) > 0x7f800000) return static_cast<bf16>((word >> 16) | 0x40);
  return static_cast<bf16>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

inline Vec load_bf16(const bf16* source) {
  HalfVec half;
  std::memcpy(&half, source, sizeof half);
  return from_bits(__builtin_convertvector(half, IntVec) << 16);
}

// Rounded to the nearest bf16 number, even in a tie.
inline Vec round_to_bf16(Vec value) {
  const IntVec word = bits(value);
  const IntVec rounded = (word + 0x7fff + ((word >> 16) & 1)) & static_cast<int32_t>(0xffff0000u);
  const IntVec not_a_number = (word & static_cast<int32_t>(0xffff0000u)) | 0x400000;
  return from_bits(value == value ? rounded : not_a_number);
}

inline void store_bf16(bf16* target, Vec value) {
#if defined(OCTAVO_AVX512_BF16)
  const __m256bh half = _mm512_cvtneps_pbh(value);
#else
  const HalfVec half = __builtin_convertvector(reinterpret_cast<UintVec>(round_to_bf16(value)) >> 16, HalfVec);
#endif
  std::memcpy(target, &half, sizeof half);
}

// Store them rounded in every second place, from `target` + `odd` on. What lies between stays, and another thread may write it.
inline void store_every_second(bf16* target, int odd, Vec value) {
  alignas(64) bf16 rounded[kLanes];
  store_bf16(rounded, value);
#if defined(OCTAVO_AVX512)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(rounded)));
  _mm512_mask_storeu_epi16(target, 0x55555555u << odd, odd ? _mm512_slli_epi32(wide, 16) : wide);
#else
  for (int i = 0; i < kLanes; ++i) target[2 * i + odd] = rounded[i];
#endif
}

// ---------------------------------------------------------------- dot products of pairs

// A kernel multiplies weights, pairs of bf16 in memory, with activations. Where the instruction
// set multiplies bf16, these are bf16 as well; elsewhere the same numbers in float32, so that
// the inner loop need not widen them.
//
// store_activation rounded to the nearest bf16 number
// load_activation  as float32
// load_pairs       one pair of weights a lane
// broadcast_pair   the same pair of activations in every lane
// dot_pairs        sum + a.even * b.even + a.odd * b.odd in each lane
#if defined(OCTAVO_AVX512_BF16) || defined(OCTAVO_NEON_BF16)
using Activation = bf16;

inline void store_activation(Activation* target, Vec value) { store_bf16(target, value); }
inline Vec load_activation(const Activation* source) { return load_bf16(source); }
#else
using Activation = float;

struct Pairs {
  Vec even;
  Vec odd;
};

inline void store_activation(Activation* target, Vec value) { store(target, round_to_bf16(value)); }
inline Vec load_activation(const Activation* source) { return load(source); }

inline Pairs load_pairs(const bf16* source) {
  IntVec words;
  std::memcpy(&words, source, sizeof words);
  return {from_bits(words << 16), from_bits(words & static_cast<int32_t>(0xffff0000u))};
}

inline Pairs broadcast_pair(const Activation* source) { return {broadcast(source[0]), broadcast(source[1])}; }

inline Vec dot_pairs(Vec sum, Pairs a, Pairs b) {
  return multiply_add(a.odd, b.odd, multiply_add(a.even, b.even, sum));
}
#endif

// Two vectors, one after the other.
inline void store_activations(Activation* target, Vec first, Vec second) {
#if defined(OCTAVO_AVX512_BF16)
  const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
  std::memcpy(target, &both, sizeof both);
#else
  store_activation(target, first);
  store_activation(target + kLanes, second);
#endif
}

#if defined(OCTAVO_AVX512_BF16)
using Pairs = __m512bh;

inline Pairs load_pairs(const bf16* source) { return (__m512bh)_mm512_loadu_si512(source); }

inline Pairs broadcast_pair(const Activation* source) {
  int32_t pair;
  std::memcpy(&pair, source, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}

inline Vec dot_pairs(Vec sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, a, b); }
#elif defined(OCTAVO_NEON_BF16)
using Pairs = bfloat16x8_t;

inline Pairs load_pairs(const bf16* source) { return vld1q_bf16(reinterpret_cast<const bfloat16_t*>(source)); }

inline Pairs broadcast_pair(const Activation* source) {
  int32_t pair;
  std::memcpy(&pair, source, sizeof pair);
  return vreinterpretq_bf16_s32(vdupq_n_s32(pair));
}

inline Vec dot_pairs(Vec sum, Pairs a, Pairs b) { return vbfdotq_f32(sum, a, b); }
#endif

// ---------------------------------------------------------------- dot products of quads of bytes

// A quantised kernel multiplies weights, quads of bytes in memory, with quantised activations, and
// sums int32: exactly, whatever the instructions.
//
// store_quads      16 or more activations, each in [-127, 127], as the kernels read them
// load_quads       one quad of 8-bit weights a lane, which lie in memory as (weight ^ kByteFlip)
// load_nibbles     two quads of 4-bit weights in [0, 15] a lane: those in the low halves of the bytes and in the high
// broadcast_quad   the same quad of activations in every lane
// dot_quads        sum + the four products, in each lane; 8-bit weights that count from kByteFlip
//                  bring kByteFlip times the sum of the activations too much
//
// The instructions of AVX512-VNNI and AVX-VNNI multiply unsigned weights; elsewhere they are signed.
#if defined(OCTAVO_AVX512_VNNI) || defined(OCTAVO_AVX_VNNI)
using ByteActivation = int8_t;
typedef uint8_t Quads __attribute__((vector_size(kLanes * 4)));
using QuadActivations = IntVec;
constexpr int kByteFlip = 128;

inline Quads load_quads(const uint8_t* source) {
  Quads quads;
  std::memcpy(&quads, source, sizeof quads);
  return quads;
}

inline void load_nibbles(const uint8_t* source, Quads& low, Quads& high) {
  const Quads bytes = load_quads(source);
  low = bytes & 15;
  high = bytes >> 4;
}

inline QuadActivations broadcast_quad(const ByteActivation* source) {
  int32_t quad;
  std::memcpy(&quad, source, sizeof quad);
  return broadcast(quad);
}

inline IntVec dot_quads(IntVec sum, Quads weights, QuadActivations x) {
#if defined(OCTAVO_AVX512_VNNI)
  return reinterpret_cast<IntVec>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(weights), reinterpret_cast<__m512i>(x)));
#else
  return reinterpret_cast<IntVec>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(weights), reinterpret_cast<__m256i>(x)));
#endif
}
#elif defined(OCTAVO_NEON_DOTPROD)
using ByteActivation = int8_t;
using Quads = int8x16_t;
using QuadActivations = int8x16_t;
constexpr int kByteFlip = 0;

inline Quads load_quads(const uint8_t* source) { return vld1q_s8(reinterpret_cast<const int8_t*>(source)); }

inline void load_nibbles(const uint8_t* source, Quads& low, Quads& high) {
  const uint8x16_t bytes = vld1q_u8(source);
  low = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
  high = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
}

inline QuadActivations broadcast_quad(const ByteActivation* source) {
  int32_t quad;
  std::memcpy(&quad, source, sizeof quad);
  return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}

inline IntVec dot_quads(IntVec sum, Quads weights, QuadActivations x) {
  return reinterpret_cast<IntVec>(vdotq_s32(reinterpret_cast<int32x4_t>(sum), weights, x));
}
#elif defined(OCTAVO_AVX512) || defined(OCTAVO_AVX2)
// Without an instruction for four products, pairs of 16 bits: first and third, second and fourth. The
// one for pairs of bytes would be no faster: it cannot hold the sum of two products of 8 bits.
using ByteActivation = int16_t;
constexpr int kByteFlip = 0;
typedef int16_t ShortVec __attribute__((vector_size(kLanes * 4)));

struct Quads {
  ShortVec even;
  ShortVec odd;
};
using QuadActivations = Quads;

inline IntVec dot_pairs(ShortVec a, ShortVec b) {
#if defined(OCTAVO_AVX512)
  return reinterpret_cast<IntVec>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#else
  return reinterpret_cast<IntVec>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#endif
}

inline Quads load_quads(const uint8_t* source) {
  ShortVec bytes;
  std::memcpy(&bytes, source, sizeof bytes);
  return {bytes << 8 >> 8, bytes >> 8};
}

inline void load_nibbles(const uint8_t* source, Quads& low, Quads& high) {
  ShortVec bytes;
  std::memcpy(&bytes, source, sizeof bytes);
  low = {bytes & 15, bytes >> 8 & 15};
  high = {bytes >> 4 & 15, bytes >> 12 & 15};
}

inline QuadActivations broadcast_quad(const ByteActivation* source) {
  int32_t even, odd;
  std::memcpy(&even, source, sizeof even);
  std::memcpy(&odd, source + 2, sizeof odd);
  return {reinterpret_cast<ShortVec>(broadcast(even)), reinterpret_cast<ShortVec>(broadcast(odd))};
}

inline IntVec dot_quads(IntVec sum, Quads weights, QuadActivations x) {
  return sum + dot_pairs(weights.even, x.even) + dot_pairs(weights.odd, x.odd);
}
#else
using ByteActivation = int32_t;
constexpr int kByteFlip = 0;

struct Quads {
  IntVec bytes[4];
};
using QuadActivations = Quads;

inline Quads load_quads(const uint8_t* source) {
  IntVec words;
  std::memcpy(&words, source, sizeof words);
  return {{words << 24 >> 24, words << 16 >> 24, words << 8 >> 24, words >> 24}};
}

inline void load_nibbles(const uint8_t* source, Quads& low, Quads& high) {
  IntVec words;
  std::memcpy(&words, source, sizeof words);
  for (int i = 0; i < 4; ++i) {
    low.bytes[i] = words >> (8 * i) & 15;
    high.bytes[i] = words >> (8 * i + 4) & 15;
  }
}

inline QuadActivations broadcast_quad(const ByteActivation* source) {
  return {{broadcast(source[0]), broadcast(source[1]), broadcast(source[2]), broadcast(source[3])}};
}

inline IntVec dot_quads(IntVec sum, Quads weights, QuadActivations x) {
  for (int i = 0; i < 4; ++i) sum += weights.bytes[i] * x.bytes[i];
  return sum;
}
#endif

// Weights that lie in a vector as `load_quads` finds them in memory.
inline Quads quads_of(Bytes bytes) {
  alignas(64) uint8_t stored[sizeof bytes];
  std::memcpy(stored, &bytes, sizeof bytes);
  return load_quads(stored);
}

// `count` integers, a multiple of 4, within [-127, 127].
inline void store_quads(ByteActivation* target, const int8_t* source, int count) {
  if constexpr (sizeof(ByteActivation) == 1) {
    std::memcpy(target, source, count);
  } else {
    constexpr bool kInPairs = sizeof(ByteActivation) == 2;  // first and third, second and fourth
    for (int i = 0; i < count; ++i) target[kInPairs ? (i & ~3) + (i & 1) * 2 + (i >> 1 & 1) : i] = source[i];
  }
}

// ---------------------------------------------------------------- half precision

inline float half_to_float(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16;
  const uint32_t magnitude = value & 0x7fff;
  if (magnitude < 0x0400) {  // zero and subnormal numbers
    const float result = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return sign != 0 ? -result : result;
  }
  const uint32_t exponent_shift = magnitude >= 0x7c00 ? (255u - 31u) << 23 : (127u - 15u) << 23;
  const uint32_t word = sign | ((magnitude << 13) + exponent_shift);
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

// Rounded to the nearest, even in a tie; what is too large becomes infinite.
inline uint16_t float_to_half(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  const uint16_t sign = static_cast<uint16_t>(word >> 16 & 0x8000);
  word &= 0x7fffffff;
  if (word > 0x7f800000) return sign | 0x7e00;
  if (word >= 0x477ff000) return sign | 0x7c00;
  if (word < 0x38800000) {  // subnormal: adding 0.5 puts its last bit where the last bit of a float32 is
    float magnitude;
    std::memcpy(&magnitude, &word, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&word, &magnitude, sizeof word);
    return static_cast<uint16_t>(sign | (word - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((word + 0xfff + (word >> 13 & 1) - (112u << 23)) >> 13));
}

// Numbers of half precision; what is not finite becomes something that is not, either.
inline Vec load_half(const uint16_t* source) {
#if defined(OCTAVO_AVX512)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(OCTAVO_AVX2)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
  HalfVec half;
  std::memcpy(&half, source, sizeof half);
  const IntVec word = __builtin_convertvector(half, IntVec);
  // As a float32 the same digits and exponent mean 2^112 times less, also where they are subnormal.
  const Vec magnitude = from_bits((word & 0x7fff) << 13) * broadcast(5.192296858534828e33f);
  const IntVec not_finite = ((word & 0x7c00) == 0x7c00) & 0x7f800000;
  return from_bits(bits(magnitude) | not_finite | (word & 0x8000) << 16);
#endif
}

// ---------------------------------------------------------------- the processor and its state

// For choices that change times and no result.
enum class Vendor { kIntel, kAmd, kOther };

inline Vendor vendor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("intel")) return Vendor::kIntel;
  if (__builtin_cpu_is("amd")) return Vendor::kAmd;
#endif
  return Vendor::kOther;
}

inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }
inline void prefetch_to_write(const void* address) { __builtin_prefetch(address, 1, 3); }
inline void prefetch_l2(const void* address) { __builtin_prefetch(address, 0, 2); }
inline void prefetch_past_caches(const void* address) { __builtin_prefetch(address, 0, 0); }  // into the first one alone

// Rounds to nearest and keeps subnormal numbers while it lives, whatever the calling thread was
// set to, so that all threads compute the same bits.
class DefaultFloatMode {
 public:
#if defined(__SSE2__)
  DefaultFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultFloatMode() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~DefaultFloatMode() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#else
  DefaultFloatMode() {}
#endif
};

// ---------------------------------------------------------------- small helpers

// Make the compiler forget how it came by a pointer, so that it does not derive others from it
// ahead of time.
template <class T>
inline void keep_in_register(T*& pointer) {
  asm("" : "+r"(pointer));
}

// Make the compiler compute a vector where it stands.
template <class AnyVec>
inline void keep(AnyVec& value) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(value));
#else
  asm volatile("" : "+w"(value));
#endif
}

// What is always true. Where a loop over sums is known to run at least once, the compiler keeps them in registers from the
// start; else it prepares a copy of them in memory, and moves them there and back.
inline void assume(bool condition) {
  if (!condition) __builtin_unreachable();
}

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace octavo
