// Experts for 1 to 16 tokens: bound by the bytes of the chosen experts' weights, each of which is read once.
//
// Tokens are the 8 (or 2 x 8) columns of a tensor-core tile and 16 rows of weights its rows. The order of the summed
// index is free as long as both operands agree, so a lane loads 16 contiguous bytes of a row, and they are its fragments
// of two steps as they stand: weights go from memory to the tensor cores without shared memory or shuffles.
#pragma once

#include "device.cuh"
#include "route.cuh"
#include "scales.cuh"

namespace ming {

// T is the type of the output, W that of the operands of the products: T, or fp8_t.
struct DecodeLaunch {
  const void* x;        // [tokens, hidden], in W
  const void* gate_up;  // [experts, 2 * width, hidden]
  const void* down;     // [experts, hidden, width]
  const void* addend;   // [tokens, hidden] or null
  void* inner;          // [tokens * top_k, width], in W
  void* y;              // [tokens, hidden]
  const DecodePlan* plan;
  int32_t tokens, hidden, width, top_k;
  Scales scales;
};

constexpr int32_t kRows = 16;                 // of weights, per block
// Elements of K that a lane loads at once (16 bytes), and a quad of lanes.
template <class W>
constexpr int32_t kLane = 16 / sizeof(W);
template <class W>
constexpr int32_t kChunk = 4 * kLane<W>;
constexpr int32_t kGateUpWarps = 8;
constexpr int32_t kGateUpChunks = 2;          // steps whose loads are in flight together
// At least so many blocks on a multiprocessor. mma.sync of FP8 is taken apart on sm_90 and sm_100 and needs more registers.
template <class W, int kTiles>
constexpr int32_t kGateUpBlocks = sizeof(W) == 1 ? 1 : kTiles == 1 ? 3 : 2;
constexpr int32_t kDownWarps = 16;
constexpr int32_t kDownChunks = 2;

namespace detail {

// The 16 bytes at `source`, or zeros.
template <class T>
__device__ __forceinline__ uint4 weight_chunk(const T* source, bool valid) {
  return valid ? device::load_streaming(source) : uint4{0, 0, 0, 0};
}

template <class T>
__device__ __forceinline__ uint4 token_chunk(const T* row, int32_t k, int32_t columns) {
  if (row != nullptr && k < columns) return *reinterpret_cast<const uint4*>(row + k);
  return uint4{0, 0, 0, 0};
}

// Both tensor-core steps of a chunk: rows g and g + 8 of the weights against one column of tokens.
template <class T>
__device__ __forceinline__ void multiply_chunk(float (&sum)[4], const uint4& upper, const uint4& lower,
                                               const uint4& token) {
  const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
  const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
  device::mma_step<T>(sum, first, token.x, token.y);
  device::mma_step<T>(sum, second, token.z, token.w);
}

}  // namespace detail

// inner[token * top_k + place] = silu(gate(x)) * up(x), for block.y-th chosen expert and 16 of its rows.
template <class T, class W, int kTiles>
__global__ void __launch_bounds__(kGateUpWarps * 32, kGateUpBlocks<W, kTiles>) decode_gate_up_kernel(const __grid_constant__ DecodeLaunch p) {
  __shared__ float partial[kGateUpWarps][2][kTiles][32][4];
  const int32_t chosen = blockIdx.y;
  if (chosen >= p.plan->count) return;
  const int32_t lane = threadIdx.x & 31;
  const int32_t warp = threadIdx.x >> 5;
  const int32_t group = lane >> 2;
  const int32_t quad = lane & 3;
  const int32_t first_row = blockIdx.x * kRows;
  const bool upper = first_row + group < p.width;
  const bool lower = first_row + group + 8 < p.width;
  const W* gate = static_cast<const W*>(p.gate_up) +
                  (static_cast<int64_t>(p.plan->expert[chosen]) * 2 * p.width + first_row + group) * p.hidden;
  const int64_t lower_offset = int64_t{8} * p.hidden;
  const int64_t up_offset = static_cast<int64_t>(p.width) * p.hidden;
  const W* token[kTiles];
#pragma unroll
  for (int32_t n = 0; n < kTiles; ++n) {
    const int32_t t = n * 8 + group;
    token[n] = t < p.tokens && p.plan->place[chosen][t] >= 0
                   ? static_cast<const W*>(p.x) + static_cast<int64_t>(t) * p.hidden
                   : nullptr;
  }
  float sum[2][kTiles][4] = {};
  constexpr int32_t kChunks = kGateUpChunks;
  for (int32_t base = warp * kChunks * kChunk<W>; base < p.hidden; base += kGateUpWarps * kChunks * kChunk<W>) {
    uint4 weights[kChunks][4];
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
      const int32_t k = base + c * kChunk<W> + quad * kLane<W>;
      const bool inside = k < p.hidden;
      weights[c][0] = detail::weight_chunk(gate + k, upper && inside);
      weights[c][1] = detail::weight_chunk(gate + lower_offset + k, lower && inside);
      weights[c][2] = detail::weight_chunk(gate + up_offset + k, upper && inside);
      weights[c][3] = detail::weight_chunk(gate + up_offset + lower_offset + k, lower && inside);
    }
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
      const int32_t k = base + c * kChunk<W> + quad * kLane<W>;
#pragma unroll
      for (int32_t n = 0; n < kTiles; ++n) {
        const uint4 values = detail::token_chunk(token[n], k, p.hidden);
        detail::multiply_chunk<W>(sum[0][n], weights[c][0], weights[c][1], values);
        detail::multiply_chunk<W>(sum[1][n], weights[c][2], weights[c][3], values);
      }
    }
  }
