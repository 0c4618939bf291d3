// Experts for many tokens: the (token, choice) pairs are sorted by expert, each expert multiplies its own run of rows
// (a grouped GEMM), and a token's results are summed in float32.
//
// The sort is stable and uses no order of execution, so results are the same in every run.
#pragma once

#include "grouped_gemm.cuh"
#include "route.cuh"

namespace ming {

struct SortLaunch {
  const int32_t* expert;  // [slots]
  int32_t* row_slot;      // [slots]: the slot (token * top_k + k) of each sorted row
  int32_t* slot_row;      // [slots]: the inverse
  GemmTile* tiles;
  int32_t* tile_count;
  int32_t slots, experts;
};

constexpr int32_t kSortThreads = 1024;
constexpr int32_t kSortWarps = kSortThreads / 32;

// One block per expert: it counts all experts, then collects its own slots in order.
__global__ void __launch_bounds__(kSortThreads) sort_kernel(const __grid_constant__ SortLaunch launch) {
  __shared__ int32_t counts[kMaxExperts];
  __shared__ int32_t warp_count[kSortWarps];
  __shared__ int32_t begin, first_tile;
  const int32_t expert = blockIdx.x;
  const int32_t lane = threadIdx.x & 31;
  const int32_t warp = threadIdx.x >> 5;
  for (int32_t i = threadIdx.x; i < kMaxExperts; i += kSortThreads) counts[i] = 0;
  __syncthreads();
  for (int32_t i = threadIdx.x; i < launch.slots; i += kSortThreads) atomicAdd(&counts[launch.expert[i]], 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    int32_t rows = 0;
    int32_t tiles = 0;
    for (int32_t e = 0; e < expert; ++e) {
      rows += counts[e];
      tiles += (counts[e] + kTileRows - 1) / kTileRows;
    }
    begin = rows;
    first_tile = tiles;
    if (expert == launch.experts - 1) *launch.tile_count = tiles + (counts[expert] + kTileRows - 1) / kTileRows;
  }
  __syncthreads();
  const int32_t count = counts[expert];
  for (int32_t i = threadIdx.x; i * kTileRows < count; i += kSortThreads) {
    launch.tiles[first_tile + i] = GemmTile{expert, begin + i * kTileRows, begin + count};
  }
  int32_t at = begin;
  for (int32_t base = 0; base < launch.slots; base += kSortThreads) {
    const int32_t slot = base + threadIdx.x;
    const bool mine = slot < launch.slots && launch.expert[slot] == expert;
    const unsigned votes = device::ballot(mine);
    if (lane == 0) warp_count[warp] = __popc(votes);
    __syncthreads();
    int32_t row = at + __popc(votes & ((1u << lane) - 1));
    for (int32_t w = 0; w < kSortWarps; ++w) {
      if (w < warp) row += warp_count[w];
      at += warp_count[w];
    }
    if (mine) {
      launch.row_slot[row] = slot;
      launch.slot_row[slot] = row;
    }
    __syncthreads();
  }
}

struct CombineLaunch {
  const void* rows;         // [slots, hidden], sorted
  const int32_t* slot_row;  // [slots]
  const float* weight;      // [slots]
  const void* addend;       // [tokens, hidden] or null
  void* y;
  int64_t tokens;
  int32_t hidden, top_k;
};

constexpr int32_t kCombineThreads = 256;

// y = sum over k of weight * row, in float32, rounded once; 8 elements per thread.
template <class T>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const __grid_constant__ CombineLaunch p) {
  struct alignas(16) Eight {
    T value[8];
  };
  const int32_t vectors = p.hidden / 8;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x;
  if (i >= p.tokens * vectors) return;
  const int64_t token = i / vectors;
  const int32_t column = static_cast<int32_t>(i - token * vectors) * 8;
  float sum[8] = {};
#pragma unroll 4
  for (int32_t k = 0; k < p.top_k; ++k) {
    const int64_t slot = token * p.top_k + k;
    const Eight row = *reinterpret_cast<const Eight*>(static_cast<const T*>(p.rows) +
                                                      static_cast<int64_t>(p.slot_row[slot]) * p.hidden + column);
    const float weight = p.weight[slot];
#pragma unroll
    for (int32_t e = 0; e < 8; ++e) sum[e] += weight * to_float(row.value[e]);
  }
  Eight result;
#pragma unroll
  for (int32_t e = 0; e < 8; ++e) result.value[e] = from_float<T>(sum[e]);
  if (p.addend != nullptr) {
    const Eight more = *reinterpret_cast<const Eight*>(static_cast<const T*>(p.addend) + token * p.hidden + column);
#pragma unroll
    for (int32_t e = 0; e < 8; ++e) result.value[e] = from_float<T>(to_float(result.value[e]) + to_float(more.value[e]));
  }
  *reinterpret_cast<Eight*>(static_cast<T*>(p.y) + token * p.hidden + column) = result;
}

}  // namespace ming
