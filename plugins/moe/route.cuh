// Routing: softmax over the experts in float32, the top_k of it, optionally divided by their sum. One warp per token.
#pragma once

#include "device.cuh"
#include "moe.h"

namespace ming {

// What routing tells the decode kernels: the chosen experts, and who chose them. One struct in the workspace.
struct DecodePlan {
  int32_t count;                                  // of chosen experts
  int32_t expert[kMaxExperts];                    // ascending
  int8_t place[kMaxExperts][kMaxDecodeTokens];    // k of the token that chose chosen expert i as its k-th, or -1
  float weight[kMaxExperts][kMaxDecodeTokens];    // 0 where place is -1
};

struct RouteLaunch {
  const void* logits;
  const void* modality;
  int32_t* expert;   // [tokens, top_k]
  float* weight;     // [tokens, top_k]
  DecodePlan* plan;  // null in prefill
  int64_t tokens;
  int32_t experts, top_k, routers, normalize, modality_bytes;
};

constexpr int32_t kRouteWarps = 16;
static_assert(kRouteWarps >= kMaxDecodeTokens, "in decode one block routes every token");

// kPerLane * 32 >= experts.
template <class T, int kPerLane>
__global__ void __launch_bounds__(kRouteWarps * 32) route_kernel(const __grid_constant__ RouteLaunch launch) {
  __shared__ int8_t place[kMaxExperts][kMaxDecodeTokens];
  __shared__ float weight[kMaxExperts][kMaxDecodeTokens];
  __shared__ int32_t slot[kMaxExperts];
  const int32_t lane = threadIdx.x & 31;
  const int32_t warp = threadIdx.x >> 5;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kRouteWarps + warp;
  const bool planning = launch.plan != nullptr;
  if (planning) {
    for (int32_t i = threadIdx.x; i < kMaxExperts * kMaxDecodeTokens; i += kRouteWarps * 32) {
      (&place[0][0])[i] = -1;
      (&weight[0][0])[i] = 0.0f;
    }
    __syncthreads();
  }
  if (token < launch.tokens) {
    const int32_t router =
        launch.routers > 1 ? router_of(read_index(launch.modality, launch.modality_bytes, token)) : 0;
    const T* logits = static_cast<const T*>(launch.logits) + (token * launch.routers + router) * launch.experts;
    float probability[kPerLane];
    float largest = -INFINITY;
#pragma unroll
    for (int32_t i = 0; i < kPerLane; ++i) {
      const int32_t e = lane + 32 * i;
      probability[i] = e < launch.experts ? to_float(logits[e]) : -INFINITY;
      largest = fmaxf(largest, probability[i]);
    }
#pragma unroll
    for (int32_t mask = 16; mask > 0; mask >>= 1) largest = fmaxf(largest, device::shuffle_xor(largest, mask));
    float sum = 0;
#pragma unroll
    for (int32_t i = 0; i < kPerLane; ++i) {
      probability[i] = lane + 32 * i < launch.experts ? expf(probability[i] - largest) : 0.0f;
      sum += probability[i];
    }
#pragma unroll
    for (int32_t mask = 16; mask > 0; mask >>= 1) sum += device::shuffle_xor(sum, mask);
#pragma unroll
    for (int32_t i = 0; i < kPerLane; ++i) probability[i] = probability[i] / sum;

    uint32_t taken = 0;
    float total = 0;
    float my_weight = 0;
    int32_t my_expert = 0;
    for (int32_t k = 0; k < launch.top_k; ++k) {
      float best_key = -1.0f;
      float best = 0;
      int32_t best_expert = kMaxExperts;
#pragma unroll
      for (int32_t i = 0; i < kPerLane; ++i) {
        const int32_t e = lane + 32 * i;
        const float key = route_key(probability[i]);
        if (e < launch.experts && !(taken >> i & 1u) && routes_before(key, e, best_key, best_expert)) {
          best_key = key;
          best = probability[i];
          best_expert = e;
        }
      }
#pragma unroll
      for (int32_t mask = 16; mask > 0; mask >>= 1) {
        const float key = device::shuffle_xor(best_key, mask);
        const float other = device::shuffle_xor(best, mask);
        const int32_t expert = device::shuffle_xor(best_expert, mask);
        if (routes_before(key, expert, best_key, best_expert)) {
          best_key = key;
          best = other;
          best_expert = expert;
        }
      }
      if ((best_expert & 31) == lane) taken |= 1u << (best_expert >> 5);
      total += best;
      if (lane == k) {
        my_expert = best_expert;
        my_weight = best;
      }
    }
    if (launch.normalize) my_weight /= total;
    if (lane < launch.top_k) {
      launch.expert[token * launch.top_k + lane] = my_expert;
      launch.weight[token * launch.top_k + lane] = my_weight;
      if (planning) {
        place[my_expert][token] = static_cast<int8_t>(lane);
        weight[my_expert][token] = my_weight;
      }
    }
  }
  if (!planning) return;
  __syncthreads();
  if (warp == 0) {  // which experts were chosen, numbered in ascending order
    int32_t before = 0;
    for (int32_t base = 0; base < kMaxExperts; base += 32) {
      bool chosen = false;
      for (int32_t t = 0; t < launch.tokens; ++t) chosen = chosen || place[base + lane][t] >= 0;
      const unsigned votes = device::ballot(chosen);
      slot[base + lane] = chosen ? before + __popc(votes & ((1u << lane) - 1)) : -1;
      before += __popc(votes);
    }
    if (lane == 0) launch.plan->count = before;
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < kMaxExperts * kMaxDecodeTokens; i += kRouteWarps * 32) {
    const int32_t expert = i / kMaxDecodeTokens;
    const int32_t t = i - expert * kMaxDecodeTokens;
    const int32_t target = slot[expert];
    if (target < 0) continue;
    launch.plan->place[target][t] = place[expert][t];
    launch.plan->weight[target][t] = weight[expert][t];
    if (t == 0) launch.plan->expert[target] = expert;
  }
}

template <class T>
int32_t launch_route(const RouteLaunch& launch, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((launch.tokens + kRouteWarps - 1) / kRouteWarps));
  const dim3 block(kRouteWarps * 32);
  if (launch.experts <= 64) {
    MING_LAUNCH((route_kernel<T, 2>), grid, block, 0, stream, launch);
  } else {
    MING_LAUNCH((route_kernel<T, 8>), grid, block, 0, stream, launch);
  }
  return static_cast<int32_t>(cudaGetLastError());
}

}  // namespace ming