#pragma unroll
  for (int32_t n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      partial[warp][0][n][lane][i] = sum[0][n][i];
      partial[warp][1][n][lane][i] = sum[1][n][i];
    }
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < kRows * 8 * kTiles; i += kGateUpWarps * 32) {
    const int32_t row = i % kRows;
    const int32_t t = i / kRows;
    if (t >= p.tokens || first_row + row >= p.width) continue;
    const int32_t place = p.plan->place[chosen][t];
    if (place < 0) continue;
    // Element (row, column) of a 16 x 8 accumulator: lane and register as PTX defines them.
    const int32_t owner = (row & 7) * 4 + (t & 7) / 2;
    const int32_t element = (row >> 3) * 2 + (t & 1);
    float gate_sum = 0;
    float up_sum = 0;
#pragma unroll
    for (int32_t w = 0; w < kGateUpWarps; ++w) {
      gate_sum += partial[w][0][t >> 3][owner][element];
      up_sum += partial[w][1][t >> 3][owner][element];
    }
    const int64_t scale_row = static_cast<int64_t>(p.plan->expert[chosen]) * 2 * p.width + first_row + row;
    gate_sum *= p.scales.gate_up<W>(scale_row);
    up_sum *= p.scales.gate_up<W>(scale_row + p.width);
    static_cast<W*>(p.inner)[static_cast<int64_t>(t * p.top_k + place) * p.width + first_row + row] =
        from_float<W>(silu(gate_sum) * up_sum * p.scales.to_inner<W>());
  }
}

