// Storage types of the tensors and their conversions, for a host compiler and for nvcc alike. Nothing here needs CUDA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#define MING_HD __host__ __device__ __forceinline__
#else
#define MING_HD inline
#endif

namespace ming {

// The codes of the C ABI (`dtype` arguments).
enum Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct half_t {
  uint16_t bits;
};
struct bfloat_t {
  uint16_t bits;
};
struct fp8_t {  // e4m3: no infinities, largest 448
  uint8_t bits;
};

MING_HD uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

MING_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

MING_HD float to_float(float value) { return value; }

MING_HD float to_float(bfloat_t value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

MING_HD float to_float(half_t value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1fu;
  const uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 0x1f) return float_of(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // subnormal: units of 2^-24
  return sign ? -magnitude : magnitude;
#endif
}

MING_HD float to_float(fp8_t value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x80u) << 24;
  const uint32_t exponent = (value.bits >> 3) & 0xfu;
  const uint32_t mantissa = value.bits & 7u;
  if ((value.bits & 0x7fu) == 0x7fu) return float_of(sign | 0x7fc00000u);
  if (exponent != 0) return float_of(sign | ((exponent + 120) << 23) | (mantissa << 20));
  const float magnitude = static_cast<float>(mantissa) * 0.001953125f;  // subnormal: units of 2^-9
  return sign ? -magnitude : magnitude;
}

// Rounds to nearest, ties to even; fp8 saturates at its largest number.
template <class T>
MING_HD T from_float(float value);

template <>
MING_HD float from_float<float>(float value) {
  return value;
}

template <>
MING_HD bfloat_t from_float<bfloat_t>(float value) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
MING_HD half_t from_float<half_t>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bits_of(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {                                                 // below 2^-14: subnormal
    const float scaled = float_of(magnitude) * 16777216.0f;                      // units of 2^-24, exact
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(scaled)))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

template <>
MING_HD fp8_t from_float<fp8_t>(float value) {
#if defined(__CUDA_ARCH__)
  return {__nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3)};
#else
  const uint32_t bits = bits_of(value);
  const uint8_t sign = static_cast<uint8_t>((bits >> 24) & 0x80u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint8_t>(sign | 0x7fu)};
  if (magnitude >= 0x43e00000u) return {static_cast<uint8_t>(sign | 0x7eu)};  // 448 and above
  if (magnitude < 0x3c800000u) {                                              // below 2^-6: subnormal
    return {static_cast<uint8_t>(sign | static_cast<uint8_t>(std::nearbyint(float_of(magnitude) * 512.0f)))};
  }
  const uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
  return {static_cast<uint8_t>(sign | ((rounded - 0x3c000000u) >> 20))};
#endif
}

// An index tensor holds int32 or int64: `bytes` is 4 or 8.
MING_HD int64_t read_index(const void* values, int32_t bytes, int64_t at) {
  return bytes == 8 ? static_cast<const int64_t*>(values)[at] : static_cast<const int32_t*>(values)[at];
}

}  // namespace ming
