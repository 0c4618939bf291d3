// FP8: units of the rounded numbers, and the rounding of activations. Without FP8 every unit is 1 and costs nothing.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "moe.h"

namespace ming {

struct Scales {
  float x, inner;                    // of the activations, for the whole tensor
  const float* gate_up_rows;         // [experts, 2 * width]
  const float* down_rows;            // [experts, hidden]

  // What a sum of products with row `row` of the weights counts in.
  template <class W>
  MING_HD float gate_up(int64_t row) const {
    return std::is_same<W, fp8_t>::value ? x * gate_up_rows[row] : 1.0f;
  }
  template <class W>
  MING_HD float down(int64_t row) const {
    return std::is_same<W, fp8_t>::value ? inner * down_rows[row] : 1.0f;
  }
  template <class W>
  MING_HD float to_inner() const {
    return std::is_same<W, fp8_t>::value ? 1.0f / inner : 1.0f;
  }
};

constexpr int32_t kRoundThreads = 256;

struct RoundLaunch {
  const void* x;
  fp8_t* out;
  int64_t count;  // a multiple of 8
  float units;    // 1 / scale
};

// x in units of its scale, as fp8; 8 elements per thread.
template <class T>
__global__ void __launch_bounds__(kRoundThreads) round_kernel(const __grid_constant__ RoundLaunch p) {
  struct alignas(16) In {
    T value[8];
  };
  struct alignas(8) Out {
    fp8_t value[8];
  };
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRoundThreads + threadIdx.x;
  if (i * 8 >= p.count) return;
  const In in = reinterpret_cast<const In*>(p.x)[i];
  Out out;
#pragma unroll
  for (int32_t e = 0; e < 8; ++e) out.value[e] = from_float<fp8_t>(to_float(in.value[e]) * p.units);
  reinterpret_cast<Out*>(p.out)[i] = out;
}

template <class T>
int32_t launch_round(const RoundLaunch& launch, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((launch.count / 8 + kRoundThreads - 1) / kRoundThreads);
  MING_LAUNCH((round_kernel<T>), dim3(blocks), dim3(kRoundThreads), 0, stream, launch);
  return static_cast<int32_t>(cudaGetLastError());
}

}  // namespace ming