// y = sum over the chosen experts of weight * down(inner), in float32, rounded once; 16 rows of y for all tokens.
template <class T, class W, int kTiles>
__global__ void __launch_bounds__(kDownWarps * 32, 1) decode_down_kernel(const __grid_constant__ DecodeLaunch p) {
  __shared__ float partial[kDownWarps][kTiles][32][4];
  const int32_t lane = threadIdx.x & 31;
  const int32_t warp = threadIdx.x >> 5;
  const int32_t group = lane >> 2;
  const int32_t quad = lane & 3;
  const int32_t first_row = blockIdx.x * kRows;
  const int32_t steps = (p.width + kDownChunks * kChunk<W> - 1) / (kDownChunks * kChunk<W>);  // of one expert
  const int32_t units = p.plan->count * steps;
  float total[kTiles][4] = {};
#pragma unroll 2
  for (int32_t unit = warp; unit < units; unit += kDownWarps) {
    const int32_t chosen = unit / steps;
    const int32_t base = (unit - chosen * steps) * kDownChunks * kChunk<W>;
    const W* row = static_cast<const W*>(p.down) +
                   (static_cast<int64_t>(p.plan->expert[chosen]) * p.hidden + first_row + group) * p.width;
    uint4 weights[kDownChunks][2];
#pragma unroll
    for (int32_t c = 0; c < kDownChunks; ++c) {
      const int32_t k = base + c * kChunk<W> + quad * kLane<W>;
      weights[c][0] = detail::weight_chunk(row + k, first_row + group < p.hidden && k < p.width);
      weights[c][1] = detail::weight_chunk(row + int64_t{8} * p.width + k, first_row + group + 8 < p.hidden && k < p.width);
    }
    float scale[2];
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      const int32_t r = first_row + group + 8 * i;
      scale[i] =
          r < p.hidden ? p.scales.down<W>(static_cast<int64_t>(p.plan->expert[chosen]) * p.hidden + r) : 0.0f;
    }
#pragma unroll
    for (int32_t n = 0; n < kTiles; ++n) {
      const int32_t t = n * 8 + group;
      const int32_t place = t < p.tokens ? p.plan->place[chosen][t] : -1;
      const W* token =
          place >= 0 ? static_cast<const W*>(p.inner) + static_cast<int64_t>(t * p.top_k + place) * p.width : nullptr;
      float sum[4] = {};
#pragma unroll
      for (int32_t c = 0; c < kDownChunks; ++c) {
        const uint4 values = detail::token_chunk(token, base + c * kChunk<W> + quad * kLane<W>, p.width);
        detail::multiply_chunk<W>(sum, weights[c][0], weights[c][1], values);
      }
      // Columns 2 * quad and 2 * quad + 1 are this lane's; a token that did not choose the expert has weight 0.
      const float even = p.plan->weight[chosen][n * 8 + quad * 2];
      const float odd = p.plan->weight[chosen][n * 8 + quad * 2 + 1];
      total[n][0] += even * (sum[0] * scale[0]);
      total[n][1] += odd * (sum[1] * scale[0]);
      total[n][2] += even * (sum[2] * scale[1]);
      total[n][3] += odd * (sum[3] * scale[1]);
    }
  }
#pragma unroll
  for (int32_t n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) partial[warp][n][lane][i] = total[n][i];
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < kRows * 8 * kTiles; i += kDownWarps * 32) {
    const int32_t row = i % kRows;
    const int32_t t = i / kRows;
    if (t >= p.tokens || first_row + row >= p.hidden) continue;
    const int32_t owner = (row & 7) * 4 + (t & 7) / 2;
    const int32_t element = (row >> 3) * 2 + (t & 1);
    float sum = 0;
#pragma unroll
    for (int32_t w = 0; w < kDownWarps; ++w) sum += partial[w][t >> 3][owner][element];
    T result = from_float<T>(sum);
    const int64_t at = static_cast<int64_t>(t) * p.hidden + first_row + row;
    if (p.addend != nullptr) result = from_float<T>(to_float(result) + to_float(static_cast<const T*>(p.addend)[at]));
    static_cast<T*>(p.y)[at] = result;
  }
}

// `most` is an upper bound of the number of chosen experts, known without reading the device.
template <class T, class W, int kTiles>
int32_t launch_decode_tiles(const DecodeLaunch& launch, int32_t most, cudaStream_t stream) {
  const auto blocks = [](int32_t rows) { return static_cast<unsigned>((rows + kRows - 1) / kRows); };
  MING_LAUNCH((decode_gate_up_kernel<T, W, kTiles>), dim3(blocks(launch.width), static_cast<unsigned>(most)),
              dim3(kGateUpWarps * 32), 0, stream, launch);
  const auto status = static_cast<int32_t>(cudaGetLastError());
  if (status != 0) return status;
  MING_LAUNCH((decode_down_kernel<T, W, kTiles>), dim3(blocks(launch.hidden)), dim3(kDownWarps * 32), 0, stream, launch);
  return static_cast<int32_t>(cudaGetLastError());
}

template <class T, class W>
int32_t launch_decode(const DecodeLaunch& launch, int32_t experts, cudaStream_t stream) {
  const int32_t slots = launch.tokens * launch.top_k;
  const int32_t most = slots < experts ? slots : experts;
  return launch.tokens <= 8 ? launch_decode_tiles<T, W, 1>(launch, most, stream)
                            : launch_decode_tiles<T, W, 2>(launch, most, stream);
}

}  // namespace ming
