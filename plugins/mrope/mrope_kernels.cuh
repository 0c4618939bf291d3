// Kernels of the three-axis rotary embedding. Memory-bound: every element is read once and written once.
#pragma once

#include "device.cuh"
#include "mrope.h"
#include "status.h"

namespace ming {

struct RopeLaunch {
  RopeCall call;
  Frequencies frequencies;
  int32_t tokens_per_block;
};

constexpr int32_t kRopeThreads = 256;
constexpr int32_t kRopeUnits = 4;  // pairs of vectors that a thread has in flight

template <class T, int kVector>
struct alignas(sizeof(T) * kVector) Vector {
  T value[kVector];
};

// One vector of the low half of a head, its partner of the high half, and where they go.
template <class T, int kVector>
struct RopeUnit {
  Vector<T, kVector> low, high;
  T* target;        // null: no work
  int32_t turn;     // index of the first angle in the block's table, or -1 for a plain copy (values)
};

template <class T, int kVector>
__device__ __forceinline__ RopeUnit<T, kVector> load_unit(const RopeLaunch& launch, int64_t first_token, int32_t tokens,
                                                          int32_t unit) {
  const RopeCall& c = launch.call;
  const int32_t half = launch.frequencies.count;
  const int32_t vectors = half / kVector;  // of a half head
  RopeUnit<T, kVector> r;
  r.target = nullptr;
  r.turn = -1;
  const int32_t row = unit / vectors;
  const int32_t element = (unit - row * vectors) * kVector;
  const int32_t head_of_all = row / tokens;
  const int32_t local = row - head_of_all * tokens;
  const int32_t all_heads = c.heads + c.kv_heads * (c.v.data != nullptr ? 2 : 1);
  if (head_of_all >= all_heads) return r;
  const int64_t token = first_token + local;
  const int64_t batch = token / c.tokens;
  const int64_t place = token - batch * c.tokens;
  const bool is_q = head_of_all < c.heads;
  const bool is_v = head_of_all >= c.heads + c.kv_heads;
  const int32_t head = is_q ? head_of_all : head_of_all - c.heads - (is_v ? c.kv_heads : 0);
  const HeadView& from = is_q ? c.q : is_v ? c.v : c.k;
  const HeadView& to = is_q ? c.q_out : is_v ? c.v_out : c.k_out;
  int64_t target_place = place;
  if (!is_q && c.write_index != nullptr) target_place += read_index(c.write_index, c.write_index_bytes, batch);
  const T* source =
      static_cast<const T*>(from.data) + batch * from.batch + head * from.head + place * from.token + element;
  r.low = *reinterpret_cast<const Vector<T, kVector>*>(source);
  r.high = *reinterpret_cast<const Vector<T, kVector>*>(source + half);
  r.target = const_cast<T*>(static_cast<const T*>(to.data)) + batch * to.batch + head * to.head +
             target_place * to.token + element;
  if (!is_v) r.turn = local * half + element;
  return r;
}

// A block rotates all heads of `tokens_per_block` neighbouring tokens, so that a token's angles are made once.
template <class T, int kVector>
__global__ void __launch_bounds__(kRopeThreads, 2) rotate_kernel(const __grid_constant__ RopeLaunch launch) {
  MING_DYNAMIC_SHARED(shared);
  float* table = reinterpret_cast<float*>(shared);  // [tokens][half][cos, sin]
  const RopeCall& c = launch.call;
  const int32_t half = launch.frequencies.count;
  const int64_t total = c.batch * c.tokens;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * launch.tokens_per_block;
  const int32_t tokens = static_cast<int32_t>(
      total - first_token < launch.tokens_per_block ? total - first_token : launch.tokens_per_block);
  const int32_t all_heads = c.heads + c.kv_heads * (c.v.data != nullptr ? 2 : 1);
  const int32_t units = all_heads * tokens * (half / kVector);
  const int32_t step = kRopeThreads * kRopeUnits;

  RopeUnit<T, kVector> unit[kRopeUnits];
  for (int32_t begin = 0; begin < units; begin += step) {
#pragma unroll
    for (int32_t i = 0; i < kRopeUnits; ++i) {
      unit[i] = load_unit<T, kVector>(launch, first_token, tokens, begin + i * kRopeThreads + threadIdx.x);
    }
    if (begin == 0) {  // the first loads are on their way meanwhile
      for (int32_t i = threadIdx.x; i < tokens * half; i += kRopeThreads) {
        const int32_t local = i / half;
        const int64_t token = first_token + local;
        const int64_t position[3] = {read_index(c.positions, c.position_bytes, token),
                                     read_index(c.positions, c.position_bytes, total + token),
                                     read_index(c.positions, c.position_bytes, 2 * total + token)};
        sincosf(rope_angle(launch.frequencies, i - local * half, position), &table[2 * i + 1], &table[2 * i]);
      }
      __syncthreads();
    }
#pragma unroll
    for (int32_t i = 0; i < kRopeUnits; ++i) {
      if (unit[i].target == nullptr) continue;
      if (unit[i].turn >= 0) {
#pragma unroll
        for (int32_t e = 0; e < kVector; ++e) {
          float low = to_float(unit[i].low.value[e]);
          float high = to_float(unit[i].high.value[e]);
          rotate_pair(low, high, table[2 * (unit[i].turn + e)], table[2 * (unit[i].turn + e) + 1]);
          unit[i].low.value[e] = from_float<T>(low);
          unit[i].high.value[e] = from_float<T>(high);
        }
      }
      *reinterpret_cast<Vector<T, kVector>*>(unit[i].target) = unit[i].low;
      *reinterpret_cast<Vector<T, kVector>*>(unit[i].target + half) = unit[i].high;
    }
  }
}

struct TableLaunch {
  Frequencies frequencies;
  const void* positions;  // [3, length]
  const void* delta;      // one index, or null for 0
  float* table;           // [max_positions, half, 2]
  int64_t length, max_positions;
  int32_t position_bytes, delta_bytes;
};

__global__ void __launch_bounds__(kRopeThreads) table_kernel(const __grid_constant__ TableLaunch launch) {
  const int32_t half = launch.frequencies.count;
  const int64_t total = launch.max_positions * half;
  const int64_t delta = launch.delta != nullptr ? read_index(launch.delta, launch.delta_bytes, 0) : 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kRopeThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kRopeThreads) {
    const int64_t place = i / half;
    int64_t position[3];
    table_position(launch.positions, launch.position_bytes, launch.length, delta, place, position);
    float2 pair;
    sincosf(rope_angle(launch.frequencies, static_cast<int32_t>(i - place * half), position), &pair.y, &pair.x);
    reinterpret_cast<float2*>(launch.table)[i] = pair;
  }
}

namespace detail {

inline bool aligned_16(const HeadView& view, int64_t element_bytes) {
  const auto ok = [&](int64_t stride) { return stride * element_bytes % 16 == 0; };
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && ok(view.batch) && ok(view.head) && ok(view.token);
}

template <class T>
int32_t launch_rotation(RopeLaunch launch, cudaStream_t stream) {
  const RopeCall& c = launch.call;
  constexpr int32_t kVector = 16 / sizeof(T);
  const int32_t half = launch.frequencies.count;
  const int32_t all_heads = c.heads + c.kv_heads * (c.v.data != nullptr ? 2 : 1);
  bool wide = half % kVector == 0;
  for (const HeadView* view : {&c.q, &c.k, &c.v, &c.q_out, &c.k_out, &c.v_out}) {
    wide = wide && aligned_16(*view, sizeof(T));
  }
  const int64_t per_token = static_cast<int64_t>(all_heads) * half / (wide ? kVector : 1);
  const int64_t total = c.batch * c.tokens;
  // One pass of the block over its units; at most 16 tokens, so that short inputs still spread over the chip.
  int64_t tokens = kRopeThreads * kRopeUnits / per_token;
  launch.tokens_per_block = static_cast<int32_t>(tokens < 1 ? 1 : tokens > 16 ? 16 : tokens);
  const dim3 grid(static_cast<unsigned>((total + launch.tokens_per_block - 1) / launch.tokens_per_block));
  const size_t shared_bytes = sizeof(float) * 2 * half * launch.tokens_per_block;
  if (wide) {
    MING_LAUNCH((rotate_kernel<T, kVector>), grid, dim3(kRopeThreads), shared_bytes, stream, launch);
  } else {
    MING_LAUNCH((rotate_kernel<T, 1>), grid, dim3(kRopeThreads), shared_bytes, stream, launch);
  }
  return static_cast<int32_t>(cudaGetLastError());
}

}  // namespace detail

// Enqueues the rotation that `call` describes. Returns a status (status.h).
inline int32_t rotate(const RopeCall& call, const Frequencies& frequencies, cudaStream_t stream) {
  if (call.batch < 0 || call.tokens < 0 || call.heads < 0 || call.kv_heads < 0) return kBadShape;
  if (call.batch * call.tokens > INT32_MAX || call.heads + 2 * int64_t{call.kv_heads} > 4096) return kBadShape;
  if (call.batch * call.tokens == 0 || call.heads + call.kv_heads == 0) return kOk;
  const RopeLaunch launch{call, frequencies, 0};
  switch (call.dtype) {
    case kFloat32:
      return detail::launch_rotation<float>(launch, stream);
    case kFloat16:
      return detail::launch_rotation<half_t>(launch, stream);
    case kBFloat16:
      return detail::launch_rotation<bfloat_t>(launch, stream);
    default:
      return kBadDtype;
  }
}

// Enqueues the filling of `launch.table`. Returns a status.
inline int32_t fill_table(const TableLaunch& launch, cudaStream_t stream) {
  if (launch.length < 0 || launch.max_positions < launch.length) return kBadShape;
  const int64_t total = launch.max_positions * launch.frequencies.count;
  if (total == 0) return kOk;
  const int64_t blocks = (total + kRopeThreads - 1) / kRopeThreads;
  MING_LAUNCH(table_kernel, dim3(static_cast<unsigned>(blocks < 8192 ? blocks : 8192)), dim3(kRopeThreads), 0, stream,
              launch);
  return static_cast<int32_t>(cudaGetLastError());
}

}  // namespace ming
